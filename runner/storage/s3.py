"""S3 storage: the Storage interface with boto3.

In:   `s3://bucket[/prefix]`; the usual AWS environment (`AWS_ENDPOINT_URL_S3`, credentials, `AWS_MAX_ATTEMPTS`, …) and
      VIDEO_LAB_S3_EXTRA.
Out:  objects stored by one PutObject or one CompleteMultipartUpload, so whole or not at all; errors of botocore and
      boto3 as RunnerErrors, see s3_errors.py.
Never: what the bytes mean.

botocore repeats single requests (its standard mode) and checks their checksums. This module repeats whole transfers:
after the last of botocore's tries, and for bodies that break off or have a wrong digest. A process that is killed
during a multipart upload leaves parts behind. These cost money until `video-lab clean` or a lifecycle rule
(AbortIncompleteMultipartUpload) removes them.
"""

from __future__ import annotations

import functools
import hashlib
import mimetypes
import os
import re
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from datetime import datetime
from email.utils import parsedate_to_datetime
from pathlib import Path
from typing import Any, BinaryIO, Self, TypeVar
from uuid import uuid4

import boto3
import botocore.session
import tenacity
from boto3.s3.transfer import TransferConfig, create_transfer_manager
from botocore.config import Config
from botocore.exceptions import ClientError
from botocore.utils import parse_timestamp

from runner import __version__
from runner.errors import ConfigInvalid, InputNotFound, RunnerError, StorageUnavailable
from runner.hashing import sha256_stream
from runner.storage.aws_answers import CAUSES, error_code
from runner.storage.base import (
    PROBE_NAME,
    Fence,
    Leftover,
    ObjectInfo,
    Replaces,
    Storage,
    Versioned,
    check_key,
    counted,
)
from runner.storage.disk import os_errors, staged
from runner.storage.s3_arguments import upload_arguments
from runner.storage.s3_conditions import (
    CHANGED,
    GONE,
    UNKNOWN,
    ConditionalUpload,
    bare_etag,
    check_before_sends,
    checked_sends,
)
from runner.storage.s3_digests import DIGEST_KEY, check_digests, expected_digests
from runner.storage.s3_errors import FOREIGN_ERRORS, missing_bucket, s3_errors, storage_error

__all__ = ["S3Storage"]

MIB = 1 << 20
TRANSFER = TransferConfig(
    multipart_threshold=16 * MIB,
    multipart_chunksize=16 * MIB,
    max_concurrency=8,
    max_io_queue=64,  # most blocks of 256 KiB that are read but not yet written
    preferred_transfer_client="classic",  # the CRT client takes no size and ETag, so it cannot read a fixed version
)
_BUCKET = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{1,253}[A-Za-z0-9]")
_WRITE_KEY = "video-lab-write"  # key in an object's metadata: the token of one conditional write

T = TypeVar("T")


def _client(environment: Mapping[str, str]) -> Any:
    """Return the S3 client for this environment. It has its own session, as boto3's default is not thread-safe."""
    names = [name for name in environment if name.startswith("AWS_") or name.lower().endswith("_proxy")]
    relevant = {name: environment[name] for name in names}
    return _client_for(os.getpid(), tuple(sorted(relevant.items())))


@functools.lru_cache(maxsize=8)
def _client_for(pid: int, environment: tuple[tuple[str, str], ...]) -> Any:
    """Return the client of a process and environment. The arguments are only the key of the cache.

    Each new client requests credentials from the machine's role; with a thousand inputs that service would refuse.
    """
    config = Config(
        retries={"mode": "standard"},  # AWS_MAX_ATTEMPTS sets the number of attempts
        connect_timeout=10,
        read_timeout=60,
        max_pool_connections=4 * TRANSFER.max_request_concurrency,  # shared by several parallel transfers
        tcp_keepalive=True,
        user_agent_extra=f"video-lab-runner/{__version__}",
    )
    try:
        session = botocore.session.get_session()
        session.get_component("response_parser_factory").set_parser_defaults(timestamp_parser=_parse_time)
        client = boto3.session.Session(botocore_session=session).client("s3", config=config)
        check_before_sends(client)
        return client
    except ValueError as err:
        raise ConfigInvalid(str(err), where="AWS_ENDPOINT_URL_S3", todo="Write https://host[:port]") from err
    except FOREIGN_ERRORS as err:
        raise storage_error(err, where="the AWS configuration", writing=False) from err


def _parse_time(text: Any) -> datetime:
    """Return a time of an answer. Forms that S3 does not write go to botocore's parser.

    For one page of a listing, botocore's parser takes 75 ms of CPU, this one 1 ms (measured on a shared Xeon).
    """
    try:
        found = parsedate_to_datetime(text) if text.endswith(" GMT") else datetime.fromisoformat(text)
    except (AttributeError, TypeError, ValueError):
        return parse_timestamp(text)
    return found if found.tzinfo is not None else parse_timestamp(text)


class _Download:
    """Subscriber of a transfer: fixes the version to read, and reports arriving bytes (negative: repeated ones)."""

    def __init__(self, size: int, etag: str, on_bytes: Callable[[int], None] | None) -> None:
        self.size, self.etag, self.report = size, etag, on_bytes

    def on_queued(self, future: Any, **_: Any) -> None:
        future.meta.provide_transfer_size(self.size)
        future.meta.provide_object_etag(self.etag)

    def on_progress(self, future: Any, bytes_transferred: int, **_: Any) -> None:
        if self.report is not None:
            self.report(bytes_transferred)


class S3Storage(Storage):
    """A bucket, or the objects below a prefix in it.

    `extra`: arguments of every upload, from s3_arguments.py. Reads get those that they accept too (SSE-C keys,
    RequestPayer, ExpectedBucketOwner). `attempts` and `sleep`: for repeating whole transfers.
    """

    def __init__(
        self,
        uri: str | Path,
        *,
        extra: Mapping[str, Any] | None = None,
        attempts: int = 4,
        sleep: Callable[[float], None] = time.sleep,
    ) -> None:
        scheme, _, rest = str(uri).partition("://")
        self.bucket, _, prefix = rest.partition("/")
        if scheme.lower() != "s3" or not _BUCKET.fullmatch(self.bucket):
            raise ConfigInvalid(
                "this URI does not name a bucket", where=uri, todo="Write s3://bucket or s3://bucket/prefix"
            )
        self.prefix = prefix.rstrip("/")
        if self.prefix:
            check_key(self.prefix)
        self.root = f"s3://{self.bucket}/{self.prefix}".rstrip("/")
        self._extra = dict(extra or {})
        self._attempts, self._sleep = attempts, sleep
        self._bucket_seen = False
        self._conditional = True  # until the store refuses conditional writes as unknown
        self._appended: dict[str, int] = {}  # key → number of its last object
        self._append_lock = threading.Lock()

    @classmethod
    def from_uri(cls, uri: str | Path, environ: Mapping[str, str]) -> Self:
        return cls(uri, extra=upload_arguments(environ))

    @property
    def appends(self) -> bool:
        return False

    @property
    def lists_identities(self) -> bool:
        return True

    @property
    def client(self) -> Any:
        return _client(os.environ)

    def _key(self, key: str) -> str:
        check_key(key)
        return f"{self.prefix}/{key}" if self.prefix else key

    def _arguments(self, operation: str, **own: Any) -> dict[str, Any]:
        """Return `own`, with those extra arguments that the operation accepts (by botocore's model of the service)."""
        takes = self.client.meta.service_model.operation_model(operation).input_shape.members
        return {"Bucket": self.bucket} | {k: v for k, v in self._extra.items() if k in takes} | own

    def _repeated(self, work: Callable[[], T], uri: str) -> T:
        """Return `work`'s result. Repeat it after retryable errors, with growing random pauses."""

        def log(state: tenacity.RetryCallState) -> None:
            import structlog

            error = state.outcome.exception() if state.outcome else None
            structlog.get_logger().warning("storage.retry", uri=uri, attempt=state.attempt_number, reason=str(error))

        retrying = tenacity.Retrying(
            stop=tenacity.stop_after_attempt(self._attempts),
            wait=tenacity.wait_random_exponential(multiplier=1, max=20),
            retry=tenacity.retry_if_exception(lambda error: isinstance(error, RunnerError) and error.retryable),
            sleep=self._sleep,
            before_sleep=log,
            reraise=True,
        )
        return retrying(work)

    # Reading

    def _head(self, key: str, **own: str) -> dict[str, Any] | None:
        uri = self.uri(key)
        with s3_errors(uri, writing=False):
            try:
                return dict(self.client.head_object(**self._arguments("HeadObject", Key=self._key(key), **own)))
            except ClientError as err:
                if error_code(err) in ("400", "403"):
                    self._raise_cause(key)
                if error_code(err) not in ("404", "NoSuchKey", "NotFound"):
                    raise
        self._require_bucket(uri)
        return None

    def _raise_cause(self, key: str) -> None:
        """Raise the error of a GET if it names a cause, as the answer to a refused HEAD has no body."""
        try:
            answer = self.client.get_object(**self._arguments("GetObject", Key=self._key(key), Range="bytes=0-0"))
            answer["Body"].close()
        except ClientError as err:
            if error_code(err) in CAUSES:
                raise

    def _require_bucket(self, uri: str) -> None:
        """Raise BucketMissing if the bucket itself is missing, which the answer to a HEAD does not show."""
        if not self._bucket_seen:
            with s3_errors(uri, writing=False):
                try:
                    self.client.head_bucket(**self._arguments("HeadBucket"))
                except ClientError as err:
                    if error_code(err) in ("404", "NoSuchBucket"):
                        raise missing_bucket(self.bucket, where=uri, writing=False) from err
                    if error_code(err) not in (
                        "403",
                        "AccessDenied",
                        "Forbidden",
                    ):  # a refusal means that the bucket exists
                        raise
            self._bucket_seen = True

    def _info(self, key: str, size: int, etag: str, modified: Any) -> ObjectInfo:
        return self._identified(key, size, etag, modified.timestamp())

    def _identified(self, key: str, size: int, etag: str, modified: float) -> ObjectInfo:
        return ObjectInfo(self.uri(key), size, _identity(etag, size), modified, key)

    def stat(self, key: str) -> ObjectInfo | None:
        return self._repeated(lambda: self._stat_once(key), self.uri(key))

    def _stat_once(self, key: str) -> ObjectInfo | None:
        head = self._head(key)
        return None if head is None else self._info(key, head["ContentLength"], head["ETag"], head["LastModified"])

    def fetch(self, key: str, dest: Path, on_bytes: Callable[[int], None] | None = None) -> ObjectInfo:
        return self._repeated(lambda: self._fetch_once(key, dest, on_bytes), self.uri(key))

    def _fetch_once(self, key: str, dest: Path, on_bytes: Callable[[int], None] | None) -> ObjectInfo:
        uri, head = self.uri(key), self._head(key, ChecksumMode="ENABLED")
        if head is None:
            raise InputNotFound("no such object", where=uri, todo="Check the bucket and the key")
        info = self._info(key, head["ContentLength"], head["ETag"], head["LastModified"])
        arguments = self._arguments("GetObject")
        bucket = arguments.pop("Bucket")
        with counted(on_bytes) as count, os_errors(dest, writing=True), staged(dest) as out:
            with s3_errors(uri, writing=False, disk=dest):
                with create_transfer_manager(self.client, TRANSFER) as manager:
                    watcher = _Download(info.bytes, head["ETag"], count)
                    manager.download(bucket, self._key(key), out, arguments, [watcher]).result()
                out.flush()
            size = os.fstat(out.fileno()).st_size
            if size != info.bytes:
                raise StorageUnavailable(
                    f"{size} bytes arrived, but the object has {info.bytes}",
                    where=uri,
                    todo="Run the same command again",
                )
            if self._stat_once(key) != info:  # the transfer manager fixes the version of ranged reads only
                raise StorageUnavailable(
                    "the object changed while it was read", where=uri, todo="Run the same command again"
                )
            verified = check_digests(expected_digests(head, self.bucket), lambda: _blocks(out), uri)
        return replace(info, verified=verified)

    def read_bytes(self, key: str) -> bytes | None:
        found = self.read_versioned(key)
        return None if found is None else found.data

    def read_versioned(self, key: str, *, aged: bool = False) -> Versioned | None:
        return self._repeated(lambda: self._read_once(key, aged), self.uri(key))

    def _read_once(self, key: str, aged: bool = False) -> Versioned | None:
        with s3_errors(self.uri(key), writing=False):
            try:
                answer = self.client.get_object(**self._arguments("GetObject", Key=self._key(key)))
            except ClientError as err:
                if error_code(err) in ("404", "NoSuchKey"):
                    return None
                raise
            data = bytes(answer["Body"].read())
        check_digests(expected_digests(answer, self.bucket), lambda: [data], self.uri(key))
        return Versioned(data, bare_etag(answer["ETag"]), _age(answer) if aged else None)

    @property
    def _within(self) -> str:
        return f"{self.prefix}/" if self.prefix else ""

    def list(self, prefix: str = "") -> Iterator[ObjectInfo]:
        for page in self._pages(prefix):
            for entry in page.get("Contents", ()):
                key = entry["Key"][len(self._within) :]
                if key and not key.endswith("/"):  # web consoles make such objects for empty folders
                    yield self._listed(key, entry)

    def folders(self, prefix: str = "") -> Iterator[str]:
        for page in self._pages(prefix, Delimiter="/"):
            for entry in page.get("CommonPrefixes", ()):
                yield entry["Prefix"][len(self._within + prefix) :].rstrip("/")

    def _pages(self, prefix: str, **own: str) -> Iterator[dict[str, Any]]:
        if prefix:
            check_key(prefix + "x")
        position: dict[str, str] = {}
        while True:
            page = self._repeated(functools.partial(self._page, self._within + prefix, position | own), self.root)
            yield page
            if not page.get("IsTruncated") or not page.get("NextContinuationToken"):
                return
            position = {"ContinuationToken": page["NextContinuationToken"]}

    def _page(self, prefix: str, position: Mapping[str, str]) -> dict[str, Any]:
        with s3_errors(self.root, writing=False):
            arguments = self._arguments("ListObjectsV2", Prefix=prefix, **position)
            return dict(self.client.list_objects_v2(**arguments))

    def _listed(self, key: str, entry: Mapping[str, Any]) -> ObjectInfo:
        """Return the object of a listing; its key may be one that `check_key` refuses."""
        identity = _identity(entry["ETag"], entry["Size"])
        return ObjectInfo(f"{self.root}/{key}", entry["Size"], identity, entry["LastModified"].timestamp(), key)

    # Writing

    def publish(
        self, local: Path, key: str, *, fence: Fence | None = None, replaces: Replaces = "anything"
    ) -> ObjectInfo:
        uri = self.uri(key)
        mark = {} if replaces == "anything" else {_WRITE_KEY: uuid4().hex}
        with os_errors(local, writing=False), local.open("rb") as file:
            size = os.fstat(file.fileno()).st_size
            digest = sha256_stream(file)

        def upload() -> ObjectInfo:
            client = ConditionalUpload(
                self.client,
                uri,
                replaces,
                mark,
                head=lambda: self._head(key),
                require_lease=lambda: self._require_lease(fence),
                knows=self._conditional,
            )
            arguments = self._extra | self._described(key, digest)
            arguments["Metadata"] |= mark
            with s3_errors(uri, writing=True, disk=local):
                with create_transfer_manager(client, TRANSFER) as manager:
                    manager.upload(str(local), self.bucket, self._key(key), arguments).result()
            if not client.knows:
                self._conditional = False
            found = self._stat_once(key)
            if found is None:
                raise StorageUnavailable(
                    f"{size} bytes were stored, but the object is missing", where=uri, todo="Run the same command again"
                )
            if found.bytes != size and found.identity == f"etag:{client.etag}:{found.bytes}":
                problem = f"{size} bytes were stored, but the object has {found.bytes} bytes"
                raise StorageUnavailable(problem, where=uri, todo="Run the same command again")
            # If the ETag differs, another process has stored another object since then.
            return self._identified(key, size, client.etag, found.modified)

        return self._repeated(upload, uri)

    def write_bytes(self, key: str, data: bytes) -> None:
        self._repeated(lambda: self._put(key, data), self.uri(key))

    def _put(self, key: str, data: bytes, **own: Any) -> str:
        """Store `data` by one request. Return the ETag of its answer."""
        described = self._described(key, hashlib.sha256(data).hexdigest())
        described["Metadata"] |= own.pop("Metadata", {})
        with s3_errors(self.uri(key), writing=True):
            own |= described | {"Key": self._key(key), "Body": data}
            return bare_etag(self.client.put_object(**self._arguments("PutObject", **own))["ETag"])

    def _described(self, key: str, digest: str) -> dict[str, Any]:
        """Return an object's metadata: those of the extra arguments and its digest; and its content type by the key's
        ending, so that browsers play a linked video."""
        given = {k: v for k, v in self._extra.get("Metadata", {}).items() if k.lower() not in (DIGEST_KEY, _WRITE_KEY)}
        kind, _ = mimetypes.guess_type(key)
        typed = {"ContentType": kind} if kind and "ContentType" not in self._extra else {}
        return {"Metadata": given | {DIGEST_KEY: digest}} | typed

    def write_if(self, key: str, data: bytes, version: str | None, *, fence: Fence | None = None) -> str | None:
        condition = {"IfNoneMatch": "*"} if version is None else {"IfMatch": f'"{version}"'}
        mark = {"Metadata": {_WRITE_KEY: uuid4().hex}}

        def write() -> str | None:
            if not self._conditional:
                self._require_lease(fence)
                return self._compare_and_put(key, data, version, mark["Metadata"])
            try:
                return self._put(key, data, **condition, **mark)
            except RunnerError as error:
                code = error_code(error.__cause__) if isinstance(error.__cause__, ClientError) else ""
                if code in CHANGED:
                    return self._version_if_written(key, mark["Metadata"])
                if code in GONE and version is not None:
                    return None  # it was deleted meanwhile
                if code not in UNKNOWN:
                    raise
                self._conditional = False
                return self._compare_and_put(key, data, version, mark["Metadata"])

        with checked_sends(lambda: self._require_lease(fence)):
            return self._repeated(write, self.uri(key))

    def _require_lease(self, fence: Fence | None) -> None:
        if fence is not None:
            found = self.read_versioned(fence.key)
            fence.require(None if found is None else found.data, self.uri(fence.key))

    def _version_if_written(self, key: str, mark: Mapping[str, str]) -> str | None:
        """Return the version under `key` if the conditional write with `mark` made it; else None.

        A request whose answer was lost is repeated, also by botocore. The store then refuses it because of its own
        first try.
        """
        head = self._head(key)
        if head is None or not mark.items() <= head.get("Metadata", {}).items():
            return None
        return bare_etag(head["ETag"])

    def _compare_and_put(self, key: str, data: bytes, version: str | None, mark: Mapping[str, str]) -> str | None:
        """Compare and write, for a store that does not support conditional writes or ignores their conditions."""
        head = self._head(key)
        found = None if head is None else bare_etag(head["ETag"])
        if found == version:
            return self._put(key, data, Metadata=mark)
        return found if head is not None and mark.items() <= head.get("Metadata", {}).items() else None

    def append_lines(self, key: str, data: bytes) -> None:
        stem, dot, suffix = self._split(key)
        with self._append_lock:  # held during the write too, so that a later call gets a later number
            number = self._appended.get(key)
            if number is None:
                form = re.compile(re.escape(stem) + r"-(\d{4,})" + re.escape(dot + suffix))
                names = (form.fullmatch(info.key) for info in self.list(f"{stem}-"))
                number = max((int(name[1]) for name in names if name), default=0)
            while True:
                number += 1
                if self.write_if(f"{stem}-{number:04d}{dot}{suffix}", data, None) is not None:
                    break  # else another process has used this number
            self._appended[key] = number

    def _split(self, key: str) -> tuple[str, str, str]:
        """`a/x.events.jsonl` → `a/x.events`, `.`, `jsonl`."""
        folder, slash, name = check_key(key).rpartition("/")
        stem, dot, suffix = name.rpartition(".")
        return (f"{folder}{slash}{stem}", dot, suffix) if stem else (key, "", "")

    def delete(self, key: str, *, version: str | None = None, fence: Fence | None = None) -> bool:
        def remove() -> bool:
            condition = {}
            if version is not None:
                self._require_lease(fence)
                head = self._head(key)  # also if conditions are supported: some stores ignore those of removals
                if head is None:
                    return True
                if bare_etag(head["ETag"]) != version:
                    return False
                condition = {"IfMatch": f'"{version}"'} if self._conditional else {}
            with s3_errors(self.uri(key), writing=True):
                own = {"Key": self._key(key), **condition}
                try:
                    self.client.delete_object(**self._arguments("DeleteObject", **own))
                except ClientError as err:
                    if condition and error_code(err) in (*CHANGED, *GONE):
                        return self._head(key) is None
                    if not condition or error_code(err) not in UNKNOWN:
                        raise
                    self.client.delete_object(**self._arguments("DeleteObject", Key=self._key(key)))
            return True

        with checked_sends(lambda: self._require_lease(fence)):
            return self._repeated(remove, self.uri(key))

    def weak_conditions(self) -> str | None:
        return None if self._conditional else "the store does not support conditional writes"

    def distrust_conditions(self) -> None:
        self._conditional = False

    # Leftovers of killed processes

    def leftovers(self, prefix: str = "") -> Iterator[Leftover]:
        yield from self._unfinished(prefix)
        for info in self.list(prefix):
            if info.key.rpartition("/")[2].startswith(PROBE_NAME):
                yield Leftover(info.uri, info.key, info.bytes, info.modified, "write probe")

    def _unfinished(self, prefix: str) -> Iterator[Leftover]:
        if prefix:
            check_key(prefix + "x")
        within = f"{self.prefix}/" if self.prefix else ""
        position: dict[str, str] = {}
        while True:
            page = self._repeated(functools.partial(self._uploads, within + prefix, position), self.root)
            for upload in page.get("Uploads", ()):
                if upload["Key"].startswith(within + prefix):
                    parts = self._repeated(functools.partial(self._parts, upload["Key"], upload["UploadId"]), self.root)
                    if parts is not None:
                        size = sum(part["Size"] for part in parts)
                        modified = max([upload["Initiated"], *(part["LastModified"] for part in parts)]).timestamp()
                        key = upload["Key"][len(within) :]
                        uri = f"{self.root}/{key}"
                        yield Leftover(uri, key, size, modified, "unfinished upload", upload_id=upload["UploadId"])
            if not page.get("IsTruncated") or not page.get("NextKeyMarker"):
                return
            position = {"KeyMarker": page["NextKeyMarker"], "UploadIdMarker": page.get("NextUploadIdMarker", "")}

    def _uploads(self, prefix: str, position: Mapping[str, str]) -> dict[str, Any]:
        with s3_errors(self.root, writing=False):
            arguments = self._arguments("ListMultipartUploads", Prefix=prefix, **position)
            try:
                return dict(self.client.list_multipart_uploads(**arguments))
            except ClientError as err:
                if error_code(err) in (
                    "405",
                    "501",
                    "MethodNotAllowed",
                    "NotImplemented",
                ):  # the store does not support them
                    return {}
                raise

    def _parts(self, key: str, upload_id: str) -> Sequence[dict[str, Any]] | None:
        """Return the parts of an unfinished upload; None if it is finished meanwhile."""
        with s3_errors(self.root, writing=False):
            arguments = self._arguments("ListParts", Key=key, UploadId=upload_id)
            try:
                pages = self.client.get_paginator("list_parts").paginate(**arguments)
                return [part for page in pages for part in page.get("Parts", ())]
            except ClientError as err:
                if error_code(err) == "NoSuchUpload":
                    return None
                raise

    def remove_leftover(self, leftover: Leftover) -> bool:
        if leftover.kind != "unfinished upload":
            self.delete(leftover.key)
            return True
        own = {"Key": self._key(leftover.key), "UploadId": leftover.upload_id}

        def abort() -> bool:
            with s3_errors(leftover.uri, writing=True):
                try:
                    self.client.abort_multipart_upload(**self._arguments("AbortMultipartUpload", **own))
                except ClientError as err:
                    if error_code(err) == "NoSuchUpload":
                        return False
                    raise
            return True

        return self._repeated(abort, leftover.uri)


def _identity(etag: str, size: int) -> str:
    return f"etag:{bare_etag(etag)}:{size}"


def _blocks(file: BinaryIO) -> Iterator[bytes]:
    """Yield the blocks of the file from its beginning."""
    file.seek(0)
    while block := file.read(MIB):
        yield block


def _age(answer: Mapping[str, Any]) -> float | None:
    """Return the object's age in seconds, from the object's and the answer's times by the store's clock."""
    date = answer["ResponseMetadata"]["HTTPHeaders"].get("date", "")
    try:
        return max(0.0, (parsedate_to_datetime(date) - answer["LastModified"]).total_seconds())
    except ValueError:  # no date, or an unreadable one
        return None

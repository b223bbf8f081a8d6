"""S3 conditions: uploads that only appear if their key is unchanged and their lease is still held.

In:   a boto3 client, the object found earlier under the key, functions that check the key and the lease.
Out:  a client for s3transfer, which itself does not pass conditions on.
Never: retries of whole transfers, keys below a prefix.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from typing import Any

from botocore.exceptions import ClientError

from runner.storage.aws_answers import error_code
from runner.storage.base import ObjectInfo, Replaces, lease_lost

__all__ = ["CHANGED", "GONE", "UNKNOWN", "ConditionalUpload", "bare_etag", "check_before_sends", "checked_sends"]

# The codes of the answers to a request that carries a condition.
CHANGED = ("412", "PreconditionFailed")  # the key has another object
GONE = ("404", "NoSuchKey")  # the key has no object any more
UNKNOWN = ("501", "NotImplemented")  # the store does not support the condition

_sending = threading.local()


def check_before_sends(client: Any) -> None:
    """Make the client call the check of `checked_sends` before each request that stores or removes an object."""
    for operation in ("PutObject", "CompleteMultipartUpload", "DeleteObject"):
        client.meta.events.register(f"before-send.s3.{operation}", _check)


def _check(**_: object) -> None:
    check = getattr(_sending, "check", None)
    if check is not None:
        check()


@contextmanager
def checked_sends(check: Callable[[], None]) -> Iterator[None]:
    """Call `check` right before each such request that this thread sends in the block.

    It is also called before each repetition by botocore, which may come many seconds later. If it raises, the request
    is not sent.
    """
    before = getattr(_sending, "check", None)
    _sending.check = check
    try:
        yield
    finally:
        _sending.check = before


class ConditionalUpload:
    """The client of one upload. It keeps the ETag of the answer that completes it, which s3transfer does not return.

    `replaces`: see `Storage.publish`. `mark`: a token of this upload in the object's metadata: a request whose answer
    was lost is repeated, and then refused because of its own first try. `head` returns the present object. `knows`:
    whether the store supports conditional requests; False after the upload if the store refused one. Then, and before
    every CompleteMultipartUpload (some stores ignore only its condition), the key is compared before the request.
    """

    def __init__(
        self,
        client: Any,
        uri: str,
        replaces: Replaces,
        mark: Mapping[str, str],
        *,
        head: Callable[[], Mapping[str, Any] | None],
        require_lease: Callable[[], None],
        knows: bool,
    ) -> None:
        self._client, self._uri, self._mark = client, uri, mark
        self._head, self._require_lease = head, require_lease
        self._conditional = replaces != "anything"
        self._seen = _etag(replaces) if isinstance(replaces, ObjectInfo) else None
        self.knows = knows
        self.etag = ""

    def __getattr__(self, name: str) -> Any:
        return getattr(self._client, name)

    def create_multipart_upload(self, **arguments: Any) -> Any:
        self._check(compare=True)  # before gigabytes are sent
        return self._client.create_multipart_upload(**arguments)

    def put_object(self, **arguments: Any) -> Any:
        return self._complete(self._client.put_object, arguments, compare=False)

    def complete_multipart_upload(self, **arguments: Any) -> Any:
        return self._complete(self._client.complete_multipart_upload, arguments, compare=True)

    def _complete(self, request: Callable[..., Any], arguments: dict[str, Any], compare: bool) -> Any:
        condition = {}
        if self._conditional and self.knows:
            condition = {"IfNoneMatch": "*"} if self._seen is None else {"IfMatch": f'"{self._seen}"'}
        try:
            with checked_sends(lambda: self._check(compare or not self.knows)):
                answer = request(**arguments, **condition)
        except ClientError as err:
            if condition and error_code(err) in UNKNOWN:
                self.knows = False
                if "Body" in arguments:
                    arguments["Body"].seek(0)
                return self._complete(request, arguments, compare)
            answer = self._own_first_try(err, arguments)
        self.etag = bare_etag(answer["ETag"])
        return answer

    def _own_first_try(self, error: ClientError, arguments: Mapping[str, Any]) -> Mapping[str, Any]:
        """Return the present object if this upload stored it before its answer was lost; else raise."""
        code = error_code(error)
        if not self._conditional or code not in (*CHANGED, *GONE, "NoSuchUpload"):
            raise error
        head = self._head()
        if head is None or not self._is_own(head):
            if code == "NoSuchUpload":
                raise error
            raise self._conflict() from error
        if "UploadId" in arguments:  # a second upload of the same file; the first has succeeded
            with suppress(ClientError):
                names = {name: arguments[name] for name in ("Bucket", "Key", "UploadId")}
                self._client.abort_multipart_upload(**names)
        return head

    def _check(self, compare: bool) -> None:
        """Raise LeaseLost if the key has another object, or if the lease is lost."""
        if compare and self._conditional:
            head = self._head()
            if head is None or not self._is_own(head):
                found = None if head is None else bare_etag(head["ETag"])
                if found != self._seen:
                    raise self._conflict()
        self._require_lease()

    def _is_own(self, head: Mapping[str, Any]) -> bool:
        return self._mark.items() <= head.get("Metadata", {}).items()

    def _conflict(self) -> Exception:
        return lease_lost("another runner has changed this object since the job began", self._uri)


def _etag(info: ObjectInfo) -> str:
    """Return the ETag of the identity `etag:<etag>:<bytes>`."""
    return (info.identity or "").removeprefix("etag:").rpartition(":")[0]


def bare_etag(etag: str) -> str:
    """Return an ETag without quotation marks, as some stores leave them out."""
    return etag.strip('"')

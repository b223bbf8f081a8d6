"""URIs: the storage or the input file behind a path, a `file:///` URI or an `s3://` URI.

In:   a URI. Out: a `Storage`, what an input is, an input as a local file. Never: what the bytes mean.
boto3 takes half a second to import, so that s3.py is imported when the first s3:// URI is opened.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any
from uuid import uuid4

from runner.errors import ConfigInvalid, InputNotFound, InputUnreadable, InternalError
from runner.storage.base import PROBE_NAME, ObjectInfo, Storage, check_key, is_remote, local_path
from runner.storage.disk import os_errors
from runner.storage.local import LocalStorage
from runner.storage.regular_file import check_regular_file

__all__ = [
    "FetchedInput",
    "download_name",
    "fetch_input",
    "fetch_input_with_info",
    "open_storage",
    "probe_writable",
    "stat_input",
]


@dataclass(frozen=True)
class FetchedInput:
    """An input as a local file, and what was read."""

    path: Path
    info: ObjectInfo
    unverified: bool  # it came over the network, and the store gave no digest to compare it with


def open_storage(uri: str | Path, *, s3_extra: Mapping[str, Any] | None = None) -> Storage:
    """The storage rooted at a folder, a `file:///` URI or `s3://bucket[/prefix]`. Nothing is asked of it yet.

    `s3_extra`: arguments for every upload, by boto3's names (`ServerSideEncryption`, `SSEKMSKeyId`, `StorageClass`, …);
    they go over those of the environment's VIDEO_LAB_S3_EXTRA (a JSON object). Raises ConfigInvalid.
    """
    if is_remote(uri):
        from runner.storage.s3 import S3Storage  # boto3 takes half a second to import
        from runner.storage.s3_arguments import upload_arguments

        return S3Storage(str(uri), extra=upload_arguments(s3_extra, os.environ))
    return LocalStorage(uri)


def stat_input(uri: str | Path, *, s3_extra: Mapping[str, Any] | None = None) -> ObjectInfo:
    """What an input file or object is, without reading it.

    Raises InputNotFound, InputUnreadable for a folder, a pipe, and what cannot be read or does not answer,
    StorageDenied, StorageUnavailable; ConfigInvalid only for what is wrong with the AWS configuration itself.
    """
    if is_remote(uri):
        storage, key = _open_object(str(uri), s3_extra)
        with _one_input(str(uri)):
            info = storage.stat(key)
        if info is None:
            raise InputNotFound("no such object", where=uri, todo="Check the bucket and the key")
        return info
    try:
        path = local_path(uri)
    except ConfigInvalid as err:  # one job's input cannot be reached; the other jobs go on
        raise InputNotFound(err.what, where=uri, todo=err.todo) from err
    with os_errors(path, writing=False):
        status = check_regular_file(path)
    return ObjectInfo(str(path), status.st_size, "", status.st_mtime, path.name)


def fetch_input(uri: str | Path, dest_dir: Path, *, s3_extra: Mapping[str, Any] | None = None) -> Path:
    """An input as a local file: a local one where it lies, an S3 object copied below `dest_dir` under its own name.

    Raises as `stat_input` does, and StorageFull.
    """
    return fetch_input_with_info(uri, dest_dir, s3_extra=s3_extra).path


def fetch_input_with_info(
    uri: str | Path, dest_dir: Path, *, s3_extra: Mapping[str, Any] | None = None
) -> FetchedInput:
    """As `fetch_input`, with what was read and whether that could be verified."""
    if not is_remote(uri):
        info = stat_input(uri)
        return FetchedInput(Path(info.uri), info, unverified=False)
    storage, key = _open_object(str(uri), s3_extra)
    dest = dest_dir / download_name(str(uri))
    with _one_input(str(uri)):
        info = storage.fetch(key, dest)
    return FetchedInput(dest, info, unverified=not info.verified)


@contextmanager
def _one_input(uri: str) -> Iterator[None]:
    """An S3 store's refusal of one object (its bucket lies in another region, its key is too long) is that input's
    fault. A fault of the configuration, which names its variable instead of the object, stays one."""
    try:
        yield
    except ConfigInvalid as err:
        if is_remote(err.where or ""):
            raise InputUnreadable(err.what, where=uri, todo=err.todo) from err
        raise


def _open_object(uri: str, s3_extra: Mapping[str, Any] | None) -> tuple[Storage, str]:
    """The storage that holds one S3 object, and its key there."""
    from runner.storage.s3 import S3Storage
    from runner.storage.s3_arguments import upload_arguments

    extra = upload_arguments(s3_extra, os.environ)
    parent, _, name = uri.rpartition("/")
    if parent.count("/") < 2 or not name:  # s3://bucket, s3://bucket/folder/
        raise InputNotFound("names a bucket or a folder, not a file", where=uri, todo="Write s3://bucket/path/file")
    try:
        return S3Storage(parent, extra=extra), check_key(name)
    except ConfigInvalid as err:
        raise InputNotFound(err.what, where=uri, todo=err.todo) from err


def download_name(uri: str) -> str:
    """Where a downloaded object lies below its folder: its own name, below a folder that tells apart equal names."""
    name = PurePosixPath(uri.rpartition("/")[2])
    stem = name.stem.encode()[:120].decode(errors="ignore")  # file names hold 255 bytes, keys 1024
    return f"{hashlib.sha256(uri.encode()).hexdigest()[:12]}/{stem}{name.suffix[:16]}"


def probe_writable(storage: Storage) -> None:
    """Write, read and delete one small object, so that a run that cannot store its results ends before it begins.

    Raises StorageDenied, StorageFull, StorageUnavailable or ConfigInvalid, each with what to do about it.
    """
    key, data = f"{PROBE_NAME}{uuid4().hex}", b"Video Lab runner asks whether it may write here\n" * 100
    storage.write_bytes(key, data)
    try:
        if storage.read_bytes(key) != data:
            raise InternalError("what was written does not read back", where=storage.uri(key))
    finally:
        storage.delete(key)

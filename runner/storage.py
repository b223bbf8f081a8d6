"""Storage: whole files and small objects by key, on a local disk or in an S3 bucket, behind one small interface.

In:   a root (`DIR`, `file:///DIR`, `s3://bucket/prefix`) and keys relative to it (`jobs/anna/output.mp4`).
Out:  local files; objects that appear whole or not at all; errors under the storage.* and input.* codes.
Never: what the bytes mean, which of them belong together, in which order they are written.

The S3 half lies in storage_s3.py, imported when the first s3:// URI is opened; copying a model store, in
storage_sync.py; how a file is put in place on a disk, in storage_disk.py.
"""

from __future__ import annotations

import errno
import os
import re
import shutil
import stat as stat_modes
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit
from uuid import uuid4

from runner.errors import ConfigInvalid, InputNotFound, InputUnreadable, InternalError
from runner.storage_disk import ABSENT, is_staged, os_errors, staged, sync_folder, walk_files

__all__ = [
    "LocalStorage",
    "ObjectInfo",
    "Storage",
    "check_key",
    "fetch_input",
    "is_remote",
    "local_path",
    "open_storage",
    "probe_writable",
    "stat_input",
    "sync_models",
]

_KEY_BYTES = 1024  # S3's limit of a key in UTF-8
_COPY_BYTES = 1 << 20


@dataclass(frozen=True)
class ObjectInfo:
    """What lies under one key now."""

    uri: str
    bytes: int
    identity: str  # "etag:<etag>:<bytes>" on S3; "" on a disk, where only reading the file could tell
    modified: float  # seconds since 1970, UTC
    key: str = ""  # relative to the storage's root


class Storage(ABC):
    """Objects by key under one root. Every method may be called from any thread.

    Keys are relative POSIX paths, see `check_key`. Raises StorageDenied when refused, StorageUnavailable (retryable)
    when the far end fails, StorageFull, and ConfigInvalid for a root or key that can never work.
    """

    root: str

    @abstractmethod
    def fetch(self, key: str, dest: Path) -> ObjectInfo:
        """Copy the object to the local file `dest`, which appears whole or not at all; say what was read.

        Raises InputNotFound if nothing lies under `key`.
        """

    @abstractmethod
    def publish(self, local: Path, key: str) -> ObjectInfo:
        """Store the local file under `key`: a reader sees what was there before, then all of it, never a part."""

    @abstractmethod
    def stat(self, key: str) -> ObjectInfo | None:
        """What lies under `key`; None if nothing does."""

    @abstractmethod
    def list(self, prefix: str = "") -> Iterator[ObjectInfo]:
        """Every object whose key begins with `prefix` (`jobs/` for a folder), at any depth, in no promised order.

        Nothing there, nothing listed; files still being published are not listed.
        """

    @abstractmethod
    def read_bytes(self, key: str) -> bytes | None:
        """A small object whole; None if nothing lies under `key`."""

    @abstractmethod
    def write_bytes(self, key: str, data: bytes) -> None:
        """Store a small object, as whole as `publish` does."""

    @abstractmethod
    def delete(self, key: str) -> None:
        """Remove the object; nothing there is fine."""

    def exists(self, key: str) -> bool:
        return self.stat(key) is not None

    def uri(self, key: str) -> str:
        """Where `key` lies, for people and records; a path that can be opened, on a local disk."""
        return f"{self.root.rstrip('/')}/{check_key(key)}"

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.root!r})"


def check_key(key: str) -> str:
    """`key`, if it names one place below a root on every backend; else ConfigInvalid.

    Refused: absolute keys, empty, `.` and `..` parts, control characters, what UTF-8 cannot hold, more than 1024 bytes
    (S3's limit), and the names under which files are staged.
    """
    parts = key.split("/")
    problem = None
    if not key:
        problem = "is empty"
    elif key.startswith("/"):
        problem = "is absolute"
    elif ".." in parts or "." in parts or "" in parts:
        problem = "has an empty, . or .. part"
    elif any(ord(c) < 0x20 or ord(c) == 0x7F for c in key):
        problem = "has a control character"
    elif any(0xD800 <= ord(c) <= 0xDFFF for c in key):
        problem = "is not valid Unicode"
    elif len(key.encode()) > _KEY_BYTES:
        problem = f"is longer than {_KEY_BYTES} bytes"
    elif is_staged(parts[-1]):
        problem = "has a name that is reserved for files being written"
    if problem:
        shown = key if len(key) <= 80 else key[:79] + "…"
        raise ConfigInvalid(f"the key {shown!r} {problem}", todo="Use a relative path such as jobs/anna/output.mp4")
    return key


class LocalStorage(Storage):
    """A folder on a disk that this machine sees; made at the first write. Links inside it are followed."""

    def __init__(self, root: str | Path) -> None:
        self.path = local_path(root)
        self.root = str(self.path)
        if self.path.exists() and not self.path.is_dir():
            raise ConfigInvalid("is a file, not a folder", where=self.root, todo="Name a folder")

    def uri(self, key: str) -> str:
        return str(self.path / check_key(key))

    def _info(self, key: str, status: os.stat_result) -> ObjectInfo:
        return ObjectInfo(self.uri(key), status.st_size, "", status.st_mtime, key)

    def fetch(self, key: str, dest: Path) -> ObjectInfo:
        source = Path(self.uri(key))
        with os_errors(source, writing=False), source.open("rb") as file:
            status = os.fstat(file.fileno())
            with os_errors(dest, writing=True), staged(dest) as out:
                shutil.copyfileobj(file, out, _COPY_BYTES)
        return self._info(key, status)

    def publish(self, local: Path, key: str) -> ObjectInfo:
        target = Path(self.uri(key))
        with os_errors(local, writing=False), local.open("rb") as file:
            with os_errors(target, writing=True):
                with staged(target) as out:
                    shutil.copyfileobj(file, out, _COPY_BYTES)
                return self._info(key, target.stat())

    def stat(self, key: str) -> ObjectInfo | None:
        path = Path(self.uri(key))
        with os_errors(path, writing=False):
            try:
                status = path.stat()
            except OSError as err:
                if err.errno in ABSENT or err.errno == errno.ENAMETOOLONG:
                    return None
                raise
        return self._info(key, status) if stat_modes.S_ISREG(status.st_mode) else None

    def list(self, prefix: str = "") -> Iterator[ObjectInfo]:
        if prefix:
            check_key(prefix + "x")  # a prefix is the beginning of a key
        top = self.path.joinpath(*prefix.split("/")[:-1])
        with os_errors(top, writing=False):
            for path in walk_files(top):
                key = path.relative_to(self.path).as_posix()
                if key.startswith(prefix) and not is_staged(path.name):
                    with suppress(FileNotFoundError):  # deleted since, or a link to nothing
                        status = path.stat()
                        if stat_modes.S_ISREG(status.st_mode):
                            yield self._info(key, status)

    def read_bytes(self, key: str) -> bytes | None:
        path = Path(self.uri(key))
        try:
            with os_errors(path, writing=False):
                return path.read_bytes()
        except InputNotFound:
            return None

    def write_bytes(self, key: str, data: bytes) -> None:
        target = Path(self.uri(key))
        with os_errors(target, writing=True), staged(target) as out:
            out.write(data)

    def delete(self, key: str) -> None:
        path = Path(self.uri(key))
        with os_errors(path, writing=True):
            try:
                path.unlink()
            except OSError as err:
                if err.errno not in ABSENT:
                    raise
                return
            sync_folder(path.parent)


def is_remote(uri: str | Path) -> bool:
    """Does this name an object store rather than a local path?"""
    return isinstance(uri, str) and uri.lower().startswith("s3://")


def local_path(uri: str | Path) -> Path:
    """A plain path or a `file:///…` URI (percent-decoded, RFC 8089) as a path. Raises ConfigInvalid for other URIs."""
    if isinstance(uri, Path):
        return uri
    scheme, separator, _ = uri.partition("://")
    if not separator or not re.fullmatch(r"[A-Za-z][A-Za-z0-9+.-]+", scheme):
        if not uri or "\0" in uri:
            raise ConfigInvalid(f"{uri!r} is not a path", todo="Give a folder or an s3:// URI")
        return Path(uri).expanduser()
    parts = urlsplit(uri)
    if scheme.lower() != "file":
        raise ConfigInvalid(f"{scheme}:// is not supported", where=uri, todo="Use a path, file:/// or s3://bucket/key")
    path = unquote(uri.partition("://")[2][len(parts.netloc) :])
    if parts.netloc not in ("", "localhost") or not path.startswith("/") or "\0" in path:
        raise ConfigInvalid("a file URI names an absolute path on this machine", where=uri, todo="Write file:///folder")
    return Path(path)


def open_storage(uri: str | Path, *, s3_extra: Mapping[str, Any] | None = None) -> Storage:
    """The storage rooted at a folder, a `file:///` URI or `s3://bucket[/prefix]`. Nothing is asked of it yet.

    `s3_extra`: arguments for every upload, by boto3's names (`ServerSideEncryption`, `SSEKMSKeyId`, `StorageClass`, …);
    they go over those of the environment's VIDEO_LAB_S3_EXTRA (a JSON object). Raises ConfigInvalid.
    """
    if is_remote(uri):
        from runner.storage_s3 import S3Storage, upload_arguments  # boto3 takes half a second to import

        return S3Storage(str(uri), extra=upload_arguments(s3_extra, os.environ))
    return LocalStorage(uri)


def stat_input(uri: str | Path, *, s3_extra: Mapping[str, Any] | None = None) -> ObjectInfo:
    """What an input file or object is, without reading it.

    Raises InputNotFound, InputUnreadable for a folder or a pipe, StorageDenied, StorageUnavailable.
    """
    if is_remote(uri):
        storage, key = _open_object(str(uri), s3_extra)
        info = storage.stat(key)
        if info is None:
            raise InputNotFound("no such object", where=uri, todo="Check the bucket and the key")
        return info
    try:
        path = local_path(uri)
    except ConfigInvalid as err:  # one job's input cannot be reached; the other jobs go on
        raise InputNotFound(err.what, where=uri, todo=err.todo) from err
    with os_errors(path, writing=False):
        status = path.stat()
        if not (stat_modes.S_ISREG(status.st_mode) or stat_modes.S_ISDIR(status.st_mode)):  # opening it could wait
            raise InputUnreadable("is a pipe or a device, not a file", where=path, todo="Copy it into a file first")
        path.open("rb").close()
    return ObjectInfo(str(path), status.st_size, "", status.st_mtime, path.name)


def fetch_input(uri: str | Path, dest_dir: Path, *, s3_extra: Mapping[str, Any] | None = None) -> Path:
    """An input as a local file: a local one where it lies, an S3 object copied below `dest_dir` under its own name.

    Raises as `stat_input` does, and StorageFull.
    """
    if not is_remote(uri):
        return Path(stat_input(uri).uri)
    from runner.storage_s3 import download_name

    storage, key = _open_object(str(uri), s3_extra)
    dest = dest_dir / download_name(str(uri))
    storage.fetch(key, dest)
    return dest


def _open_object(uri: str, s3_extra: Mapping[str, Any] | None) -> tuple[Storage, str]:
    """The storage that holds one S3 object, and its key there."""
    from runner.storage_s3 import S3Storage, upload_arguments

    extra = upload_arguments(s3_extra, os.environ)
    parent, _, name = uri.rpartition("/")
    if parent.count("/") < 2 or not name:  # s3://bucket, s3://bucket/folder/
        raise InputNotFound("names a bucket or a folder, not a file", where=uri, todo="Write s3://bucket/path/file")
    try:
        return S3Storage(parent, extra=extra), check_key(name)
    except ConfigInvalid as err:
        raise InputNotFound(err.what, where=uri, todo=err.todo) from err


def probe_writable(storage: Storage) -> None:
    """Write, read and delete one small object, so that a run that cannot store its results ends before it begins.

    Raises StorageDenied, StorageFull, StorageUnavailable or ConfigInvalid, each with what to do about it.
    """
    key, data = f".video-lab-probe-{uuid4().hex}", b"Video Lab runner asks whether it may write here\n" * 100
    storage.write_bytes(key, data)
    try:
        if storage.read_bytes(key) != data:
            raise InternalError("what was written does not read back", where=storage.uri(key))
    finally:
        storage.delete(key)


def sync_models(uri: str | Path, cache: Path, wanted: Callable[[str], bool]) -> Path:
    """A model store as a local folder: a local one where it lies, an s3:// one copied once below `cache`.

    `wanted` says of each key below the store's root whether it is needed. See `storage_sync.sync_store`.
    Raises WeightsMissing, storage.*.
    """
    from runner.storage_sync import sync_store

    return sync_store(uri, cache, wanted)

"""Local storage: the Storage interface over a folder of this machine.

In:   a folder. Out: objects that appear whole or not at all. Never: what the bytes mean.
"""

from __future__ import annotations

import errno
import hashlib
import os
import stat as stat_modes
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import BinaryIO

from runner.errors import ConfigInvalid, InputNotFound
from runner.hashing import sha256_file
from runner.storage.base import PROBE_NAME, Leftover, ObjectInfo, Storage, Versioned, check_key, counted
from runner.storage.disk import (
    ABSENT,
    is_staged,
    locked_folder,
    os_errors,
    remove_unlocked,
    staged,
    sync_folder,
    walk_files,
    writer_of,
)
from runner.storage.uris import local_path

__all__ = ["LocalStorage"]

_COPY_BYTES = 1 << 20


class LocalStorage(Storage):
    """A folder on a disk that this machine sees; made at the first write. Links inside it are followed.

    `root`: what the URIs of its objects begin with, where the folder stands for a store of another name.
    """

    def __init__(self, uri: str | Path, *, root: str | None = None) -> None:
        self.path = local_path(uri)
        self.root = str(self.path) if root is None else root
        self._named = root is not None
        with os_errors(self.path, writing=True):
            if self.path.exists() and not self.path.is_dir():
                raise ConfigInvalid("is a file, not a folder", where=self.root, todo="Name a folder")

    def uri(self, key: str) -> str:
        return self._uri(check_key(key))

    def _uri(self, key: str) -> str:
        return f"{self.root.rstrip('/')}/{key}" if self._named else str(self.path / key)

    def _path(self, key: str) -> Path:
        return self.path / check_key(key)

    @property
    def appends(self) -> bool:
        return True

    @property
    def lists_identities(self) -> bool:
        return False

    def _info(self, key: str, status: os.stat_result, identity: str | None = None) -> ObjectInfo:
        return ObjectInfo(self.uri(key), status.st_size, identity, status.st_mtime, key)

    def identify(self, info: ObjectInfo, sha256: Callable[[Path], str] = sha256_file) -> str:
        if info.identity is not None:
            return info.identity
        path = self._path(info.key)
        with os_errors(path, writing=False):
            return f"sha256:{sha256(path)}"

    def fetch(self, key: str, dest: Path, on_bytes: Callable[[int], None] | None = None) -> ObjectInfo:
        source = self._path(key)
        with counted(on_bytes) as count, os_errors(source, writing=False), source.open("rb") as file:
            status = os.fstat(file.fileno())
            with os_errors(dest, writing=True), staged(dest) as out:
                identity = _copy(file, out, count)
        return self._info(key, status, identity)

    def publish(self, local: Path, key: str) -> ObjectInfo:
        target = self._path(key)
        with os_errors(local, writing=False), local.open("rb") as file:
            with os_errors(target, writing=True), staged(target) as out:
                identity = _copy(file, out)
                out.flush()
                status = os.fstat(out.fileno())  # the target itself may be another process's a moment later
        return self._info(key, status, identity)

    def stat(self, key: str) -> ObjectInfo | None:
        path = self._path(key)
        with os_errors(path, writing=False):
            try:
                status = path.stat()
            except OSError as err:
                if err.errno in ABSENT or err.errno == errno.ENAMETOOLONG:
                    return None
                raise
        return self._info(key, status) if stat_modes.S_ISREG(status.st_mode) else None

    def list(self, prefix: str = "") -> Iterator[ObjectInfo]:
        for path, key in self._files(prefix):
            if not is_staged(path.name):
                status = _status(path)
                if status is not None:
                    yield self._info(key, status)

    def _files(self, prefix: str) -> Iterator[tuple[Path, str]]:
        """Every file whose key begins with `prefix`, and its key."""
        if prefix:
            check_key(prefix + "x")  # a prefix is the beginning of a key
        top = self.path.joinpath(*prefix.split("/")[:-1])
        with os_errors(top, writing=False):
            for path in walk_files(top):
                key = path.relative_to(self.path).as_posix()
                if key.startswith(prefix):
                    yield path, key

    def read_bytes(self, key: str) -> bytes | None:
        path = self._path(key)
        try:
            with os_errors(path, writing=False):
                return path.read_bytes()
        except InputNotFound:
            return None

    def write_bytes(self, key: str, data: bytes) -> None:
        target = self._path(key)
        with os_errors(target, writing=True), staged(target) as out:
            out.write(data)

    def read_versioned(self, key: str) -> Versioned | None:
        data = self.read_bytes(key)
        return None if data is None else Versioned(data, _version(data))

    def write_if(self, key: str, data: bytes, version: str | None) -> str | None:
        target = self._path(key)

        def place(temporary: Path) -> None:
            if version is None:
                _create(temporary, target)
                return
            try:
                found = _version(target.read_bytes())
            except OSError as err:
                if err.errno in ABSENT:
                    raise _ChangedError from err
                raise
            if found != version:
                raise _ChangedError
            os.replace(temporary, target)

        try:
            with os_errors(target, writing=True), staged(target, place=place) as out:
                out.write(data)
        except _ChangedError:
            return None
        return _version(data)

    def append_lines(self, key: str, data: bytes) -> None:
        path = self._path(key)
        with os_errors(path, writing=True):
            path.parent.mkdir(parents=True, exist_ok=True)
            with path.open("ab", buffering=0) as file:
                rest = memoryview(data)
                while rest:  # one write, unless the disk is full
                    rest = rest[file.write(rest) :]

    def delete(self, key: str) -> None:
        path = self._path(key)
        with os_errors(path, writing=True):
            try:
                with locked_folder(path.parent):
                    path.unlink()
            except OSError as err:
                if err.errno not in ABSENT:
                    raise
                return
            sync_folder(path.parent)

    def leftovers(self, prefix: str = "") -> Iterator[Leftover]:
        for path, key in self._files(prefix):
            is_probe = path.name.startswith(PROBE_NAME)
            status = _status(path) if is_probe or is_staged(path.name) else None
            if status is None:
                continue
            if is_probe:
                yield Leftover(self._uri(key), key, status.st_size, status.st_mtime, "write probe")
                continue
            with os_errors(path, writing=True):
                writer = writer_of(path)
            if not writer:
                abandoned = writer is False
                yield Leftover(self._uri(key), key, status.st_size, status.st_mtime, "staged file", abandoned)

    def _unfinished(self, prefix: str) -> Iterator[Leftover]:
        return (leftover for leftover in self.leftovers(prefix) if leftover.abandoned)

    def remove_leftover(self, leftover: Leftover) -> bool:
        with os_errors(leftover.uri, writing=True):
            return remove_unlocked(self.path / leftover.key)


def _copy(source: BinaryIO, out: BinaryIO, on_bytes: Callable[[int], None] | None = None) -> str:
    """Copy what is left of `source`; the identity of the bytes that were copied."""
    digest = hashlib.sha256()
    while block := source.read(_COPY_BYTES):
        digest.update(block)
        out.write(block)
        if on_bytes is not None:
            on_bytes(len(block))
    return f"sha256:{digest.hexdigest()}"


def _status(path: Path) -> os.stat_result | None:
    """Of a regular file; None of other things."""
    with os_errors(path, writing=False):
        try:
            status = path.stat()
        except OSError as err:
            if err.errno in (*ABSENT, errno.ELOOP):  # deleted since, or a link to nothing or to itself
                return None
            raise
    return status if stat_modes.S_ISREG(status.st_mode) else None


class _ChangedError(Exception):
    """What lies under the key is not what was expected."""


def _version(data: bytes) -> str:
    return f"sha256:{hashlib.sha256(data).hexdigest()}"


def _create(temporary: Path, target: Path) -> None:
    """Give the file its name if nothing has that name: by a link, which excludes also where no lock does (NFS)."""
    try:
        os.link(temporary, target)
    except FileExistsError as err:
        raise _ChangedError from err
    except OSError as err:
        if err.errno not in (errno.EPERM, errno.ENOTSUP, errno.ENOSYS, errno.EMLINK):  # a file system without links
            raise
        if os.path.lexists(target):
            raise _ChangedError from err
        os.replace(temporary, target)
    else:
        temporary.unlink()

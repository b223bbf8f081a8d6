"""Local storage: the Storage interface for a folder of this machine.

In:   a folder. Out: objects that appear whole or not at all. Never: what the bytes mean.
"""

from __future__ import annotations

import errno
import hashlib
import os
import stat as stat_modes
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import BinaryIO

from runner.errors import ConfigInvalid, InputNotFound
from runner.hashing import sha256_file
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
    lease_lost,
)
from runner.storage.disk import (
    ABSENT,
    folder_clock,
    is_staged,
    locked_folder,
    locks_hold,
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
    """A folder on a mounted disk. It is made at the first write. Links inside it are followed.

    `root`: beginning of the URIs of its objects, if it is not the folder's path.
    """

    def __init__(self, uri: str | Path, *, root: str | None = None) -> None:
        self.path = local_path(uri)
        self.root = str(self.path) if root is None else root
        self._named = root is not None
        self._own_clock = False
        with os_errors(self.path, writing=True):
            if self.path.exists() and not self.path.is_dir():
                raise ConfigInvalid("this is a file, not a folder", where=self.root, todo="Name a folder")

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

    def publish(
        self, local: Path, key: str, *, fence: Fence | None = None, replaces: Replaces = "anything"
    ) -> ObjectInfo:
        target = self._path(key)

        def place(temporary: Path) -> None:
            self._require_lease(fence)
            if replaces is None:
                _create(temporary, target)
                return
            if isinstance(replaces, ObjectInfo):
                found = _status(target)
                if found is None or (found.st_size, found.st_mtime) != (replaces.bytes, replaces.modified):
                    raise _ChangedError
            os.replace(temporary, target)

        folder = self._lease_folder(fence)
        try:
            with os_errors(local, writing=False), local.open("rb") as file:
                with os_errors(target, writing=True), staged(target, place=place, lock_first=folder) as out:
                    identity = _copy(file, out)
                    out.flush()
                    status = os.fstat(out.fileno())  # another process may replace the target a moment later
        except _ChangedError as err:
            raise lease_lost("another runner has changed this object since the job began", self.uri(key)) from err
        return self._info(key, status, identity)

    def _require_lease(self, fence: Fence | None) -> None:
        if fence is not None:
            fence.require(self.read_bytes(fence.key), self.uri(fence.key))

    def _lease_folder(self, fence: Fence | None) -> Path | None:
        """Return the folder of the lease, to lock it first. Raises LeaseLost before anything is written."""
        if fence is None:
            return None
        self._require_lease(fence)
        folder = self._path(fence.key).parent
        with os_errors(folder, writing=True):
            folder.mkdir(parents=True, exist_ok=True)
        return folder

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

    def folders(self, prefix: str = "") -> Iterator[str]:
        if prefix:
            check_key(prefix + "x")
        top = self.path / prefix
        with os_errors(top, writing=False):
            try:
                with os.scandir(top) as entries:
                    names = sorted(entry.name for entry in entries if entry.is_dir())
            except OSError as err:
                if err.errno not in ABSENT:
                    raise
                names = []
        yield from names

    def _files(self, prefix: str) -> Iterator[tuple[Path, str]]:
        """Yield every file whose key begins with `prefix`, and its key."""
        if prefix:
            check_key(prefix + "x")  # a valid prefix is the beginning of a valid key
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

    def read_versioned(self, key: str, *, aged: bool = False) -> Versioned | None:
        path = self._path(key)
        try:
            with os_errors(path, writing=False), path.open("rb") as file:
                written, data = os.fstat(file.fileno()).st_mtime, file.read()
        except InputNotFound:
            return None
        return Versioned(data, _version(data), self._seconds_since(written, path.parent) if aged else None)

    def use_own_clock(self) -> None:
        self._own_clock = True

    def _seconds_since(self, written: float, folder: Path) -> float | None:
        try:
            return max(0.0, (time.time() if self._own_clock else folder_clock(folder)) - written)
        except OSError:  # read-only, owned by another user, or full
            return None

    def write_if(self, key: str, data: bytes, version: str | None, *, fence: Fence | None = None) -> str | None:
        target = self._path(key)

        def place(temporary: Path) -> None:
            self._require_lease(fence)
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

        folder = self._lease_folder(fence)
        try:
            with os_errors(target, writing=True), staged(target, place=place, lock_first=folder) as out:
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
                while rest:  # one write is enough unless the disk is full
                    rest = rest[file.write(rest) :]

    def delete(self, key: str, *, version: str | None = None, fence: Fence | None = None) -> bool:
        path = self._path(key)
        folder = self._lease_folder(fence)
        with os_errors(path, writing=True):
            try:
                with locked_folder(path.parent, folder):
                    self._require_lease(fence)
                    if version is not None and _version(path.read_bytes()) != version:
                        return False
                    path.unlink()
            except OSError as err:
                if err.errno not in ABSENT:
                    raise
                return True
            sync_folder(path.parent)
        return True

    def weak_conditions(self) -> str | None:
        with os_errors(self.path, writing=True):
            if locks_hold(self.path):
                return None
        return "the file system has no locks for folders, so two processes can replace one file at the same time"

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
    """Copy `source` from its position to its end. Return the identity of the copied bytes."""
    digest = hashlib.sha256()
    while block := source.read(_COPY_BYTES):
        digest.update(block)
        out.write(block)
        if on_bytes is not None:
            on_bytes(len(block))
    return f"sha256:{digest.hexdigest()}"


def _status(path: Path) -> os.stat_result | None:
    """Return the status of a regular file; None for anything else."""
    with os_errors(path, writing=False):
        try:
            status = path.stat()
        except OSError as err:
            if err.errno in (*ABSENT, errno.ELOOP):  # deleted since, or a link to nothing or to itself
                return None
            raise
    return status if stat_modes.S_ISREG(status.st_mode) else None


class _ChangedError(Exception):
    """The object under the key is not the expected one."""


def _version(data: bytes) -> str:
    return f"sha256:{hashlib.sha256(data).hexdigest()}"


def _create(temporary: Path, target: Path) -> None:
    """Give the file its name if that is free: by a hard link, which is exclusive even without locks (NFS)."""
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

"""Disk: write files atomically, lock folders, and turn the operating system's errors into RunnerErrors.

In:   paths. Out: files in their place; errors that name the folder's owner and the remedy.
Never: keys, roots, the content of a file.
"""

from __future__ import annotations

import errno
import fcntl
import os
import re
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import BinaryIO
from uuid import uuid4

from runner.errors import (
    InputNotFound,
    InputUnreadable,
    RunnerError,
    StorageDenied,
    StorageFull,
    StorageUnavailable,
)

__all__ = [
    "ABSENT",
    "folder_clock",
    "is_staged",
    "locked_folder",
    "locks_hold",
    "os_error",
    "os_errors",
    "remove_unlocked",
    "staged",
    "sync_folder",
    "walk_files",
    "writer_of",
]

ABSENT = frozenset({errno.ENOENT, errno.ENOTDIR})  # no such file, or a parent is a file
LOCK_SECONDS = 30.0  # locks are held for a rename or two: after half a minute the holder is stopped or its disk hangs

_STAGED = re.compile(r"\.staged-[0-9a-f]{32}\.tmp")


def is_staged(name: str) -> bool:
    """Return whether this is the name of a staged file: one being written, or left by a killed process."""
    return _STAGED.fullmatch(name) is not None


@contextmanager
def staged(
    target: Path, *, place: Callable[[Path], None] | None = None, lock_first: Path | None = None
) -> Iterator[BinaryIO]:
    """Yield a new file that becomes `target` if the block succeeds, and is removed if it fails.

    It is made beside the target, as a rename cannot cross devices. It is synced before the rename, as a crash could
    otherwise leave the name with half the bytes. `place` is called with its path and renames it or raises; the
    target's folder is locked meanwhile, and `lock_first` before it. Without `place`, it replaces the target. The file
    is locked until then, which distinguishes it from a leftover of a killed process.
    """
    target.parent.mkdir(parents=True, exist_ok=True)
    temporary, opened = _new_staged(target.parent)
    try:
        with opened as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
            with locked_folder(target.parent, lock_first):
                if place is None:
                    os.replace(temporary, target)
                else:
                    place(temporary)
    except BaseException:
        with suppress(OSError):
            temporary.unlink(missing_ok=True)
        raise
    sync_folder(target.parent)


def _new_staged(folder: Path) -> tuple[Path, BinaryIO]:
    """Return a new, locked file, open for reading and writing."""
    while True:
        temporary = folder / f".staged-{uuid4().hex}.tmp"
        file = temporary.open("x+b")  # not mkstemp: with its mode 0600, only the container's user could read the file
        with suppress(OSError):
            fcntl.flock(file, fcntl.LOCK_EX)
        if temporary.exists():
            return temporary, file
        file.close()  # another process removed it as a leftover before it was locked


def writer_of(path: Path) -> bool | None:
    """Return whether a process is writing (locks) this staged file; None if the file system has no locks."""
    try:
        with path.open("rb") as file:
            return _writer_of(file)
    except FileNotFoundError:  # it was renamed meanwhile
        return True


def _writer_of(file: BinaryIO) -> bool | None:
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    except OSError:
        return None
    return False


def remove_unlocked(path: Path) -> bool:
    """Remove a leftover unless a process is writing it. Return whether it was removed."""
    try:
        with path.open("rb") as file:
            if _writer_of(file):
                return False
            path.unlink()  # while its lock is held, so that no process uses it
    except FileNotFoundError:
        return False
    return True


@contextmanager
def locked_folder(folder: Path, first: Path | None = None) -> Iterator[None]:
    """Lock `folder`, and the folder `first` before it, against other threads and processes that use this function.

    The system releases the locks when their holder dies. No effect on a file system without locks for folders, e.g.
    NFS. Raises StorageUnavailable, which names the folder, if another process holds a lock for LOCK_SECONDS: it may be
    stopped (SIGSTOP, a frozen container).
    """
    with ExitStack() as stack:
        locked = set()
        for path in (folder,) if first is None else (first, folder):
            handle = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
            stack.callback(os.close, handle)
            status = os.fstat(handle)
            if (status.st_dev, status.st_ino) not in locked:  # a second lock would wait for the first
                locked.add((status.st_dev, status.st_ino))
                _lock(handle, path)
        yield


def _lock(handle: int, folder: Path) -> None:
    deadline, pause = time.monotonic() + LOCK_SECONDS, 0.001
    while True:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return
        except BlockingIOError as err:
            if time.monotonic() >= deadline:
                raise StorageUnavailable(
                    f"another process has locked this folder for {LOCK_SECONDS:g} s",
                    where=folder,
                    todo="Find the stopped process that holds it (fuser, lsof), end it, and run the same command again",
                ) from err
        except OSError:  # no locks here
            return
        time.sleep(pause)
        pause = min(2 * pause, 0.05)


def locks_hold(folder: Path) -> bool:
    """Return whether this file system refuses a second lock of the folder."""
    handles = [os.open(folder, os.O_RDONLY | os.O_DIRECTORY) for _ in range(2)]
    try:
        for handle in handles:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    except OSError:
        return False
    finally:
        for handle in handles:
            os.close(handle)
    return False


def folder_clock(folder: Path) -> float:
    """Return the time (s since 1970) by the clock that dates files in this folder: a server's on a network mount."""
    temporary, opened = _new_staged(folder)
    try:
        with opened as file:
            file.write(b"x")
            file.flush()
            os.fsync(file.fileno())  # a network mount may use this machine's clock until the file is written
            return os.fstat(file.fileno()).st_mtime
    finally:
        temporary.unlink(missing_ok=True)


def sync_folder(folder: Path) -> None:
    """Sync the folder's new entry to the disk."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    except OSError as err:
        if err.errno not in (errno.EINVAL, errno.ENOTSUP):  # some network and FUSE file systems cannot
            raise
    finally:
        os.close(handle)


_FULL = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}
_IN_THE_WAY = {errno.ENOTDIR, errno.EISDIR, errno.EEXIST, errno.ENAMETOOLONG, errno.ELOOP, errno.EINVAL}
_LONG = "the name is longer than this file system allows"


def os_error(error: OSError, *, where: object, writing: bool) -> RunnerError:
    """Return the operating system's error as a RunnerError. All unlisted errors become StorageUnavailable."""
    named = error.filename2 or error.filename  # after a rename, its target
    place = where if named is None or is_staged(Path(str(named)).name) else named
    reason = (error.strerror or str(error) or type(error).__name__).lower()
    user = f"uid {os.geteuid()}"
    if error.errno in _FULL:
        what = "no space is left on the device" if error.errno == errno.ENOSPC else reason
        return StorageFull(
            what, where=place, todo="Free space there, then run the same command again. Finished jobs are kept"
        )
    if error.errno == errno.EROFS:
        return StorageDenied(
            "the file system is read-only", where=place, todo="Mount a writable volume there, or choose another folder"
        )
    if isinstance(error, PermissionError):
        return StorageDenied(
            f"permission was denied to {user}{_owner(place)}",
            where=place,
            todo=f"Make it {'writable' if writing else 'readable'} to {user}, or run the container as its owner: "
            '--user "$(id -u):$(id -g)"',
        )
    if not writing and error.errno in ABSENT:
        return InputNotFound("no such file", where=place, todo="Check the path")
    if error.errno in _IN_THE_WAY:  # a problem of this file only: other files may work
        return _in_the_way(error.errno, place, reason) if writing else _odd_input(error.errno, place, reason)
    return StorageUnavailable(
        f"input/output failed: {reason}", where=place, todo="Check the disk or mount, then run the same command again"
    )


def _odd_input(number: int, place: object, reason: str) -> RunnerError:
    if number == errno.ENAMETOOLONG:
        return InputNotFound(_LONG, where=place, todo="Check the path")
    if number == errno.EISDIR:
        return InputUnreadable("this is a folder, not a file", where=place, todo="Name a file")
    if number == errno.ELOOP:
        return InputUnreadable("a symbolic link there forms a loop", where=place, todo="Name the file itself")
    return InputUnreadable(f"the file cannot be read: {reason}", where=place, todo="Check the path")


def _in_the_way(number: int | None, place: object, reason: str) -> StorageDenied:
    """Return the error for a place that another file or folder occupies."""
    path = Path(str(place))
    if number == errno.ENAMETOOLONG:
        return StorageDenied(_LONG, where=place, todo="Choose a shorter name, or an output folder with a shorter path")
    if number == errno.EISDIR:
        return StorageDenied("a folder is where a file must be", where=place, todo="Remove or rename that folder")
    for obstacle in (path, *path.parents):
        with suppress(OSError):
            if number == errno.ELOOP and obstacle.is_symlink():
                problem = "a symbolic link there forms a loop"
                return StorageDenied(problem, where=obstacle, todo="Remove or rename that link")
            if number in (errno.ENOTDIR, errno.EEXIST) and os.path.lexists(obstacle) and not obstacle.is_dir():
                problem = "a file is where a folder must be"
                return StorageDenied(problem, where=obstacle, todo="Remove or rename that file")
    return StorageDenied(f"this path cannot be used: {reason}", where=place, todo="Remove or rename what has this name")


def _owner(place: object) -> str:
    """Return the owner of the nearest existing folder, as the end of a sentence; empty if unknown."""
    path = Path(str(place))
    for candidate in (path, *path.parents):
        with suppress(OSError):
            return f"; {candidate} belongs to uid {candidate.stat().st_uid}"
    return ""


@contextmanager
def os_errors(where: object, *, writing: bool) -> Iterator[None]:
    """Raise OSErrors of the block as RunnerErrors."""
    try:
        yield
    except OSError as err:
        raise os_error(err, where=where, writing=writing) from err


def walk_files(top: Path) -> Iterator[Path]:
    """Yield the files below `top`, through links but without cycles; none if `top` is missing. Raises if unreadable."""

    def fail(error: OSError) -> None:
        if error.errno not in ABSENT:
            raise error

    seen: set[str] = set()
    for folder, folders, files in os.walk(top, onerror=fail, followlinks=True):
        real = os.path.realpath(folder)
        if real in seen:
            folders.clear()
            continue
        seen.add(real)
        folders.sort()
        yield from (Path(folder, name) for name in sorted(files))

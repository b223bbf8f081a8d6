"""Disk cache: keep arrays on local disk between jobs and runs, e.g. the poses of a video that several jobs use.

In:   a key (a digest of everything that determines the arrays) and arrays. Out: the same arrays, or None.
Never: what the arrays mean.

Each entry is one safetensors file (which contains no code), with a digest over key, names, types and bytes. A torn or
damaged entry is a miss and is removed. Files appear whole by rename. Adding and removing hold one lock; reading needs
none, as a removed file stays readable to processes that have opened it. If a new entry does not fit, the least recently
used entries are removed.
"""

from __future__ import annotations

import hashlib
import json
import os
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Any

import numpy as np

from runner.errors import RunnerError, as_runner_error
from runner.storage.disk import is_staged, staged
from runner.timing import StageTimer

__all__ = ["MAX_BYTES", "DiskCache", "key", "remembered"]

MAX_BYTES = 4 << 30  # a minute of poses is 3 MB at 30 fps, of masks 4 MB
FORMAT = 1  # increase it when the same parts give other arrays
SUFFIX = ".safetensors"
SEAL = "_sha256"  # the entry's digest, kept as one more array
STRIPES = 64  # locks shared among the keys: a lock file per key could never be removed safely

Arrays = Mapping[str, np.ndarray]


def key(parts: Mapping[str, Any]) -> str:
    """Return the sha256 (hex) of JSON-able `parts`, which determine the arrays. Their order does not matter.

    Raises TypeError for a part that is not JSON-able, ValueError for one that is not finite.
    """
    text = json.dumps({**parts, "format": FORMAT}, sort_keys=True, separators=(",", ":"), allow_nan=False)
    return hashlib.sha256(text.encode()).hexdigest()


class DiskCache:
    """A folder of entries, at most `max_bytes` in all; 0 keeps nothing. Safe for several processes and threads."""

    def __init__(self, root: Path, max_bytes: int = MAX_BYTES, *, clock_ns: Callable[[], int] = time.time_ns) -> None:
        if max_bytes < 0:
            raise ValueError(f"max_bytes must not be negative, not {max_bytes}")
        self.root, self.max_bytes, self._clock_ns = Path(root), max_bytes, clock_ns

    def get(self, key: str) -> dict[str, np.ndarray] | None:
        """Return the arrays under `key`, or None. The caller may change them. Counts as a use.

        A damaged entry is removed and is a miss. Raises StorageDenied, … if the entry cannot be read.
        """
        path = self._path(key)
        try:
            with path.open("rb") as file:
                inode = os.fstat(file.fileno()).st_ino
                arrays = _read(file.read(), key)
        except FileNotFoundError:
            return None
        except OSError as err:
            raise as_runner_error(err, where=path) from err
        if arrays is None:
            self._remove_damaged(path, inode)
            return None
        now = self._clock_ns()
        with suppress(OSError):  # evicted meanwhile, or a read-only folder: still a hit
            os.utime(path, ns=(now, now))
        return arrays

    def put(self, key: str, arrays: Arrays) -> bool:
        """Keep `arrays` (numbers, any shape) under `key`. The least recently used entries are removed if necessary.

        False if they are larger than the cache. Raises StorageFull and StorageDenied for errors of the disk.
        """
        blob = _serialise(key, arrays)
        if len(blob) > self.max_bytes:
            return False
        path = self._path(key)
        try:
            with self._lock():
                self._make_room(len(blob), path)
                with staged(path) as out:
                    out.write(blob)
                now = self._clock_ns()
                os.utime(path, ns=(now, now))
        except OSError as err:
            raise as_runner_error(err, where=path) from err
        return True

    def bytes(self) -> int:
        """Return the bytes of all entries."""
        return sum(size for _, _, size in self._entries())

    @contextmanager
    def making(self, key: str) -> Iterator[None]:
        """Hold the lock for making `key`'s arrays. Other threads and processes wait for it.

        The lock is released when the process dies. Keys share STRIPES locks, so the block must not use another key.
        """
        with self._lock(f"making-{int(key[:8], 16) % STRIPES:02d}"):
            yield

    def _path(self, key: str) -> Path:
        return self.root / f"{key}{SUFFIX}"

    @contextmanager
    def _lock(self, name: str = "cache") -> Iterator[None]:
        from filelock import FileLock

        self.root.mkdir(parents=True, exist_ok=True)
        with FileLock(self.root / f".{name}.lock"):
            yield

    def _entries(self) -> list[tuple[int, str, int]]:
        """Return (last use in ns, name, bytes) of every entry, the least recently used first."""
        found = []
        with suppress(FileNotFoundError), os.scandir(self.root) as folder:
            for entry in folder:
                if entry.name.endswith(SUFFIX):
                    with suppress(FileNotFoundError):
                        stat = entry.stat()
                        found.append((stat.st_mtime_ns, entry.name, stat.st_size))
        return sorted(found)

    def _make_room(self, needed: int, target: Path) -> None:
        """Remove leftovers of killed processes, and entries until `needed` more bytes fit. The lock must be held."""
        for path in self.root.iterdir():
            if is_staged(path.name):  # no process is writing it, as this one holds the lock
                path.unlink(missing_ok=True)
        entries = [entry for entry in self._entries() if entry[1] != target.name]
        total = needed + sum(size for _, _, size in entries)
        for _, name, size in entries:
            if total <= self.max_bytes:
                return
            (self.root / name).unlink(missing_ok=True)
            total -= size

    def _remove_damaged(self, path: Path, inode: int) -> None:
        """Remove the file with this inode, and not one that has replaced it. If removal is denied, it stays a miss."""
        with suppress(OSError), self._lock():
            if path.stat().st_ino == inode:
                path.unlink()


def remembered(
    cache: DiskCache | None, key: str, make: Callable[[], Arrays], timer: StageTimer, name: str = "pose_cache"
) -> Arrays:
    """Return the arrays under `key`; call `make` if they are not cached. Counts `name`_hits or `name`_misses.

    Callers that come while another one makes them wait and get the same arrays. If the cache cannot be used, a warning
    is logged and `make` is called, as a job must not fail for that. `make` must not use the cache.
    """
    if cache is None:
        return make()
    with ExitStack() as stack:
        found = None
        try:
            found = cache.get(key)
            if found is None:
                stack.enter_context(cache.making(key))
                found = cache.get(key)  # made by another caller during the wait
        except (RunnerError, OSError) as err:
            _report(err, cache)
        timer.count(f"{name}_misses" if found is None else f"{name}_hits")
        if found is not None:
            return found
        arrays = make()
        try:
            cache.put(key, arrays)
        except (RunnerError, OSError) as err:
            _report(err, cache)
        return arrays


def _report(err: Exception, cache: DiskCache) -> None:
    import structlog

    structlog.get_logger().warning("pose_cache.unusable", folder=str(cache.root), error=str(err))


def _serialise(key: str, arrays: Arrays) -> bytes:
    from safetensors.numpy import save

    plain = {name: np.array(array, order="C") for name, array in arrays.items()}
    for name, array in plain.items():
        if name == SEAL or array.dtype.kind not in "biuf":
            raise ValueError(f"the array {name!r} of type {array.dtype} cannot be cached")
    return save({**plain, SEAL: np.frombuffer(_digest(key, plain), np.uint8)})


def _read(blob: bytes, key: str) -> dict[str, np.ndarray] | None:
    """Return the arrays in an entry's bytes; None if the bytes are damaged or belong to another key."""
    from safetensors import SafetensorError
    from safetensors.numpy import load

    try:
        arrays = {name: np.array(array) for name, array in load(blob).items()}
    except (SafetensorError, KeyError, ValueError):  # KeyError: a type that numpy does not have
        return None
    seal = arrays.pop(SEAL, None)
    return arrays if seal is not None and seal.tobytes() == _digest(key, arrays) else None


def _digest(key: str, arrays: Arrays) -> bytes:
    digest = hashlib.sha256(key.encode())
    for name, array in sorted(arrays.items()):
        digest.update(json.dumps([name, array.dtype.str, array.shape]).encode())
        digest.update(array.tobytes())
    return digest.digest()

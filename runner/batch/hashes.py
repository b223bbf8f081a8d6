"""Hashes: the sha256 of local files, computed once for the same path, size, mtime and inode.

In:   paths, and a file that keeps the results between runs. Out: hex digests. Never: what is in the files.
"""

from __future__ import annotations

import hashlib
import json
import os
import threading
import time
from pathlib import Path
from typing import Any

from runner.storage.disk import staged

__all__ = ["FileHashes"]

VERSION = 1
MOST = 200_000  # entries that are kept, about 40 MB; the least recently used leave first
SETTLED_S = 2.0  # a file may change again within its clock's tick, 2 s on FAT and on some network file systems

Stamp = tuple[int, int, int]  # bytes, mtime in ns, inode


class FileHashes:
    """sha256 by file. Safe from any thread; `memory` is a file that several runs may share, the last to save wins."""

    def __init__(self, memory: Path | None = None) -> None:
        self._memory = memory
        self._known: dict[str, tuple[Stamp, str]] = _read(memory)
        self._changed = False
        self._lock = threading.Lock()

    def sha256(self, path: Path) -> str:
        """sha256, hex, of the file's bytes. Raises OSError where it cannot be read."""
        place = hashlib.sha256(os.fsencode(path.resolve())).hexdigest()  # a name may hold a presigned URL's signature
        with path.open("rb") as file:
            stamp = _stamp(file.fileno())
            with self._lock:
                known = self._known.pop(place, None)
                if known is not None and known[0] == stamp:
                    self._known[place] = known  # now the most recently used
                    return known[1]
            digest = hashlib.file_digest(file, "sha256").hexdigest()
            unchanged = _stamp(file.fileno()) == stamp
        if unchanged and time.time_ns() - stamp[1] > SETTLED_S * 1e9:
            with self._lock:
                self._known[place] = (stamp, digest)
                self._changed = True
        return digest

    def save(self) -> None:
        """Write what is known to `memory`, if anything is new. Raises OSError."""
        with self._lock:
            if self._memory is None or not self._changed:
                return
            kept = dict(list((_read(self._memory) | self._known).items())[-MOST:])
            self._changed = False
        self._memory.parent.mkdir(parents=True, exist_ok=True)
        with staged(self._memory) as out:
            files = {place: [*stamp, digest] for place, (stamp, digest) in kept.items()}
            out.write(json.dumps({"version": VERSION, "files": files}, ensure_ascii=True).encode())


def _stamp(descriptor: int) -> Stamp:
    status = os.fstat(descriptor)
    return status.st_size, status.st_mtime_ns, status.st_ino


def _read(memory: Path | None) -> dict[str, tuple[Stamp, str]]:
    """What an earlier run kept. A file that is missing or damaged only costs hashing again."""
    if memory is None:
        return {}
    try:
        content: Any = json.loads(memory.read_bytes())
        if content["version"] != VERSION:
            return {}
        return {
            str(place): ((int(size), int(mtime), int(inode)), str(digest))
            for place, (size, mtime, inode, digest) in content["files"].items()
        }
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError):
        return {}

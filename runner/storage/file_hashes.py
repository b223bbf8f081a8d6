"""File hashes: the sha256 of local files, computed once for the same path, size, mtime and inode.

In:   paths, and a file that keeps the results between runs. Out: hex digests. Never: the content of the files.

The file also keeps facts (yes or no) that other modules find out about contents, e.g. whether two readers of a video
give different frames.

In the cache folder there is one such file for inputs and outputs of jobs (`file-hashes.json`), and one for weights
(`weight-identities.json`). They contain the sha256 of each path instead of the path, as a name may contain a presigned
URL's signature.
"""

from __future__ import annotations

import hashlib
import json
import os
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from runner.hashing import sha256_stream
from runner.storage.disk import staged

__all__ = ["FileHashes", "content_sha256"]

VERSION = 1
MOST = 200_000  # most entries, about 40 MB; the least recently used are removed
SETTLED_S = 2.0  # a file may change again within one tick of its clock: 2 s on FAT and some network file systems

Stamp = tuple[int, int, int]  # bytes, mtime in ns, inode


class FileHashes:
    """sha256 by file. Safe from any thread. `memory`: the file that keeps them; several processes may share it."""

    def __init__(self, memory: Path | None = None) -> None:
        self._memory: Path | None = None
        self._known: dict[str, tuple[Stamp, str]] = {}
        self._facts: dict[str, bool] = {}
        self._changed = False
        self._lock = threading.Lock()
        if memory is not None:
            self.use(memory)

    def use(self, memory: Path) -> None:
        """Read the file `memory`, unless it was read before. `save` writes to it from now on."""
        with self._lock:
            if memory != self._memory:
                self._known |= _read(memory)
                self._facts |= _read_facts(memory)
                self._memory = memory

    def sha256(self, path: Path) -> str:
        """Return the sha256 (hex) of the file's bytes. Raises OSError if it cannot be read."""
        place = _place(path)
        with path.open("rb") as file:
            stamp = _stamp(os.fstat(file.fileno()))
            with self._lock:
                known = self._known.pop(place, None)
                if known is not None and known[0] == stamp:
                    self._known[place] = known  # now the most recently used
                    return known[1]
            digest = sha256_stream(file)
            unchanged = _stamp(os.fstat(file.fileno())) == stamp
        if unchanged and time.time_ns() - stamp[1] > SETTLED_S * 1e9:
            with self._lock:
                self._known[place] = (stamp, digest)
                self._changed = True
        return digest

    def known(self, path: Path) -> str | None:
        """Return the digest that was computed for this unchanged file before, without reading it; else None."""
        with self._lock:
            entry = self._known.get(_place(path))
        return entry[1] if entry is not None and entry[0] == _stamp(path.stat()) else None

    def fact(self, name: str, find: Callable[[], bool]) -> bool:
        """Return the fact `name`; call `find` if it is not known. `name`: a digest of everything that determines it.

        Raises the errors of `find`; then nothing is kept.
        """
        with self._lock:
            known = self._facts.pop(name, None)
            if known is not None:
                self._facts[name] = known  # now the most recently used
                return known
        found = find()
        with self._lock:
            self._facts[name] = found
            self._changed = True
        return found

    def save(self) -> None:
        """Add new entries to the memory file. Entries of other processes stay. Raises OSError."""
        with self._lock:
            if self._memory is None or not self._changed:
                return
            memory, known, facts = self._memory, dict(self._known), dict(self._facts)
            self._changed = False
        try:
            memory.parent.mkdir(parents=True, exist_ok=True)
            with staged(memory, place=lambda temporary: _merge(temporary, memory, known, facts)):
                pass
        except OSError:
            self._changed = True
            raise


def _merge(temporary: Path, memory: Path, known: dict[str, tuple[Stamp, str]], facts: dict[str, bool]) -> None:
    """Replace `memory` by its content and the new entries. The folder is locked, so that no entry is lost."""
    kept = list((_read(memory) | known).items())[-MOST:]
    files = {place: [*stamp, digest] for place, (stamp, digest) in kept}
    content: dict[str, Any] = {"version": VERSION, "files": files}
    if facts := dict(list((_read_facts(memory) | facts).items())[-MOST:]):
        content["facts"] = facts
    with temporary.open("wb") as out:
        out.write(json.dumps(content).encode("ascii"))
        out.flush()
        os.fsync(out.fileno())
    os.replace(temporary, memory)


def _place(path: Path) -> str:
    return _hashed_name(path.resolve())


def _hashed_name(path: Path | str) -> str:
    return hashlib.sha256(os.fsencode(path)).hexdigest()


def _stamp(status: os.stat_result) -> Stamp:
    return status.st_size, status.st_mtime_ns, status.st_ino


def _read(memory: Path) -> dict[str, tuple[Stamp, str]]:
    """Return the entries of earlier runs; none if the file is missing or damaged (files are then hashed again)."""
    try:
        content: Any = json.loads(memory.read_bytes())
        if "version" not in content:
            return _read_by_path(content)
        if content["version"] != VERSION:
            return {}
        return {
            str(place): ((int(size), int(mtime), int(inode)), str(digest))
            for place, (size, mtime, inode, digest) in content["files"].items()
        }
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError):
        return {}


def _read_facts(memory: Path) -> dict[str, bool]:
    """Return the facts of earlier runs; none if the file is missing or damaged."""
    try:
        content: Any = json.loads(memory.read_bytes())
        return {str(name): bool(found) for name, found in content["facts"].items()}
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError):
        return {}


def _read_by_path(content: dict[str, Any]) -> dict[str, tuple[Stamp, str]]:
    """Read version 0.1.0's file of weights: path → {"file": [bytes, mtime in ns, inode], "sha256": …}.

    Hashing 30 GB again would take minutes.
    """
    found = {}
    for path, entry in content.items():
        size, mtime, inode = entry["file"]
        found[_hashed_name(path)] = ((int(size), int(mtime), int(inode)), str(entry["sha256"]))
    return found


_SHARED = FileHashes()


def content_sha256(path: Path) -> str:
    """Return the sha256 (hex) of a file's bytes; read once per process for the same path, size, mtime and inode.

    Raises OSError if it cannot be read.
    """
    return _SHARED.sha256(Path(path))

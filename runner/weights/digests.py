"""Digests: the sha256 of model files, found without reading 80 GB at every start.

In:   files, and where to remember. Out: hex digests. Never: what is in the files.

A digest comes from the first of these that has it: the file's own safetensors metadata (`video_lab.sha256`, written
when we made it), the hub's record beside a download (`.cache/huggingface/download/NAME.metadata`, whose second line is
the sha256 of a large file), our memory of having hashed this very file (same path, size, mtime and inode), the bytes.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from uuid import uuid4

from runner.errors import WeightsCorrupt, as_runner_error

__all__ = ["METADATA_KEY", "FileIdentities", "combine"]

METADATA_KEY = "video_lab.sha256"
MEMORY_FILE = "weight-identities.json"
SHA256 = re.compile(r"[0-9a-f]{64}")
CLOCK_SLACK_S = 1  # the hub's record may be written within the same second as the file


def combine(digests: Mapping[str, str]) -> str:
    """One digest of several files, by name: that of a sha256sum listing, sorted. A single file keeps its own."""
    if len(digests) == 1:
        return next(iter(digests.values()))
    listing = "".join(f"{digest}  {name}\n" for name, digest in sorted(digests.items()))
    return hashlib.sha256(listing.encode()).hexdigest()


class FileIdentities:
    """sha256 by file, hashed once in the life of this object, and once in all where a folder keeps the results.

    Safe beside others: the folder's file is read, merged and replaced whole under a lock; hashing happens outside it.
    """

    def __init__(self) -> None:
        self._known: dict[str, dict[str, object]] = {}

    def of(self, files: Iterable[Path], root: Path, folder: Path | None = None) -> dict[Path, str]:
        """Digest of each file. The hub's records are looked for between the file and `root`; `folder` is our memory."""
        self._known |= read_memory(folder)
        digests: dict[Path, str] = {}
        fresh: dict[str, dict[str, object]] = {}
        for file in files:
            digest = recorded(file, root)
            if digest is None:
                stat = file.stat()
                key, mark = str(file.resolve()), [stat.st_size, stat.st_mtime_ns, stat.st_ino]
                known = self._known.get(key, {})
                if known.get("file") == mark and isinstance(known.get("sha256"), str):
                    digest = str(known["sha256"])
                else:
                    digest = hash_file(file)
                    fresh[key] = {"file": mark, "sha256": digest}
            digests[file] = digest
        if fresh:
            self._known |= fresh
            if folder is not None:
                remember(fresh, folder)
        return digests


def read_memory(folder: Path | None) -> dict[str, dict[str, object]]:
    """What was hashed before, by path."""
    if folder is None:
        return {}
    try:
        known = json.loads((folder / MEMORY_FILE).read_text())
    except (FileNotFoundError, json.JSONDecodeError):
        return {}  # never written, or damaged from outside: both only cost hashing again
    return {k: v for k, v in known.items() if isinstance(v, dict)} if isinstance(known, dict) else {}


def remember(fresh: dict[str, dict[str, object]], folder: Path) -> None:
    """Add `fresh` to the folder's memory. Raises StorageDenied or StorageFull."""
    from filelock import FileLock

    target = folder / MEMORY_FILE
    staged = folder / f".{MEMORY_FILE}.{uuid4().hex}"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with FileLock(f"{target}.lock"):
            staged.write_text(json.dumps(read_memory(folder) | fresh, indent=1, sort_keys=True))
            os.replace(staged, target)
    except OSError as err:
        staged.unlink(missing_ok=True)
        raise as_runner_error(err, where=target) from err


def hash_file(file: Path) -> str:
    """sha256 of the bytes."""
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def recorded(file: Path, root: Path) -> str | None:
    """The digest that was written down when `file` was made or downloaded, or None."""
    return _own_metadata(file) or _hub_record(file, root)


def _own_metadata(file: Path) -> str | None:
    if file.suffix != ".safetensors":
        return None
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(file, framework="np") as opened:
            value = (opened.metadata() or {}).get(METADATA_KEY, "")
    except SafetensorError as err:
        raise WeightsCorrupt(f"not a whole safetensors file ({err})", where=file, todo="Download it again") from err
    return value if SHA256.fullmatch(value) else None


def _hub_record(file: Path, root: Path) -> str | None:
    for base in file.parents:
        if not base.is_relative_to(root):
            return None
        name = file.relative_to(base).as_posix()
        record = base / ".cache" / "huggingface" / "download" / f"{name}.metadata"
        try:
            _commit, etag, written_s = record.read_text().splitlines()[:3]
            fits = file.stat().st_mtime <= float(written_s) + CLOCK_SLACK_S
        except FileNotFoundError:
            continue
        except ValueError:
            return None  # not the hub's format: the bytes will tell
        return etag if fits and SHA256.fullmatch(etag) else None
    return None

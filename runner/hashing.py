"""Hashing: the sha256 of one file and of several.

In:   a path, or a file that is open for reading. Out: 64 hexadecimal digits. Never: what the bytes mean; memories of
digests, see storage/file_hashes.py.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from io import BufferedReader
from pathlib import Path

__all__ = ["combine", "sha256_file", "sha256_stream"]


def sha256_file(path: Path) -> str:
    """sha256, hex, of the whole file. Raises OSError where it cannot be read."""
    with path.open("rb") as file:
        return sha256_stream(file)


def sha256_stream(stream: BufferedReader) -> str:
    """sha256, hex, of what is left of an open file, from its position to its end. Raises OSError."""
    return hashlib.file_digest(stream, "sha256").hexdigest()


def combine(digests: Mapping[str, str]) -> str:
    """One digest of several files, by name: that of a sha256sum listing, sorted. A single file keeps its own."""
    if len(digests) == 1:
        return next(iter(digests.values()))
    listing = "".join(f"{digest}  {name}\n" for name, digest in sorted(digests.items()))
    return hashlib.sha256(listing.encode()).hexdigest()

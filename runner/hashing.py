"""Hashing: the sha256 of one file and of several.

In:   a path, or a file that is open for reading. Out: 64 hexadecimal digits.
Never: what the bytes mean; caching of digests (storage/file_hashes.py does that).
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from io import BufferedReader
from pathlib import Path

__all__ = ["combine", "sha256_file", "sha256_stream"]


def sha256_file(path: Path) -> str:
    """Return the sha256 (hex) of the whole file. Raises OSError if it cannot be read."""
    with path.open("rb") as file:
        return sha256_stream(file)


def sha256_stream(stream: BufferedReader) -> str:
    """Return the sha256 (hex) of an open file from its current position to its end. Raises OSError."""
    return hashlib.file_digest(stream, "sha256").hexdigest()


def combine(digests: Mapping[str, str]) -> str:
    """Combine the digests of several files, by name, into one: the sha256 of their sorted sha256sum listing.

    The digest of a single file is returned unchanged.
    """
    if len(digests) == 1:
        return next(iter(digests.values()))
    listing = "".join(f"{digest}  {name}\n" for name, digest in sorted(digests.items()))
    return hashlib.sha256(listing.encode()).hexdigest()

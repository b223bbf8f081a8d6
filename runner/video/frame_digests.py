"""Frame digests: compute a sha256 of each frame, and one of all of them.

In:   uint8 RGB frames. Out: hex digests, and the text of a file that lists them. Never: encoded video, jobs.

Records with `frames_hash: 2` hold `combined_digest`. A list of the digests of single frames shows which frames differ.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterable, Sequence

import numpy as np

__all__ = ["FRAMES_HASH", "combined_digest", "digest_frames", "digest_of", "format_digests", "parse_digests"]

FRAMES_HASH = 2  # the version of `combined_digest`; 1 was the sha256 of all frames in one stream
_DIGEST = re.compile(r"[0-9a-f]{64}")


def digest_of(frame: np.ndarray) -> str:
    """Return the hex sha256 of a frame uint8 [H, W, 3]: of its shape (three little-endian uint32) and its bytes."""
    if frame.dtype != np.uint8 or frame.ndim != 3 or frame.shape[2] != 3:
        raise ValueError(f"a frame must be uint8 [H, W, 3], not {frame.dtype} {list(frame.shape)}")
    digest = hashlib.sha256(np.array(frame.shape, "<u4").tobytes())
    digest.update(np.ascontiguousarray(frame).data)
    return digest.hexdigest()


def digest_frames(frames: np.ndarray) -> list[str]:
    """Return `digest_of` of each frame of uint8 [n, H, W, 3]."""
    return [digest_of(frame) for frame in frames]


def combined_digest(digests: Iterable[str]) -> str:
    """Return the hex sha256 of the digests, 32 bytes each, in order."""
    return hashlib.sha256(b"".join(map(bytes.fromhex, digests))).hexdigest()


def format_digests(digests: Sequence[str]) -> bytes:
    """Return a text with one digest a line; every line ends with a newline."""
    return "".join(f"{digest}\n" for digest in digests).encode()


def parse_digests(data: bytes) -> list[str]:
    """Return the digests in a text of `format_digests`. Raises ValueError for any other text."""
    lines = data.decode("ascii").split("\n")
    if lines.pop() or not all(map(_DIGEST.fullmatch, lines)):
        raise ValueError("not a list of hex sha256 digests, one a line")
    return lines

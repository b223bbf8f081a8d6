"""Packed masks: every mask of a clip, small enough to hold at once, and exactly what was put in.

In:   bool [H, W], frame by frame. Out: the same, for any span of frames, as `given.GivenMask` gives a user's.
Never: how masks are made or widened.

A frame costs its bounding box at one bit a pixel, deflated: some 2 KB for a person in 1080p, where the bits alone are
260 KB and a 20-minute clip of them would be gigabytes.
"""

from __future__ import annotations

import zlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import cv2
import numpy as np

__all__ = ["ClipMasks", "Packed", "pack", "unpack"]

LEVEL = 1  # of deflate: 1 ms a 1080p frame; higher levels save a fifth for ten times as much


@dataclass(frozen=True)
class Packed:
    """One mask: its bounding box and what is in it."""

    box: tuple[int, int, int, int]  # left, top, width, height; all 0 for an empty mask
    bits: bytes  # deflated np.packbits of the box's rows, one after the other

    @property
    def empty(self) -> bool:
        return self.box[2] == 0


def pack(mask: np.ndarray) -> Packed:
    """bool [H, W] → `Packed`."""
    left, top, width, height = cv2.boundingRect(mask.astype(np.uint8))
    inner = mask[top : top + height, left : left + width]
    return Packed((left, top, width, height), zlib.compress(np.packbits(inner).tobytes(), LEVEL) if width else b"")


def unpack(packed: Packed, height: int, width: int) -> np.ndarray:
    """`Packed` of a [height, width] mask → bool [height, width]."""
    mask = np.zeros((height, width), bool)
    if not packed.empty:
        left, top, columns, rows = packed.box
        bits = np.frombuffer(zlib.decompress(packed.bits), np.uint8)
        inner = np.unpackbits(bits, count=rows * columns).reshape(rows, columns)
        mask[top : top + rows, left : left + columns] = inner
    return mask


@dataclass(frozen=True, eq=False)
class ClipMasks:
    """The masks of a clip's sampled frames."""

    height: int
    width: int
    packed: tuple[Packed, ...]

    @classmethod
    def of(cls, masks: Iterable[np.ndarray], height: int, width: int) -> ClipMasks:
        """From bool [height, width], one a frame; each may be dropped once it was handed over."""
        return cls(height, width, tuple(pack(mask) for mask in masks))

    def __len__(self) -> int:
        return len(self.packed)

    @property
    def nbytes(self) -> int:
        """Bytes of all packed masks."""
        return sum(len(mask.bits) for mask in self.packed)

    def frames(self, start: int, stop: int) -> Iterator[np.ndarray]:
        """bool [height, width] of the frames [start, stop), one each."""
        for mask in self.packed[start:stop]:
            yield unpack(mask, self.height, self.width)

    def taken(self, indices: np.ndarray) -> ClipMasks:
        """The masks of `indices`, in that order; one may appear twice. Shares the bits."""
        return ClipMasks(self.height, self.width, tuple(self.packed[i] for i in indices))

    def close(self) -> None:
        """Nothing to release; a mask that is read from a file has something."""

    def arrays(self) -> dict[str, np.ndarray]:
        """For np.savez: `size` int64 [2] (height, width), `boxes` int32 [n, 4], `ends` int64 [n], `bits` uint8."""
        return {
            "size": np.array([self.height, self.width], np.int64),
            "boxes": np.array([mask.box for mask in self.packed], np.int32).reshape(-1, 4),
            "ends": np.cumsum([len(mask.bits) for mask in self.packed], dtype=np.int64),
            "bits": np.frombuffer(b"".join(mask.bits for mask in self.packed), np.uint8),
        }

    @classmethod
    def from_arrays(cls, arrays: dict[str, np.ndarray]) -> ClipMasks:
        """Inverse of `arrays`."""
        bits, ends = arrays["bits"].tobytes(), arrays["ends"].tolist()
        starts = [0, *ends][: len(ends)]
        boxes = [(left, top, width, height) for left, top, width, height in arrays["boxes"].tolist()]
        height, width = arrays["size"].tolist()
        return cls(height, width, tuple(Packed(b, bits[s:e]) for b, s, e in zip(boxes, starts, ends, strict=True)))

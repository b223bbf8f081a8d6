"""Packed masks: keep all masks of a clip in memory, compressed without loss.

In:   bool [H, W], frame by frame. Out: the same, for any range of frames, with the methods of `given.GivenMask`.
Never: making or widening masks.

A frame takes its bounding box at one bit per pixel, deflated: about 2 KB for a person in 1080p. Its bits without
compression are 260 KB, which is gigabytes for a 20-minute clip.
"""

from __future__ import annotations

import zlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import cv2
import numpy as np

__all__ = ["ClipMasks", "Packed", "pack", "unpack"]

LEVEL = 1  # of deflate: 1 ms per 1080p frame; higher levels save a fifth of the size for ten times the time


@dataclass(frozen=True)
class Packed:
    """One mask: its bounding box and the pixels in it."""

    box: tuple[int, int, int, int]  # left, top, width, height; all 0 for an empty mask
    bits: bytes  # deflated np.packbits of the box's rows, one after the other

    @property
    def empty(self) -> bool:
        return self.box[2] == 0


def pack(mask: np.ndarray) -> Packed:
    """Pack bool [H, W]."""
    left, top, width, height = cv2.boundingRect(mask.astype(np.uint8))
    inner = mask[top : top + height, left : left + width]
    return Packed((left, top, width, height), zlib.compress(np.packbits(inner).tobytes(), LEVEL) if width else b"")


def unpack(packed: Packed, height: int, width: int) -> np.ndarray:
    """Unpack a mask to bool [height, width]."""
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
        """Pack masks bool [height, width], one per frame. Each is used once, as it comes."""
        return cls(height, width, tuple(pack(mask) for mask in masks))

    def __len__(self) -> int:
        return len(self.packed)

    @property
    def nbytes(self) -> int:
        """Bytes of all packed masks."""
        return sum(len(mask.bits) for mask in self.packed)

    def frames(self, start: int, stop: int) -> Iterator[np.ndarray]:
        """Yield bool [height, width] for each frame in [start, stop)."""
        for mask in self.packed[start:stop]:
            yield unpack(mask, self.height, self.width)

    def taken(self, indices: np.ndarray) -> ClipMasks:
        """Return the masks of `indices`, in that order; an index may appear twice. The bits are shared, not copied."""
        return ClipMasks(self.height, self.width, tuple(self.packed[i] for i in indices))

    def close(self) -> None:
        """Do nothing; `GivenMask.close` releases a file."""

    def arrays(self) -> dict[str, np.ndarray]:
        """Return arrays for np.savez: `size` int64 [2] (height, width), `boxes` int32 [n, 4], `ends` int64 [n], `bits`
        uint8."""
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

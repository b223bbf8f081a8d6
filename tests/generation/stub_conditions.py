"""Conditions of a job that live in memory: seeded pictures that move, so that a frame out of place is seen."""

from __future__ import annotations

from dataclasses import dataclass, field
from fractions import Fraction
from types import SimpleNamespace
from typing import Any

import numpy as np
from PIL import Image

FACE = 32


def moving(frames: int, height: int, width: int, seed: int) -> np.ndarray:
    """uint8 [frames, height, width, 3]: smooth random pictures, each frame another."""
    coarse = np.random.default_rng(seed).integers(0, 256, (frames, 4, 4, 3), dtype=np.uint8)
    return np.stack([np.asarray(Image.fromarray(c).resize((width, height), Image.Resampling.BICUBIC)) for c in coarse])


def moving_mask(frames: int, height: int, width: int) -> np.ndarray:
    """uint8 [frames, height, width] of 0 and 255: a box that wanders."""
    mask = np.zeros((frames, height, width), np.uint8)
    for i in range(frames):
        left = (3 * i) % (width // 2)
        mask[i, height // 4 : -height // 4, left : left + width // 3] = 255
    return mask


@dataclass
class MemoryConditions:
    """Fulfils what the pipeline and the generator's contract ask of conditions; notes every window asked for."""

    frames: int
    width: int = 48
    height: int = 64
    seed: int = 0
    reference_seed: int = 1
    fps: Fraction = Fraction(16)
    start_s: float = 0.0
    report: dict[str, Any] = field(default_factory=dict)
    people: None = None
    asked: list[tuple[int, int]] = field(default_factory=list)
    closed: bool = False

    def __post_init__(self) -> None:
        self.reference = Image.fromarray(moving(1, 90, 50, self.reference_seed)[0])  # of neither size nor aspect
        self.pose = moving(self.frames, self.height, self.width, self.seed * 10 + 2)
        self.face = moving(self.frames, FACE, FACE, self.seed * 10 + 3)
        self.background = moving(self.frames, self.height, self.width, self.seed * 10 + 4)
        self.mask = moving_mask(self.frames, self.height, self.width)

    def window(self, start: int, stop: int) -> Any:
        assert 0 <= start < stop <= self.frames
        self.asked.append((start, stop))
        return SimpleNamespace(
            pose=self.pose[start:stop],
            face=self.face[start:stop],
            background=self.background[start:stop],
            mask=self.mask[start:stop],
        )

    def close(self) -> None:
        self.closed = True

"""A made scene for tests of metrics: a dancer of two colours moves before a still, textured background."""

from __future__ import annotations

from collections.abc import Sequence
from fractions import Fraction
from pathlib import Path

import cv2
import numpy as np

from runner.video.writer import Mp4Writer, PngWriter, png_name

__all__ = ["DANCER", "apply_gain", "dancer_box", "make_scene", "write_mp4", "write_pngs"]

DANCER = ((200, 60, 40), (40, 70, 190))
FPS = Fraction(16)


def make_scene(
    frames: int,
    width: int = 96,
    height: int = 144,
    *,
    dancer: tuple[tuple[int, int, int], tuple[int, int, int]] = DANCER,
    noise: float = 1.0,
    seed: int = 0,
    gains: Sequence[float] = (),
) -> np.ndarray:
    """uint8 [frames, height, width, 3]; `noise`: standard deviation in levels, anew in each frame.

    gains: of each frame, before the levels are rounded. After it 1.02 is an offset of 2 for all levels of 75 to 124.
    """
    chance = np.random.default_rng(seed)
    y, x = np.mgrid[0:height, 0:width]
    waves = [(60, 90, 17, 29), (80, 70, 23, 13), (90, 60, 11, 31)]
    background = np.stack([low + high * np.abs(np.sin(x / a) * np.cos(y / b)) for low, high, a, b in waves], axis=2)
    texture = np.random.default_rng(99).normal(0, 30, (height, width, 1))  # without it a coder leaves a shift out
    background += cv2.GaussianBlur(texture, (0, 0), 1)[:, :, None]
    clip = np.empty((frames, height, width, 3), np.uint8)
    for index in range(frames):
        picture = background.copy()
        x1, y1, x2, y2 = dancer_box(index, width, height)
        middle = (y1 + y2) // 2
        cv2.rectangle(picture, (x1, y1), (x2 - 1, middle), dancer[0], -1)
        cv2.rectangle(picture, (x1, middle), (x2 - 1, y2 - 1), dancer[1], -1)
        picture += chance.normal(0, noise, picture.shape)
        clip[index] = np.clip(np.rint(picture * (gains[index] if gains else 1)), 0, 255)
    return clip


def dancer_box(index: int, width: int = 96, height: int = 144) -> tuple[int, int, int, int]:
    """(x1, y1, x2, y2) of the dancer in frame `index`; every frame has another."""
    x1 = round(width * (0.4 + 0.3 * np.sin(index / 4)))
    y1 = round(height * (0.3 + 0.1 * np.sin(index / 2.7)))
    return x1, y1, x1 + width // 5, y1 + height // 2


def apply_gain(frames: np.ndarray, gain: float, offset: float = 0.0) -> np.ndarray:
    """The frames' levels times `gain` plus `offset`, rounded to uint8."""
    return np.clip(np.rint(frames * gain + offset), 0, 255).astype(np.uint8)


def write_mp4(path: Path, frames: np.ndarray, crf: int = 18, fps: Fraction = FPS) -> Path:
    with Mp4Writer(path, frames.shape[2], frames.shape[1], fps, crf=crf) as writer:
        writer.write(frames)
    return path


def write_pngs(folder: Path, frames: np.ndarray) -> list[Path]:
    with PngWriter(folder, frames.shape[2], frames.shape[1]) as writer:
        writer.write(frames)
    return [folder / png_name(index) for index in range(len(frames))]

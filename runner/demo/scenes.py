"""Scenes: draw the rooms that puppets dance in, in muted colours, so that nothing in them looks like a joint or limb.

In:   a name, a size, a random seed. Out: RGB uint8 pictures. Never: puppets, files.
"""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise

import numpy as np

__all__ = ["FLOOR", "SCENES", "scene"]

# For the tiny detector, pixels brighter than 0.86 or more saturated than 0.32 are a puppet. H.264 changes a pixel by
# some hundredths, chroma more than luma.
_DARKEST, _BRIGHTEST, _CHROMA = 0.10, 0.74, 0.20
FLOOR = 0.80  # upper edge of a scene's floor, as a share of the height


def _grid(width: int, height: int) -> tuple[np.ndarray, np.ndarray]:
    """Return x [1, W] and y [H, 1], 0..1."""
    return np.linspace(0, 1, width, dtype=np.float32)[None, :], np.linspace(0, 1, height, dtype=np.float32)[:, None]


def _paint(luma: np.ndarray, colour: tuple[float, float, float]) -> np.ndarray:
    """Return luma [H, W] tinted with the offsets `colour` (mean 0), [H, W, 3]."""
    return luma[..., None] + np.array(colour, np.float32)


def _studio(width: int, height: int, rng: np.random.Generator) -> np.ndarray:
    """A rehearsal room: plaster wall, skirting board, wooden boards towards the back."""
    x, y = _grid(width, height)
    picture = _paint(0.56 - 0.12 * np.abs(x - 0.4) + 0.05 * (1 - y), (0.02, 0.0, -0.02))
    panel = ((x > 0.08) & (x < 0.3) | (x > 0.72) & (x < 0.94)) & (y > 0.12) & (y < 0.5)
    picture = np.where(panel[..., None], _paint(0.36 + 0.14 * (y + 0 * x), (-0.03, 0.0, 0.03)), picture)
    depth = (y - FLOOR) / (1 - FLOOR)
    board = np.floor((x - 0.5) / (0.25 + 0.75 * np.clip(depth, 0, 1)) * 9).astype(int)
    shade = rng.uniform(-0.04, 0.04, 64)[board % 64]
    boards = _paint(0.40 + shade + 0.06 * depth, (0.07, 0.01, -0.08))
    picture = np.where((y >= FLOOR)[..., None], boards, picture)
    return np.where(((y >= FLOOR - 0.025) & (y < FLOOR) & (x >= 0))[..., None], np.float32(0.30), picture)


def _stage(width: int, height: int, rng: np.random.Generator) -> np.ndarray:
    """A theatre: dark curtain in folds, a pool of light on the floor."""
    x, y = _grid(width, height)
    phase = rng.uniform(0, 2 * np.pi)
    folds = 0.24 + 0.07 * np.sin(2 * np.pi * 11 * x + phase + 0.6 * np.sin(5 * x)) - 0.04 * y
    picture = _paint(folds, (0.08, -0.05, -0.03))
    pool = np.exp(-(((x - 0.5) / 0.33) ** 2) - ((y - 0.92) / 0.1) ** 2)
    floor = _paint(0.30 + 0.34 * pool, (0.03, 0.01, -0.04))
    return np.where((y >= FLOOR)[..., None], floor, picture)


def _street(width: int, height: int, rng: np.random.Generator) -> np.ndarray:
    """A street at dusk: a sky with a gradient, houses with dim windows, a paved square."""
    x, y = _grid(width, height)
    picture = _paint(0.34 + 0.34 * y + 0 * x, (-0.04, 0.0, 0.05)) * np.array([1, 0.98, 0.96], np.float32)
    edges = np.concatenate([[0.0], np.sort(rng.uniform(0.08, 0.92, 5)), [1.0]])
    for left, right in pairwise(edges):
        roof, shade = rng.uniform(0.18, 0.5), rng.uniform(0.2, 0.32)
        house = (x >= left) & (x < right) & (y > roof)
        picture = np.where(
            house[..., None], _paint(np.full((height, width), shade, np.float32), (0.01, 0.0, 0.02)), picture
        )
        window = house & (((x - left) * 22) % 1 > 0.55) & (((y - roof) * 14) % 1 > 0.5) & (y < FLOOR - 0.06)
        picture = np.where(
            window[..., None], _paint(np.full((height, width), shade + 0.2, np.float32), (0.07, 0.02, -0.09)), picture
        )
    rows = np.sqrt(np.clip((y - FLOOR) / (1 - FLOOR), 0, 1)) * 6
    slabs = 0.42 + 0.05 * ((np.floor(rows) + np.floor(x * 14 + 0.5 * np.floor(rows))) % 2)
    return np.where((y >= FLOOR)[..., None], _paint(slabs, (0.0, 0.0, 0.01)), picture)


def _meadow(width: int, height: int, rng: np.random.Generator) -> np.ndarray:
    """An overcast field: grey sky, a line of hills, dull grass."""
    x, y = _grid(width, height)
    clouds = np.zeros((height, width), np.float32)
    for k in (1, 2, 3):
        clouds += np.sin(2 * np.pi * (k * x + rng.uniform())) * np.sin(np.pi * k * y + rng.uniform()) / k
    picture = _paint(0.62 + 0.03 * clouds, (-0.01, 0.0, 0.03))
    for base, depth, shade in ((0.55, 0.06, 0.46), (0.66, 0.05, 0.38)):
        ridge = base - depth * np.sin(2 * np.pi * (x * rng.uniform(0.8, 1.6) + rng.uniform()))
        picture = np.where((y > ridge)[..., None], _paint(shade + 0 * (x + y), (-0.02, 0.03, -0.02)), picture)
    grass = 0.36 + 0.12 * (y - FLOOR) / (1 - FLOOR) + 0 * x
    return np.where((y >= FLOOR)[..., None], _paint(grass, (-0.02, 0.06, -0.06)), picture)


SCENES: dict[str, Callable[[int, int, np.random.Generator], np.ndarray]] = {
    "studio": _studio,
    "stage": _stage,
    "street": _street,
    "meadow": _meadow,
}


def scene(name: str, width: int, height: int, seed: int = 0) -> np.ndarray:
    """Draw a scene with a little grain: uint8 [height, width, 3] RGB. The same arguments give the same pixels."""
    rng = np.random.default_rng(seed)
    picture = np.clip(SCENES[name](width, height, rng), _DARKEST, _BRIGHTEST)
    picture = picture + rng.normal(0, 0.012, (height, width, 1)).astype(np.float32)
    middle = picture.mean(axis=2, keepdims=True)
    picture = middle + np.clip(picture - middle, -_CHROMA / 2, _CHROMA / 2)
    return (np.clip(picture, 0, _BRIGHTEST) * 255).astype(np.uint8)

"""Sizing: choose the size of a render, and place frames of other shapes in it.

In:   sizes in pixels, always (width, height), and frames uint8 [H, W, 3]. Out: sizes, `Placement`, resized frames.
Never: files, models. The official arithmetic (`resize_by_area`, `padding_resize`) is here too, for parity mode.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

from runner.spec.options import MAX_SIDE, JobOptions

__all__ = [
    "AUTO_AREA",
    "GRID",
    "Placement",
    "area_size",
    "official_placement",
    "output_size",
    "padding_resize",
    "place",
    "resize_by_area",
]

GRID = 16  # autoencoder (8) times patch (2)
AUTO_AREA = 480 * 832  # the 480p weights were trained at this size
MIN_SIDE = GRID


def output_size(options: JobOptions, reference_size: tuple[int, int], video_size: tuple[int, int]) -> tuple[int, int]:
    """Return (width, height) of the output: the option's, or for `auto` the 480p area in the aspect of the reference
    (mode replace: of the video).

    Both sides are the nearest multiples of 16. `preprocess.parity` follows the official rule: only the area of the
    option counts, the aspect is the input's, and sides are floored (464 for 480).
    """
    shape = video_size if options.mode == "replace" else reference_size
    size = options.size_pixels
    if options.preprocess.parity:
        return area_size(*shape, size[0] * size[1] if size else AUTO_AREA)
    if size:
        return size
    aspect = shape[0] / shape[1]
    return _nearest(math.sqrt(AUTO_AREA * aspect)), _nearest(math.sqrt(AUTO_AREA / aspect))


def area_size(width: int, height: int, area: int, divisor: int = GRID) -> tuple[int, int]:
    """Return the size of the official `resize_by_area`. The order of operations is kept: results are floored."""
    aspect = width / height
    new_height = math.sqrt(area / aspect)
    new_width = area / new_height
    floored = (int(side // divisor) * divisor for side in (new_width, new_height))
    new_width, new_height = (max(MIN_SIDE, side) for side in floored)
    return int(new_width), int(new_height)


def resize_by_area(frame: np.ndarray, area: int) -> np.ndarray:
    """Letterbox `frame` uint8 [h, w, 3] into `area_size`, as in the official code. uint8 [H, W, 3].

    Area averaging if the frame shrinks, else bilinear.
    """
    import cv2

    height, width = frame.shape[:2]
    new_width, new_height = area_size(width, height, area)
    shrinks = new_width * new_height < width * height
    return padding_resize(frame, new_width, new_height, cv2.INTER_AREA if shrinks else cv2.INTER_LINEAR)


def padding_resize(frame: np.ndarray, width: int, height: int, interpolation: int | None = None) -> np.ndarray:
    """Letterbox uint8 [h, w, …] on black to [height, width, …], as in the official code. Bilinear by default.

    It truncates instead of rounding, which can leave one black row or column more than needed.
    """
    import cv2

    left, top, new_width, new_height = official_placement((frame.shape[1], frame.shape[0]), (width, height)).target
    canvas = np.zeros((height, width, *frame.shape[2:]), np.uint8)
    resized = cv2.resize(
        frame, (new_width, new_height), interpolation=cv2.INTER_LINEAR if interpolation is None else interpolation
    )
    canvas[top : top + new_height, left : left + new_width] = resized
    return canvas


def official_placement(frame: tuple[int, int], canvas: tuple[int, int]) -> Placement:
    """Return the place of a frame on a canvas in `padding_resize`. Sizes are (width, height)."""
    (w, h), (width, height) = frame, canvas
    if h / w > height / width:
        new_width, new_height = max(1, int(height / h * w)), height
    else:
        new_width, new_height = width, max(1, int(width / w * h))
    left, top = int((width - new_width) / 2), int((height - new_height) / 2)
    return Placement((0, 0, w, h), (left, top, new_width, new_height), canvas)


@dataclass(frozen=True)
class Placement:
    """A rectangle of a source frame and the rectangle of the target that it fills. Pixels; the aspect is kept, except
    for rounding."""

    source: tuple[int, int, int, int]  # x, y, width, height taken from the frame
    target: tuple[int, int, int, int]  # x, y, width, height filled on the canvas
    canvas: tuple[int, int]  # width, height

    def points(self, xy: np.ndarray) -> np.ndarray:
        """Convert source coordinates [..., 2] to canvas coordinates [..., 2]."""
        (sx, sy, sw, sh), (tx, ty, tw, th) = self.source, self.target
        return (xy - (sx, sy)) * (tw / sw, th / sh) + (tx, ty)

    def image(self, frame: np.ndarray, interpolation: int | None = None) -> np.ndarray:
        """Place uint8 [h, w, …] on black [H, W, …]. By default area averaging if it shrinks, bilinear if it grows."""
        import cv2

        (sx, sy, sw, sh), (tx, ty, tw, th) = self.source, self.target
        width, height = self.canvas
        if interpolation is None:
            interpolation = cv2.INTER_AREA if tw * th < sw * sh else cv2.INTER_LINEAR
        canvas = np.zeros((height, width, *frame.shape[2:]), np.uint8)
        part = np.ascontiguousarray(frame[sy : sy + sh, sx : sx + sw])
        canvas[ty : ty + th, tx : tx + tw] = cv2.resize(part, (tw, th), interpolation=interpolation)
        return canvas


def place(frame: tuple[int, int], canvas: tuple[int, int], *, crop_up_to: int = 0) -> Placement:
    """Return the place of a frame on a canvas: letterboxed in the middle, aspect kept. Sizes are (width, height).

    crop_up_to: if filling the canvas would cut off fewer canvas pixels than this, it is filled instead. So a rendered
    background has no thin black bars, which would come from sides that are multiples of 16.
    """
    (w, h), (width, height) = frame, canvas
    fill = max(width / w, height / h)
    if w * fill - width < crop_up_to and h * fill - height < crop_up_to:
        cut_w, cut_h = min(w, round(width / fill)), min(h, round(height / fill))
        return Placement(((w - cut_w) // 2, (h - cut_h) // 2, cut_w, cut_h), (0, 0, width, height), canvas)
    scale = min(width / w, height / h)
    new_w, new_h = (max(1, min(limit, round(side * scale))) for side, limit in ((w, width), (h, height)))
    return Placement((0, 0, w, h), ((width - new_w) // 2, (height - new_h) // 2, new_w, new_h), canvas)


def _nearest(side: float) -> int:
    return min(MAX_SIDE, max(MIN_SIDE, round(side / GRID) * GRID))

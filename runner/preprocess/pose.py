"""Pose: a person's box in, 133 whole-body points out.

In:   uint8 RGB frames, boxes and a network of the ViTPose contract. Out: points float32 [133, 3]: x, y in pixels of the
frame, and the heatmap's peak as confidence (raw: it can exceed 1). Never: which person, or what came before.

Contract: [n, 3, 256, 192] float32, ImageNet-normalised, → heatmaps [n, 133, 64, 48]. The network was trained on RGB;
the official pipeline hands it BGR, which parity mode repeats. Decoding is DARK without UDP, as there: what
the generator has learned to read.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import cv2
import numpy as np

from runner.preprocess.detect import Box
from runner.preprocess.sessions import Network, check_shape, open_network

__all__ = ["JOINTS", "Crop", "PoseEstimator", "crop_of", "decode_heatmaps", "network_input"]

JOINTS = 133
WIDTH, HEIGHT = 192, 256
MAP_WIDTH, MAP_HEIGHT = 48, 64
MARGIN = 1.25
LEAST_SIDE = 10  # a smaller box is a mistake: the whole frame is looked at instead
MEAN = np.array([0.485, 0.456, 0.406], np.float32)
STD = np.array([0.229, 0.224, 0.225], np.float32)
SLOPE, LEVEL = np.float32(1) / (255 * STD), MEAN / STD  # (value / 255 - mean) / std in one step
BLUR = cv2.getGaussianKernel(11, 2.0).ravel()  # float64; 2.0 is OpenCV's own sigma for 11 taps
TINY = 1e-10
RADIUS = 7  # 5 for the blur and 2 for the second differences: a 15x15 patch holds all that the Taylor step sees
# float64 [5, 15]: row k blurs values k … k + 10 of 15, so that a patch is blurred by two products.
BLUR_DOWN = np.stack([np.concatenate([np.zeros(k), BLUR, np.zeros(4 - k)]) for k in range(5)])


@dataclass(frozen=True)
class Crop:
    """What the network looks at: centre and size in pixels of the frame, unrounded, 3:4."""

    cx: float
    cy: float
    width: float
    height: float

    @property
    def corners(self) -> tuple[int, int, int, int]:
        """x1, y1, x2, y2 in whole pixels (half to even); may lie outside of the frame."""
        x1, y1 = round(self.cx - self.width / 2), round(self.cy - self.height / 2)
        x2, y2 = round(self.cx + self.width / 2), round(self.cy + self.height / 2)
        return x1, y1, max(x2, x1 + 1), max(y2, y1 + 1)


class PoseEstimator:
    """Finds 133 points in each crop with a ViTPose network."""

    def __init__(self, network: Network) -> None:
        check_shape(network, input_tail=(3, HEIGHT, WIDTH), output_tails=[(JOINTS, MAP_HEIGHT, MAP_WIDTH)])
        self.network = network

    @classmethod
    def load(cls, path: Path, device: str = "cpu") -> PoseEstimator:
        return cls(open_network(path, device))

    def points(self, frames: np.ndarray, boxes: Sequence[Box | None], *, bgr: bool = False) -> np.ndarray:
        """uint8 RGB [n, H, W, 3] and a box each (None: look at the whole frame) → float32 [n, 133, 3]."""
        size = (frames.shape[2], frames.shape[1])
        crops = [crop_of(box, size) for box in boxes]
        images = np.stack([network_input(f, c, bgr=bgr) for f, c in zip(frames, crops, strict=True)])
        return decode_heatmaps(self.network.run(images), crops)


def crop_of(box: Box | None, size: tuple[int, int]) -> Crop:
    """The 3:4 crop around a box, a quarter larger; around the whole frame (width, height) if there is no good box."""
    if box is None or box.score <= 0 or box.x2 - box.x1 < LEAST_SIDE or box.y2 - box.y1 < LEAST_SIDE:
        x1, y1, x2, y2 = 0.0, 0.0, float(size[0]), float(size[1])
    else:
        x1, y1, x2, y2 = box.x1, box.y1, box.x2, box.y2
    tall = MARGIN * max((x2 - x1) * (HEIGHT / WIDTH), y2 - y1)
    return Crop((x1 + x2) / 2, (y1 + y2) / 2, tall * (WIDTH / HEIGHT), tall)


def network_input(frame: np.ndarray, crop: Crop, *, bgr: bool = False) -> np.ndarray:
    """uint8 RGB [H, W, 3] → float32 [3, 256, 192], normalised; outside of the frame is black before normalising.

    The bilinear resize of `cv2.resize` on float32, but only the two rows and columns that each pixel is mixed from are
    read: at most 512x384 of a crop that can hold ten times as many.
    """
    x1, y1, x2, y2 = crop.corners
    columns, across = _taps(x1, x2 - x1, WIDTH)
    rows, down = _taps(y1, y2 - y1, HEIGHT)
    where = np.empty((2 * HEIGHT, 2 * WIDTH, 2), np.int16)
    where[..., 0], where[..., 1] = columns, rows[:, None]
    near = cv2.remap(frame, where, None, cv2.INTER_NEAREST, borderMode=cv2.BORDER_CONSTANT, borderValue=0)
    image = np.empty((3, HEIGHT, WIDTH), np.float32)
    planes = cv2.split(near)[:: -1 if bgr else 1]
    for out, plane, slope, level in zip(image, planes, SLOPE, LEVEL, strict=True):
        values = plane.astype(np.float32)
        tall = _mixed(values[:HEIGHT], values[HEIGHT:], down[:, None])
        np.multiply(_mixed(tall[:, :WIDTH], tall[:, WIDTH:], across), slope, out=out)
        np.subtract(out, level, out=out)
    return image


def _taps(start: int, length: int, count: int) -> tuple[np.ndarray, np.ndarray]:
    """Of `length` pixels from `start` on, resized to `count`: the pairs mixed, [2 * count] (all first ones, then all
    second ones), and the share of the second, float32 [count]."""
    at = ((np.arange(count) + 0.5) * (length / count) - 0.5).clip(0, length - 1)
    low = np.floor(at)
    return start + np.concatenate([low, np.minimum(low + 1, length - 1)]), (at - low).astype(np.float32)


def _mixed(first: np.ndarray, second: np.ndarray, share: np.ndarray) -> np.ndarray:
    mixed = np.subtract(second, first)
    mixed *= share
    mixed += first
    return mixed


def decode_heatmaps(heatmaps: np.ndarray, crops: Sequence[Crop]) -> np.ndarray:
    """Heatmaps float32 [n, J, 64, 48] and the crops they came from → points float32 [n, J, 3] in pixels of the frame.

    DARK: the peak, then one Newton step on the logarithm of the map blurred by an 11-tap Gaussian. Equal to blurring
    whole maps, but only the 15x15 values that the step depends on are blurred, for all maps at once.
    """
    n, joints = heatmaps.shape[:2]
    maps = heatmaps.reshape(n * joints, MAP_HEIGHT, MAP_WIDTH)
    flat = heatmaps.reshape(n * joints, -1)
    peak = flat.argmax(1)
    score = flat[np.arange(len(flat)), peak]
    px, py = peak % MAP_WIDTH, peak // MAP_WIDTH
    nothing = score <= 0
    px, py = np.where(nothing, -1, px), np.where(nothing, -1, py)
    xy = np.stack([px, py], 1).astype(np.float64)
    inside = np.flatnonzero((px > 1) & (px < MAP_WIDTH - 2) & (py > 1) & (py < MAP_HEIGHT - 2))
    if len(inside):
        xy[inside] += _newton_steps(_log_windows(maps, inside, px[inside], py[inside]))
    xy = xy.reshape(n, joints, 2)
    size = np.array([[c.width, c.height] for c in crops])[:, None]
    centre = np.array([[c.cx, c.cy] for c in crops])[:, None]
    frame_xy = xy * (size / (MAP_WIDTH, MAP_HEIGHT)) + centre - size / 2
    return np.concatenate([frame_xy, score.reshape(n, joints, 1)], 2).astype(np.float32)


def _log_windows(maps: np.ndarray, chosen: np.ndarray, px: np.ndarray, py: np.ndarray) -> np.ndarray:
    """Log of the blurred `maps[chosen]`, 5x5 around each peak: float64 [m, 5, 5], up to a constant a map."""
    reach = np.arange(-RADIUS, RADIUS + 1)
    rows, columns = (py[:, None] + reach)[:, :, None], (px[:, None] + reach)[:, None, :]
    on_map = (rows >= 0) & (rows < MAP_HEIGHT) & (columns >= 0) & (columns < MAP_WIDTH)
    patches = maps[chosen[:, None, None], rows.clip(0, MAP_HEIGHT - 1), columns.clip(0, MAP_WIDTH - 1)]
    patches = np.where(on_map, patches.astype(np.float64), 0.0)  # the blur sees zeros outside of the map
    blurred = BLUR_DOWN @ patches @ BLUR_DOWN.T
    # The definition rescales each map to its old peak before it clips at 1e-10. The factor is at least 1, so it is
    # needed only where something could be clipped: maps with negative or vanishing values beside the peak.
    for i in np.flatnonzero(blurred.min(axis=(1, 2)) < TINY):
        whole = maps[chosen[i]].astype(np.float64)
        highest = cv2.sepFilter2D(whole, -1, BLUR, BLUR, borderType=cv2.BORDER_CONSTANT).max()
        if highest:
            blurred[i] *= whole.max() / highest
    return np.log(np.maximum(blurred, TINY))


def _newton_steps(f: np.ndarray) -> np.ndarray:
    """Offsets [m, 2] (x, y) to the top of the parabola through 5x5 windows f [m, y, x]; 0 where there is no top."""
    dx = (f[:, 2, 3] - f[:, 2, 1]) / 2
    dy = (f[:, 3, 2] - f[:, 1, 2]) / 2
    dxx = (f[:, 2, 4] - 2 * f[:, 2, 2] + f[:, 2, 0]) / 4
    dyy = (f[:, 4, 2] - 2 * f[:, 2, 2] + f[:, 0, 2]) / 4
    dxy = (f[:, 3, 3] - f[:, 1, 3] - f[:, 3, 1] + f[:, 1, 1]) / 4
    det = dxx * dyy - dxy * dxy
    with np.errstate(divide="ignore", invalid="ignore", over="ignore"):
        step = np.stack([-(dyy * dx - dxy * dy) / det, -(dxx * dy - dxy * dx) / det], 1)
    # A step longer than the map comes from a flat top, where the determinant is rounding noise. The official code takes
    # it, and OpenCV then refuses coordinates beyond 32 bits.
    usable = np.isfinite(step).all(1) & (np.abs(step).max(1) <= MAP_HEIGHT)
    return np.where(usable[:, None], step, 0.0)

"""ViTPose: find a person's 133 whole-body points.

In:   uint8 RGB frames, boxes and a network of the ViTPose contract. Out: points float32 [133, 3]: x, y in pixels of the
      frame, and the heatmap's peak as confidence (raw: it can exceed 1). Never: choosing a person, other frames.

Contract: [n, 3, 256, 192] float32, ImageNet-normalised, → heatmaps [n, 133, 64, 48]. The network was trained on RGB;
the official preprocessing gives it BGR, and parity mode does the same. Decoding is DARK without UDP, as in the official
code: the generator was trained with such points.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import cv2
import numpy as np

from runner.preprocess.networks.sessions import Network, check_shape, open_network
from runner.preprocess.networks.yolov10 import Box

__all__ = ["JOINTS", "Crop", "PoseEstimator", "crop_of", "decode_heatmaps", "network_input"]

JOINTS = 133
WIDTH, HEIGHT = 192, 256
MAP_WIDTH, MAP_HEIGHT = 48, 64
MARGIN = 1.25
LEAST_SIDE = 10  # a smaller box is a mistake: the whole frame is used instead
MEAN = np.array([0.485, 0.456, 0.406], np.float32)
STD = np.array([0.229, 0.224, 0.225], np.float32)
SLOPE, LEVEL = np.float32(1) / (255 * STD), MEAN / STD  # (value / 255 - mean) / std in one step
BLUR = cv2.getGaussianKernel(11, 2.0).ravel()  # float64; 2.0 is OpenCV's own sigma for 11 taps
TINY = 1e-10
RADIUS = 7  # 5 for the blur and 2 for the second differences: the Taylor step depends on a 15x15 patch
# float64 [5, 15]: row k blurs values k … k + 10 of 15, so that a patch is blurred by two products.
BLUR_DOWN = np.stack([np.concatenate([np.zeros(k), BLUR, np.zeros(4 - k)]) for k in range(5)])


@dataclass(frozen=True)
class Crop:
    """The part of a frame that the network gets: centre and size in pixels of the frame, not rounded, 3:4."""

    cx: float
    cy: float
    width: float
    height: float

    @property
    def corners(self) -> tuple[int, int, int, int]:
        """x1, y1, x2, y2 in whole pixels (half to even); may be outside the frame.

        They are the centre minus and plus half of the size, computed as in the official code, which maps the input's
        corners back through an inverted matrix. Crops of whole boxes often end halfway between two pixels, where the
        last bits decide the rounding.
        """
        tall, wide = self.height, self.height / (HEIGHT / WIDTH)
        to_input = np.array(
            [
                [WIDTH / wide, 0, WIDTH * (-self.cx / wide + 0.5)],
                [0, HEIGHT / tall, HEIGHT * (-self.cy / tall + 0.5)],
                [0, 0, 1],
            ]
        )
        to_frame = np.linalg.inv(to_input)
        x1, y1 = (round(at) for at in np.dot(to_frame, (0.0, 0.0, 1.0))[:2])
        x2, y2 = (round(at) for at in np.dot(to_frame, (float(WIDTH), float(HEIGHT), 1.0))[:2])
        return x1, y1, max(x2, x1 + 1), max(y2, y1 + 1)


class PoseEstimator:
    """Finds 133 points in each crop with a ViTPose network."""

    input_size = (3, HEIGHT, WIDTH)

    def __init__(self, network: Network) -> None:
        check_shape(network, input_tail=(3, HEIGHT, WIDTH), output_tails=[(JOINTS, MAP_HEIGHT, MAP_WIDTH)])
        self.network = network

    @classmethod
    def load(cls, path: Path, device: str = "cpu") -> PoseEstimator:
        return cls(open_network(path, device))

    def points(self, frames: np.ndarray, boxes: Sequence[Box | None], *, bgr: bool = False) -> np.ndarray:
        """Return points float32 [n, 133, 3] for frames uint8 RGB [n, H, W, 3] and boxes (None: the whole frame)."""
        images = self.network.images(len(frames), self.input_size)
        crops = [self.cut(frame, box, out=out, bgr=bgr) for frame, box, out in zip(frames, boxes, images, strict=True)]
        return self.decode(self.network.run(images), crops)

    def cut(self, frame: np.ndarray, box: Box | None, *, out: np.ndarray, bgr: bool = False) -> Crop:
        """Write the network's input for `box` of uint8 RGB [H, W, 3] into `out`, float32 [3, 256, 192]. Returns the
        crop."""
        crop = crop_of(box, (frame.shape[1], frame.shape[0]))
        network_input(frame, crop, bgr=bgr, out=out)
        return crop

    def decode(self, output: np.ndarray, crops: Sequence[Crop]) -> np.ndarray:
        """Decode the network's output for `crops` to points float32 [n, 133, 3] in pixels of the frames."""
        return decode_heatmaps(output, crops)


def crop_of(box: Box | None, size: tuple[int, int]) -> Crop:
    """Return the 3:4 crop around a box, a quarter larger; around the whole frame (width, height) without a good box."""
    if box is None or box.score <= 0 or box.x2 - box.x1 < LEAST_SIDE or box.y2 - box.y1 < LEAST_SIDE:
        x1, y1, x2, y2 = 0.0, 0.0, float(size[0]), float(size[1])
    else:
        x1, y1, x2, y2 = box.x1, box.y1, box.x2, box.y2
    tall = 200 * (
        max((x2 - x1) * (HEIGHT / WIDTH), y2 - y1) / 200 * MARGIN
    )  # divided and multiplied by 200 as in the official code, for the same last bits
    return Crop((x1 + x2) / 2, (y1 + y2) / 2, tall * (WIDTH / HEIGHT), tall)


def network_input(frame: np.ndarray, crop: Crop, *, bgr: bool = False, out: np.ndarray | None = None) -> np.ndarray:
    """Return the input for uint8 RGB [H, W, 3]: float32 [3, 256, 192], normalised, in `out` if given. Black outside the
    frame.

    It equals a bilinear `cv2.resize` on float32. But only the two rows and columns that each pixel is mixed from are
    read: at most 512x384 pixels of a crop that can have ten times as many, and none outside the frame. A warp of bytes
    would take half the time, but round to whole levels, which can move joints by pixels.
    """
    x1, y1, x2, y2 = crop.corners
    columns, across, x = _taps(x1, x2 - x1, WIDTH, frame.shape[1])
    rows, down, y = _taps(y1, y2 - y1, HEIGHT, frame.shape[0])
    image = np.empty((3, HEIGHT, WIDTH), np.float32) if out is None else out
    if len(down) < HEIGHT or len(across) < WIDTH:
        image[:] = -LEVEL[:, None, None]  # black
    if not (len(down) and len(across)):
        return image
    pairs = cv2.split(_gathered(frame, rows, columns))[:3][:: -1 if bgr else 1]
    values = np.empty((len(rows), len(columns)), np.float32)
    tall = np.empty((len(down), len(columns)), np.float32)
    for plane, bytes_, slope, level in zip(image[:, y, x], pairs, SLOPE, LEVEL, strict=True):
        np.copyto(values, bytes_)
        _mix(values[: len(down)], values[len(down) :], down[:, None], tall)
        _mix(tall[:, : len(across)], tall[:, len(across) :], across, plane)
        np.multiply(plane, slope, out=plane)
        np.subtract(plane, level, out=plane)
    return image


def _gathered(frame: np.ndarray, rows: np.ndarray, columns: np.ndarray) -> np.ndarray:
    """Return frame[rows, columns] as uint8 RGBx [r, c, 4], 0 outside the frame.

    It takes whole rows, then columns as words of four bytes: this needs half the time of taking pixels of three bytes.
    """
    height, width = frame.shape[:2]
    left, right = max(int(columns.min()), 0), min(int(columns.max()) + 1, width)
    strip = np.empty((len(rows), right - left + 1, 4), np.uint8)
    strip[:, -1] = 0  # stands for all columns outside
    cv2.cvtColor(frame[rows.clip(0, height - 1), left:right], cv2.COLOR_RGB2RGBA, dst=strip[:, :-1])
    strip[(rows < 0) | (rows >= height)] = 0
    inside = (columns >= left) & (columns < right)
    words = strip.view(np.uint32)[..., 0].take(np.where(inside, columns - left, right - left), axis=1)
    return words[..., None].view(np.uint8)


def _taps(start: int, length: int, count: int, end: int) -> tuple[np.ndarray, np.ndarray, slice]:
    """Return the taps of resizing `length` pixels from `start` on to `count`, for the k outputs that depend on pixels
    0 … end - 1: (indices int64 [2 * k], all first taps, then all second ones; shares of the second, float32 [k]; the
    slice of these outputs)."""
    at = np.minimum(np.maximum((np.arange(count) + 0.5) * (length / count) - 0.5, 0), length - 1)
    low = at.astype(np.int64)
    first, second = start + low, start + np.minimum(low + 1, length - 1)
    seen = slice(int(np.searchsorted(second, 0)), int(np.searchsorted(first, end)))
    return np.concatenate([first[seen], second[seen]]), (at - low)[seen].astype(np.float32), seen


def _mix(first: np.ndarray, second: np.ndarray, share: np.ndarray, out: np.ndarray) -> None:
    np.subtract(second, first, out=out)
    out *= share
    out += first


def decode_heatmaps(heatmaps: np.ndarray, crops: Sequence[Crop]) -> np.ndarray:
    """Decode heatmaps float32 [n, J, 64, 48] of the crops to points float32 [n, J, 3] in pixels of the frame.

    DARK: the peak, then one Newton step on the logarithm of the map, blurred by an 11-tap Gaussian. The result equals
    that of blurring whole maps, but only the 15x15 values that the step depends on are blurred, for all maps at once.
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
    """Return the log of the blurred `maps[chosen]` around each peak: float64 [m, 5, 5], up to a constant per map."""
    patches = np.empty((len(chosen), 2 * RADIUS + 1, 2 * RADIUS + 1))
    whole = (px >= RADIUS) & (px < MAP_WIDTH - RADIUS) & (py >= RADIUS) & (py < MAP_HEIGHT - RADIUS)
    every = np.lib.stride_tricks.sliding_window_view(maps, patches.shape[1:], axis=(1, 2))
    patches[whole] = every[chosen[whole], py[whole] - RADIUS, px[whole] - RADIUS]
    patches[~whole] = _at_border(maps, chosen[~whole], px[~whole], py[~whole])
    # One product per patch, not one over all: its rounding would depend on the other patches of the batch.
    blurred = BLUR_DOWN @ patches @ BLUR_DOWN.T
    # DARK rescales each map to its old peak before it clips at 1e-10. The factor is at least 1, so it is needed only
    # for maps in which values could be clipped: those with negative or very small values beside the peak.
    for i in np.flatnonzero(blurred.min(axis=(1, 2)) < TINY):
        heatmap = maps[chosen[i]].astype(np.float64)
        highest = cv2.sepFilter2D(heatmap, -1, BLUR, BLUR, borderType=cv2.BORDER_CONSTANT).max()
        if highest:
            blurred[i] *= heatmap.max() / highest
    return np.log(np.maximum(blurred, TINY))


def _at_border(maps: np.ndarray, chosen: np.ndarray, px: np.ndarray, py: np.ndarray) -> np.ndarray:
    """Return patches [m, 15, 15] that reach over the edge of `maps[chosen]`, with zeros outside."""
    reach = np.arange(-RADIUS, RADIUS + 1)
    rows, columns = py[:, None] + reach, px[:, None] + reach
    on_map = ((rows >= 0) & (rows < MAP_HEIGHT))[:, :, None] & ((columns >= 0) & (columns < MAP_WIDTH))[:, None, :]
    starts = chosen[:, None] * (MAP_HEIGHT * MAP_WIDTH) + rows.clip(0, MAP_HEIGHT - 1) * MAP_WIDTH
    patches = maps.reshape(-1).take(starts[:, :, None] + columns.clip(0, MAP_WIDTH - 1)[:, None, :])
    patches *= on_map
    return patches


def _newton_steps(f: np.ndarray) -> np.ndarray:
    """Return the offsets [m, 2] (x, y) to the top of the parabola through 5x5 windows f [m, y, x]; 0 without a top."""
    dx = (f[:, 2, 3] - f[:, 2, 1]) / 2
    dy = (f[:, 3, 2] - f[:, 1, 2]) / 2
    dxx = (f[:, 2, 4] - 2 * f[:, 2, 2] + f[:, 2, 0]) / 4
    dyy = (f[:, 4, 2] - 2 * f[:, 2, 2] + f[:, 0, 2]) / 4
    dxy = (f[:, 3, 3] - f[:, 1, 3] - f[:, 3, 1] + f[:, 1, 1]) / 4
    det = dxx * dyy - dxy * dxy
    with np.errstate(divide="ignore", invalid="ignore", over="ignore"):
        step = np.stack([-(dyy * dx - dxy * dy) / det, -(dxx * dy - dxy * dx) / det], 1)
    # A step longer than the map comes from a flat top, where the determinant is rounding noise. The official code uses
    # it, and OpenCV then fails on coordinates beyond 32 bits.
    usable = np.isfinite(step).all(1) & (np.abs(step).max(1) <= MAP_HEIGHT)
    return np.where(usable[:, None], step, 0.0)

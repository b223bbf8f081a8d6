"""Frame metrics: measures the differences of a new video from the baseline's, frame by frame, in one pass.

In:   the frames of both outputs, the joints of the segments, boxes of the person. Out: `Measurements`.
Never: limits, verdicts, identity (see `Measurements.identity`), storage.

Memory holds a window of frames and a thumbnail of each frame. PSNR and SSIM equal those of scikit-image; SSIM has the
parameters of Wang et al. (2004): a Gaussian window, sigma 1.5.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, field
from fractions import Fraction
from itertools import zip_longest
from math import ceil, floor
from typing import Protocol

import numpy as np

from runner.regression.alignment import align_thumbnails, make_thumbnail, thumbnail_shape
from runner.regression.findings import PSNR_OF_EQUAL, Drift, FrameValues, JointDrift, Measurements, SegmentDrift
from runner.regression.outputs import RenderedFrames
from runner.video.drift import DriftMeter, MeasuredDrift, reduce_picture, to_lab

__all__ = ["LocatedPerson", "find_shift", "measure", "psnr", "ssim"]

WINDOW = 8  # frames of each video in memory
THREADS = min(4, os.cpu_count() or 1)  # OpenCV, numpy and scipy release the interpreter's lock
SIGMA = 1.5  # pixels; of SSIM's window
WINDOW_SIDE = 11  # pixels: scikit-image cuts the window off at 3.5 sigma
COLOUR_PIXELS = 4096  # pixels of a box that are used for its mean colour
SHIFT_GAIN_DB = 3.0  # undoing a plain shift at least halves the squared error
FRACTION_GAIN_DB = 1.0
SHIFT_PIXELS = (0.25, 64.0)  # least and most
ECC_STOPS = (1 | 2, 100, 1e-7)  # OpenCV's COUNT | EPS: iterations, least gain of the coefficient
ECC_BLUR = 5  # pixels
UNDO = 1 | 16  # OpenCV's INTER_LINEAR | WARP_INVERSE_MAP: pixel (x, y) comes from (x + right, y + down)


class LocatedPerson(Protocol):
    """The person's box in each frame of an output."""

    def person(self, frame: int, fps: Fraction | None = None) -> tuple[int, int, int, int] | None:
        """Return (x1, y1, x2, y2) in pixels of frame `frame` at `fps`, without x2 and y2; None if it is unknown."""


def measure(
    new: RenderedFrames,
    baseline: RenderedFrames,
    *,
    joints: Sequence[int],
    people: LocatedPerson | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> Measurements:
    """Measure all metrics except identity, on the frames that both videos have.

    joints: the first frame of each segment after the first; those beyond the common frames are left out. people: boxes
    in pixels of `new`. progress: called with (frames done, all frames).
    If the sizes differ, PSNR, SSIM and the largest difference are None, and colour and drift are measured against the
    baseline's frames scaled to the new size. Raises InputUnreadable for damaged outputs.
    """
    common, total = min(new.frames, baseline.frames), max(new.frames, baseline.frames)
    same_size = new.size == baseline.size
    meter = DriftMeter([joint for joint in joints if 0 < joint < common], common)
    found = _Series()
    # One array each: many small arrays between freed large ones would keep the heap from shrinking.
    thumbnails = [np.empty((side.frames, *thumbnail_shape(*side.size)), np.uint8) for side in (new, baseline)]
    with ThreadPoolExecutor(THREADS) as pool:
        for begin, frames, others in _windows(new, baseline):
            pairs = min(len(frames), len(others))
            boxes = [people.person(begin + i, new.fps) if people else None for i in range(pairs)]
            scaled = others[:pairs] if same_size else _resize(others[:pairs], new.size)
            compared = pool.map(_compare_frames, frames[:pairs], scaled, boxes, [same_size] * pairs)
            if pairs:
                meter.add(frames[:pairs], scaled)
            for side, window in zip(thumbnails, (frames, others), strict=True):
                for index, frame in enumerate(window, begin):
                    side[index] = make_thumbnail(frame)
            for index, values in enumerate(compared):
                found.add(values, frames[index], scaled[index])
            if progress:
                progress(min(begin + max(len(frames), len(others)), total), total)
    same_shape = thumbnails[0].shape[1:] == thumbnails[1].shape[1:]
    return Measurements(
        frames_baseline=baseline.frames,
        frames_new=new.frames,
        frames_compared=common,
        psnr=_summarise(found.psnr, 3),
        ssim=_summarise(found.ssim, 6),
        largest_difference=max(found.largest, default=None),
        largest_difference_frame=int(np.argmax(found.largest)) if found.largest else None,
        colour=max(found.colour),
        colour_frame=int(np.argmax(found.colour)),
        shift=find_shift(*found.worst) if found.worst else None,
        misalignments=align_thumbnails(*thumbnails) if same_shape else [],
        drift=_drift(meter.result()),
    )


@dataclass
class _Values:
    colour: float
    psnr: float | None = None
    ssim: float | None = None
    largest: int | None = None


@dataclass
class _Series:
    """Values of each frame so far, and the pair of frames whose PSNR is the lowest."""

    psnr: list[float] = field(default_factory=list)
    ssim: list[float] = field(default_factory=list)
    largest: list[int] = field(default_factory=list)
    colour: list[float] = field(default_factory=list)
    worst: tuple[np.ndarray, np.ndarray] | None = None

    def add(self, values: _Values, frame: np.ndarray, other: np.ndarray) -> None:
        self.colour.append(values.colour)
        if values.ssim is not None:
            self.ssim.append(values.ssim)
        if values.psnr is None or values.largest is None:
            return
        if values.psnr < min(self.psnr, default=PSNR_OF_EQUAL):
            self.worst = frame.copy(), other.copy()
        self.psnr.append(values.psnr)
        self.largest.append(values.largest)


def _windows(new: RenderedFrames, baseline: RenderedFrames) -> Iterator[tuple[int, np.ndarray, np.ndarray]]:
    """Yield (index of the first frame, window, the baseline's window); after the shorter video its window is empty."""
    nothing = np.zeros((0, 0, 0, 3), np.uint8)
    begin = 0
    for frames, others in zip_longest(new.windows(WINDOW), baseline.windows(WINDOW), fillvalue=nothing):
        yield begin, frames, others
        begin += WINDOW


def _resize(frames: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    import cv2

    scaled = [cv2.resize(frame, size, interpolation=cv2.INTER_AREA) for frame in frames]
    return np.stack(scaled) if scaled else np.zeros((0, size[1], size[0], 3), np.uint8)


def _compare_frames(
    frame: np.ndarray, other: np.ndarray, box: tuple[int, int, int, int] | None, same_size: bool
) -> _Values:
    import cv2

    values = _Values(float(np.linalg.norm(_mean_lab(frame, box) - _mean_lab(other, box))))
    if same_size:
        values.psnr, values.largest = psnr(frame, other), int(cv2.norm(frame, other, cv2.NORM_INF))
        values.ssim = ssim(frame, other) if min(frame.shape[:2]) >= WINDOW_SIDE else None
    return values


def _mean_lab(frame: np.ndarray, box: tuple[int, int, int, int] | None) -> np.ndarray:
    height, width = frame.shape[:2]
    if box is not None:
        x1, y1, x2, y2 = max(0, box[0]), max(0, box[1]), min(width, box[2]), min(height, box[3])
        if x1 < x2 and y1 < y2:
            frame = frame[y1:y2, x1:x2]
    return to_lab(reduce_picture(frame, COLOUR_PIXELS)).mean(axis=(0, 1))


def psnr(frame: np.ndarray, other: np.ndarray) -> float:
    """Return the PSNR in dB of two uint8 [H, W, 3]; 100 for equal frames, which is the maximum."""
    from skimage.metrics import peak_signal_noise_ratio

    if np.array_equal(frame, other):
        return PSNR_OF_EQUAL
    return min(PSNR_OF_EQUAL, float(peak_signal_noise_ratio(other, frame, data_range=255)))


def ssim(frame: np.ndarray, other: np.ndarray) -> float:
    """Return the mean SSIM of two uint8 [H, W, 3]; 1 for equal frames. Each side needs at least WINDOW_SIDE pixels."""
    from skimage.metrics import structural_similarity

    if np.array_equal(frame, other):
        return 1.0
    found = structural_similarity(
        frame, other, gaussian_weights=True, sigma=SIGMA, use_sample_covariance=False, data_range=255, channel_axis=2
    )
    return float(found)


def find_shift(frame: np.ndarray, other: np.ndarray) -> tuple[float, float] | None:
    """Return the shift (right, down) in pixels from `other` to `frame`, uint8 [H, W, 3]; None if it is no plain shift.

    Phase correlation finds large shifts of textured pictures. ECC (ascent of the correlation coefficient) also finds
    small shifts of smooth pictures. A candidate counts if moving `frame` back increases the PSNR to `other` by 3 dB.
    """
    import cv2

    grey = [cv2.cvtColor(picture, cv2.COLOR_RGB2GRAY).astype(np.float32) for picture in (other, frame)]
    window = cv2.createHanningWindow(grey[0].shape[::-1], cv2.CV_32F)
    found = {cv2.phaseCorrelate(grey[0], grey[1], window)[0]}
    for right, down in ((0.0, 0.0), *found):
        start = np.array([[1, 0, right], [0, 1, down]], np.float32)
        with suppress(cv2.error):  # pictures that do not correlate, or flat ones
            moved = cv2.findTransformECC(grey[0], grey[1], start, cv2.MOTION_TRANSLATION, ECC_STOPS, None, ECC_BLUR)[1]
            found.add((float(moved[0, 2]), float(moved[1, 2])))
    height, width = frame.shape[:2]
    whole = {(float(x), float(y)) for right, down in found for x in _around(right) for y in _around(down)}
    least = psnr(frame, other) + SHIFT_GAIN_DB
    best: tuple[float, float] | None = None
    for right, down in (*sorted(whole), *sorted(found)):
        if not SHIFT_PIXELS[0] <= np.hypot(right, down) <= min(SHIFT_PIXELS[1], width / 4, height / 4):
            continue
        back = cv2.warpAffine(frame, np.array([[1, 0, right], [0, 1, down]], np.float32), (width, height), flags=UNDO)
        edge_x, edge_y = ceil(abs(right)), ceil(abs(down))
        inside = slice(edge_y, height - edge_y), slice(edge_x, width - edge_x)
        after = psnr(np.ascontiguousarray(back[inside]), np.ascontiguousarray(other[inside]))
        # Interpolation also smooths coding noise, so a shift by a part of a pixel must gain more than that.
        margin = 0 if (right, down) in whole else FRACTION_GAIN_DB
        if after >= least + margin:
            least, best = after, (round(right, 2), round(down, 2))
    return best


def _around(value: float) -> tuple[int, int]:
    return floor(value), ceil(value)


def _summarise(values: list[float], digits: int) -> FrameValues | None:
    """Summarise the values of a metric whose lower values are worse."""
    if not values:
        return None
    at = int(np.argmin(values))
    return FrameValues(
        mean=float(np.mean(values)),
        p5=float(np.percentile(values, 5)),
        worst=values[at],
        worst_frame=at,
        values=[round(value, digits) for value in values],
    )


def _drift(measured: MeasuredDrift) -> Drift:
    """Return the drift as findings. Every segment must have been measured against the baseline."""
    segments = []
    for number, segment in enumerate(measured.segments, 1):
        if segment.gain is None or segment.offset is None:
            raise ValueError(f"segment {number} was measured without a baseline")
        segments.append(
            SegmentDrift(
                segment=number,
                begin=segment.begin,
                end=segment.end,
                gain=segment.gain,
                offset=segment.offset,
                delta_e=segment.delta_e or 0.0,
                within=segment.within,
                laplacian=segment.laplacian,
                laplacian_ratio=segment.laplacian_ratio or 0.0,
                motion=segment.motion,
                motion_ratio=segment.motion_ratio or 0.0,
                still=segment.still,
            )
        )
    joints = [
        JointDrift(
            frame=joint.frame,
            step=joint.step,
            excess=joint.excess,
            gain=joint.gain,
            offset=joint.offset,
            still=joint.still,
        )
        for joint in measured.joints
    ]
    return Drift(joint_drift=measured.joint_drift, joints=joints, segments=segments)

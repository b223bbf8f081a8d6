"""Drift: measure how colour, texture and motion of a video change from segment to segment.

In:   uint8 RGB frames in windows, the first frame of each later segment; optionally the same frames of a baseline.
Out:  delta E, gain and offset at joints and in segments, Laplacian energy, motion energy.
Never: files, jobs, limits, more than a few reduced pictures in memory.

The frames are read once, in order. Colours are measured on pictures reduced by area to about 14,000 pixels, and on
still pixels only: those that hardly change from frame to frame in a segment. So the moving person is left out. A
comparison of each pixel with itself separates colour from content, which global statistics do not. Delta E is CIE76 in
Lab (D65).
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace

import numpy as np

__all__ = [
    "STILL_SHARE",
    "ColourFit",
    "DriftMeter",
    "MeasuredDrift",
    "MeasuredJoint",
    "MeasuredSegment",
    "SegmentStatistics",
    "fit_colour",
    "reduce_picture",
    "to_lab",
]

REDUCED_PIXELS = 14_400  # 160x90: a limb still covers several pixels, and coding noise averages out
FIT_PIXELS = 4096  # still pixels used for a fit, evenly spaced: a fit of three channels takes about a millisecond
NEAR = 4  # frames on each side of a joint
AROUND = 12  # frames on each side, in which the steps between other frames are measured
# A still pixel's frame-to-frame changes, root mean square, in levels: H.264 at crf 18 stays below 1 on a still
# background. A noisy picture may have twice the changes of its quietest tenth, up to the second number.
STILL_LEVELS = (1.5, 6.0)
STILL_SHARE = 0.05  # of the picture; a smaller still area may be a logo or a border
SPREAD = 8.0  # levels, standard deviation; on a plainer background noise of 0.5 levels would bias a gain by 0.4 %
CLIPPED = 3.0  # levels from black and white, within which a gain may have been cut off
GAINS = (0.5, 2.0)  # a gain outside is taken for other content, not for drift
HUBER, TUKEY = 1.345, 4.685  # robust standard deviations; each 95 % efficient for normal noise
LEAST_SCALE = 1.0  # levels: rounding alone must not make an outlier, even where most pixels do not change
ENERGY_FLOOR = 0.01  # levels squared, added to both energies of a ratio: 0 to 0 gives 1

# Linear sRGB to XYZ (IEC 61966-2-1), each row divided by the white point D65.
TO_XYZ = np.array(
    [
        [0.412453, 0.357580, 0.180423],
        [0.212671, 0.715160, 0.072169],
        [0.019334, 0.119193, 0.950227],
    ]
) / np.array([[0.95047], [1.0], [1.08883]])

Triple = tuple[float, float, float]


@dataclass(frozen=True)
class ColourFit:
    """`after` = `gain` * `before` + `offset`, for red, green and blue; offsets in 8-bit levels."""

    gain: Triple
    offset: Triple
    delta_e: float  # mean change over the pixels by gain and offset


@dataclass(frozen=True)
class MeasuredJoint:
    frame: int  # the first after the joint
    step: float  # delta E of the still pixels, from NEAR frames before to NEAR frames after
    usual: float  # the median of such steps between other frames nearby
    excess: float  # of `step`, above `usual`; with a baseline that of the change against the baseline
    gain: Triple  # from before to after; with a baseline, relative to the change in the baseline
    offset: Triple  # the same, 8-bit levels
    still: float  # share of the picture that is still on both sides; below STILL_SHARE all pixels were taken


@dataclass(frozen=True)
class MeasuredSegment:
    begin: int
    end: int
    within: float  # delta E of the still pixels, from the first quarter to the last
    laplacian: float  # mean squared Laplacian of luma, levels squared
    motion: float  # mean squared difference of neighbouring frames' luma, levels squared
    still: float  # share of the picture that is still; below STILL_SHARE all pixels were taken
    # Against the baseline's segment; None without one.
    gain: Triple | None = None
    offset: Triple | None = None
    delta_e: float | None = None
    laplacian_ratio: float | None = None
    motion_ratio: float | None = None


@dataclass(frozen=True)
class MeasuredDrift:
    joint_drift: float  # the largest excess; 0 without a joint
    joints: list[MeasuredJoint]
    segments: list[MeasuredSegment]


class DriftMeter:
    """Measure a video in one pass: `add` its frames in order, then `result`.

    joints: the first frame of each segment after the first, increasing, within 1..frames - 1. frames: of the video.
    Raises ValueError for joints outside this range, windows of another size, and more or fewer frames than `frames`.
    """

    def __init__(self, joints: Sequence[int], frames: int) -> None:
        self._bounds = [0, *joints, frames]
        if any(begin >= end for begin, end in zip(self._bounds, self._bounds[1:], strict=False)):
            raise ValueError(f"joints must increase within 1..{frames - 1}, not {list(joints)}")
        self._seen = 0
        self._compares: bool | None = None
        self._current: list[SegmentStatistics] = []  # the video's, and the baseline's
        self._before: list[SegmentStatistics] = []
        self._joints: list[MeasuredJoint] = []
        self._segments: list[MeasuredSegment] = []

    def add(self, frames: np.ndarray, baseline: np.ndarray | None = None) -> None:
        """Add frames uint8 [n, H, W, 3]. `baseline`: the same frames of the baseline, in every call or in none."""
        if self._compares is None:
            self._compares = baseline is not None
        if self._compares != (baseline is not None):
            raise ValueError("a baseline's frames come with every window or with none")
        if baseline is not None and baseline.shape != frames.shape:
            raise ValueError(f"a window of {frames.shape} has a baseline of {baseline.shape}")
        if self._seen + len(frames) > self._bounds[-1]:
            raise ValueError(f"more than {self._bounds[-1]} frames")
        for index, frame in enumerate(frames):
            if self._seen in self._bounds:
                begin, end = self._seen, self._bounds[self._bounds.index(self._seen) + 1]
                self._current = [SegmentStatistics(begin, end) for _ in range(1 + self._compares)]
            self._current[0].add(frame)
            if baseline is not None:
                self._current[1].add(baseline[index])
            self._seen += 1
            if self._seen == self._current[0].end:
                self._finish_segment()

    def result(self) -> MeasuredDrift:
        """Return the measurements. Raises ValueError before the last frame was added."""
        if self._seen != self._bounds[-1]:
            raise ValueError(f"{self._seen} of {self._bounds[-1]} frames were added")
        largest = max((joint.excess for joint in self._joints), default=0.0)
        return MeasuredDrift(largest, self._joints, self._segments)

    def _finish_segment(self) -> None:
        self._segments.append(_measure_segment(*self._current))
        if self._before:
            self._joints.append(_measure_joint(self._before, self._current))
        self._before, self._current = self._current, []


@dataclass
class SegmentStatistics:
    """Running statistics of one video over one segment of `end` - `begin` frames; `add` takes them in order."""

    begin: int
    end: int
    count: int = 0
    sums: list[np.ndarray] = field(default_factory=list)  # float64 [h, w, 3]: of all frames, first, last quarter
    squared: np.ndarray = field(default_factory=lambda: np.zeros(()))  # float64 [h, w]: of frame-to-frame changes
    head: list[np.ndarray] = field(default_factory=list)  # float32 [h, w, 3], the first AROUND
    tail: deque[np.ndarray] = field(default_factory=lambda: deque(maxlen=AROUND))
    grey: np.ndarray | None = None  # uint8 [H, W], of the frame before
    laplacian: float = 0.0
    motion: float = 0.0

    @property
    def quarter(self) -> int:
        return max(1, (self.end - self.begin) // 4)

    @property
    def mean(self) -> np.ndarray:
        """float64 [h, w, 3], 8-bit levels: the mean of the reduced pictures."""
        return self.sums[0] / self.count

    @property
    def mean_laplacian(self) -> float:
        """Mean squared Laplacian of luma, levels squared."""
        return self.laplacian / self.count

    def within(self, pixels: np.ndarray) -> float:
        """Return delta E of `pixels`, bool [h, w], from the first quarter of the segment to the last."""
        first, last = (total / self.quarter for total in self.sums[1:])
        return fit_colour(first[pixels], last[pixels]).delta_e

    def add(self, frame: np.ndarray) -> None:
        import cv2

        picture = reduce_picture(frame)
        grey = cv2.cvtColor(frame, cv2.COLOR_RGB2GRAY)
        self.laplacian += cv2.norm(cv2.Laplacian(grey, cv2.CV_16S), cv2.NORM_L2SQR) / grey.size
        if self.grey is None:
            self.sums = [np.zeros(picture.shape, np.float64) for _ in range(3)]
            self.squared = np.zeros(picture.shape[:2], np.float64)
        elif self.grey.shape != grey.shape:
            raise ValueError(f"a frame of {grey.shape} follows frames of {self.grey.shape}")
        else:
            self.motion += cv2.norm(grey, self.grey, cv2.NORM_L2SQR) / grey.size
            self.squared += np.square(picture - self.tail[-1]).mean(axis=2)
        self.sums[0] += picture
        if self.count < self.quarter:
            self.sums[1] += picture
        if self.count >= self.end - self.begin - self.quarter:
            self.sums[2] += picture
        if len(self.head) < AROUND:
            self.head.append(picture)
        self.tail.append(picture)
        self.grey = grey
        self.count += 1

    def still(self) -> np.ndarray:
        """Return the pixels that hardly change from frame to frame, bool [h, w]."""
        changes = np.sqrt(self.squared / max(1, self.count - 1))
        return changes <= np.clip(2 * np.percentile(changes, 10), *STILL_LEVELS)


def _measure_segment(video: SegmentStatistics, baseline: SegmentStatistics | None = None) -> MeasuredSegment:
    still, share = _choose(video.still() if baseline is None else video.still() & baseline.still())
    laplacian, motion = video.mean_laplacian, video.motion / max(1, video.count - 1)
    alone = MeasuredSegment(
        begin=video.begin,
        end=video.end,
        within=video.within(still),
        laplacian=laplacian,
        motion=motion,
        still=share,
    )
    if baseline is None:
        return alone
    mean, other = video.mean[still], baseline.mean[still]
    fit = fit_colour(other, mean)
    return replace(
        alone,
        gain=fit.gain,
        offset=fit.offset,
        delta_e=_mean_delta_e(other, mean),
        laplacian_ratio=_ratio(laplacian, baseline.mean_laplacian),
        motion_ratio=_ratio(motion, baseline.motion / max(1, baseline.count - 1)),
    )


def _measure_joint(before: list[SegmentStatistics], after: list[SegmentStatistics]) -> MeasuredJoint:
    """Measure the joint between two segments of one video, or of a video and its baseline.

    With a baseline, the colours of both videos are compared on each side of the joint. The excess is the change between
    the two comparisons. So a change of the scene, which both videos show, does not count.
    """
    masks = [side.still() for side in (*before, *after)]
    still, share = _choose(np.logical_and.reduce(masks))
    joint, behind = len(before[0].tail), len(after[0].head)
    videos = [
        np.stack([picture[still] for picture in (*one.tail, *other.head)]).astype(np.float64)
        for one, other in zip(before, after, strict=True)
    ]
    near = min(NEAR, joint, behind)
    others = [at for at in range(near, joint + behind - near + 1, 2) if at + near <= joint or at - near >= joint]

    def means(at: int) -> list[tuple[np.ndarray, np.ndarray]]:
        """Return the mean colours of each video before frame `at` and from it on, float64 [pixels, 3] each."""
        return [(video[at - near : at].mean(axis=0), video[at : at + near].mean(axis=0)) for video in videos]

    def usual(step: Callable[[int], float]) -> float:
        return float(np.median([step(at) for at in others])) if others else 0.0

    own = fit_colour(*means(joint)[0])
    own_usual = usual(lambda at: fit_colour(*means(at)[0]).delta_e)
    frame = after[0].begin
    if len(videos) == 1:
        excess = max(0.0, own.delta_e - own_usual)
        return MeasuredJoint(frame, own.delta_e, own_usual, excess, own.gain, own.offset, share)
    against = _step_against(*means(joint))
    excess = max(0.0, against.delta_e - usual(lambda at: _step_against(*means(at)).delta_e))
    return MeasuredJoint(frame, own.delta_e, own_usual, excess, against.gain, against.offset, share)


def _step_against(video: tuple[np.ndarray, np.ndarray], baseline: tuple[np.ndarray, np.ndarray]) -> ColourFit:
    """Fit how the video's colours change relative to the baseline's. Pairs are (before, after), float64 [pixels, 3]."""
    fits = [fit_colour(other, own) for own, other in zip(video, baseline, strict=True)]
    (gain, offset), (later_gain, later_offset) = ((np.array(fit.gain), np.array(fit.offset)) for fit in fits)
    change = later_gain / gain
    rest = later_offset - change * offset
    colours = baseline[0][:: -(-len(baseline[0]) // FIT_PIXELS)]
    one, other = (np.clip(colours * g + o, 0, 255) for g, o in ((gain, offset), (later_gain, later_offset)))
    return ColourFit(_triple(change), _triple(rest), _mean_delta_e(one, other))


def _triple(values: np.ndarray) -> Triple:
    red, green, blue = map(float, values)
    return red, green, blue


def _choose(still: np.ndarray) -> tuple[np.ndarray, float]:
    """Return the pixels to measure on, bool [h, w], and the share of still pixels."""
    share = float(still.mean())
    return (still if share >= STILL_SHARE else np.ones_like(still)), share


def fit_colour(before: np.ndarray, after: np.ndarray) -> ColourFit:
    """Fit gain and offset of each channel from float [n, 3] to float [n, 3], in 8-bit levels; robust to outliers.

    Where a channel's values spread too little to determine a gain, the gain is 1 and only the offset is fitted.
    """
    stride = -(-len(before) // FIT_PIXELS)
    x, y = (np.asarray(side[::stride], np.float64) for side in (before, after))
    fits = [_fit_channel(x[:, channel], y[:, channel]) for channel in range(3)]
    gain, offset = ([fit[part] for fit in fits] for part in (0, 1))
    moved = np.clip(x * gain + offset, 0, 255)
    return ColourFit((gain[0], gain[1], gain[2]), (offset[0], offset[1], offset[2]), _mean_delta_e(x, moved))


def _fit_channel(x: np.ndarray, y: np.ndarray) -> tuple[float, float]:
    inside = (np.minimum(x, y) > CLIPPED) & (np.maximum(x, y) < 255 - CLIPPED)
    if inside.mean() >= 0.2:
        x, y = x[inside], y[inside]
    gain, offset = plain = 1.0, float(np.median(y - x))
    # Huber's weights have a single best fit. Tukey's, which ignore outliers, start from it: alone they may end in
    # another minimum, as rounded levels differ by whole numbers, and most of them by the same one.
    for weigh in (_huber, _tukey):
        for _ in range(30):
            rest = y - gain * x - offset
            scale = max(LEAST_SCALE, 1.4826 * float(np.median(np.abs(rest))))
            weights = weigh(rest / scale)
            total = weights.sum()
            mean_x, mean_y = (weights @ x) / total, (weights @ y) / total
            variance = (weights @ np.square(x - mean_x)) / total
            before = gain, offset
            gain = 1.0
            if variance >= SPREAD**2:
                gain = float((weights @ ((x - mean_x) * (y - mean_y))) / total / variance)
            offset = float(mean_y - gain * mean_x)
            if abs(gain - before[0]) < 1e-6 and abs(offset - before[1]) < 1e-4:
                break
    return (gain, offset) if GAINS[0] <= gain <= GAINS[1] else plain


def _huber(rest: np.ndarray) -> np.ndarray:
    return HUBER / np.maximum(np.abs(rest), HUBER)


def _tukey(rest: np.ndarray) -> np.ndarray:
    return np.square(1 - np.minimum(1, np.square(rest / TUKEY)))


def reduce_picture(picture: np.ndarray, pixels: int = REDUCED_PIXELS) -> np.ndarray:
    """Average [H, W, 3], real, by area to float32 [h, w, 3] of about `pixels` pixels, never more than H x W."""
    import cv2

    height, width = picture.shape[:2]
    scale = min(1.0, (pixels / (height * width)) ** 0.5)
    size = max(1, round(width * scale)), max(1, round(height * scale))
    reduced: np.ndarray = cv2.resize(picture.astype(np.float32, copy=False), size, interpolation=cv2.INTER_AREA)
    return reduced


def to_lab(colours: np.ndarray) -> np.ndarray:
    """CIE Lab (D65), float64 [..., 3], of sRGB colours in 8-bit levels, [..., 3] of any float or integer type.

    Implemented here because OpenCV's conversion was measured to be off by 0.3, and scikit-image is not a dependency of
    jobs.
    """
    share = np.asarray(colours, np.float64) / 255
    linear = np.where(share > 0.04045, ((share + 0.055) / 1.055) ** 2.4, share / 12.92)
    xyz = linear @ TO_XYZ.T
    x, y, z = np.moveaxis(np.where(xyz > (6 / 29) ** 3, np.cbrt(xyz), xyz / (3 * (6 / 29) ** 2) + 4 / 29), -1, 0)
    return np.stack([116 * y - 16, 500 * (x - y), 200 * (y - z)], axis=-1)


def _mean_delta_e(one: np.ndarray, other: np.ndarray) -> float:
    return float(np.linalg.norm(to_lab(one) - to_lab(other), axis=-1).mean())


def _ratio(energy: float, other: float) -> float:
    return (energy + ENERGY_FLOOR) / (other + ENERGY_FLOOR)

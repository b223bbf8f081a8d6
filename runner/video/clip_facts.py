"""Clip facts: length, rate, cuts, repeated pictures and blur of a video, measured without a network.

In:   an open video. Out: `ClipFacts`: length, rate, size, cuts, pictures that repeat, blur.
Never: people, jobs, advice, more than a window of frames in memory.

The video is decoded once. Neighbouring frames are compared as reduced pictures; cuts.py defines a cut. A picture
repeats where no pixel of the luma, reduced by area to 64 pixels on the long side, changes by more than SAME_LEVELS.
This limit is absolute. It was measured on a real clip in which every frame appears twice, encoded by x264 at crf 18, 23
and 28 and by MPEG-4 Part 2: equal pictures changed by 8 levels at most, different ones by 49 at least. In the clip
itself neighbours differ by 29 levels or more. At crf 35 coding noise reaches 28 levels, so repeats in strongly
compressed or noisy videos are not found.

Blur is the measure of Crete et al. 2007: 0 for a sharp picture, 1 for one without edges. It compares a picture with a
blurred copy of itself, so it depends little on the content.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from fractions import Fraction
from itertools import pairwise

import numpy as np

from runner.video.cuts import is_cut, thumbnail
from runner.video.reader import STAMP_NOISE_S, VideoInfo, VideoReader, sample_by_time

__all__ = ["ClipFacts", "Cut", "Repeats", "StillSpan", "blur_effect", "measure_clip"]

SAME_LEVELS = 10.0  # 8-bit luma
SAME_SIDE = 64  # pixels
WINDOW_BYTES = 32 << 20  # of decoded frames held at once
BLUR_FRAMES = 12  # evenly over the clip
BLUR_AREA = 832 * 480  # pixels; a larger picture is scaled down for the model
BLUR_WINDOW = 11  # pixels, by the measure's authors
STILL_S = 1.0  # a picture that stays this long is assumed to be a still on purpose
UNEVEN = 0.1  # of the usual frame time: allowed deviation of a frame in a video of constant rate
FEW_PICTURES = 8  # with fewer moving pictures no rule is looked for
RULE_BLOCK = 20  # pictures, at least, over which their starts are compared with an even spacing
RULE_REPEATS = 4  # in a block, at least, where not all pictures repeat: frames dropped by chance are not evenly spaced
RULE_SHARE = 0.9  # of the blocks
# A start may deviate by less than a frame from an even spacing. The rest allows for the spacing, a mean over the video.
RULE_FRAMES = 1.35
PHASES = 6  # frames at the beginning, each tried as the first one to sample
PHASE_GAIN = 0.02  # of the pictures: a later start that shows fewer additional ones is not chosen
LEAST_REPEAT = 1.02  # frames a picture: one frame in 50 repeats
COMMON_RATES = tuple(
    Fraction(rate)
    for rate in (
        "8",
        "10",
        "12",
        "25/2",
        "15",
        "16",
        "20",
        "24000/1001",
        "24",
        "25",
        "30000/1001",
        "30",
        "48",
        "50",
        "60",
    )
)
NEAR_RATE = 0.006  # relative: the accuracy to which 8 s give the share of repeats


@dataclass(frozen=True)
class Cut:
    frame: int  # the first one of the new scene
    seconds: float  # when it appears


@dataclass(frozen=True)
class StillSpan:
    """One picture that stays for a second or longer."""

    begin_s: float
    end_s: float


@dataclass(frozen=True)
class Repeats:
    """Frames repeat by a rule: the video was made at another rate than it is stored at."""

    frames_a_picture: float  # 2: every second frame repeats
    pictures_per_s: float
    fps: Fraction  # the rate to sample at
    start_s: float  # where to begin to sample, so that most pictures are seen; 0 where that changes little
    covered: float  # share of the different pictures that are seen when frames are sampled so


@dataclass(frozen=True)
class ClipFacts:
    info: VideoInfo
    measured_fps: float  # from the timestamps
    shortest_s: float  # from one frame to the next
    longest_s: float
    variable: bool  # the durations of frames differ
    cuts: tuple[Cut, ...]
    repeated_frames: int  # that show the picture of the frame before them
    repeats: Repeats | None
    still: tuple[StillSpan, ...]
    blur: float  # 0 … 1, median over frames


def measure_clip(reader: VideoReader, progress: Callable[[int], None] | None = None) -> ClipFacts:
    """Decode the whole video once. `progress`: called with the number of frames that are done, after each window.

    Raises InputUnreadable when the file proves damaged on the way.
    """
    info, starts_s = reader.info, reader.starts_s
    window = max(1, min(32, WINDOW_BYTES // (info.width * info.height * 3)))
    asked_blur = set(np.linspace(0, info.frames - 1, BLUR_FRAMES).round().astype(int).tolist())
    scenes, blurs = _SceneWatch(), []
    changes: list[int] = [0]  # numbers of the frames that show another picture than the frame before
    spans: list[int] = [0]  # the same, against the first frame of the span: in a slow fade neighbours hardly differ
    small = first = np.zeros((0, 0), np.float32)
    done = 0
    for frames in reader.windows(np.arange(info.frames), window):
        for frame in frames:
            before, small = small, _reduced(frame)
            if not done:
                first = small
            elif np.abs(small - before).max() > SAME_LEVELS:
                changes.append(done)
            if np.abs(small - first).max() > SAME_LEVELS:
                spans.append(done)
                first = small
            scenes.add(thumbnail(frame))
            if done in asked_blur:
                blurs.append(blur_effect(frame))
            done += 1
        if progress is not None:
            progress(done)
    steps = np.diff(starts_s) if info.frames > 1 else np.array([info.duration_s])
    usual = float(np.median(steps))
    uneven = 2 * STAMP_NOISE_S + UNEVEN * usual
    times_s = np.append(starts_s, info.duration_s)
    still = (StillSpan(float(times_s[a]), float(times_s[b])) for a, b in pairwise([*spans, info.frames]))
    return ClipFacts(
        info=info,
        measured_fps=info.frames / info.duration_s,
        shortest_s=float(steps.min()),
        longest_s=float(steps.max()),
        variable=bool(np.abs(steps - usual).max() > uneven),
        cuts=tuple(Cut(frame, float(starts_s[frame])) for frame in scenes.cuts()),
        repeated_frames=info.frames - len(changes),
        repeats=_repeats(np.array(changes), times_s, info),
        still=tuple(span for span in still if span.end_s - span.begin_s >= STILL_S),
        blur=float(np.median(blurs)),
    )


def blur_effect(frame: np.ndarray) -> float:
    """Return how blurred a picture uint8 [H, W, 3] is: 0 sharp, 1 without edges (Crete et al. 2007).

    A picture of more than BLUR_AREA pixels is reduced by area first.
    """
    import cv2

    height, width = frame.shape[:2]
    scale = (BLUR_AREA / (height * width)) ** 0.5
    if scale < 1:
        size = max(1, round(width * scale)), max(1, round(height * scale))
        frame = cv2.resize(frame, size, interpolation=cv2.INTER_AREA)
    luma = cv2.cvtColor(frame, cv2.COLOR_RGB2GRAY).astype(np.float32)
    worst = 0.0
    for across in (True, False):
        kernel = (BLUR_WINDOW, 1) if across else (1, BLUR_WINDOW)
        again = cv2.blur(luma, kernel, borderType=cv2.BORDER_REFLECT)
        edges, left = (_edges(picture, across) for picture in (luma, again))
        total = float(edges.sum(dtype=np.float64))
        if total == 0:  # a plain picture
            return 1.0
        worst = max(worst, 1 - float(np.maximum(edges - left, 0).sum(dtype=np.float64)) / total)
    return worst


def _edges(luma: np.ndarray, across: bool) -> np.ndarray:
    """Absolute Sobel derivative across or down, without the border."""
    import cv2

    found = cv2.Sobel(luma, cv2.CV_32F, int(across), int(not across), borderType=cv2.BORDER_REFLECT)
    edges: np.ndarray = np.abs(found)[2:-1, 2:-1]
    return edges


def _reduced(frame: np.ndarray) -> np.ndarray:
    """Luma float32 of at most SAME_SIDE pixels a side, 8-bit levels."""
    import cv2

    height, width = frame.shape[:2]
    scale = min(1.0, SAME_SIDE / max(height, width))
    size = max(1, round(width * scale)), max(1, round(height * scale))
    small = cv2.resize(frame, size, interpolation=cv2.INTER_AREA)
    luma: np.ndarray = cv2.cvtColor(small, cv2.COLOR_RGB2GRAY).astype(np.float32)
    return luma


class _SceneWatch:
    """Find cuts in thumbnails, taken in order.

    Cuts at neighbouring frames are one cut. Where the scene before them returns, they were a flash, and are no cut.
    """

    def __init__(self) -> None:
        self._frame = -1
        self._last: np.ndarray | None = None
        self._open: tuple[int, np.ndarray] | None = None  # first frame of a run of cuts, and the thumbnail before it
        self._cuts: list[int] = []

    def add(self, small: np.ndarray) -> None:
        self._frame += 1
        cut = self._last is not None and is_cut(self._last, small)
        if cut and self._open is None and self._last is not None:
            self._open = self._frame, self._last
        elif not cut and self._open is not None and self._last is not None:
            self._close(self._last)
        self._last = small

    def cuts(self) -> list[int]:
        """Numbers of the first frames of scenes, without the video's first."""
        if self._open is not None and self._last is not None:
            self._close(self._last)
        return self._cuts

    def _close(self, after: np.ndarray) -> None:
        assert self._open is not None
        first, before = self._open
        if is_cut(before, after):
            self._cuts.append(first)
        self._open = None


def _repeats(starts: np.ndarray, times_s: np.ndarray, info: VideoInfo) -> Repeats | None:
    """Return the rule by which frames repeat, or None.

    starts: int64 [n], the first frame of each different picture. times_s: of each frame, and of the video's end.
    """
    ends = np.append(starts[1:], info.frames)
    lengths = ends - starts
    # The first and the last picture may be cut off, and so may one beside a still picture.
    moving = times_s[ends] - times_s[starts] < STILL_S
    moving[[0, -1]] = False
    if moving.sum() < FEW_PICTURES:
        return None
    usual = float(lengths[moving].mean())
    if usual < LEAST_REPEAT or not _follows_rule(starts[moving], usual):
        return None
    per_s = info.frames / info.duration_s / usual
    fps = _plain_rate(per_s)
    shares = {}
    for start_s in times_s[: min(PHASES, info.frames)].tolist():
        shown = sample_by_time(times_s[:-1], info.duration_s, fps, start_s)
        seen = np.unique(np.searchsorted(starts, shown, side="right") - 1)
        shares[start_s] = float(np.isin(np.flatnonzero(moving), seen).mean())
    most = max(shares.values())
    start_s = next(start for start, share in shares.items() if share >= most - PHASE_GAIN)
    return Repeats(usual, per_s, fps, start_s, shares[start_s])


def _follows_rule(starts: np.ndarray, usual: float) -> bool:
    """Whether pictures begin evenly, `usual` frames apart, in nearly every stretch of the video."""
    odd = abs(usual - round(usual))
    block = min(RULE_BLOCK, len(starts)) if odd < LEAST_REPEAT - 1 else max(RULE_BLOCK, round(RULE_REPEATS / odd))
    fitting = []
    for begin in range(0, len(starts) - block + 1, block):
        off = starts[begin : begin + block] - usual * np.arange(block)
        fitting.append(off.max() - off.min() <= RULE_FRAMES)
    return bool(fitting) and sum(fitting) >= RULE_SHARE * len(fitting)


def _plain_rate(rate: float) -> Fraction:
    """Return the nearest common rate within NEAR_RATE, else `rate` rounded to hundredths."""
    nearest = min(COMMON_RATES, key=lambda common: abs(float(common) - rate))
    return nearest if abs(float(nearest) / rate - 1) < NEAR_RATE else Fraction(round(rate * 100), 100)

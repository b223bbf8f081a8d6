"""Reader: choose the frames of a clip that a job uses, and read their pixels a window at a time.

In:   a local file; the wanted frames a second. Out: frame indices, uint8 RGB windows.
Never: people, models, jobs, a whole clip in memory. writer.py writes clips.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from types import TracebackType
from typing import Literal

import numpy as np

from runner.errors import InputError, InputTooShort, InputUnreadable
from runner.video.decode import Frames, Timeline, read_timeline
from runner.video.decord_reader import DecordClip, DecordFrames

__all__ = [
    "Sampled",
    "VideoInfo",
    "VideoReader",
    "probe",
    "readers_differ",
    "sample_by_time",
    "sample_indices",
]

MIN_FRAMES = 2  # one frame has no motion
WINDOW_BYTES = 24 << 20  # of frames that are compared at a time, for each reader
STAMP_NOISE_S = 1e-3  # Matroska stores whole milliseconds, QuickTime often 1/600 s: a timestamp may deviate by this


@dataclass(frozen=True)
class VideoInfo:
    """A clip as a player shows it: trimmed and turned by the container's tags. With `parity`, as decord counts it."""

    path: Path
    frames: int
    fps: Fraction  # average
    duration_s: float
    width: int  # pixels, after rotation
    height: int
    has_audio: bool
    rotation: int = 0  # degrees counter-clockwise by which its frames were turned


@dataclass(frozen=True)
class Sampled:
    """Output frame i shows source frame `indices[i]`."""

    indices: np.ndarray  # int64 [n], non-decreasing
    fps: Fraction  # of the output
    start_s: float  # of the first frame, seconds after the clip's first frame


def probe(path: Path | str) -> VideoInfo:
    """Return length, rate and size of a clip. Only the first frame is decoded.

    Raises InputNotFound, InputUnreadable (empty, truncated, no frames, not a video), InputTooLarge.
    """
    return _info(read_timeline(Path(path)))


def sample_indices(info_frames: int, video_fps: float, duration_s: float, fps: float | None) -> np.ndarray:
    """Return the official frame indices, int64 [n]; n can be 0. Pure.

    `duration_s` is when the last frame ends; `fps` None keeps the source's rate. Source: the preprocessing of
    Wan2.2-Animate at commit 42bf4cf. The length is truncated, so that 123 frames at 30 fps sampled at 30 fps lose one;
    positions round half to even. Where the frame count differs by more than a tenth from duration times rate, the
    latter counts.
    """
    expected = int(duration_s * video_fps + 0.5)
    frames = expected if abs((info_frames - expected) / info_frames) > 0.1 else info_frames
    rate = video_fps if fps is None else fps
    length = int(frames / video_fps * rate)
    positions = np.round(np.arange(length) / rate * video_fps)
    # Against info_frames too: an `expected` above it would index past the end.
    return np.clip(positions, 0, min(frames, info_frames) - 1).astype(np.int64)


def sample_by_time(starts_s: np.ndarray, end_s: float, fps: Fraction, start_s: float = 0.0) -> np.ndarray:
    """Return int64 [n]: frame i is on screen at `start_s + i / fps`; n is the number of frame periods, rounded. Pure.

    `starts_s`: float64, increasing, when each source frame appears; the last stays until `end_s`. A timestamp
    that is late by rounding (1 ms, or a quarter of the usual frame where that is less) counts as in time.
    """
    length = int(np.floor((end_s - start_s) * float(fps) + 0.5))
    if length < 1:
        return np.zeros(0, np.int64)
    usual = float(np.median(np.diff(starts_s))) if len(starts_s) > 1 else end_s
    at = start_s + np.arange(length) * float(1 / fps) + min(STAMP_NOISE_S, usual / 4)
    return np.clip(np.searchsorted(starts_s, at, side="right") - 1, 0, len(starts_s) - 1).astype(np.int64)


class VideoReader:
    """One clip: choose frames with `sample`, then read them in windows. Memory does not grow with the clip's length.

    Reading forward decodes each frame once, also across calls. Not for two threads at once.

    With `parity` the frames are counted and read by decord, as the official script does. It gives the frames that were
    sampled last, or those of `plan` (int64, frame numbers that an earlier reader sampled), or all. PyAV reads the
    timeline first, and decodes the planned span before decord does: damage raises the same error with both.
    """

    def __init__(self, path: Path | str, *, parity: bool = False, plan: np.ndarray | None = None) -> None:
        self._timeline = read_timeline(Path(path))
        self._frames: Frames | DecordFrames | None = None
        self._clip = self._look_with_decord() if parity else None
        self.info = _info(self._timeline, self._clip)
        self._plan = np.arange(self.info.frames) if plan is None else np.unique(plan)
        self._is_checked = False  # PyAV has decoded the planned span

    def _look_with_decord(self) -> DecordClip:
        try:
            return DecordClip(self._timeline)
        except InputUnreadable:
            self._check_span(0, self._timeline.frames - 1)  # where the file is damaged, PyAV says where
            raise

    @property
    def parity(self) -> bool:
        """Whether decord reads the frames."""
        return self._clip is not None

    @property
    def starts_s(self) -> np.ndarray:
        """float64 [frames]: when each frame appears, seconds after the first one does."""
        return self._timeline.starts_s

    def sample(
        self,
        fps: float | Fraction | Literal["source"],
        start_s: float = 0,
        max_frames: int | None = None,
        parity: bool = False,
    ) -> Sampled:
        """Return the frames for an output of `fps` that begins `start_s` seconds into the clip, at most `max_frames`.

        By timestamps, see `sample_by_time`; with `parity` by the official rule, see `sample_indices`, where a `start_s`
        acts as if the clip began with the frame that is then on screen. A reader with `parity` takes decord's count,
        rate and end of the clip, as the official script does.
        Raises InputTooShort when fewer than two frames remain, or when `start_s` lies beyond the end.
        """
        rate = None if fps == "source" else Fraction(fps).limit_denominator(1001)
        if rate is not None and rate <= 0:
            raise ValueError(f"fps must be positive, not {fps}")
        if start_s < 0:
            raise ValueError(f"start_s must not be negative, not {start_s}")
        line = self._timeline
        if start_s >= line.duration_s:
            raise InputTooShort(
                f"start_s is {start_s:g}, but the clip ends after {line.duration_s:.3f} s",
                where=line.path,
                todo="Choose an earlier start_s",
            )
        out_rate, begin_s = rate or self.info.fps, float(start_s)
        if parity or self._clip is not None:
            indices, begin_s = self._sample_officially(None if rate is None else float(rate), start_s)
        else:
            indices = sample_by_time(line.starts_s, line.duration_s, out_rate, begin_s)
        indices = indices[:max_frames]
        if len(indices) < MIN_FRAMES:
            raise InputTooShort(
                f"{len(indices)} frame{'' if len(indices) == 1 else 's'} at {float(out_rate):g} fps from second "
                f"{start_s:g} on, at least {MIN_FRAMES} are needed; the clip has {self.info.frames} "
                f"in {line.duration_s:.3f} s",
                where=line.path,
                todo="Use a longer clip, an earlier start_s or a higher fps",
            )
        if self._clip is not None:
            self.close()  # decord's frames depend on the plan
        self._plan, self._is_checked = np.unique(indices), False
        return Sampled(indices, out_rate, begin_s)

    def _sample_officially(self, fps: float | None, start_s: float) -> tuple[np.ndarray, float]:
        """Indices by the official rule, int64 [n], and the second at which the first one appears."""
        line, clip = self._timeline, self._clip
        starts_s, frames, rate, end_s = line.starts_s, line.frames, float(line.fps), line.duration_s
        if clip is not None:
            # decord's times of MPEG program streams are not usable: PyAV's serve where both count the same frames.
            starts_s = starts_s if clip.frames == frames else clip.starts_s
            frames, rate, end_s = clip.frames, clip.fps, clip.end_s
        first = max(0, int(np.searchsorted(starts_s, start_s + STAMP_NOISE_S, side="right")) - 1)
        begin_s = float(starts_s[first])
        return first + sample_indices(frames - first, rate, end_s - begin_s, fps), begin_s

    def windows(self, indices: np.ndarray, window: int = 32) -> Iterator[np.ndarray]:
        """Yield uint8 [n, H, W, 3] RGB, `window` frames at a time, for non-decreasing `indices` (repeats allowed)."""
        if window < 1:
            raise ValueError(f"window must be at least 1, not {window}")
        for begin in range(0, len(indices), window):
            yield self.read(indices[begin : begin + window])

    def read(self, indices: np.ndarray) -> np.ndarray:
        """Return uint8 [n, H, W, 3] RGB, upright, for non-decreasing `indices`; fastest when calls go forward, too.

        Raises InputUnreadable where the file is damaged.
        """
        wanted = np.asarray(indices, np.int64)
        last = self.info.frames - 1
        if len(wanted) and (wanted[0] < 0 or wanted[-1] > last or (np.diff(wanted) < 0).any()):
            raise ValueError(f"indices must not decrease and must lie in 0..{last}")
        if self._frames is None:
            self._frames = self._open_frames()
        return self._frames.read(wanted)

    def check_intact(self) -> None:
        """Let PyAV decode the planned span. Raises InputUnreadable where it is damaged.

        Where decord counts more frames than PyAV, or fewer, the span is that of PyAV's frames with the same numbers.
        """
        first, last = (min(int(number), self._timeline.frames - 1) for number in self._plan[[0, -1]])
        self._check_span(first, last)
        self._is_checked = True

    def _check_span(self, first: int, last: int) -> None:
        frames = Frames(self._timeline)
        try:
            frames.check_span(first, last)
        finally:
            frames.close()

    def _open_frames(self) -> Frames | DecordFrames:
        if self._clip is None:
            return Frames(self._timeline)
        if not self._is_checked:
            self.check_intact()
        return DecordFrames(self._clip, self._plan)

    def close(self) -> None:
        """Release the file. Idempotent; reading again opens it again."""
        if self._frames is not None:
            self._frames.close()
            self._frames = None

    def __enter__(self) -> VideoReader:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def readers_differ(
    path: Path | str, fps: float | Fraction | Literal["source"], start_s: float = 0, max_frames: int | None = None
) -> bool:
    """Whether decord gives a job with these options other frames than PyAV: others are sampled, or pixels differ.

    Both decode all sampled frames, a window at a time. A file that only decord cannot read differs.
    Raises what PyAV raises: InputNotFound, InputUnreadable, InputTooLarge, InputTooShort, StorageDenied.
    """
    with VideoReader(path) as ours:
        expected = ours.sample(fps, start_s, max_frames, parity=True)
        ours.check_intact()
        window = max(1, min(16, WINDOW_BYTES // (ours.info.width * ours.info.height * 3)))
        try:
            with VideoReader(path, parity=True) as official:
                found = official.sample(fps, start_s, max_frames)
                official._is_checked = True
                if not np.array_equal(found.indices, expected.indices) or found.fps != expected.fps:
                    return True
                pairs = zip(ours.windows(ours._plan, window), official.windows(ours._plan, window), strict=True)
                return not all(np.array_equal(a, b) for a, b in pairs)
        except InputError:
            return True


def _info(line: Timeline, clip: DecordClip | None = None) -> VideoInfo:
    counted = line if clip is None else clip
    fps = _plain(Fraction(counted.fps))
    size = counted.width, counted.height
    return VideoInfo(line.path, counted.frames, fps, line.duration_s, *size, line.has_audio, line.rotation)


def _plain(rate: Fraction) -> Fraction:
    """Return the nearest rate that a container can hold (NTSC: denominator 1001), at least one frame in 1001 s."""
    return max(rate.limit_denominator(1001), Fraction(1, 1001))

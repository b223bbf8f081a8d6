"""Reader: which frames of a clip a job sees, and their pixels a window at a time. (writer.py is the way out.)

In:   a local file; the frames a second asked for. Out: frame indices, uint8 RGB windows.
Never: people, models, jobs; nothing here holds a whole clip.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from types import TracebackType
from typing import Literal

import numpy as np

from runner.errors import InputTooShort
from runner.video.decode import Frames, Timeline, read_timeline

__all__ = [
    "Sampled",
    "VideoInfo",
    "VideoReader",
    "probe",
    "sample_by_time",
    "sample_indices",
]

MIN_FRAMES = 2  # the model moves a picture; one frame has no motion
STAMP_NOISE_S = 1e-3  # Matroska stores whole milliseconds, QuickTime often 1/600 s: a stamp may lie this far off


@dataclass(frozen=True)
class VideoInfo:
    """A clip as it is shown: trimmed and turned as its container says."""

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
    """Length, rate and size of a clip, without decoding more than its first frame.

    Raises InputNotFound, InputUnreadable (empty, truncated, no frames, not a video), InputTooLarge.
    """
    return _info(read_timeline(Path(path)))


def sample_indices(info_frames: int, video_fps: float, duration_s: float, fps: float | None) -> np.ndarray:
    """The official frame indices, int64 [n]; n can be 0. Pure.

    `duration_s` is when the last frame ends; `fps` None keeps the source's rate. Source: the preprocessing of
    Wan2.2-Animate at commit 42bf4cf. The length is truncated, so that 123 frames at 30 fps sampled at 30 fps lose one;
    positions round half to even; a frame count more than a tenth away from the duration's gives way to it.
    """
    expected = int(duration_s * video_fps + 0.5)
    frames = expected if abs((info_frames - expected) / info_frames) > 0.1 else info_frames
    rate = video_fps if fps is None else fps
    length = int(frames / video_fps * rate)
    positions = np.round(np.arange(length) / rate * video_fps)
    # Against info_frames too: an `expected` above it would index past the end.
    return np.clip(positions, 0, min(frames, info_frames) - 1).astype(np.int64)


def sample_by_time(starts_s: np.ndarray, end_s: float, fps: Fraction, start_s: float = 0.0) -> np.ndarray:
    """int64 [n]: frame i is the one on screen at `start_s + i / fps`; n is how many frame periods fit, rounded. Pure.

    `starts_s`: float64, increasing, when each source frame appears; the last stays until `end_s`. A stamp that is late
    by rounding (1 ms, or a quarter of the usual frame where that is less) counts as in time.
    """
    length = int(np.floor((end_s - start_s) * float(fps) + 0.5))
    if length < 1:
        return np.zeros(0, np.int64)
    usual = float(np.median(np.diff(starts_s))) if len(starts_s) > 1 else end_s
    at = start_s + np.arange(length) * float(1 / fps) + min(STAMP_NOISE_S, usual / 4)
    return np.clip(np.searchsorted(starts_s, at, side="right") - 1, 0, len(starts_s) - 1).astype(np.int64)


class VideoReader:
    """One clip: choose frames with `sample`, then read them in windows. Memory is a window's, whatever the length.

    Reading forward decodes each frame once, also across calls. Not for two threads at once.
    """

    def __init__(self, path: Path | str) -> None:
        self._timeline = read_timeline(Path(path))
        self._frames: Frames | None = None
        self.info = _info(self._timeline)

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
        """Frames for an output of `fps` that begins `start_s` seconds into the clip, at most `max_frames`.

        By timestamps, see `sample_by_time`; with `parity` by the official rule, see `sample_indices`, where a `start_s`
        acts as if the clip began with the frame that is then on screen.
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
        out_rate, begin_s = rate or _plain(line.fps), float(start_s)
        if parity:
            first = int(np.searchsorted(line.starts_s, start_s + STAMP_NOISE_S, side="right")) - 1
            begin_s = float(line.starts_s[first])
            wanted = None if rate is None else float(rate)
            indices = first + sample_indices(line.frames - first, float(line.fps), line.duration_s - begin_s, wanted)
        else:
            indices = sample_by_time(line.starts_s, line.duration_s, out_rate, begin_s)
        indices = indices[:max_frames]
        if len(indices) < MIN_FRAMES:
            raise InputTooShort(
                f"{len(indices)} frame{'' if len(indices) == 1 else 's'} at {float(out_rate):g} fps from second "
                f"{start_s:g} on, at least {MIN_FRAMES} are needed; the clip has {line.frames} "
                f"in {line.duration_s:.3f} s",
                where=line.path,
                todo="Use a longer clip, an earlier start_s or a higher fps",
            )
        return Sampled(indices, out_rate, begin_s)

    def windows(self, indices: np.ndarray, window: int = 32) -> Iterator[np.ndarray]:
        """Yield uint8 [n, H, W, 3] RGB, `window` frames at a time, for non-decreasing `indices` (repeats allowed)."""
        if window < 1:
            raise ValueError(f"window must be at least 1, not {window}")
        for begin in range(0, len(indices), window):
            yield self.read(indices[begin : begin + window])

    def read(self, indices: np.ndarray) -> np.ndarray:
        """uint8 [n, H, W, 3] RGB, upright, for non-decreasing `indices`; fastest when calls go forward, too.

        Raises InputUnreadable when the file proves damaged on the way.
        """
        wanted = np.asarray(indices, np.int64)
        last = self._timeline.frames - 1
        if len(wanted) and (wanted[0] < 0 or wanted[-1] > last or (np.diff(wanted) < 0).any()):
            raise ValueError(f"indices must not decrease and must lie in 0..{last}")
        if self._frames is None:
            self._frames = Frames(self._timeline)
        return self._frames.read(wanted)

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


def _info(line: Timeline) -> VideoInfo:
    fps = _plain(line.fps)
    size = line.width, line.height
    return VideoInfo(line.path, line.frames, fps, line.duration_s, *size, line.has_audio, line.rotation)


def _plain(rate: Fraction) -> Fraction:
    """A rate that a container can hold; NTSC's denominator is 1001. Frames further apart than 1001 s count as that."""
    return max(rate.limit_denominator(1001), Fraction(1, 1001))

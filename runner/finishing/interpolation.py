"""Interpolation: double a job's frame rate with one new frame between each two neighbours.

In:   a job's segments, in order. Out: the same frames, each but the first with a new one before it.
Never: the network's work, files, encoders.

Every frame of the generator passes unchanged. The frame between two neighbours is
    the network's          as a rule
    the first of the two   if both are equal, or if there is a cut between them (video/cuts.py)
The boundaries of segments have no effect on the frames. n frames become 2n - 1. With `output.pad_last` they become 2n:
the last frame is repeated, so that the clip keeps its length. Without it, picture and sound end half a generated frame
earlier.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from fractions import Fraction
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, Protocol

import numpy as np

from runner.errors import InternalError, JobWeightsMissing, job_weight_errors
from runner.finishing.stages import StageSettings, StageState
from runner.forecast.flops import TERA
from runner.forecast.rife_shape import RifeShape
from runner.generation.protocol import ClipInfo, Segment, SegmentPlan
from runner.spec.options import JobOptions
from runner.video.cuts import is_cut, thumbnail
from runner.weights.store import ModelStore

if TYPE_CHECKING:
    from runner.forecast.seconds import DeviceSpeed

__all__ = [
    "INTERPOLATE",
    "BetweenFrames",
    "Interpolation",
    "InterpolationForecast",
    "forecast_interpolation",
    "open_interpolation",
]

INTERPOLATE: Final = "interpolate"  # the stage's name
TIMES: Final = 2  # of the frame rate


@dataclass(frozen=True)
class InterpolationForecast:
    """Output and greatest cost of a job's interpolation. Cuts and equal frames cost nothing."""

    frames: int  # of the output
    fps: Fraction  # of the output
    tflop: float
    seconds: float | None  # at least, by the number of operations; None without a known GPU
    memory_bytes: int  # on the device, of the network and of one frame, beside the generator's


def forecast_interpolation(
    plan: SegmentPlan, fps: Fraction, options: JobOptions, device: DeviceSpeed | None = None
) -> InterpolationForecast | None:
    """Forecast the interpolation of a job of `plan`, generated at `fps`, with the published network. None for a job
    without interpolation."""
    if options.output.interpolate != TIMES:
        return None
    shape, made, size = RifeShape(), max(plan.frames - 1, 0), (plan.width, plan.height)
    return InterpolationForecast(
        frames=count_frames(plan.frames, pad_last=options.output.pad_last),
        fps=TIMES * fps,
        tflop=made * shape.frame_flop(*size) / TERA,
        seconds=None if device is None else made * shape.frame_seconds(*size, device),
        memory_bytes=shape.weight_bytes + shape.peak_bytes(*size),
    )


def count_frames(frames: int, *, pad_last: bool) -> int:
    """Return the number of output frames for `frames` generated ones."""
    return TIMES * frames if pad_last else max(TIMES * frames - (TIMES - 1), 0)


class BetweenFrames(Protocol):
    """Makes the frame in the middle between two."""

    def between(self, one: np.ndarray, other: np.ndarray) -> np.ndarray:
        """Return the frame in the middle. All three are uint8 RGB [H, W, 3]."""
        ...


class Interpolation:
    """The stage of one job, see `stages.SegmentStage`. Between segments it keeps the last frame."""

    name = INTERPOLATE

    def __init__(
        self, network: BetweenFrames, *, pad_last: bool = False, about: Mapping[str, Any] | None = None
    ) -> None:
        """about: further entries of its report, e.g. the network's name."""
        self._network: BetweenFrames | None = network
        self._pad_last, self._about = pad_last, dict(about or {})
        self._last: np.ndarray | None = None
        self._small: np.ndarray | None = None  # the last frame's thumbnail
        self._counts = {"interpolated": 0, "copied": 0, "cuts": 0}

    @property
    def report(self) -> Mapping[str, Any]:
        """Counts of frames between two neighbours: made by the network, copies of equal ones, repeated at cuts."""
        return self._about | self._counts

    def clip_out(self, clip: ClipInfo) -> ClipInfo:
        return replace(clip, frames=count_frames(clip.frames, pad_last=self._pad_last), fps=TIMES * clip.fps)

    def __call__(self, segment: Segment) -> Iterator[Segment]:
        if not len(segment.frames):
            return
        made: list[np.ndarray] = []
        for frame in segment.frames:
            small = thumbnail(frame)
            if self._last is not None and self._small is not None:
                made.append(self._between(self._last, frame, self._small, small))
            made.append(frame)
            self._last, self._small = frame, small
        self._last = made[-1].copy()  # a view would keep all frames of the segment in memory
        yield replace(segment, frames=np.stack(made))

    def flush(self) -> Iterator[Segment]:
        if self._pad_last and self._last is not None:
            yield Segment(0, self._last[None])

    def state(self) -> StageState:
        return StageState({} if self._last is None else {"last": self._last}, dict(self._counts))

    def restore(self, state: StageState) -> None:
        if set(state.values) != set(self._counts):
            raise InternalError(f"the state of stage {self.name} has the values {sorted(state.values)}")
        self._counts = {name: int(state.values[name]) for name in self._counts}
        self._last = state.arrays.get("last")
        self._small = None if self._last is None else thumbnail(self._last)

    def close(self) -> None:
        self._network = self._last = self._small = None

    def _between(self, one: np.ndarray, other: np.ndarray, small: np.ndarray, next_small: np.ndarray) -> np.ndarray:
        assert self._network is not None, "the stage was closed"
        if np.array_equal(one, other):
            kind, frame = "copied", one
        elif is_cut(small, next_small):
            kind, frame = "cuts", one
        else:
            kind, frame = "interpolated", self._network.between(one, other)
        self._counts[kind] += 1
        return frame


def open_interpolation(options: JobOptions, settings: StageSettings) -> Interpolation | None:
    """Return the stage, or None for a job without interpolation. The network is loaded once and kept for later jobs.

    Raises JobWeightsMissing, JobWeightsCorrupt, ConfigInvalid (the device is not available), OutOfMemory.
    """
    if options.output.interpolate != TIMES:
        return None
    if settings.models is None:
        raise JobWeightsMissing("no model store was named", todo="Pass --models, or leave output.interpolate at 1")
    network = settings.kept.get(INTERPOLATE)
    if network is None:
        network = settings.kept[INTERPOLATE] = _load(ModelStore(settings.models).rife, settings.device)
    about = {"network": ModelStore(settings.models).rife.stem, "device": str(network.device), "dtype": "float32"}
    return Interpolation(network, pad_last=options.output.pad_last, about=about)


def _load(path: Path, device: str) -> Any:
    from runner.finishing.rife import RifeInterpolator
    from runner.generation.runtime.device import pick_device

    picked, _ = pick_device(device)
    with job_weight_errors():
        return RifeInterpolator.open(path, picked)

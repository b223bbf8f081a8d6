"""Interpolation: twice the frame rate, a frame made between each two neighbours of a job.

In:   a job's segments, in order. Out: the same frames, and one before each of them but the first.
Never: how the network works, files, encoders.

Every frame of the generator passes unchanged. The frame between two neighbours is
    the network's       as a rule
    the first of both   where both are equal, or where a cut lies between them (video/cuts.py)
Where one segment ends and the next begins is not seen: how a clip is cut into segments changes no frame. Of n frames
come 2n - 1, with `output.pad_last` 2n: the last one is repeated, so that the clip is as long as it
was; else picture and sound end half a generated frame earlier.
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
    """What interpolation makes of a job, and what it costs at most: cuts and equal frames cost nothing."""

    frames: int  # of the output
    fps: Fraction  # of the output
    tflop: float
    seconds: float | None  # at least, by operations; None without a GPU of which something is known
    memory_bytes: int  # on the device, of the network and of one frame, beside what the generator keeps there


def forecast_interpolation(
    plan: SegmentPlan, fps: Fraction, options: JobOptions, device: DeviceSpeed | None = None
) -> InterpolationForecast | None:
    """For a job of `plan`, generated at `fps`; None where it does not ask for it. Of the published network."""
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
    """How many frames come of `frames`."""
    return TIMES * frames if pad_last else max(TIMES * frames - (TIMES - 1), 0)


class BetweenFrames(Protocol):
    """Makes the frame halfway between two."""

    def between(self, one: np.ndarray, other: np.ndarray) -> np.ndarray:
        """uint8 RGB [H, W, 3], all three."""
        ...


class Interpolation:
    """The stage of one job, see `stages.SegmentStage`. Between segments it keeps their last frame."""

    name = INTERPOLATE

    def __init__(
        self, network: BetweenFrames, *, pad_last: bool = False, about: Mapping[str, Any] | None = None
    ) -> None:
        """`about`: what else its report says, e.g. of the network."""
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
        self._last = made[-1].copy()  # else it would hold all frames of the segment
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
    """The stage, where the job asks for it. The network is loaded for the first such job and kept for the others.

    Raises JobWeightsMissing, JobWeightsCorrupt, ConfigInvalid (a device that is not there), OutOfMemory.
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

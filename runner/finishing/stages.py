"""Stages: what happens to a job's frames between the decoder and the encoder, a segment at a time.

In:   a job's options; its segments in order. Out: segments, perhaps with more frames at another rate.
Never: how frames are generated or encoded.

A stage is one file beside this one and a row of STAGES.
"""

from __future__ import annotations

from collections.abc import Generator, Iterable, Mapping, Sequence
from contextlib import ExitStack, closing
from dataclasses import dataclass, field
from importlib import import_module
from pathlib import Path
from typing import Any, Final, Protocol

import numpy as np

from runner.errors import InternalError
from runner.generation.protocol import ClipInfo, ResumePoint, Segment
from runner.spec.options import JobOptions
from runner.timing import StageTimer

__all__ = [
    "STAGES",
    "SegmentStage",
    "StageSettings",
    "StageState",
    "add_states",
    "finish_segments",
    "finished_clip",
    "open_stages",
    "split_states",
]

PREFIX: Final = "stage."  # of a stage's keys in a resume point; a generator's own keys begin otherwise

# Name → "module:function" of (JobOptions, StageSettings) -> SegmentStage, or None where the job does not ask for it.
# A job's stages run in this order. Imported when the first job starts.
STAGES: dict[str, str] = {
    "interpolate": "runner.finishing.interpolation:open_interpolation",
}


@dataclass(frozen=True)
class StageSettings:
    """What a run says to all stages."""

    models: Path | None = None  # the model store
    device: str = "auto"  # auto | cpu | cuda
    # By stage: what is loaded once for all jobs of the run, e.g. a network. Read and filled in the generating thread.
    kept: dict[str, Any] = field(default_factory=dict, repr=False, compare=False)


@dataclass(frozen=True)
class StageState:
    """What a stage keeps from one segment to the next. The stage alone knows what it means."""

    arrays: Mapping[str, np.ndarray]  # of standard numpy dtypes; not changed after they were handed out
    values: Mapping[str, Any]  # JSON-able


class SegmentStage(Protocol):
    """One stage of one job. It may keep frames from one segment to the next."""

    @property
    def name(self) -> str:
        """Of its seconds in the record's `timings_s` and of its state in a checkpoint; without dots."""
        ...

    @property
    def report(self) -> Mapping[str, Any]:
        """What the record says of it, e.g. counts of frames since the job's first segment; JSON-able."""
        return {}

    def clip_out(self, clip: ClipInfo) -> ClipInfo:
        """What it makes of a whole clip. `start_s` stays, and the length in seconds to less than a frame."""
        ...

    def __call__(self, segment: Segment) -> Iterable[Segment]:
        """The segments that can be handed on, in order; of these only the frames count.

        `segment` may have no frames, where the stage before kept them.
        """
        ...

    def flush(self) -> Iterable[Segment]:
        """What is left after the last segment."""
        ...

    def state(self) -> StageState:
        """What `restore` needs in another process, so that the next segments come out with the same bits."""
        ...

    def restore(self, state: StageState) -> None:
        """Continue after the segment that `state` was taken after. Before the first segment."""
        ...

    def close(self) -> None:
        """Release everything. Idempotent."""
        ...


def open_stages(options: JobOptions, settings: StageSettings) -> tuple[SegmentStage, ...]:
    """The stages that a job asks for, in order, made for it alone. Raises what their files raise, e.g. weights.*."""
    found = []
    for row in STAGES.values():
        module, _, name = row.partition(":")
        stage = getattr(import_module(module), name)(options, settings)
        if stage is not None:
            found.append(stage)
    return tuple(found)


def finished_clip(clip: ClipInfo, stages: Sequence[SegmentStage]) -> ClipInfo:
    """`clip` after all stages."""
    for stage in stages:
        clip = stage.clip_out(clip)
    return clip


def finish_segments(
    segments: Iterable[Segment],
    stages: Sequence[SegmentStage],
    timer: StageTimer,
    total: int,
    states: Mapping[str, StageState] | None = None,
) -> Generator[Segment, None, None]:
    """`segments` through all stages, lazily: one finished segment for each, of the same index.

    It has all frames that the stages hand on for it, perhaps none; that of index `total` - 1 has also those that the
    stages kept to the end. Its `pose` is the generated segment's, at the first rate. Its `resume` has the stages'
    states beside the generator's own (`add_states`).

    `states`: of a resumed job, from `split_states`; None where it begins at segment 0. Closes the stages at the end, or
    when it is closed. Raises InternalError where `states` are not of these stages, and what a stage's `restore` raises.
    """
    with ExitStack() as opened:
        for stage in stages:
            opened.enter_context(closing(stage))
        _check_names(stages)
        if states is not None:
            _restore(stages, states)
        for segment in segments:
            made = [segment]
            for stage in stages:
                made = _run(stage, made, timer, last=segment.index == total - 1)
            resume = segment.resume
            if resume is not None:
                resume = add_states(resume, {stage.name: stage.state() for stage in stages})
            yield Segment(segment.index, _join(made, segment), segment.pose, resume, segment.drift)


def _run(stage: SegmentStage, segments: Iterable[Segment], timer: StageTimer, *, last: bool) -> list[Segment]:
    with timer.stage(stage.name, on_device=True):
        made = [each for segment in segments for each in stage(segment)]
        if last:
            made.extend(stage.flush())
    return made


def _join(made: Sequence[Segment], segment: Segment) -> np.ndarray:
    """The frames of all that the stages made of `segment`."""
    if len(made) == 1:
        return made[0].frames
    return np.concatenate([each.frames for each in made]) if made else segment.frames[:0]


def add_states(point: ResumePoint, states: Mapping[str, StageState]) -> ResumePoint:
    """`point` with the stages' states: arrays as `stage.<name>.<array>`, values as `stage.<name>`."""
    arrays, values = dict(point.arrays), dict(point.values)
    for stage, state in states.items():
        arrays.update({f"{PREFIX}{stage}.{name}": array for name, array in state.arrays.items()})
        values[f"{PREFIX}{stage}"] = dict(state.values)
    return ResumePoint(point.segment, arrays, values)


def split_states(point: ResumePoint) -> tuple[ResumePoint, dict[str, StageState]]:
    """What `add_states` put together: the generator's own point, and the states by their stages' names."""
    names = [key.removeprefix(PREFIX) for key in point.values if key.startswith(PREFIX)]
    states = {}
    for stage in names:
        prefix = f"{PREFIX}{stage}."
        arrays = {key.removeprefix(prefix): array for key, array in point.arrays.items() if key.startswith(prefix)}
        states[stage] = StageState(arrays, point.values[f"{PREFIX}{stage}"])
    own_arrays = {key: array for key, array in point.arrays.items() if not key.startswith(PREFIX)}
    own_values = {key: value for key, value in point.values.items() if not key.startswith(PREFIX)}
    return ResumePoint(point.segment, own_arrays, own_values), states


def _check_names(stages: Sequence[SegmentStage]) -> None:
    """Names are parts of keys: two states of one name, or a name with a dot, could not be told apart again."""
    names = [stage.name for stage in stages]
    if len(set(names)) < len(names) or any("." in name for name in names):
        raise ValueError(f"the stages of a job need different names without dots, not {', '.join(names)}")


def _restore(stages: Sequence[SegmentStage], states: Mapping[str, StageState]) -> None:
    names = [stage.name for stage in stages]
    if set(names) != set(states):
        raise InternalError(
            f"the checkpoint has states of the stages {sorted(states)}; this job has the stages {sorted(names)}",
            todo="Run again with --checkpoint off, and report this",
        )
    for stage in stages:
        stage.restore(states[stage.name])

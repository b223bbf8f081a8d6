"""Stages: change a job's frames between the decoder and the encoder, a segment at a time.

In:   a job's options; its segments in order. Out: segments, perhaps with more frames at another rate.
Never: generating or encoding frames.

A stage is one file in this folder and a row of STAGES.
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

PREFIX: Final = "stage."  # of a stage's keys in a resume point; no key of a generator begins with it

# Name → "module:function" of (JobOptions, StageSettings) -> SegmentStage, or None for a job without this stage.
# A job's stages run in this order. Modules are imported when the first job starts.
STAGES: dict[str, str] = {
    "interpolate": "runner.finishing.interpolation:open_interpolation",
}


@dataclass(frozen=True)
class StageSettings:
    """A run's settings for all stages."""

    models: Path | None = None  # the model store
    device: str = "auto"  # auto | cpu | cuda
    # Stage -> an object that is loaded once for all jobs of the run, e.g. a network. Only for the generating thread.
    kept: dict[str, Any] = field(default_factory=dict, repr=False, compare=False)


@dataclass(frozen=True)
class StageState:
    """The state of a stage between two segments. Only the stage itself interprets it."""

    arrays: Mapping[str, np.ndarray]  # of standard numpy dtypes; never changed after they are returned
    values: Mapping[str, Any]  # JSON-able


class SegmentStage(Protocol):
    """One stage of one job. It may keep frames from one segment to the next."""

    @property
    def name(self) -> str:
        """The key of its seconds in the record's `timings_s` and of its state in a checkpoint; without dots."""
        ...

    @property
    def report(self) -> Mapping[str, Any]:
        """Its entries in the record, e.g. counts of frames since the job's first segment; JSON-able."""
        return {}

    def clip_out(self, clip: ClipInfo) -> ClipInfo:
        """Return the facts of the clip after this stage. `start_s` stays; the length changes by less than a frame."""
        ...

    def __call__(self, segment: Segment) -> Iterable[Segment]:
        """Return the segments that are ready, in order. Only their frames are used.

        `segment` may have no frames, if the stage before kept them.
        """
        ...

    def flush(self) -> Iterable[Segment]:
        """Return the frames that are left after the last segment."""
        ...

    def state(self) -> StageState:
        """Return the state from which `restore` in another process gives the next segments the same bits."""
        ...

    def restore(self, state: StageState) -> None:
        """Continue after the segment at which `state` was taken. Called before the first segment."""
        ...

    def close(self) -> None:
        """Release everything. Idempotent."""
        ...


def open_stages(options: JobOptions, settings: StageSettings) -> tuple[SegmentStage, ...]:
    """Open a job's stages, in order. Raises the errors of their modules, e.g. weights.*."""
    found = []
    for row in STAGES.values():
        module, _, name = row.partition(":")
        stage = getattr(import_module(module), name)(options, settings)
        if stage is not None:
            found.append(stage)
    return tuple(found)


def finished_clip(clip: ClipInfo, stages: Sequence[SegmentStage]) -> ClipInfo:
    """Return the facts of `clip` after all stages."""
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
    """Run `segments` through all stages, lazily. Yields one finished segment for each, with the same index.

    It has all frames that the stages return for it, perhaps none. The segment of index `total` - 1 also has those that
    the stages kept to the end. Its `pose` is the generated segment's, at the first rate. Its `resume` has the stages'
    states beside the generator's (`add_states`).

    states: those of a resumed job, from `split_states`; None for a job from segment 0.
    The stages are closed at the end, or when the generator is closed. Raises InternalError if `states` are not of these
    stages, and the errors of a stage's `restore`.
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
    """Join the frames that the stages made from `segment`."""
    if len(made) == 1:
        return made[0].frames
    return np.concatenate([each.frames for each in made]) if made else segment.frames[:0]


def add_states(point: ResumePoint, states: Mapping[str, StageState]) -> ResumePoint:
    """Return `point` with the stages' states: arrays as `stage.<name>.<array>`, values as `stage.<name>`."""
    arrays, values = dict(point.arrays), dict(point.values)
    for stage, state in states.items():
        arrays.update({f"{PREFIX}{stage}.{name}": array for name, array in state.arrays.items()})
        values[f"{PREFIX}{stage}"] = dict(state.values)
    return ResumePoint(point.segment, arrays, values)


def split_states(point: ResumePoint) -> tuple[ResumePoint, dict[str, StageState]]:
    """Undo `add_states`: return the generator's point, and the states by the names of their stages."""
    names = [key.removeprefix(PREFIX) for key in point.values if key.startswith(PREFIX)]
    states = {}
    for stage in names:
        prefix = f"{PREFIX}{stage}."
        arrays = {key.removeprefix(prefix): array for key, array in point.arrays.items() if key.startswith(prefix)}
        states[stage] = StageState(arrays, point.values[f"{PREFIX}{stage}"])
    arrays = {key: array for key, array in point.arrays.items() if not key.startswith(PREFIX)}
    values = {key: value for key, value in point.values.items() if not key.startswith(PREFIX)}
    return ResumePoint(point.segment, arrays, values), states


def _check_names(stages: Sequence[SegmentStage]) -> None:
    """Raise ValueError for equal names and names with a dot: `split_states` finds the states by the names in keys."""
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

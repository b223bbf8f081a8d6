"""Stages: what happens to a job's frames between the decoder and the encoder, a segment at a time.

In:   a job's options; its segments in order. Out: segments, perhaps with more frames at another rate.
Never: how frames are generated or encoded.

A stage is one file beside this one and a row of STAGES.
"""

from __future__ import annotations

from collections.abc import Generator, Iterable, Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Protocol

from runner.generation.protocol import ClipInfo, Segment
from runner.spec.options import JobOptions
from runner.timing import StageTimer

__all__ = ["STAGES", "SegmentStage", "StageSettings", "finish_segments", "finished_clip", "open_stages"]

# Name → "module:function" of (JobOptions, StageSettings) -> SegmentStage, or None where the job does not ask for it.
# A job's stages run in this order. Imported when the first job starts.
STAGES: dict[str, str] = {}


@dataclass(frozen=True)
class StageSettings:
    """What a run says to all stages."""

    models: Path | None = None  # the model store
    device: str = "auto"  # auto | cpu | cuda


class SegmentStage(Protocol):
    """One stage of one job. It may keep frames from one segment to the next."""

    @property
    def name(self) -> str:
        """Of its seconds in the record's `timings_s`."""
        ...

    def clip_out(self, clip: ClipInfo) -> ClipInfo:
        """What it makes of a whole clip. `start_s` and the length in seconds stay."""
        ...

    def __call__(self, segment: Segment) -> Iterable[Segment]:
        """The segments that can be handed on, in order; `pose` stays as it is, at the clip's first rate."""
        ...

    def flush(self) -> Iterable[Segment]:
        """What is left after the last segment."""
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
    segments: Iterable[Segment], stages: Sequence[SegmentStage], timer: StageTimer
) -> Generator[Segment, None, None]:
    """`segments` through all stages, lazily, numbered anew. Closes the stages at the end, or when it is closed."""
    for stage in stages:
        segments = _through(segments, stage, timer)
    index = 0
    for segment in segments:
        if len(segment.frames) or segment.pose is not None:
            yield Segment(index, segment.frames, segment.pose)
            index += 1


def _through(segments: Iterable[Segment], stage: SegmentStage, timer: StageTimer) -> Iterator[Segment]:
    with closing(stage):
        for segment in segments:
            yield from _timed(stage(segment), stage.name, timer)
        yield from _timed(stage.flush(), stage.name, timer)


def _timed(made: Iterable[Segment], name: str, timer: StageTimer) -> Iterator[Segment]:
    waiting = iter(made)
    while True:
        with timer.stage(name, on_device=True):
            segment = next(waiting, None)
        if segment is None:
            return
        yield segment

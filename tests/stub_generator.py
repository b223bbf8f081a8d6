"""A generator of the batch loop's contract without a model: plain frames, chosen delays, chosen failures.

What a job shall do is told by its prompt: `ok`, `fail-prepare`, `fail-generate`, `crash`, `oom`, `flaky` (fails with a
retryable error until its second try), `wrong-size`, `few` (fewer frames than promised).
"""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from fractions import Fraction
from typing import Any

import numpy as np

from runner.errors import InputUnreadable, StorageUnavailable
from runner.generation.protocol import ClipInfo, OnStep, Request, Segment, SegmentPlan
from runner.spec.options import JobOptions
from runner.timing import StageTimer

WIDTH, HEIGHT = 64, 48


@dataclass
class StubConditions:
    request: Request
    clip: ClipInfo
    report: Mapping[str, Any] = field(default_factory=lambda: {"frames_without_person": 0})
    closed: bool = False

    def close(self) -> None:
        self.closed = True


@dataclass
class StubGenerator:
    frames: int = 6
    segments: int = 2
    prepare_s: float = 0.0
    generate_s: float = 0.0
    identity: Mapping[str, str] = field(default_factory=lambda: {"weights": "stub"})
    description: Mapping[str, Any] = field(default_factory=lambda: {"device": "none"})
    probe: None = None
    tries: dict[str, int] = field(default_factory=dict)
    prepared: list[StubConditions] = field(default_factory=list)
    generating: threading.Event = field(default_factory=threading.Event)
    closed: bool = False

    def plan(self, frames: int, size: tuple[int, int], options: JobOptions) -> SegmentPlan:
        each = -(-frames // self.segments)
        steps = options.steps or 2
        return SegmentPlan(frames, each, 0, self.segments, *size, steps, evaluations=steps, tflop=1.0)

    def prepare(self, request: Request, timer: StageTimer) -> StubConditions:
        with timer.stage("stub_prepare"):
            time.sleep(self.prepare_s)
        if request.prompt == "fail-prepare":
            raise InputUnreadable("not a video", where=request.video, todo="Send a video")
        conditions = StubConditions(request, ClipInfo(self.frames, Fraction(8), WIDTH, HEIGHT, 0.0))
        self.prepared.append(conditions)
        return conditions

    def generate(
        self, conditions: StubConditions, plan: SegmentPlan, timer: StageTimer, on_step: OnStep | None = None
    ) -> Iterator[Segment]:
        prompt = conditions.request.prompt
        self.tries[prompt] = self.tries.get(prompt, 0) + 1
        self.generating.set()
        if prompt == "crash":
            os._exit(9)
        if prompt == "oom":
            raise MemoryError("stub")
        if prompt == "flaky" and self.tries[prompt] < 2:
            raise StorageUnavailable("the stub's store is away")
        seed = conditions.request.options.seed
        random = np.random.default_rng(seed)
        total = plan.segments * plan.steps
        left = plan.frames
        begin = time.monotonic()
        for index in range(plan.segments):
            for step in range(plan.steps):
                deadline = begin + self.generate_s * (index * plan.steps + step + 1) / total
                while time.monotonic() < deadline:
                    time.sleep(min(0.01, self.generate_s / total))
                timer.step(self.generate_s / total)
                if on_step is not None:
                    on_step(index * plan.steps + step + 1, total)
            if prompt == "fail-generate" and index == 1:
                raise ValueError("the stub broke")
            count = min(plan.segment_frames, left)
            if prompt == "few" and index == 1:
                count = 1
            width = WIDTH * 2 if prompt == "wrong-size" else WIDTH
            left -= count
            shade = random.integers(0, 255, (count, 1, 1, 3), np.uint8)
            frames = np.broadcast_to(shade, (count, HEIGHT, width, 3)).copy()
            yield Segment(index, frames, pose=frames[:, ::-1].copy())

    def lower_memory(self) -> bool:
        return False

    def close(self) -> None:
        self.closed = True

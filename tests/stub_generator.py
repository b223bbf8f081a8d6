"""A generator of the batch loop's contract without a model: plain frames, chosen delays, chosen failures.

What a job shall do is told by its prompt: `ok`, `fail-prepare`, `fail-generate`, `crash`, `oom`, `flaky` (fails with a
retryable error until its second try), `wrong-size`, `few` (fewer frames than promised). In the middle of a segment,
counted from 0: `crash-at-N` (the process ends, unless the job was resumed at segment N), `flaky-at-N` (as `flaky`).
Of a job `no-people` it is not known where people are.

A job may be resumed after any of its segments. `resumable=False` makes a generator that cannot do this.
"""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from fractions import Fraction
from typing import Any

import numpy as np

from runner.errors import InputUnreadable, InternalError, StorageUnavailable
from runner.generation.protocol import ClipInfo, OnStep, Request, ResumePoint, Segment, SegmentPlan
from runner.records.people import People, make_people
from runner.spec.options import JobOptions
from runner.timing import StageTimer

WIDTH, HEIGHT = 64, 48


@dataclass
class StubConditions:
    request: Request
    clip: ClipInfo
    report: Mapping[str, Any] = field(default_factory=lambda: {"frames_without_person": 0})
    closed: bool = False

    @property
    def people(self) -> People | None:
        """A box that depends on the seed and wanders."""
        if self.request.prompt == "no-people":
            return None
        clip, left = self.clip, np.arange(self.clip.frames) + self.request.options.seed % 16
        box = np.stack([left, left * 0 + 4, left + 20, left * 0 + 40], 1).astype(float)
        return make_people(box, np.full_like(box, np.nan), *clip.size, clip.fps)

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
    device: str = "stub"
    resumable: bool = True
    warns: tuple[str, ...] = ()  # of each job that it generates
    tries: dict[str, int] = field(default_factory=dict)
    prepared: list[StubConditions] = field(default_factory=list)
    started_at: list[int] = field(default_factory=list)  # the first segment of each call of `generate`
    generating: threading.Event = field(default_factory=threading.Event)
    closed: bool = False

    @property
    def resume_identity(self) -> Mapping[str, str]:
        return {"device": self.device} if self.resumable else {}

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
        self,
        conditions: StubConditions,
        plan: SegmentPlan,
        timer: StageTimer,
        on_step: OnStep | None = None,
        start: ResumePoint | None = None,
    ) -> Iterator[Segment]:
        prompt = conditions.request.prompt
        word, _, place = prompt.partition("-at-")
        first = 0 if start is None else start.segment
        self.tries[prompt] = self.tries.get(prompt, 0) + 1
        self.started_at.append(first)
        self.generating.set()
        if prompt == "crash":
            os._exit(9)
        if prompt == "oom":
            raise MemoryError("stub")
        if prompt == "flaky" and self.tries[prompt] < 2:
            raise StorageUnavailable("the stub's store is away")
        if first == plan.segments:
            return
        random = np.random.default_rng(conditions.request.options.seed)
        left = plan.frames
        if start is not None:
            left = _restore(start, random)
        total = plan.segments * plan.steps
        begin = time.monotonic()
        for index in range(first, plan.segments):
            for step in range(plan.steps):
                deadline = begin + self.generate_s * ((index - first) * plan.steps + step + 1) / total
                with timer.stage("denoise"):
                    while time.monotonic() < deadline:
                        time.sleep(min(0.01, self.generate_s / total))
                timer.step(self.generate_s / total)
                if on_step is not None:
                    on_step(index * plan.steps + step + 1, total)
                if place == str(index) and word == "crash" and first != index:
                    os._exit(9)
                if place == str(index) and word == "flaky" and self.tries[prompt] < 2:
                    raise StorageUnavailable("the stub's store is away")
            if prompt == "fail-generate" and index == 1:
                raise ValueError("the stub broke")
            count = min(plan.segment_frames, left)
            if prompt == "few" and index == 1:
                count = 1
            width = WIDTH * 2 if prompt == "wrong-size" else WIDTH
            left -= count
            shade = random.integers(0, 255, (count, 1, 1, 3), np.uint8)
            frames = np.broadcast_to(shade, (count, HEIGHT, width, 3)).copy()
            resume = _resume_point(index + 1, plan, random, left) if self.resumable else None
            yield Segment(index, frames, pose=frames[:, ::-1].copy(), resume=resume)

    def job_warnings(self, plan: SegmentPlan, options: JobOptions) -> Sequence[str]:
        return self.warns

    def fall_back_memory_mode(self) -> bool:
        return False

    def close(self) -> None:
        self.closed = True


def _resume_point(segment: int, plan: SegmentPlan, random: np.random.Generator, left: int) -> ResumePoint:
    """The random state as bytes, and how many frames are `left`."""
    if segment == plan.segments:
        return ResumePoint(segment, {}, {})
    state: Any = random.bit_generator.state
    raw = b"".join(state["state"][name].to_bytes(16, "little") for name in ("state", "inc"))
    spare = {name: int(state[name]) for name in ("has_uint32", "uinteger")}
    return ResumePoint(segment, {"random": np.frombuffer(raw, np.uint8)}, {"left": left, **spare})


def _restore(start: ResumePoint, random: np.random.Generator) -> int:
    """Give `random` the state that `start` has; how many frames are left. Raises InternalError where it has none."""
    if set(start.arrays) != {"random"} or start.arrays["random"].shape != (32,):
        raise InternalError("the stub's checkpoint has no random state", todo="Run with --checkpoint off")
    raw = start.arrays["random"].tobytes()
    state: Any = random.bit_generator.state
    state["state"] = {"state": int.from_bytes(raw[:16], "little"), "inc": int.from_bytes(raw[16:], "little")}
    random.bit_generator.state = state | {name: start.values[name] for name in ("has_uint32", "uinteger")}
    return int(start.values["left"])

"""Task: the state of one attempt of one job in the batch loop, and its record.

In:   the results of each stage. Out: a ResultRecord. Never: the work of a stage, or which stage is next.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from runner.batch.delivery import Delivery
from runner.batch.job_checkpoint import Chain, Found, with_versions
from runner.batch.lease import host_name
from runner.batch.ledger import Decision
from runner.batch.memory_sampler import MemoryWindow
from runner.errors import RunnerError
from runner.generation.protocol import Conditions, Segment, SegmentPlan
from runner.records.drift_record import DriftRecord
from runner.records.record import (
    Efficiency,
    InputRecord,
    MemoryRecord,
    ResultRecord,
    SpanRecord,
    environment,
    reuse_of,
)
from runner.spec.manifest import Job
from runner.timing import StageTimer, now

__all__ = ["EndItem", "SegmentItem", "Spans", "Task"]

# The stages that the forecast covers. Waiting for conditions or for the encoder is not included.
GENERATION_STAGES = ("encode_prompt", "encode_image", "encode_reference", "encode_conditions", "denoise", "vae_decode")


@dataclass
class Task:
    """One attempt of one job."""

    job: Job
    folder: Path  # its own scratch folder
    window: MemoryWindow
    tried: tuple[str, ...] = ()  # error codes of earlier attempts in this run
    timer: StageTimer = field(default_factory=StageTimer)
    started_at: str = field(default_factory=now)
    begin: float = field(default_factory=time.monotonic)
    parts: dict[str, Any] = field(default_factory=dict)
    fingerprint: str = ""
    decision: Decision = field(default_factory=lambda: Decision("run", ""))
    inputs: dict[str, InputRecord] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)  # for the record
    warnings: list[str] = field(default_factory=list)  # the notes that a person should check
    audio_from: Path | None = None
    conditions: Conditions | None = None
    plan: SegmentPlan | None = None
    chain: Chain | None = None  # for its kept segments; None: none are kept
    identity: Mapping[str, str] = field(default_factory=dict)  # the generator's resume_identity at the last segment
    kept: Found = field(default_factory=Found)  # kept segments of an earlier attempt
    resumed_at: int | None = None  # first segment (from 1) that this attempt generates, if it was resumed
    drift: DriftRecord | None = None  # of all finished segments, including those of earlier attempts
    finishing: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)  # stage → its report at the end
    delivery: Delivery | None = None
    fetch_begin: float | None = None  # start of fetching, after the model was loaded; monotonic seconds
    deliver_begin: float | None = None  # when its first segment was written; monotonic seconds
    spans: dict[str, tuple[float, float]] = field(default_factory=dict)  # by stage: begin and end; monotonic seconds
    part_s: float = 0.0  # seconds to encode and keep the last segment
    generating: bool = False  # the main thread reads its conditions; no other thread may close them
    settled: bool = False  # set by the delivery thread; later items of this task are dropped

    def note(self, text: str, *, warning: bool = False) -> None:
        """Add a note to the record. `warning`: also to its warnings."""
        self.notes.append(text)
        if warning:
            self.warnings.append(text)

    @property
    def generation_s(self) -> float:
        """Seconds of generation so far."""
        return sum(self.timer.seconds.get(stage, 0.0) for stage in GENERATION_STAGES)

    @property
    def gpu_s(self) -> float:
        """Seconds of device work so far: generation, and the stages between decoder and encoder."""
        return self.generation_s + sum(self.timer.seconds.get(stage, 0.0) for stage in self.finishing)

    def record(
        self, *, run_id: str, shard: str, recipe: str, engine: dict[str, Any], overlapped: list[str], **more: Any
    ) -> ResultRecord:
        """Return the record of the attempt. `more`: how it ended (status, output, error)."""
        return ResultRecord(
            job_id=self.job.id,
            attempt=self.decision.attempt,
            run_id=run_id,
            reason=self.decision.reason,
            started_at=self.started_at,
            finished_at=now(),
            fingerprint=self.fingerprint,
            fingerprint_parts=self.parts,
            inputs=self.inputs,
            host=host_name(),
            shard=shard,
            wall_s=round(time.monotonic() - (self.fetch_begin or self.begin), 3),
            gpu_s=round(self.gpu_s, 3),
            spans={
                name: SpanRecord(begin_s=round(begin - self.begin, 3), end_s=round(end - self.begin, 3))
                for name, (begin, end) in self.spans.items()
            },
            timings_s={name: round(s, 6) for name, s in self.timer.seconds.items()},
            steps_s=[round(s, 6) for s in self.timer.steps],
            memory=MemoryRecord(
                stages=self.timer.peaks,
                forecast=self.timer.forecast,
                process_gpu_peak_bytes=self.window.gpu_peak,
                host_rss_peak_bytes=self.window.rss_peak,
                overlapped=overlapped,
            ),
            efficiency=self._efficiency(),
            resumed_at_segment=self.resumed_at,
            drift=self.drift,
            preprocess=dict(self.conditions.report) if self.conditions is not None else {},
            finishing={name: dict(report) for name, report in self.finishing.items()},
            caches=dict(self.timer.counters),
            reuse=reuse_of(self.timer.counters, self.timer.gauges),
            recipe=recipe,
            engine=engine,
            environment=dict(environment()),
            computed_by=with_versions(self.identity) if self.identity else {},
            notes=self.notes,
            warnings=self.warnings,
            **more,
        )

    def _efficiency(self) -> Efficiency | None:
        plan = self.plan
        if plan is None:
            return None
        generating = self.generation_s
        generated = plan.segments if self.resumed_at is None else plan.segments - self.resumed_at + 1
        share = generated / plan.segments
        return Efficiency(
            frames_requested=plan.frames,
            frames_denoised=plan.denoised_frames,
            segments=plan.segments,
            segments_generated=generated,
            segment_frames=plan.segment_frames,
            padding_fraction=round(plan.padding_frames / plan.denoised_frames, 4),
            overlap_fraction=round(plan.overlap_total / plan.denoised_frames, 4),
            tflop=plan.tflop,
            tflop_per_s=plan.tflop * share / generating if generating and generated else None,
            generation_s=round(generating, 3) if generating else None,
            forecast_s=None if plan.seconds is None else round(plan.seconds * share, 3),
        )


@dataclass(frozen=True)
class SegmentItem:
    """One generated segment, for the delivery thread."""

    task: Task
    segment: Segment
    identity: Mapping[str, str]  # the generator's `resume_identity` when it made the segment


@dataclass(frozen=True)
class EndItem:
    """The end of a task, for the delivery thread: complete, failed (`error`), or returned to a later run."""

    task: Task
    error: RunnerError | None = None
    stage: str = ""
    returned: bool = False


class Spans:
    """When the stages of the last few jobs ran, to find those that ran at the same time. Monotonic seconds."""

    def __init__(self, keep: int = 8) -> None:
        self._keep = keep  # only neighbours in time can overlap
        self._jobs: dict[str, dict[str, tuple[float, float]]] = {}
        self._lock = threading.Lock()

    def add(self, job_id: str, stage: str, begin: float) -> None:
        """Note that `stage` ran from `begin` until now."""
        with self._lock:
            self._jobs.setdefault(job_id, {})[stage] = (begin, time.monotonic())
            while len(self._jobs) > self._keep:
                self._jobs.pop(next(iter(self._jobs)))

    def overlapping(self, job_id: str, stage: str) -> list[str]:
        """Return the ended stages of other jobs that overlapped with `stage` of this job, as `prepare of b`."""
        with self._lock:
            begin, end = self._jobs.get(job_id, {}).get(stage, (0.0, 0.0))
            return [
                f"{name} of {other}"
                for other, stages in self._jobs.items()
                for name, (b, e) in stages.items()
                if other != job_id and b < end and e > begin
            ]

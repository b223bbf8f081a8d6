"""Run pace: how far a run is, and how long it will still take.

In:   which job enters which phase, each step, the end of each job. Out: a `RunPosition`: job, segment, step, ETA.
Never: how it is shown. pace.py has the forecast of one job, which the loop uses when it is stopped.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

from runner.generation.protocol import SegmentPlan
from runner.timing import hours_and_minutes

__all__ = ["Phase", "RunPace", "RunPosition", "StepCount"]

Phase = Literal["preparing", "loading the model", "generating", "publishing", "waiting"]

SHOWN_FIRST: tuple[Phase, ...] = ("loading the model", "preparing", "publishing")  # shown if no job is being generated


@dataclass(frozen=True)
class StepCount:
    """How far a job is. `segment` and `step` (of the sampler, in that segment) count from 1.

    done, total: model evaluations over all segments, including those of earlier attempts. A sampler may need several
    evaluations per step.
    """

    segment: int
    segments: int
    step: int
    steps: int
    done: int
    total: int

    @classmethod
    def of(cls, plan: SegmentPlan, done: int, total: int) -> StepCount:
        """Return the count after `done` of `total` evaluations of a job with this plan."""
        each = max(1, plan.evaluations)
        segment = min(plan.segments, max(0, done - 1) // each + 1)
        step = (done - (segment - 1) * each) * plan.steps // each
        return cls(segment, plan.segments, min(plan.steps, max(1, step)), plan.steps, done, total)


@dataclass(frozen=True)
class RunPosition:
    """How far the run is. Jobs that were skipped or failed count as done.

    job: the number, from 1, of the job that began last. running: number of jobs being generated. phase, at: of the only
    running job; `at` is None before its first step. eta_s: seconds until the last job has been generated, None if
    unknown.
    """

    jobs_done: int
    jobs: int
    job: int
    running: int
    phase: Phase
    at: StepCount | None
    eta_s: float | None

    @property
    def text(self) -> str:
        """`job 3/120 · segment 2/5 · step 4/6 · ETA 01:12`."""
        parts = [f"job {self.job}/{self.jobs}" if self.job <= self.jobs else f"job {self.job}"]
        parts.append(f"{self.running} running" if self.running > 1 else self.place)
        return " · ".join([*parts, self.eta] if self.eta else parts)

    @property
    def place(self) -> str:
        """`segment 2/5 · step 4/6`, or the phase."""
        return describe_place(self.phase, self.at)

    @property
    def eta(self) -> str:
        """`ETA 01:12`, `ETA 1:01:12`; empty where it is not known, and where it is past."""
        if self.eta_s is None or self.eta_s < 0.5:
            return ""
        return f"ETA {hours_and_minutes(self.eta_s).removeprefix('0:')}"

    @property
    def fields(self) -> dict[str, Any]:
        """The same as numbers, without unknown ones. JSON-able."""
        found: dict[str, Any] = {"jobs_done": self.jobs_done, "jobs": self.jobs, "job": self.job}
        found |= {"running": self.running}
        if self.running < 2:
            found |= {"phase": self.phase}
            if self.at is not None:
                at = self.at
                found |= {"segment": at.segment, "segments": at.segments, "step": at.step, "steps": at.steps}
        return found if self.eta_s is None else found | {"eta_s": round(self.eta_s, 1)}


def describe_place(phase: Phase, at: StepCount | None) -> str:
    """Return `segment 2/5 · step 4/6`, or the phase."""
    if at is None or phase != "generating":
        return phase
    return f"segment {at.segment}/{at.segments} · step {at.step}/{at.steps}"


@dataclass
class _UnderWay:
    """A job that is under way. Times: seconds of the clock."""

    phase: Phase
    began: float  # start of this phase
    at: StepCount | None = None
    stepped: float = 0.0  # end of the last step
    before: int = 0  # evaluations of earlier attempts

    def step(self, at: StepCount, now: float) -> None:
        if self.at is None:
            self._begin(at)
        elif at.done <= self.at.done:  # it restarts at its first segment
            self.began = self.stepped
            self._begin(at)
        self.at, self.stepped = at, now

    def _begin(self, at: StepCount) -> None:
        self.before = (at.segment - 1) * (at.total // at.segments)

    def left_s(self, now: float, mean_s: float | None) -> float | None:
        """Return the seconds until the job has been generated.

        Before its first step, and while its last segment is decoded, `mean_s` counts: the mean seconds of other jobs,
        None if there were none.
        """
        if self.at is None or (mean_s is not None and self.at.done == self.at.total):
            return None if mean_s is None else max(0.0, mean_s - (now - self.began))
        made = self.at.done - self.before
        if made <= 0:
            return None
        pace = (self.stepped - self.began) / made
        return max(0.0, pace * (self.at.total - self.at.done) - (now - self.stepped))


class RunPace:
    """Which jobs of one run are under way, and its ETA. Safe from any thread. `clock`: seconds, monotonic.

    The ETA adds two amounts: the rest of the running jobs at their own pace; and the other jobs at the mean seconds of
    the jobs that ran in this run, divided by the number of jobs that run at the same time. Before one job has ended,
    the pace of the running jobs also counts for the others.
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._lock = threading.Lock()
        self._jobs = self._ended = self._generated = 0
        self._under_way: dict[str, _UnderWay] = {}
        self._slots: list[float] = []  # one entry per job that runs at the same time: its start

    def start(self, jobs: int) -> None:
        """Start a run of `jobs` jobs; more may be added."""
        with self._lock:
            self._jobs = jobs

    def enter(self, job_id: str, phase: Phase) -> None:
        """The job enters a phase. `waiting`: it is no longer under way; it may run again later."""
        with self._lock:
            self._enter(job_id, phase)

    def step(self, job_id: str, at: StepCount) -> None:
        """A step of the job has ended."""
        with self._lock:
            self._enter(job_id, "generating")
            self._under_way[job_id].step(at, self._clock())

    def finish(self, job_id: str) -> None:
        """The job has ended: it succeeded, failed or was skipped."""
        with self._lock:
            self._enter(job_id, "waiting")
            self._ended += 1

    def _enter(self, job_id: str, phase: Phase) -> None:
        known = self._under_way.get(job_id)
        if known is not None and known.phase == phase:
            return
        now = self._clock()
        if known is not None and known.phase == "generating":
            self._generated += 1
        if phase == "waiting":
            self._under_way.pop(job_id, None)
            return
        self._under_way[job_id] = _UnderWay(phase, now)
        if phase == "generating" and len(self._in("generating")) > len(self._slots):
            self._slots.append(now)

    def _in(self, phase: Phase) -> list[str]:
        return [name for name, job in self._under_way.items() if job.phase == phase]

    def shown(self) -> dict[str, tuple[Phase, StepCount | None]]:
        """Return the jobs to show, each with its phase and last step: those being generated, else one other job."""
        with self._lock:
            return {name: (self._under_way[name].phase, self._under_way[name].at) for name in self._shown()}

    def _shown(self) -> list[str]:
        others = (self._in(phase)[:1] for phase in SHOWN_FIRST)
        return self._in("generating") or next(filter(None, others), [])

    def position(self) -> RunPosition | None:
        """Return how far the run is; None while no job is under way."""
        with self._lock:
            shown = [self._under_way[name] for name in self._shown()]
            if not shown:
                return None
            running, publishing = len(self._in("generating")), len(self._in("publishing"))
            first = shown[0]
            begun = self._ended + 1 if first.phase == "publishing" else self._ended + publishing + max(1, running)
            left = self._jobs - self._ended - publishing - running
            return RunPosition(
                self._ended,
                self._jobs,
                begun,
                running,
                first.phase,
                first.at,
                self._eta([job for job in shown if job.phase == "generating"], max(0, left)),
            )

    def counts(self) -> tuple[int, int]:
        """Return (jobs that have ended, all jobs)."""
        with self._lock:
            return self._ended, self._jobs

    def _eta(self, running: list[_UnderWay], others: int) -> float | None:
        if not running and not others:
            return None
        now, mean = self._clock(), None
        if self._generated:  # time between two jobs, e.g. waiting for inputs, counts
            mean = (sum(now - begun for begun in self._slots) - sum(now - job.began for job in running)) / (
                self._generated
            )
        lefts = [left for job in running if (left := job.left_s(now, mean)) is not None]
        if len(lefts) < len(running):
            return None
        if mean is None and running:
            mean = sum(now - job.began + left for job, left in zip(running, lefts, strict=True)) / len(running)
        if mean is None:
            return None
        return max([*lefts, (sum(lefts) + others * mean) / max(1, len(self._slots))])

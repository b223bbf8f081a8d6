"""Hand-out: schedules jobs on workers: the longest job first, and one job ahead for a worker that generates.

In:   jobs and their forecast seconds; the workers that join and leave; the phases and ends of their jobs.
Out:  the jobs to hand out now. Never: how a job reaches a worker, or how it runs.

The order is list scheduling by longest processing time (LPT): the longest waiting job goes to the worker that is free
first. With exact forecasts and workers of equal speed that never leave, the makespan is at most 4/3 - 1/(3 m) of the
optimum for m workers (Graham 1969). A worker that generates gets its next job ahead, so that the job is prepared
meanwhile. That is the job which the worker would get in the LPT order by the forecasts. Near the end of a run there may
be none: the remaining job then waits for a worker that is free sooner.
"""

from __future__ import annotations

import heapq
import math
import statistics
import time
from bisect import insort
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

from runner.batch.run_pace import Phase
from runner.spec.manifest import Job

__all__ = ["HandOut"]

OFF_DEVICE: tuple[Phase, ...] = ("publishing", "waiting")  # the next job may be generated meanwhile


@dataclass(frozen=True, order=True)
class _Waiting:
    """A job that no worker has. Jobs sort in the order in which they are handed out."""

    returned: int  # 0: a worker that had it was lost; 1: never handed out
    minus_s: float  # its forecast seconds, negative: the longest first
    place: int  # in the manifest
    job: Job = field(compare=False)


@dataclass
class _Handed:
    """A job that a worker has. `phase`: None until the worker reports one. `since`: its start, by the clock."""

    waiting: _Waiting
    seconds: float
    phase: Phase | None = None
    since: float = 0.0

    @property
    def on_device(self) -> bool:
        """Whether the job is being generated, or will be generated next."""
        return self.phase not in OFF_DEVICE

    def left_s(self, now: float) -> float:
        """Return forecast seconds until the worker's device has finished it; a postponed job counts too."""
        if self.phase == "publishing":
            return 0.0
        return max(0.0, self.seconds - (now - self.since)) if self.phase == "generating" else self.seconds


class _Worker:
    """One worker and its jobs."""

    def __init__(self, place: int) -> None:
        self.place = place  # in the order of joining
        self.handed: dict[str, _Handed] = {}

    @property
    def idle(self) -> bool:
        return not any(one.on_device for one in self.handed.values())

    @property
    def takes_one(self) -> bool:
        """Whether the worker has nothing to generate, or generates one job and prepares none."""
        phases = [one.phase for one in self.handed.values() if one.on_device]
        return phases in ([], ["generating"])

    def free_in_s(self, now: float) -> float:
        """Return forecast seconds until the worker has nothing to generate."""
        return 0.0 if self.idle else sum(one.left_s(now) for one in self.handed.values())


class HandOut:
    """The jobs of one run and the workers that take them. Not thread-safe.

    `seconds`: job id → forecast seconds on a worker's device. A job without a forecast counts as the median of the
    others. Without any forecast all jobs count as equal and are handed out in the manifest's order. `clock`: seconds,
    monotonic. Raises ValueError for two jobs with one id, and for seconds that are negative or not finite.
    """

    def __init__(
        self, jobs: Sequence[Job], seconds: Mapping[str, float], clock: Callable[[], float] = time.monotonic
    ) -> None:
        known = [seconds[job.id] for job in jobs if job.id in seconds]
        if any(not math.isfinite(each) or each < 0 for each in known):
            raise ValueError("forecast seconds must be finite and not negative")
        if len({job.id for job in jobs}) < len(jobs):
            raise ValueError("two jobs have the same id")
        median = statistics.median(known) if known else 1.0
        self._waiting = sorted(_Waiting(1, -seconds.get(job.id, median), place, job) for place, job in enumerate(jobs))
        self._workers: dict[str, _Worker] = {}
        self._joined = 0
        self._left = len(jobs)
        self._clock = clock

    @property
    def left(self) -> int:
        """Jobs that have not ended."""
        return self._left

    def join(self, worker: str) -> None:
        """Add a worker that is ready to take jobs. Raises ValueError if it has joined already and not left."""
        if worker in self._workers:
            raise ValueError(f"worker {worker} has joined already")
        self._workers[worker] = _Worker(self._joined)
        self._joined += 1

    def leave(self, worker: str) -> tuple[Job, ...]:
        """Remove a worker that was lost or has ended. Return its unfinished jobs, which now wait before all others.

        Returns () for a worker that has not joined.
        """
        known = self._workers.pop(worker, None)
        if known is None:
            return ()
        returned = sorted(
            _Waiting(0, one.waiting.minus_s, one.waiting.place, one.waiting.job) for one in known.handed.values()
        )
        for one in returned:
            insort(self._waiting, one)
        return tuple(one.job for one in returned)

    def next_jobs(self) -> list[tuple[str, Job]]:
        """Return (worker, job) pairs to hand out now, and count them as handed out. At most one job per worker.

        A worker takes a job when it has nothing to generate, and one ahead when it generates and prepares none. Each
        worker gets the first job that list scheduling assigns to it by the forecasts, or none.
        """
        taking = {name for name, worker in self._workers.items() if worker.takes_one}
        if not taking or not self._waiting:
            return []
        now = self._clock()
        free = [(worker.free_in_s(now), not worker.idle, worker.place, name) for name, worker in self._workers.items()]
        heapq.heapify(free)
        found: list[tuple[str, Job]] = []
        chosen: list[int] = []
        for index, one in enumerate(self._waiting):
            if not taking:
                break
            free_s, _, place, name = free[0]
            if name in taking:
                taking.remove(name)
                chosen.append(index)
                self._workers[name].handed[one.job.id] = _Handed(one, -one.minus_s)
                found.append((name, one.job))
            heapq.heapreplace(free, (free_s - one.minus_s, True, place, name))
        for index in reversed(chosen):
            del self._waiting[index]
        return found

    def note_phase(self, worker: str, job_id: str, phase: Phase) -> None:
        """Record that a job enters a phase on a worker.

        In phase `waiting`, e.g. because another runner has the job, the worker can take another job. A report about a
        job that the worker does not have, or no longer has, is ignored.
        """
        handed = self._handed(worker, job_id)
        if handed is not None and handed.phase != phase:
            handed.phase, handed.since = phase, self._clock()

    def note_end(self, worker: str, job_id: str) -> None:
        """Record that a job has ended: it succeeded, failed or was skipped. Ignored if the worker does not have it.

        A lost worker may have finished a job that waits again by now; the next worker finds it done and skips it.
        """
        if self._handed(worker, job_id) is not None:
            del self._workers[worker].handed[job_id]
            self._left -= 1

    def _handed(self, worker: str, job_id: str) -> _Handed | None:
        known = self._workers.get(worker)
        return known.handed.get(job_id) if known is not None else None

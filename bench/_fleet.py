"""Fleet: many machines render the jobs of one run, as a simulation of discrete events.

In:   jobs with their segments and seconds, how they are shared, the rate of kills. Out: the end of each job, the lost
work, and the requests to the store. Never: the price of a request.

A machine works as the batch loop does: it prepares a job while it generates another, one prepared job waits, and the
encoder works in parallel. The product's own code decides which job comes next: `Shard.take`, `AnyShard.arrange`,
`HandOut`. The lease of a killed runner blocks its jobs for LEASE_S. A runner that has nothing else to do looks again at
a job of another runner after LOOK_AGAIN_S.
"""

from __future__ import annotations

import heapq
import random
from collections import Counter, deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from itertools import count
from typing import Literal

from runner.batch.lease import LEASE_S
from runner.batch.run_pace import Phase
from runner.batch.settlement import LOOK_AGAIN_S
from runner.batch.shards import AnyShard, Shard
from runner.batch.spot import RESERVE_S
from runner.batch.summary import SHARE_OF_JOBS, WAIT_S, WAIT_SHARE
from runner.launch.hand_out import HandOut
from runner.launch.task_count import balance_shares
from runner.spec.manifest import Job
from runner.spec.options import JobOptions

Share = Literal["static", "balanced", "any", "ray"]
OPTIONS = JobOptions()


@dataclass(frozen=True)
class Work:
    """One job. `segment_s`: seconds of each segment on the device; `forecast_s`: forecast for all segments."""

    segments: int
    segment_s: float
    forecast_s: float
    prepare_s: float
    deliver_s: float  # after the last segment

    @property
    def device_s(self) -> float:
        return self.segments * self.segment_s


@dataclass(frozen=True)
class FleetSettings:
    machines: int
    kills_per_hour: float = 0.0  # of a machine
    notice_s: float = 0.0  # between the notice and the end of the machine; 0: it is killed without a notice
    load_s: float = 0.0  # to load the model
    replace_s: float = 0.0  # from the end of a machine to the start of its replacement
    detect_s: float = 0.0  # until the Ray driver notices a machine that was killed without a notice
    look_s: float = 0.0  # to decide one job
    survey_s: float = 0.0  # a job that is done when the runner begins
    seed: int = 1


@dataclass
class Outcome:
    """Results, in seconds. `looks`: decisions, counted by result. `summaries`: (lines, jobs) of each written one."""

    makespan_s: float = 0.0  # until the last job was done
    ended_s: float = 0.0  # until the last runner ended
    machine_s: float = 0.0  # from a machine's first second to the end of its task, or of the machine
    lost_s: float = 0.0  # of generation that has to be repeated
    lease_s: float = 0.0  # leases times the seconds that they were held
    kills: int = 0
    starts: list[int] = field(default_factory=list)  # of each task
    runners: int = 0
    looks: Counter[str] = field(default_factory=Counter)
    surveyed: int = 0  # jobs of a runner that were done when it began, over all runners
    surveys: list[int] = field(default_factory=list)  # for each runner, jobs of all that were done when it began
    summaries: list[tuple[Counter[str], int]] = field(default_factory=list)


@dataclass
class _Lease:
    runner: _Runner
    since: float
    until: float = float("inf")  # known to be lost from here on


class SummarySchedule:
    """Decides when a summary is written, by the rules of `SummaryWriter`; `note` returns whether it is due now.

    The product waits nine times the duration of a write before the next one; here a write takes no time.
    """

    def __init__(self, begin: float, jobs: int | None = None) -> None:
        """`jobs`: number of jobs known at the start; None: each job becomes known when it ends, as with a driver."""
        self.lines: Counter[str] = Counter()
        self._begin, self._jobs = begin, jobs
        self._written_at, self._written_lines = float("-inf"), 0

    def note(self, status: str, now: float) -> bool:
        self.lines[status] += 1
        total = self.lines.total()
        known = total if self._jobs is None else self._jobs
        grown = total - self._written_lines >= SHARE_OF_JOBS * known
        waited = now - self._written_at >= max(WAIT_S, WAIT_SHARE * (now - self._begin))
        if grown or waited:
            self._written_at, self._written_lines = now, total
        return grown or waited


@dataclass(eq=False)
class _Runner:
    """A process on a machine."""

    name: str
    place: int  # of its machine, or its index in the array
    began: float
    todo: deque[int]
    schedule: SummarySchedule
    more: bool = False  # more jobs may be sent
    alive: bool = True
    draining: bool = False
    loaded: bool = False
    fetching: bool = False
    later: list[tuple[float, int]] = field(default_factory=list)
    held: set[int] = field(default_factory=set)
    prepared: int | None = None  # waits for the device
    blocked: int | None = None  # is prepared too, and waits for the other's place
    generating: int | None = None
    generating_since: float = 0.0
    looks_again_at: float = float("inf")


class Fleet:
    """One run. `run` may be called once."""

    def __init__(self, works: Sequence[Work], share: Share, settings: FleetSettings) -> None:
        self.now = 0.0
        self.outcome = Outcome()
        self._works, self._share, self._settings = works, share, settings
        self._random = random.Random(settings.seed)
        self._events: list[tuple[float, int, Callable[[], None]]] = []
        self._number, self._names = count(), count()
        self._done = bytearray(len(works))
        self._kept = [0] * len(works)
        self._leases: dict[int, _Lease] = {}
        self._left = len(works)
        self._runners: dict[str, _Runner] = {}
        self._starts: Counter[int] = Counter()
        self._ids = [f"job-{index:06d}" for index in range(len(works))]
        self._index = {name: index for index, name in enumerate(self._ids)}
        self._balanced = balance_shares([work.forecast_s for work in works], settings.machines)
        self._hand_out: HandOut | None = None
        if share == "ray":
            jobs = [Job(name, "r.png", "v.mp4", None, "", OPTIONS, None) for name in self._ids]
            forecasts = {name: work.forecast_s for name, work in zip(self._ids, works, strict=True)}
            self._hand_out = HandOut(jobs, forecasts, lambda: self.now)

    def run(self) -> Outcome:
        for place in range(self._settings.machines):
            self._start(place)
        self._dispatch()
        while self._left or (self._hand_out is None and self._runners):  # a runner ends when it has seen its whole list
            self.now, _, event = heapq.heappop(self._events)
            event()
        for runner in list(self._runners.values()):  # the driver ends its workers
            self._end(runner)
        self.outcome.ended_s, self.outcome.starts = self.now, list(self._starts.values())
        return self.outcome

    def _after(self, seconds: float, event: Callable[[], None]) -> None:
        heapq.heappush(self._events, (self.now + seconds, next(self._number), event))

    # -- machines -------------------------------------------------------------------------------------------------

    def _start(self, place: int) -> None:
        if not self._left:
            return
        name = f"host{next(self._names)}-1"
        everything = range(len(self._works))
        mine: Sequence[int] = ()
        if self._share == "static":
            mine = Shard(place, self._settings.machines).take(everything)
        elif self._share == "balanced":
            mine = Shard(place, self._settings.machines).take(self._balanced)
        elif self._share == "any":
            mine = AnyShard(name).arrange(AnyShard(name).take(everything))
        todo = deque(job for job in mine if not self._done[job])
        done = len(mine) - len(todo)
        driven = self._share == "ray"
        schedule = SummarySchedule(self.now, None if driven else len(mine))
        runner = _Runner(name, place, self.now, todo, schedule, more=driven)
        self._runners[name] = runner
        self._starts[place] += 1
        self.outcome.runners += 1
        self.outcome.surveyed += done
        if mine:
            self.outcome.surveys.append(len(self._works) - self._left)
        runner.schedule.lines["skipped"] += done
        if self._hand_out is not None:
            self._hand_out.join(name)
        rate = self._settings.kills_per_hour / 3600
        if rate:
            event = self._notify if self._settings.notice_s else self._kill
            self._after(self._random.expovariate(rate), lambda: runner.alive and event(runner))
        self._after(done * self._settings.survey_s, lambda: self._fetch(runner))

    def _kill(self, runner: _Runner) -> None:
        """Kill a machine; its leases stay until they expire."""
        self.outcome.kills += 1
        job = runner.generating
        if job is not None:
            self._keep(job, runner, self.now)
        for held in runner.held:
            self._leases[held].until = self.now + LEASE_S
        self._end(runner, final=False)
        self._after(self._settings.detect_s, lambda: self._leave(runner))
        self._after(self._settings.replace_s, lambda: self._start(runner.place))

    def _notify(self, runner: _Runner) -> None:
        """Announce the end of a machine: it generates the segments that fit into the time and gives back the rest."""
        self.outcome.kills += 1
        runner.draining = True
        for held in runner.held - {runner.generating}:
            if not self._is_delivering(runner, held):
                self._give_back(runner, held)
        job, stop_at = runner.generating, self.now
        if job is not None:
            each = self._works[job].segment_s
            budget_s = max(0.0, self._settings.notice_s - RESERVE_S)
            made = int((self.now - runner.generating_since + budget_s) / each)
            stop_at = max(self.now, runner.generating_since + made * each)
            if self._kept[job] + made >= self._works[job].segments:
                stop_at = self.now + self._settings.notice_s  # it is finished and delivered
        self._after(stop_at - self.now, lambda: self._drained(runner))

    def _drained(self, runner: _Runner) -> None:
        if not runner.alive:
            return
        if any(self._is_delivering(runner, held) for held in runner.held):  # what is generated is always published
            self._after(1.0, lambda: self._drained(runner))
            return
        job = runner.generating
        if job is not None:
            self._keep(job, runner, self.now)
        for held in list(runner.held):
            self._give_back(runner, held)
        self._end(runner)
        self._leave(runner)
        self._after(self._settings.replace_s, lambda: self._start(runner.place))

    def _keep(self, job: int, runner: _Runner, until: float) -> None:
        """Keep the finished segments of an interrupted job."""
        spent = until - runner.generating_since
        each = self._works[job].segment_s
        made = min(self._works[job].segments - self._kept[job], int(spent / each + 1e-9))
        self._kept[job] += made
        self.outcome.lost_s += max(0.0, spent - made * each)
        runner.generating = None

    def _is_delivering(self, runner: _Runner, job: int) -> bool:
        return self._kept[job] == self._works[job].segments and job not in (runner.prepared, runner.blocked)

    def _give_back(self, runner: _Runner, job: int) -> None:
        runner.held.discard(job)
        lease = self._leases.pop(job, None)
        if lease is not None:
            self.outcome.lease_s += self.now - lease.since

    def _end(self, runner: _Runner, *, final: bool = True) -> None:
        if runner.alive:
            runner.alive = False
            del self._runners[runner.name]
            self.outcome.machine_s += self.now - runner.began
            if final:
                self.outcome.summaries.append((runner.schedule.lines.copy(), self._jobs_of(runner)))

    def _jobs_of(self, runner: _Runner) -> int:
        """Lines of its summary."""
        if self._share == "ray":
            return runner.schedule.lines.total()
        if self._share == "any":
            return len(self._works)
        return len(range(runner.place, len(self._works), self._settings.machines))

    def _leave(self, runner: _Runner) -> None:
        if self._hand_out is not None:
            self._hand_out.leave(runner.name)
            self._dispatch()

    # -- the driver -----------------------------------------------------------------------------------------------

    def _dispatch(self) -> None:
        if self._hand_out is None:
            return
        for name, job in self._hand_out.next_jobs():
            runner = self._runners.get(name)
            if runner is not None:  # None: the driver has not noticed yet that it was killed
                runner.todo.append(self._index[job.id])
                self._fetch(runner)

    def _phase(self, runner: _Runner, job: int, phase: Phase) -> None:
        if self._hand_out is not None:
            self._hand_out.note_phase(runner.name, self._ids[job], phase)
            self._dispatch()

    def _note_line(self, runner: _Runner, status: str) -> None:
        if runner.schedule.note(status, self.now):
            self.outcome.summaries.append((runner.schedule.lines.copy(), self._jobs_of(runner)))

    # -- a runner's loop ------------------------------------------------------------------------------------------

    def _fetch(self, runner: _Runner) -> None:
        """Let the prefetch thread take a job, wait for one, or stop because no more will come."""
        if not runner.alive or runner.draining or runner.fetching or runner.blocked is not None:
            return
        if runner.todo:
            job = runner.todo.popleft()
        elif runner.later and runner.later[0][0] <= self.now:
            _, job = heapq.heappop(runner.later)
        elif runner.later:
            due = runner.later[0][0]
            if due < runner.looks_again_at:
                runner.looks_again_at = due
                self._after(due - self.now, lambda: self._look_again(runner))
            return
        else:
            if not runner.more and not runner.held:
                self._end(runner)
            return
        runner.fetching = True
        self._after(self._settings.look_s, lambda: self._decide(runner, job))

    def _look_again(self, runner: _Runner) -> None:
        runner.looks_again_at = float("inf")
        self._fetch(runner)

    def _decide(self, runner: _Runner, job: int) -> None:
        if not runner.alive or runner.draining:
            return
        lease = self._leases.get(job)
        if self._done[job]:
            self.outcome.looks["done"] += 1
            self._note_line(runner, "skipped")
            if self._hand_out is not None:
                self._hand_out.note_end(runner.name, self._ids[job])
                self._dispatch()
        elif lease is not None and self.now < lease.until:
            self.outcome.looks["leased"] += 1
            heapq.heappush(runner.later, (self.now + LOOK_AGAIN_S, job))
            self._phase(runner, job, "waiting")
        else:
            if lease is not None:
                self.outcome.lease_s += lease.until - LEASE_S - lease.since
            self.outcome.looks["taken"] += 1
            self._leases[job] = _Lease(runner, self.now)
            runner.held.add(job)
            self._phase(runner, job, "preparing")
            seconds = self._works[job].prepare_s + (0.0 if runner.loaded else self._settings.load_s)
            runner.loaded = True
            self._after(seconds, lambda: self._prepared(runner, job))
            return
        runner.fetching = False
        self._fetch(runner)

    def _prepared(self, runner: _Runner, job: int) -> None:
        if not runner.alive or runner.draining:
            return
        runner.fetching = False
        if runner.prepared is None:
            runner.prepared = job
            self._advance(runner)
            self._fetch(runner)
        else:
            runner.blocked = job

    def _advance(self, runner: _Runner) -> None:
        """The device takes the prepared job."""
        if runner.draining or runner.generating is not None or runner.prepared is None:
            return
        job = runner.generating = runner.prepared
        runner.prepared, runner.blocked = runner.blocked, None
        runner.generating_since = self.now
        self._phase(runner, job, "generating")
        work = self._works[job]
        self._after((work.segments - self._kept[job]) * work.segment_s, lambda: self._generated(runner, job))
        self._fetch(runner)

    def _generated(self, runner: _Runner, job: int) -> None:
        if not runner.alive or runner.generating != job:
            return
        runner.generating = None
        self._kept[job] = self._works[job].segments
        self._after(self._works[job].deliver_s, lambda: self._delivered(runner, job))
        self._phase(runner, job, "publishing")
        self._advance(runner)

    def _delivered(self, runner: _Runner, job: int) -> None:
        if not runner.alive:
            return
        if self._done[job]:
            raise RuntimeError(f"job {job} was done twice")
        self._give_back(runner, job)
        self._done[job] = True
        self._left -= 1
        self.outcome.makespan_s = self.now
        self._note_line(runner, "succeeded")
        if self._hand_out is not None:
            self._hand_out.note_end(runner.name, self._ids[job])
        if runner.draining:
            if runner.generating is None:
                self._drained(runner)
            return
        self._fetch(runner)

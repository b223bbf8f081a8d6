"""Hand-out: unit tests, the makespan against the optimum and plain list scheduling, and what holds whatever comes."""

from __future__ import annotations

import heapq
import math
from collections.abc import Sequence
from itertools import product

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

from runner.launch.hand_out import HandOut
from runner.spec.manifest import Job
from runner.spec.options import JobOptions
from tests.hand_clock import HandClock

OPTIONS = JobOptions()


def make_job(name: str) -> Job:
    return Job(name, "r.png", "v.mp4", None, "", OPTIONS, None)


def make_hand_out(seconds: dict[str, float], workers: str = "", clock: HandClock | None = None) -> HandOut:
    """Jobs named as in `seconds`; a worker for each letter of `workers`."""
    found = HandOut([make_job(name) for name in seconds], seconds, clock or HandClock())
    for worker in workers:
        found.join(worker)
    return found


def next_ids(hand_out: HandOut) -> dict[str, str]:
    """Worker → job."""
    found = hand_out.next_jobs()
    assert len({worker for worker, _ in found}) == len(found)
    return {worker: job.id for worker, job in found}


def test_the_longest_go_first_to_workers_in_the_order_in_which_they_joined():
    hand_out = make_hand_out({"short": 1, "long": 9, "middle": 5}, "xy")
    assert next_ids(hand_out) == {"x": "long", "y": "middle"}
    assert hand_out.left == 3


def test_nothing_is_handed_out_without_workers_or_without_jobs():
    assert make_hand_out({"a": 1}).next_jobs() == []
    empty = make_hand_out({}, "x")
    assert (empty.next_jobs(), empty.left) == ([], 0)


def test_a_job_without_a_forecast_counts_as_the_median_of_the_others():
    jobs = [make_job(name) for name in ("unknown", "a", "b", "c")]
    hand_out = HandOut(jobs, {"a": 1, "b": 10, "c": 4, "of another run": 1000}, HandClock())
    for worker in "vwxy":
        hand_out.join(worker)
    assert next_ids(hand_out) == {"v": "b", "w": "unknown", "x": "c", "y": "a"}  # of equal ones the manifest's order


def test_without_any_forecast_jobs_go_out_in_the_order_of_the_manifest():
    hand_out = HandOut([make_job(name) for name in "cab"], {}, HandClock())
    for worker in "xyz":
        hand_out.join(worker)
    assert next_ids(hand_out) == {"x": "c", "y": "a", "z": "b"}


@pytest.mark.parametrize("wrong", [-1.0, math.inf, math.nan])
def test_seconds_that_are_none_are_refused(wrong):
    with pytest.raises(ValueError, match="finite"):
        make_hand_out({"a": wrong})


def test_two_jobs_of_one_id_are_refused():
    with pytest.raises(ValueError, match="same id"):
        HandOut([make_job("a"), make_job("a")], {})


def test_a_worker_joins_once():
    hand_out = make_hand_out({"a": 1}, "x")
    with pytest.raises(ValueError, match="joined"):
        hand_out.join("x")
    hand_out.leave("x")
    hand_out.join("x")
    assert next_ids(hand_out) == {"x": "a"}


def test_one_job_ahead_and_no_more():
    """None while the first one is prepared: it could not be prepared either."""
    hand_out = make_hand_out({"a": 5, "b": 4, "c": 3, "d": 2}, "x")
    assert next_ids(hand_out) == {"x": "a"}
    for phase in ("loading the model", "preparing"):
        hand_out.note_phase("x", "a", phase)
        assert next_ids(hand_out) == {}
    hand_out.note_phase("x", "a", "generating")
    assert next_ids(hand_out) == {"x": "b"}
    assert next_ids(hand_out) == {}
    hand_out.note_phase("x", "b", "preparing")
    assert next_ids(hand_out) == {}
    hand_out.note_phase("x", "a", "publishing")
    assert next_ids(hand_out) == {}  # b is prepared yet
    hand_out.note_phase("x", "b", "generating")
    assert next_ids(hand_out) == {"x": "c"}
    hand_out.note_end("x", "a")
    assert (next_ids(hand_out), hand_out.left) == ({}, 3)


def test_a_worker_that_only_publishes_is_idle():
    hand_out = make_hand_out({"a": 5, "b": 4}, "x")
    next_ids(hand_out)
    hand_out.note_phase("x", "a", "generating")
    hand_out.note_phase("x", "a", "publishing")
    assert next_ids(hand_out) == {"x": "b"}


def test_a_job_that_is_put_off_leaves_room_for_another_and_counts_again_when_it_comes_back():
    hand_out = make_hand_out({"a": 5, "b": 4, "c": 3, "d": 2}, "x")
    next_ids(hand_out)
    hand_out.note_phase("x", "a", "waiting")  # another runner has it
    assert next_ids(hand_out) == {"x": "b"}
    hand_out.note_phase("x", "b", "generating")
    hand_out.note_phase("x", "a", "preparing")
    assert next_ids(hand_out) == {}
    hand_out.note_phase("x", "a", "waiting")
    assert next_ids(hand_out) == {"x": "c"}
    assert hand_out.left == 4
    assert {job.id for job in hand_out.leave("x")} == {"a", "b", "c"}


def test_a_job_that_is_found_done_ends_without_a_phase():
    hand_out = make_hand_out({"a": 5, "b": 4}, "x")
    next_ids(hand_out)
    hand_out.note_end("x", "a")
    assert (next_ids(hand_out), hand_out.left) == ({"x": "b"}, 1)


def test_the_jobs_of_a_lost_worker_are_handed_out_first():
    hand_out = make_hand_out({"a": 9, "b": 8, "c": 2, "d": 1}, "xy")
    assert next_ids(hand_out) == {"x": "a", "y": "b"}
    hand_out.note_phase("y", "b", "generating")
    assert next_ids(hand_out) == {"y": "c"}
    assert [job.id for job in hand_out.leave("y")] == ["b", "c"]
    assert hand_out.leave("y") == ()
    hand_out.note_end("x", "a")
    assert next_ids(hand_out) == {"x": "b"}
    hand_out.note_end("x", "b")
    assert next_ids(hand_out) == {"x": "c"}  # before d, which no worker had
    hand_out.note_end("x", "c")
    assert next_ids(hand_out) == {"x": "d"}
    hand_out.note_end("x", "d")
    assert hand_out.left == 0


def test_what_a_worker_says_of_a_job_that_it_has_no_longer_counts_for_nothing():
    hand_out = make_hand_out({"a": 9}, "xy")
    assert next_ids(hand_out) == {"x": "a"}
    hand_out.leave("x")
    assert next_ids(hand_out) == {"y": "a"}
    for worker in ("x", "unknown"):
        hand_out.note_phase(worker, "a", "publishing")
        hand_out.note_end(worker, "a")
    assert (next_ids(hand_out), hand_out.left) == ({}, 1)
    hand_out.note_end("y", "a")
    hand_out.note_end("y", "a")
    assert hand_out.left == 0


def test_the_last_job_waits_for_the_worker_that_is_free_first():
    """Handed ahead to x, which is free in 100 s, it would begin then; y is free in 50 s, with a job ahead already."""
    clock = HandClock()
    hand_out = make_hand_out({"a": 100, "b": 30, "c": 20, "last": 10}, "xy", clock)
    assert next_ids(hand_out) == {"x": "a", "y": "b"}
    hand_out.note_phase("y", "b", "generating")
    assert next_ids(hand_out) == {"y": "c"}
    hand_out.note_phase("x", "a", "generating")
    assert next_ids(hand_out) == {}
    clock.tick(30)
    hand_out.note_phase("y", "b", "publishing")
    hand_out.note_phase("y", "c", "generating")
    assert next_ids(hand_out) == {"y": "last"}


def test_a_worker_is_free_sooner_as_time_goes_by():
    clock = HandClock()
    hand_out = make_hand_out({"a": 100, "b": 30, "c": 20, "last": 10}, "xy", clock)
    next_ids(hand_out)
    hand_out.note_phase("y", "b", "generating")
    assert next_ids(hand_out) == {"y": "c"}
    clock.tick(25)
    hand_out.note_phase("x", "a", "generating")  # late: 100 s from now; y: 25 s
    clock.tick(80)  # y has taken longer than its forecast: 20 s for c; x: 20 s
    assert next_ids(hand_out) == {"x": "last"}


def test_an_idle_worker_goes_before_one_that_should_be_free_by_now():
    clock = HandClock()
    hand_out = make_hand_out({"a": 10, "b": 5}, "x", clock)
    next_ids(hand_out)
    hand_out.note_phase("x", "a", "generating")
    clock.tick(20)
    hand_out.join("y")
    assert next_ids(hand_out) == {"y": "b"}


# -- makespan -----------------------------------------------------------------------------------------------------


def makespan(seconds: Sequence[int], workers: int, *, ahead: bool) -> int:
    """Of jobs that take as long as forecast and are prepared in no time. Not `ahead`: it is prepared until it ends."""
    clock = HandClock()
    hand_out = HandOut(
        [make_job(str(n)) for n in range(len(seconds))], {str(n): s for n, s in enumerate(seconds)}, clock
    )
    queues: dict[str, list[str]] = {str(n): [] for n in range(workers)}
    for worker in queues:
        hand_out.join(worker)
    ends: list[tuple[float, str]] = []

    def begin(worker: str) -> None:
        job = queues[worker][0]
        heapq.heappush(ends, (clock.now + seconds[int(job)], worker))
        hand_out.note_phase(worker, job, "generating" if ahead else "preparing")

    while hand_out.left:
        while given := next_ids(hand_out):
            for worker, job in given.items():
                queues[worker].append(job)
                assert len(queues[worker]) <= 1 + ahead
                if len(queues[worker]) == 1:
                    begin(worker)
        clock.now, worker = heapq.heappop(ends)
        hand_out.note_end(worker, queues[worker].pop(0))
        if queues[worker]:
            begin(worker)
    return int(clock.now)


def plain_list_schedule(seconds: Sequence[int], workers: int) -> int:
    """Longest first, each to the worker with the least so far."""
    loads = [0] * workers
    for each in sorted(seconds, reverse=True):
        loads[loads.index(min(loads))] += each
    return max(loads)


def best_makespan(seconds: Sequence[int], workers: int) -> int:
    """Of all assignments."""
    return min(
        max(sum(s for s, at in zip(seconds, places, strict=True) if at == worker) for worker in range(workers))
        for places in product(range(workers), repeat=len(seconds))
    )


@settings(max_examples=60, deadline=None)
@given(st.lists(st.integers(1, 30), max_size=7), st.integers(1, 3), st.booleans())
def test_the_makespan_is_within_graham_s_bound_of_the_best(seconds, workers, ahead):
    best = best_makespan(seconds, workers)
    assert best <= makespan(seconds, workers, ahead=ahead) <= (4 / 3 - 1 / (3 * workers)) * best


@settings(max_examples=100, deadline=None)
@given(st.lists(st.integers(1, 30), max_size=30), st.integers(1, 6), st.booleans())
def test_handing_ahead_costs_no_makespan_where_forecasts_are_exact(seconds, workers, ahead):
    assert makespan(seconds, workers, ahead=ahead) == plain_list_schedule(seconds, workers)


# -- whatever joins, leaves and ends ------------------------------------------------------------------------------

NAMES = [f"job{n}" for n in range(8)]
WORKERS = ["v", "w", "x"]


class HandOutMachine(RuleBasedStateMachine):
    """The test's own book of which worker has which job, in which phase."""

    @initialize(seconds=st.dictionaries(st.sampled_from(NAMES), st.floats(0, 100)), jobs=st.integers(0, len(NAMES)))
    def begin(self, seconds, jobs):
        self.clock = HandClock()
        self.hand_out = HandOut([make_job(name) for name in NAMES[:jobs]], seconds, self.clock)
        self.waiting, self.ended = set(NAMES[:jobs]), set[str]()
        self.returned: set[str] = set()
        self.has: dict[str, dict[str, str]] = {}  # worker → job → phase

    @rule(worker=st.sampled_from(WORKERS))
    def join(self, worker):
        if worker not in self.has:
            self.hand_out.join(worker)
            self.has[worker] = {}

    @rule(worker=st.sampled_from(WORKERS))
    def leave(self, worker):
        lost = self.has.pop(worker, {}).keys()
        found = [job.id for job in self.hand_out.leave(worker)]
        assert sorted(found) == sorted(lost)
        self.waiting |= lost
        self.returned |= lost

    @rule(
        worker=st.sampled_from(WORKERS),
        job=st.sampled_from(NAMES),
        phase=st.sampled_from(["preparing", "loading the model", "generating", "publishing", "waiting"]),
    )
    def enter(self, worker, job, phase):
        self.hand_out.note_phase(worker, job, phase)
        if job in self.has.get(worker, {}):
            self.has[worker][job] = phase

    @rule(worker=st.sampled_from(WORKERS), job=st.sampled_from(NAMES))
    def end(self, worker, job):
        self.hand_out.note_end(worker, job)
        if self.has.get(worker, {}).pop(job, None) is not None:
            self.ended.add(job)

    @rule(seconds=st.floats(0, 100))
    def pass_time(self, seconds):
        self.clock.tick(seconds)

    @rule()
    def hand(self):
        for worker, job in self.hand_out.next_jobs():
            assert job.id in self.waiting, f"{job.id} is not to be handed out"
            device = self.on_device(worker)
            assert device in ([], ["generating"])
            if not device and job.id not in self.returned:
                assert self.waiting.isdisjoint(self.returned), "what a lost worker had does not go first"
            self.waiting.remove(job.id)
            self.has[worker][job.id] = "handed"
        idle = [worker for worker in self.has if not self.on_device(worker)]
        assert not (idle and self.waiting), "a worker is idle while jobs wait"

    def on_device(self, worker: str) -> list[str]:
        return [phase for phase in self.has[worker].values() if phase not in ("publishing", "waiting")]

    @invariant()
    def none_is_lost(self):
        if hasattr(self, "has"):
            had = [job for jobs in self.has.values() for job in jobs]
            assert len(had) == len(set(had))
            assert self.hand_out.left == len(had) + len(self.waiting)

    def teardown(self):
        """One worker does all that is left, each job once."""
        if not hasattr(self, "has"):
            return
        for worker in WORKERS:
            self.leave(worker)
        self.join("v")
        while self.hand_out.left:
            self.hand()
            (job,) = self.has["v"]
            self.end("v", job)
        assert not self.waiting


HandOutMachine.TestCase.settings = settings(max_examples=60, stateful_step_count=40, deadline=None)
TestHandOut = HandOutMachine.TestCase

"""Where a run is and its ETA, by a clock that is set by hand."""

from __future__ import annotations

import pytest

from runner.batch.run_pace import RunPace, RunPosition, StepCount
from runner.generation.protocol import SegmentPlan
from tests.hand_clock import HandClock


@pytest.fixture
def clock() -> HandClock:
    return HandClock(1000.0)


@pytest.fixture
def pace(clock) -> RunPace:
    return RunPace(clock)


def plan(segments: int, steps: int, evaluations: int) -> SegmentPlan:
    return SegmentPlan(80, 20, 0, segments, 64, 48, steps, evaluations=evaluations, tflop=1.0)


def at(done: int, total: int = 10) -> StepCount:
    """After `done` evaluations of a job of two segments."""
    each = total // 2
    return StepCount.of(plan(2, each, each), done, total)


def generate(pace: RunPace, clock: HandClock, name: str, seconds: float) -> None:
    pace.enter(name, "generating")
    clock.tick(seconds)
    pace.step(name, at(10))
    pace.enter(name, "publishing")


def eta(pace: RunPace) -> float | None:
    position = pace.position()
    assert position is not None
    return position.eta_s


# -- steps -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("steps", "evaluations", "done"),
    [(3, 3, [1, 2, 3]), (3, 6, [2, 4, 6]), (3, 5, [2, 4, 5])],
    ids=["one evaluation a step", "two a step", "Heun: two, and one in the last step"],
)
def test_segments_and_steps_count_from_one(steps, evaluations, done):
    found = [
        StepCount.of(plan(2, steps, evaluations), index * evaluations + made, 2 * evaluations)
        for index in range(2)
        for made in done
    ]
    assert [(count.segment, count.step) for count in found] == [(1, 1), (1, 2), (1, 3), (2, 1), (2, 2), (2, 3)]
    assert {(count.segments, count.steps, count.total) for count in found} == {(2, steps, 2 * evaluations)}
    assert [count.done for count in found] == [*done, *(evaluations + made for made in done)]


def test_within_a_step_its_number_stays_in_its_segment():
    assert StepCount.of(plan(2, 3, 6), 1, 12) == StepCount(1, 2, 1, 3, 1, 12)
    assert StepCount.of(plan(2, 3, 6), 7, 12) == StepCount(2, 2, 1, 3, 7, 12)


# -- text --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("running", "phase", "count", "eta_s", "text"),
    [
        (1, "generating", StepCount(2, 5, 4, 6, 10, 30), 72.4, "job 3/120 · segment 2/5 · step 4/6 · ETA 01:12"),
        (1, "generating", StepCount(2, 5, 4, 6, 10, 30), None, "job 3/120 · segment 2/5 · step 4/6"),
        (1, "generating", None, 3599.4, "job 3/120 · generating · ETA 59:59"),
        (0, "preparing", None, 3599.6, "job 3/120 · preparing · ETA 1:00:00"),
        (0, "loading the model", None, None, "job 3/120 · loading the model"),
        (1, "generating", StepCount(5, 5, 6, 6, 30, 30), 0.4, "job 3/120 · segment 5/5 · step 6/6"),
        (4, "generating", StepCount(2, 5, 4, 6, 10, 30), 36000, "job 3/120 · 4 running · ETA 10:00:00"),
    ],
)
def test_the_text(running, phase, count, eta_s, text):
    assert RunPosition(2, 120, 3, running, phase, count, eta_s).text == text


def test_the_numbers():
    one = RunPosition(2, 120, 3, 1, "generating", StepCount(2, 5, 4, 6, 10, 30), 72.44)
    assert one.fields == {
        "jobs_done": 2, "jobs": 120, "job": 3, "running": 1, "phase": "generating", "segment": 2, "segments": 5,
        "step": 4, "steps": 6, "eta_s": 72.4,
    }  # fmt: skip
    assert RunPosition(2, 120, 6, 4, "generating", None, None).fields == {
        "jobs_done": 2, "jobs": 120, "job": 6, "running": 4,
    }  # fmt: skip


# -- which job ---------------------------------------------------------------------------------------------------------


def test_the_job_that_is_generated_is_shown_before_those_around_it(pace):
    pace.start(5)
    assert pace.position() is None
    texts = []
    for name, phase in [
        ("a", "loading the model"),
        ("a", "preparing"),
        ("a", "generating"),
        ("b", "preparing"),
        ("a", "publishing"),
        ("b", "generating"),
        ("c", "preparing"),
    ]:
        pace.enter(name, phase)
        texts.append(pace.position().text.partition(" · ETA")[0])
    assert texts == [
        "job 1/5 · loading the model",
        "job 1/5 · preparing",
        "job 1/5 · generating",
        "job 1/5 · generating",
        "job 2/5 · preparing",
        "job 2/5 · generating",
        "job 2/5 · generating",
    ]
    pace.finish("a")
    assert pace.position().job == 2
    pace.finish("b")
    assert (pace.position().job, pace.position().phase) == (3, "preparing")
    pace.enter("c", "waiting")
    assert pace.position() is None


def test_the_last_job_is_published_and_no_eta_is_shown(pace, clock):
    pace.start(1)
    generate(pace, clock, "a", 5)
    assert pace.position().text == "job 1/1 · publishing"
    pace.finish("a")
    assert pace.position() is None


def test_more_jobs_than_were_known(pace):
    """Those of a mailbox: the number of jobs is not known."""
    pace.start(0)
    pace.enter("a", "generating")
    assert pace.position().text == "job 1 · generating"


# -- ETA ---------------------------------------------------------------------------------------------------------------


def test_before_a_job_has_ended_its_own_pace_counts_for_all(pace, clock):
    pace.start(3)
    pace.enter("a", "loading the model")
    clock.tick(44)
    pace.enter("a", "preparing")
    clock.tick(6)
    pace.enter("a", "generating")
    clock.tick(2)
    assert eta(pace) is None
    pace.step("a", at(1))  # 2 s an evaluation: 20 s a job; loading is no part of it
    assert eta(pace) == 18 + 2 * 20
    clock.tick(1)
    assert eta(pace) == 17 + 2 * 20
    clock.tick(3)
    pace.step("a", at(2))  # 6 s for two
    assert eta(pace) == 24 + 2 * 30


def test_other_jobs_count_the_mean_of_those_that_ran(pace, clock):
    pace.start(10)
    for name in "abcde":
        pace.finish(name)  # skipped: they are no part of the mean
    generate(pace, clock, "f", 10)
    clock.tick(2)  # until the next one is prepared
    generate(pace, clock, "g", 18)
    pace.finish("f")
    pace.enter("h", "generating")
    assert eta(pace) == 15 + 2 * 15
    clock.tick(4)
    pace.step("h", at(2))
    assert eta(pace) == 16 + 2 * 15
    clock.tick(100)  # a step that hangs
    assert eta(pace) == 2 * 15


def test_while_the_last_segment_is_decoded_the_mean_counts(pace, clock):
    pace.start(2)
    generate(pace, clock, "a", 10)
    pace.enter("b", "generating")
    clock.tick(6)
    pace.step("b", at(10))
    clock.tick(1)
    assert eta(pace) == 3


def test_a_failed_job_ran(pace, clock):
    pace.start(3)
    pace.enter("a", "generating")
    clock.tick(8)
    pace.enter("a", "waiting")
    pace.finish("a")
    pace.enter("b", "preparing")
    assert eta(pace) == 16


def test_a_job_that_resumes_counts_what_this_attempt_made(pace, clock):
    pace.start(1)
    pace.enter("a", "generating")
    clock.tick(3)
    pace.step("a", at(6))  # the first segment, 5 evaluations, is of an earlier attempt
    assert eta(pace) == 4 * 3


def test_a_job_that_begins_anew_counts_from_there(pace, clock):
    pace.start(1)
    pace.enter("a", "generating")
    clock.tick(3)
    pace.step("a", at(6))
    clock.tick(2)
    pace.step("a", at(1))
    assert eta(pace) == 9 * 2


def test_jobs_that_run_at_the_same_time_share_the_rest(pace, clock):
    pace.start(8)
    pace.enter("a", "generating")
    clock.tick(5)
    pace.enter("b", "generating")
    clock.tick(5)
    pace.step("a", at(5))  # 10 s left
    pace.step("b", at(5))  # 5 s left
    assert eta(pace) == (15 + 6 * 15) / 2
    clock.tick(5)
    pace.enter("b", "publishing")  # the first that has ended: 10 s
    pace.enter("c", "generating")
    clock.tick(2)
    pace.step("c", at(1))
    assert pace.position().text == "job 3/8 · 2 running · ETA 00:36"
    assert eta(pace) == pytest.approx((3 + 18 + 5 * 10) / 2)
    pace.finish("b")
    for name in "defgh":
        pace.finish(name)
    assert eta(pace) == 18  # the longest of those that are left

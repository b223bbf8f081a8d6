"""The pace of a job by a clock that is set by hand: a job of four segments of five evaluations."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from runner.batch.pace import SegmentPace
from runner.generation.protocol import SegmentPlan
from tests.hand_clock import HandClock

BEFORE, EVALUATION, AFTER, SET_UP = 3.0, 2.0, 4.0, 50.0
SEGMENT = BEFORE + 5 * EVALUATION + AFTER


@pytest.fixture
def clock() -> HandClock:
    return HandClock(1000.0)


def plan(seconds: float | None = None, evaluations: int = 5) -> SegmentPlan:
    return SegmentPlan(80, 20, 0, 4, 64, 48, 5, evaluations=evaluations, tflop=1.0, seconds=seconds)


def go(
    pace: SegmentPace, clock: HandClock, index: int, steps: range = range(1, 6), seconds: float = EVALUATION
) -> None:
    for step in steps:
        clock.tick(seconds)
        pace.step(index * 5 + step)


def segment(pace: SegmentPace, clock: HandClock, index: int, set_up: float = 0.0) -> None:
    clock.tick(BEFORE + set_up)
    go(pace, clock, index)
    clock.tick(AFTER)
    pace.segment_done()


def test_nothing_is_known_at_first(clock):
    pace = SegmentPace(plan(), 0, clock)
    assert pace.left_in_segment() is pace.left_in_job() is None
    clock.tick(60)
    pace.step(1)  # the first evaluation cannot be told from what came before it
    assert pace.left_in_segment() is pace.left_in_job() is None


def test_the_plan_counts_until_evaluations_are_measured(clock):
    pace = SegmentPace(plan(seconds=80), 0, clock)
    assert (pace.left_in_segment(), pace.left_in_job()) == (20, 80)
    clock.tick(60)
    pace.step(1)
    assert (pace.left_in_segment(), pace.left_in_job()) == (20, 80)


def test_measured_evaluations_count_more_than_the_plan(clock):
    pace = SegmentPace(plan(seconds=4), 0, clock)  # a forecast of 1 s a segment
    clock.tick(BEFORE + SET_UP)
    go(pace, clock, 0, range(1, 4))
    assert pace.left_in_segment() == 2 * EVALUATION
    assert pace.left_in_job() == 2 * EVALUATION + 3 * 5 * EVALUATION


def test_what_comes_after_the_evaluations_is_the_plan_s_until_it_is_measured(clock):
    pace = SegmentPace(plan(seconds=4 * SEGMENT), 0, clock)
    clock.tick(BEFORE + SET_UP)
    go(pace, clock, 0)
    assert pace.left_in_segment() == BEFORE + AFTER
    assert pace.left_in_job() == BEFORE + AFTER + 3 * SEGMENT
    clock.tick(AFTER)
    pace.segment_done()
    assert pace.left_in_segment() == SEGMENT
    clock.tick(BEFORE)
    go(pace, clock, 1)
    assert pace.left_in_segment() == AFTER


@pytest.mark.parametrize("done", [1, 2, 3])
def test_the_third_segment_is_forecast_to_the_second(clock, done):
    pace = SegmentPace(plan(), 0, clock)
    segment(pace, clock, 0, SET_UP)
    segment(pace, clock, 1)
    ends = clock.now + SEGMENT

    def check() -> None:
        assert pace.left_in_segment() == pytest.approx(ends - clock.now)
        assert pace.left_in_job() == pytest.approx(ends - clock.now + SEGMENT)

    check()
    clock.tick(BEFORE / 2)
    check()
    clock.tick(BEFORE / 2)
    go(pace, clock, 2, range(1, done + 1))
    check()
    clock.tick(EVALUATION / 2)  # in the middle of an evaluation
    check()
    clock.tick(EVALUATION / 2)
    pace.step(10 + done + 1)
    go(pace, clock, 2, range(done + 2, 6))
    check()
    clock.tick(AFTER / 2)
    check()


def test_the_set_up_of_the_job_is_not_forecast_again(clock):
    pace = SegmentPace(plan(), 0, clock)
    segment(pace, clock, 0, SET_UP)
    assert pace.left_in_segment() == 5 * EVALUATION + AFTER  # of what comes before nothing is known yet
    segment(pace, clock, 1)
    assert pace.left_in_segment() == SEGMENT


def test_a_phase_that_takes_longer_than_ever_is_about_to_end(clock):
    pace = SegmentPace(plan(), 0, clock)
    segment(pace, clock, 0)
    segment(pace, clock, 1)
    clock.tick(BEFORE + EVALUATION + 100)
    assert pace.left_in_segment() == 4 * EVALUATION + AFTER
    go(pace, clock, 2)
    clock.tick(AFTER + 100)
    assert pace.left_in_segment() == 0


def test_the_newest_evaluations_count(clock):
    pace = SegmentPace(plan(), 0, clock)
    go(pace, clock, 0)
    pace.segment_done()
    go(pace, clock, 1, seconds=10 * EVALUATION)
    pace.segment_done()
    go(pace, clock, 2, range(1, 3), seconds=10 * EVALUATION)
    assert pace.left_in_segment() == pytest.approx(3 * 10 * EVALUATION)


def test_steps_of_several_evaluations(clock):
    """A sampler that calls the model twice a step, and once in the last."""
    pace = SegmentPace(plan(), 0, clock)
    for index in range(2):
        clock.tick(BEFORE)
        for done in (2, 4, 5):
            clock.tick(EVALUATION * (2 if done < 5 else 1))
            pace.step(index * 5 + done)
            if done == 4:
                assert pace.left_in_segment() == EVALUATION + (AFTER if index else 0)
        clock.tick(AFTER)
        pace.segment_done()
    assert pace.left_in_segment() == SEGMENT


@pytest.mark.parametrize("seconds", [None, 4.0])
def test_one_evaluation_a_segment(clock, seconds):
    """No evaluation can be measured by itself: whole segments are."""
    pace = SegmentPace(plan(seconds, evaluations=1), 0, clock)
    clock.tick(SET_UP + 8)
    pace.step(1)
    pace.segment_done()
    clock.tick(8)
    pace.step(2)
    pace.segment_done()
    assert (pace.left_in_segment(), pace.left_in_job()) == (8, 16)
    clock.tick(6)
    assert (pace.left_in_segment(), pace.left_in_job()) == (2, 10)
    clock.tick(20)
    assert pace.left_in_segment() == 0


def test_a_resumed_job_begins_at_its_segment(clock):
    pace = SegmentPace(plan(), 2, clock)
    clock.tick(BEFORE + SET_UP)
    go(pace, clock, 2, range(1, 4))
    assert pace.left_in_segment() == 2 * EVALUATION
    assert pace.left_in_job() == 7 * EVALUATION
    go(pace, clock, 2, range(4, 6))
    clock.tick(AFTER)
    pace.segment_done()
    assert pace.left_in_segment() == pace.left_in_job() == 5 * EVALUATION + AFTER


@pytest.mark.parametrize("ask", [SegmentPace.left_in_segment, SegmentPace.left_in_job])
def test_after_the_last_segment_nothing_is_left(clock, ask: Callable[[SegmentPace], float | None]):
    pace = SegmentPace(plan(seconds=80), 3, clock)
    segment(pace, clock, 3)
    assert ask(pace) == 0
    assert ask(SegmentPace(plan(), 4, clock)) == 0

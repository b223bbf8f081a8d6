from __future__ import annotations

import threading
import time

import pytest
from hypothesis import given
from hypothesis import strategies as st

from runner.timing import CallTimer, StageTimer, hours_and_minutes, now, unix_time
from tests.hand_clock import HandClock


class Probe:
    """A device whose queued work takes effect when it is waited for."""

    def __init__(self, clock: HandClock) -> None:
        self.clock, self.queued, self.bytes, self.log = clock, 0.0, 0, []

    def synchronize(self) -> None:
        self.log.append("wait")
        self.clock.now += self.queued
        self.queued = 0.0

    def reset_peak(self) -> None:
        self.log.append("reset")
        self.bytes = 0

    def peak(self) -> dict[str, int]:
        return {"allocated": self.bytes}


def test_stages_add_up_by_name():
    clock = HandClock()
    timer = StageTimer(clock)
    for seconds in (1.0, 2.5):
        with timer.stage("decode"):
            clock.now += seconds
    assert timer.seconds == {"decode": 3.5}


def test_a_stage_that_fails_is_still_timed():
    clock = HandClock()
    timer = StageTimer(clock)

    def draw() -> None:
        with timer.stage("draw"):
            clock.now += 2
            raise ValueError("x")

    with pytest.raises(ValueError, match="x"):
        draw()
    assert timer.seconds == {"draw": 2}


def test_work_queued_on_the_device_counts_for_its_own_stage():
    clock = HandClock()
    probe = Probe(clock)
    timer = StageTimer(clock, probe)
    with timer.stage("denoise", on_device=True):
        probe.queued, probe.bytes = 7.0, 100
    with timer.stage("vae_decode", on_device=True):
        probe.bytes = 60
    with timer.stage("denoise", on_device=True):
        probe.bytes = 80
    assert timer.seconds == {"denoise": 7.0, "vae_decode": 0.0}
    assert timer.peaks == {"denoise": {"allocated": 100}, "vae_decode": {"allocated": 60}}
    assert probe.log[:3] == ["wait", "reset", "wait"]


def test_counters_and_steps_are_safe_from_threads():
    timer = StageTimer()

    def work() -> None:
        for _ in range(500):
            timer.count("hit")
            timer.step(1.0)

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert timer.counters == {"hit": 2000}
    assert len(timer.steps) == 2000


class Waited:
    """A probe that counts how often it was waited for."""

    def __init__(self) -> None:
        self.count = 0

    def synchronize(self) -> None:
        self.count += 1


@pytest.mark.parametrize("probe", [None, Waited()])
def test_call_timer_notes_each_evaluation_up_to_the_next_or_the_steps_end(probe):
    clock = iter([10.0, 11.0, 13.5, 20.0, 20.25]).__next__
    timer = StageTimer(clock=clock, probe=probe)
    calls = CallTimer(timer)
    calls.start()  # 10
    calls.start()  # 11: the first lasted 1 s
    calls.end_step()  # 13.5
    calls.end_step()  # a step without an evaluation notes nothing
    calls.start()  # 20: what lay between the steps belongs to neither
    calls.end_step()
    assert timer.steps == [1.0, 2.5, 0.25]
    assert probe is None or probe.count == 3


@given(st.datetimes(timezones=st.timezones()))
def test_a_time_of_any_zone_is_the_same_moment(moment):
    assert unix_time(moment.isoformat()) == moment.timestamp()


def test_times_are_read_as_they_are_written():
    assert unix_time("1970-01-01T00:01:00.250+00:00") == 60.25
    assert unix_time("1970-01-01T01:01:00+01:00") == 60
    assert unix_time("1970-01-01T00:01:00") == 60  # of UTC, whatever this machine's zone is
    assert unix_time(now()) == pytest.approx(time.time(), abs=60)
    assert [unix_time(text) for text in ("", "yesterday", "2026-13-01T00:00:00+00:00")] == [None] * 3


@given(st.integers(0, 10**7))
def test_a_duration_is_hours_minutes_and_seconds(seconds):
    hours, minutes, rest = hours_and_minutes(seconds).split(":")
    assert len(minutes) == len(rest) == 2
    assert int(hours) * 3600 + int(minutes) * 60 + int(rest) == seconds


def test_a_duration_is_rounded_to_seconds():
    assert [hours_and_minutes(s) for s in (0.4, 59.6, 3599.7, 45296)] == ["0:00:00", "0:01:00", "1:00:00", "12:34:56"]

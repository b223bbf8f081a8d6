"""The simulation of a large run: its parts against sums done here, and the whole once."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from runner.batch.summary import SummaryWriter
from runner.records.record import JobLine
from tests.bench.run_bench import run_bench
from tests.hand_clock import HandClock
from tests.system_tests import system_test

BENCH = str(Path(__file__).resolve().parents[2] / "bench")


@pytest.fixture
def fleet(monkeypatch):
    monkeypatch.syspath_prepend(BENCH)
    import _fleet

    yield _fleet
    sys.modules.pop("_fleet")


def make_works(fleet, seconds, segments=1):
    return [fleet.Work(segments, each / segments, each, 0.0, 0.0) for each in seconds]


SECONDS = [60, 10, 20, 50, 30, 30, 40, 70, 10, 20, 80, 10, 90]


def test_without_kills_and_costs_each_share_takes_what_it_should(fleet):
    """Static shards: the largest sum of every third job; longest first: the list schedule; the others end with them."""
    found = {s: fleet.Fleet(make_works(fleet, SECONDS), s, fleet.FleetSettings(3)).run() for s in ("static", "ray")}
    sums = [sum(SECONDS[place::3]) for place in range(3)]
    assert found["static"].makespan_s == max(sums) == found["static"].ended_s
    assert found["static"].machine_s == sum(sums)
    loads = [0, 0, 0]
    for each in sorted(SECONDS, reverse=True):
        loads[loads.index(min(loads))] += each
    assert found["ray"].makespan_s == max(loads)
    assert found["ray"].machine_s == 3 * max(loads)


def test_any_does_each_job_once_and_ends_when_the_last_one_is_done(fleet):
    found = fleet.Fleet(make_works(fleet, SECONDS), "any", fleet.FleetSettings(3, look_s=0.1)).run()
    assert sum(SECONDS) / 3 <= found.makespan_s <= sum(SECONDS)
    assert found.looks["taken"] == len(SECONDS)
    assert found.looks["taken"] + found.looks["done"] == 3 * len(SECONDS)  # each runner sees each job done
    finals = [lines for lines, _ in found.summaries if lines.total() == len(SECONDS)]
    assert sum(lines["succeeded"] for lines in finals[-3:]) == len(SECONDS)


@pytest.mark.parametrize("share", ["static", "balanced", "any", "ray"])
@pytest.mark.parametrize("notice_s", [0.0, 120.0])
def test_with_kills_each_job_is_still_done_once(fleet, share, notice_s):
    works = make_works(fleet, SECONDS * 10, segments=5)
    plan = fleet.FleetSettings(4, 20.0, notice_s, load_s=5, replace_s=10, detect_s=5, look_s=0.1, survey_s=0.01)
    found = fleet.Fleet(works, share, plan).run()
    assert found.kills > 3
    assert found.makespan_s >= sum(work.device_s for work in works) / 4
    assert found.looks["taken"] >= len(works)
    assert found.runners > 4
    if notice_s:
        assert found.lost_s == 0  # every segment fits into the time of a notice, or is not begun
    else:
        assert 0 < found.lost_s <= found.kills * max(work.segment_s for work in works)


class Writings:
    """In the place of a storage: how often a summary was written."""

    def __init__(self) -> None:
        self.at: list[float] = []
        self.clock = HandClock()

    def write_bytes(self, key: str, data: bytes) -> None:
        if key.endswith(".json"):
            self.at.append(self.clock.now)

    def read_bytes(self, key: str) -> None:
        return None


@settings(max_examples=30, deadline=None)
@given(st.lists(st.floats(0, 400), min_size=1, max_size=60), st.integers(60, 200), st.booleans())
def test_summaries_are_written_when_the_real_writer_writes_them(pauses, jobs, driven):
    sys.path.insert(0, BENCH)
    try:
        from _fleet import SummarySchedule
    finally:
        sys.path.remove(BENCH)
    store = Writings()
    names = [str(index) for index in range(jobs)]
    known = [] if driven else names
    real = SummaryWriter(
        store, run_id="r", shard="s", shard_reason="", manifest="", recipe="", job_ids=known, clock=store.clock
    )
    schedule, times = SummarySchedule(0.0, None if driven else jobs), []
    for name, pause in zip(names, pauses, strict=False):
        store.clock.tick(pause)
        real.add(JobLine(id=name, status="skipped", reason="done"))
        if schedule.note("skipped", store.clock.now):
            times.append(store.clock.now)
    assert store.at == times


@system_test
def test_cluster_scale(tmp_path):
    """Fewer machines than jobs by far, so that handing out longest first shows."""
    found, printed = run_bench("cluster_scale", tmp_path, "--jobs", "300", "--gpus", "5", "--rates", "0,1")
    assert printed.startswith("SIMULATION") and found["simulation"]
    rows = {(row["kills_per_hour"], row["notice_s"], row["share"]): row for row in found["rows"]}
    assert len(rows) == 12
    for row in rows.values():
        assert row["ratio"] >= 1
        assert row["gpu_hours"] >= 5 * row["bound_s"] / 3600 * 0.99
        assert row["dollars"] == pytest.approx(row["gpu_hours"])
    plain = [rows[0, 0, share] for share in ("static", "any", "ray")]
    assert plain[2]["ratio"] < plain[0]["ratio"]
    assert rows[0, 0, "balanced"]["ratio"] < plain[0]["ratio"]
    assert plain[1]["looks"]["taken"] == 300
    counted = found["requests_counted"]
    static = plain[0]["requests"]
    assert (
        static["DELETE"]
        == 300 * counted["rendered"]["DELETE"] + (found["segments"] - 300) * counted["segment"]["DELETE"]
    )
    assert plain[1]["requests"]["GET"] >= static["GET"] + 4 * 300 * counted["done"]["GET"] * 0.9
    # Each runner of `any` lists all jobs in its summary, a worker of the driver those that it was sent.
    largest = [row["summaries"]["largest"] for row in plain]
    assert largest[1] > 3 * max(largest[0], largest[2])

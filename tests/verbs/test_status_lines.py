from __future__ import annotations

import time
from datetime import UTC, timedelta, timezone

import pytest

from runner.verbs.status import RunStatus, StatusRow
from runner.verbs.status_lines import (
    counts_line,
    details,
    notable_rows,
    others_line,
    pace_line,
    short_reason,
    source_line,
)


def rows(count: int, status: str, **more) -> list[StatusRow]:
    return [StatusRow(id=f"{status}{index}", status=status, **more) for index in range(count)]


def seen(*parts: list[StatusRow], run_id: str | None = "r", now: float = 0.0) -> RunStatus:
    return RunStatus("out", run_id, "m.yaml" if run_id else None, tuple(row for part in parts for row in part), {}, now)


def held(status: str, *heard: tuple[str, float]) -> list[StatusRow]:
    return [
        StatusRow(id=f"{status}-{index}", status=status, host=host, heard_s=age)
        for index, (host, age) in enumerate(heard)
    ]


def test_counts_line_has_all_counts():
    found = seen(
        rows(312, "succeeded"),
        rows(3, "failed"),
        held("running", ("gpu-a", 4.2), ("gpu-b", 9.0)),
        rows(183, "pending", reason="not begun"),
    )
    assert counts_line(found) == (
        "312 of 500 done · 3 failed · 2 running (gpu-a heard of 4 s ago, gpu-b heard of 9 s ago) · 183 pending"
    )


def test_counts_line_shows_zero_only_for_failures():
    assert counts_line(seen(rows(2, "succeeded"))) == "2 of 2 done · 0 failed"
    found = seen(rows(1, "succeeded", warnings=("w",)), held("lost", ("gpu-c", 90.0)))
    assert counts_line(found) == "1 of 2 done · 0 failed · 1 lost (gpu-c last heard of 90 s ago) · 1 with warnings"


def test_counts_line_names_host_once_and_shortens_many_hosts():
    assert "3 running (a heard of 2 s ago)" in counts_line(seen(held("running", ("a", 8.0), ("a", 2.0), ("a", 5.0))))
    many = [(f"gpu-{index}", 3.0 + index) for index in range(12)]
    assert "12 running (12 hosts heard of 3 to 14 s ago)" in counts_line(seen(held("running", *many)))


def test_others_line_counts_jobs_of_other_manifests():
    others = [*rows(3, "succeeded", listed=False), *rows(1, "failed", listed=False)]
    found = seen(rows(1, "succeeded"), others)
    assert counts_line(found) == "1 of 1 done · 0 failed"
    assert others_line(found) == "jobs of other manifests: 3 succeeded · 1 failed"
    assert others_line(seen(rows(1, "succeeded"))) is None


def test_counts_line_without_manifest_has_no_total():
    found = seen(rows(2, "succeeded"), rows(1, "failed"), run_id=None)
    assert counts_line(found) == "2 done · 1 failed"
    assert "jobs that have not begun are not counted" in source_line(found)
    assert source_line(seen([])) == "out, run r of m.yaml:"


AT = 1_800_000_000.0  # 2027-01-15T08:00:00Z


def moment(seconds: float) -> str:
    return time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(seconds)) + ".000Z"


def going_on(done: int, left: int, hours: float) -> RunStatus:
    """So many jobs done one after the other in so many hours."""
    each = hours * 3600 / done
    ended = [
        StatusRow(
            id=str(index),
            status="succeeded",
            run_id="r",
            started_at=moment(AT - (index + 1) * each),
            finished_at=moment(AT - index * each),
        )
        for index in range(done)
    ]
    return seen(ended, held("running", ("a", 1.0)), rows(left - 1, "pending"), now=AT)


def test_pace_line_shows_rate_and_eta():
    assert pace_line(going_on(31, 40, 2.5), UTC) == "12.4 jobs an hour · ETA 11:13:33 (in 3:13:33)"
    assert (
        pace_line(going_on(31, 40, 2.5), timezone(timedelta(hours=9)))
        == "12.4 jobs an hour · ETA 20:13:33 (in 3:13:33)"
    )
    assert pace_line(going_on(2, 40, 1), UTC) == "2.0 jobs an hour · ETA 2027-01-16 04:00:00 (in 20:00:00)"
    assert pace_line(going_on(10, 1, 0.01), UTC).startswith("1000 jobs an hour · ")


@pytest.mark.parametrize(
    ("found", "line"),
    [
        (seen(rows(1, "succeeded")), "no job is left"),
        (seen(held("running", ("a", 1.0))), "no job of this run has ended yet"),
        (seen(rows(1, "pending")), "no job of this run has ended yet · no job is running"),
    ],
)
def test_pace_line_of_unknown_rate_says_why(found, line):
    assert pace_line(found, UTC) == line


def test_shown_rows_and_notes_of_many_jobs_are_selected():
    failed = rows(1, "failed", code="internal", reason="internal: a bug")
    warned = rows(1, "succeeded", warnings=("one", "two"))
    changed = rows(1, "pending", reason="its settings have changed since: succeeded at t")
    plain = [StatusRow(id="plain", status="succeeded"), StatusRow(id="new", status="pending", reason="not begun")]
    lost = [StatusRow(id="gone", status="lost", stage="generating", host="a", heard_s=99.0, reason="its process ended")]
    running = [lost[0].model_copy(update={"id": "now", "status": "running"})]
    all_rows = [*plain, *failed, *warned, *changed, *lost, *running]
    assert notable_rows(all_rows) == [*failed, *warned, *changed, *lost, *running]
    assert [short_reason(row) for row in all_rows] == [
        "",
        "not begun",
        "internal",
        "",
        "its settings have changed since",
        "generating on a, last heard of 99 s ago",
        "generating on a, heard of 99 s ago",
    ]
    assert details(all_rows) == [
        ("failed0", "internal: a bug"),
        ("succeeded0", "! one"),
        ("succeeded0", "! two"),
        ("pending0", "its settings have changed since: succeeded at t"),
        ("gone", "its process ended"),
    ]

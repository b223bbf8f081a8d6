"""Report building: what holds for any facts of a run: shares sum up, jobs keep their order, nothing unknown is told."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from runner.records.record import (
    AttemptMark,
    ErrorRecord,
    JobLine,
    OutputRecord,
    ProcessRecord,
    ProcessUsage,
    ResultRecord,
    RunJobsRecord,
    RunSummary,
    SpanRecord,
)
from runner.records.run_report import RunReport
from runner.verbs.report_building import RunFacts, build_report
from runner.verbs.status import SeenMark, StatusRow

BEGIN = datetime(2026, 1, 1, tzinfo=UTC)
ERROR = ErrorRecord(code="job.crashed", message="it crashed. Look at the log", stage="generate", retryable=False)


def at(seconds: float) -> str:
    return (BEGIN + timedelta(seconds=seconds)).isoformat(timespec="milliseconds")


def record_of(job_id: str, *, begin: float = 1.0, end: float = 2.0, ok: bool = True, **more) -> ResultRecord:
    output = OutputRecord(
        uri=f"out/jobs/{job_id}/output.mp4",
        key=f"jobs/{job_id}/output.mp4",
        bytes=1,
        files=1,
        identity="sha256:0",
        sha256="0",
        frames=30,
        fps="30000/1001",
        width=64,
        height=48,
        frames_sha256="0",
    )
    values = {
        "job_id": job_id,
        "status": "succeeded" if ok else "failed",
        "attempt": 1,
        "run_id": "r",
        "reason": "no record yet",
        "started_at": at(begin),
        "finished_at": at(end),
        "fingerprint": "f",
        "fingerprint_parts": {},
        "host": "h",
        "shard": "h-7",
        "gpu_s": 0.5,
        "output": output if ok else None,
        "error": None if ok else ERROR,
    }
    return ResultRecord(**(values | more))


def usage_of(**more) -> ProcessUsage:
    values = {"host": "h", "pid": 7, "started_at": at(0), "seconds": 10.0, "finished": True, "work_s": 4.0}
    return ProcessUsage(**(values | {"loading": [SpanRecord(begin_s=0.5, end_s=2.5)]} | more))


def summary_of(shard: str = "h-7", lines=(), processes=None, **more) -> RunSummary:
    values = {
        "run_id": "r",
        "shard": shard,
        "shard_reason": "",
        "manifest": "m.yaml",
        "recipe": "fp32",
        "started_at": at(0),
        "finished_at": at(10),
        "seconds": 10.0,
        "exit_code": 0,
        "counts": {},
        "jobs": [JobLine(id=name, status=status, reason="why") for name, status in lines],
        "processes": [usage_of()] if processes is None else processes,
        "environment": {},
    }
    return RunSummary(**(values | more))


def row_of(name: str, status: str) -> StatusRow:
    needed = {"detail": ""} if "detail" in StatusRow.model_fields else {}
    return StatusRow(id=name, status=status, **needed)


def build(summaries, records=(), rows=(), marks=(), jobs=None, **given) -> RunReport:
    kept = None
    if jobs is not None:
        kept = RunJobsRecord(run_id="r", manifest="m.yaml", recipe="fp32", force=False, jobs=dict.fromkeys(jobs))
    facts = RunFacts(
        run_id="r",
        out="out",
        kept=kept,
        summaries={summary.shard: summary for summary in summaries},
        rows={row.id: row for row in rows},
        records={record.job_id: record for record in records},
        marks=dict(marks),
        kept_at=BEGIN.timestamp(),
    )
    return build_report(facts, made_at=at(100), **given)


def mark_of(name: str, *, pid: int = 7, begin: float = 3.0, run_id: str = "r") -> AttemptMark:
    process = ProcessRecord(pid=pid, start_ticks=0, boot_id="b", pid_namespace="n")
    text = {"fingerprint": "f", "started_at": at(begin), "stage": "generating"}
    return AttemptMark(job_id=name, attempt=2, run_id=run_id, host="h", process=process, **text)


@example(gpu_s=[5e-324], failed=set(), more_work=0.0, seconds=0.0, loading=1.0, price=1.0)
@given(
    gpu_s=st.lists(st.floats(0, 1e5), max_size=8),
    failed=st.sets(st.integers(0, 7)),
    more_work=st.floats(0, 1e4),
    seconds=st.floats(0, 1e6),
    loading=st.floats(0, 1e4),
    price=st.floats(0, 1e3),
)
def test_build_report_shares_cost_and_seconds_that_sum_to_total(gpu_s, failed, more_work, seconds, loading, price):
    """The sums also hold if the clock of a process went back and its parts are longer than the whole."""
    records = [record_of(f"j{n}", gpu_s=one, ok=n not in failed) for n, one in enumerate(gpu_s)]
    work = sum(gpu_s) + more_work
    usage = usage_of(seconds=seconds, work_s=work, loading=[SpanRecord(begin_s=0, end_s=loading)])
    lines = [(record.job_id, record.status) for record in records]
    found = build([summary_of(lines=lines, processes=[usage])], records, gpu_hour=price)
    spent = found.gpu_seconds
    assert spent.total == pytest.approx(spent.work + spent.loading + spent.idle, abs=0.01)
    assert spent.total == pytest.approx(max(seconds, work + loading), abs=0.01)
    assert found.cost == pytest.approx(spent.total * price / 3600)
    rendered = [record for record in records if record.output is not None and record.gpu_s]
    told = [job.cost for job in found.jobs if job.cost is not None]
    assert len(told) == len(rendered)
    if rendered:
        assert sum(told) == pytest.approx(found.cost)
        for job in found.jobs:  # in proportion to the work of each
            if job.cost is not None and job.gpu_s:
                share = job.gpu_s / sum(record.gpu_s for record in rendered)
                assert job.cost == pytest.approx(found.cost * share, rel=1e-6)


@given(st.lists(st.sampled_from("abcdefgh"), unique=True), st.lists(st.sampled_from("abcdefgh"), unique=True))
def test_build_report_lists_jobs_in_manifest_order_and_others_last(listed, named):
    found = build([summary_of(lines=[(name, "not_run") for name in named])], jobs=listed)
    names = [job.id for job in found.jobs]
    assert names == listed + [name for name in named if name not in listed]
    assert found.counts["total"] == sum(count for state, count in found.counts.items() if state != "total")


@pytest.mark.parametrize(
    ("lines", "record", "row", "state"),
    [
        (["succeeded"], True, "succeeded", "succeeded"),
        (["skipped", "succeeded"], True, "succeeded", "succeeded"),  # another process of the run skipped it
        (["skipped"], True, "succeeded", "succeeded"),  # its shard was started anew after it
        (["not_run"], True, "succeeded", "succeeded"),  # its process was killed before the summary was written again
        ([], True, "succeeded", "succeeded"),
        (["failed", "not_run"], False, "failed", "failed"),
        (["failed"], True, "failed", "failed"),  # an older output of the run stands beside the failure
        (["skipped"], "other", "succeeded", "skipped"),
        (["not_run"], "other", "succeeded", "skipped"),
        (["not_run"], "other", "pending", "pending"),  # its settings have changed since
        (["skipped"], "other", "pending", "pending"),  # --retry-failed left it out
        (["skipped"], None, None, "pending"),
        (["succeeded"], "other", "succeeded", "succeeded"),  # a later run replaced it
        (["not_run"], None, None, "pending"),
        ([], None, None, "pending"),
    ],
)
def test_job_status_follows_from_summary_lines_record_and_row(lines, record, row, state):
    summaries = [summary_of(f"h-{n}", [("a", status)], started_at=at(5)) for n, status in enumerate(lines)]
    records = []
    if record is not None:
        records = [record_of("a", ok=record is not False, run_id="before" if record == "other" else "r")]
    rows = [row_of("a", row)] if row else []
    (job,) = build(summaries, records, rows, jobs=["a"]).jobs
    assert job.status == state
    assert (job.error is not None) == (record is False)


@pytest.mark.parametrize("state", ["running", "lost"])
def test_running_job_shows_host_and_extends_process(state):
    stale = summary_of(lines=[("a", "not_run")], processes=[usage_of(finished=False)], finished_at=None, exit_code=None)
    seen = SeenMark(mark_of("a"), heard_at=BEGIN.timestamp() + 42)
    found = build([stale], rows=[row_of("a", state)], marks=[("a", seen)], jobs=["a"])
    (job,), (process,) = found.jobs, found.processes
    assert (job.status, job.attempt, job.host) == (state, 2, "h")
    assert (process.end_s, process.finished, found.seconds, found.finished_at) == (42.0, False, 42.0, None)


def test_mark_of_other_run_or_process_does_not_extend_process():
    stale = summary_of(processes=[usage_of(finished=False)], finished_at=None)
    for mark in (mark_of("a", run_id="later"), mark_of("a", pid=8), mark_of("a", begin=-1.0)):
        seen = SeenMark(mark, heard_at=BEGIN.timestamp() + 42)
        found = build([stale], rows=[row_of("a", "running")], marks=[("a", seen)], jobs=["a"])
        assert found.processes[0].end_s == 10.0


def test_records_belong_to_last_process_of_shard_and_host_begun_before():
    processes = [usage_of(seconds=3.0, finished=False), usage_of(pid=8, started_at=at(20), seconds=5.0)]
    records = [record_of("a", begin=1, end=4), record_of("b", begin=21, end=23), record_of("c", begin=1, host="other")]
    found = build([summary_of(processes=processes, exit_code=1, stopped_by="SIGTERM")], records)
    told = [(one.host, one.pid, one.begin_s, one.end_s, one.exit_code, one.stopped_by) for one in found.processes]
    assert told == [
        ("h", 7, 0.0, 4.0, None, None),  # it was last heard of in the record of a
        ("h", 8, 20.0, 25.0, 1, "SIGTERM"),
        ("other", None, 1.0, 2.0, None, None),  # it wrote no summary
    ]
    assert any("Each host's times come from its own clock" in note for note in found.notes)
    assert found.finished_at is None


def test_span_times_count_from_start_of_run():
    spans = {"generate": SpanRecord(begin_s=0.25, end_s=0.75), "prepare": SpanRecord(begin_s=0.0, end_s=0.25)}
    late = summary_of("h-8", processes=[usage_of(pid=8, started_at=at(5))])
    found = build([late, summary_of()], [record_of("a", begin=6.0, end=7.0, shard="h-8", spans=spans)])
    assert found.started_at == at(0)
    told = [(span.stage, span.job_id, span.begin_s, span.end_s) for span in found.processes[1].spans]
    assert told == [
        ("load", None, 5.5, 7.5),
        ("prepare", "a", 6.0, 6.25),
        ("generate", "a", 6.25, 6.75),
    ]


def test_film_seconds_with_fractional_frame_rate_are_exact():
    (job,) = build([summary_of(lines=[("a", "succeeded")])], [record_of("a")]).jobs
    assert job.film_s == pytest.approx(1.001)


def test_build_report_of_older_summary_has_unknown_cost():
    found = build(
        [summary_of(lines=[("a", "succeeded")], processes=[])], [record_of("a", host="", gpu_s=None)], gpu_hour=1
    )
    assert (found.processes, found.cost, found.seconds, found.finished_at) == ([], None, 10.0, at(10))
    assert found.jobs[0].gpu_s is None

"""Shared run: join the messages of one run's workers: one log, one progress, one line per job, one exit code.

In:   the messages of each worker (`worker_link.py`). Out: events, progress, a `SharedRun`.
Never: how a worker is started or stopped.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import structlog

from runner.batch.progress import Progress
from runner.batch.run_pace import Phase
from runner.batch.summary import exit_code_of_lines
from runner.errors import RunnerError
from runner.records.record import JobLine

__all__ = ["JoinedReports", "SharedRun", "WorkerReport", "merge_exit_codes", "merge_lines"]

LOGGED_ONCE = ("job_skipped", "leases_are_warnings")  # every worker sends these events
RANKS = {"not_run": 0, "skipped": 1, "failed": 2, "succeeded": 3}
# If jobs are left undone: the first of these codes with which a worker ended. First codes that need a change before a
# rerun, then those of a stopped run, then those that a rerun may solve.
FIRST_CODES = (2, 130, 143, 3, 1)
DIED = 3  # counts as the exit code of a worker that was killed


@dataclass(frozen=True)
class SharedRun:
    """The joint result of the workers."""

    exit_code: int
    lines: tuple[JobLine, ...]  # one per job, in the manifest's order
    error: RunnerError | None = None  # the error that gave the exit code, if jobs were left undone


@dataclass
class WorkerReport:
    """The messages of one worker so far. `name`: its place in the log, e.g. the GPU."""

    name: str
    jobs: set[str] = field(default_factory=set)  # under way in this worker
    finished: int = 0  # number of jobs that it reported as ended
    ended: int | None = None  # the exit code in its outcome
    error: RunnerError | None = None  # the error that it sent instead of an outcome
    stopped_by: RunnerError | None = None  # the error in its outcome: what stopped its run

    @property
    def over(self) -> bool:
        """Whether it has sent its outcome, or an error instead."""
        return self.ended is not None or self.error is not None

    @property
    def code(self) -> int | None:
        """Its exit code; None if it was killed before it could send one."""
        return self.error.exit_code if self.error is not None else self.ended


class JoinedReports:
    """The messages of all workers of one run. `field`: log field for a worker's place, e.g. `gpu`."""

    def __init__(self, job_ids: Sequence[str], progress: Progress, field: str) -> None:
        self._job_ids, self._progress, self._field = job_ids, progress, field
        self._reports: list[WorkerReport] = []
        self._lines: list[JobLine] = []
        self._finished: set[str] = set()
        self._logged: set[tuple[str, str]] = set()  # (event, job) of LOGGED_ONCE
        self._log = structlog.get_logger()

    def open(self, name: str) -> WorkerReport:
        """Return the report of a new worker."""
        self._reports.append(WorkerReport(name))
        return self._reports[-1]

    def hear(self, report: WorkerReport, what: str, *more: Any) -> None:
        """Process one message of a worker."""
        if what == "log":
            self._write_event(report, *more)
        elif what == "phase":
            self._enter_phase(report, *more)
        elif what == "step":
            self._progress.step(*more)
        elif what == "finished":
            self._finish(report, *more)
        elif what == "ended":
            report.ended, lines, report.stopped_by = more
            self._lines.extend(lines)
        elif what == "failed":
            (report.error,) = more

    def leave(self, report: WorkerReport) -> None:
        """Note that the worker has ended or died: its jobs are waiting again."""
        for job_id in sorted(report.jobs):
            self._progress.phase(job_id, "waiting")
        report.jobs.clear()

    def merge(self) -> SharedRun:
        """Return the joint result. If no worker began its jobs, raises the first RunnerError of a worker."""
        lines = merge_lines(self._job_ids, self._lines)
        began = any(report.ended is not None for report in self._reports)
        errors = [report.error for report in self._reports if report.error is not None]
        if errors and not began and not self._lines:
            raise errors[0]
        code = merge_exit_codes(lines, [report.code for report in self._reports])
        causes = [report.error or report.stopped_by for report in self._reports]
        undone = any(line.status == "not_run" for line in lines)
        cause = next((one for one in causes if one is not None and one.exit_code == code), None)
        return SharedRun(code, tuple(lines), cause if undone else None)

    def _enter_phase(self, report: WorkerReport, job_id: str, phase: Phase) -> None:
        if phase != "waiting":
            report.jobs.add(job_id)
        elif job_id in report.jobs:
            report.jobs.remove(job_id)
        else:  # it only checked a job that another worker has
            return
        self._progress.phase(job_id, phase)

    def _finish(self, report: WorkerReport, line: JobLine) -> None:
        report.jobs.discard(line.id)
        report.finished += 1
        self._lines.append(line)
        if line.id not in self._finished:  # a job that one worker has rendered is skipped by the others
            self._finished.add(line.id)
            self._progress.finished(line)

    def _write_event(self, report: WorkerReport, level: str, event: dict[str, Any]) -> None:
        if event.get("event") in LOGGED_ONCE:
            entry = str(event["event"]), str(event.get("job"))
            if entry in self._logged:
                return
            self._logged.add(entry)
        name = event.pop("event", "")
        getattr(self._log, level)(name, **event | {self._field: report.name})


def merge_lines(job_ids: Sequence[str], lines: Iterable[JobLine]) -> list[JobLine]:
    """Return one line per job, in the order of `job_ids`; other ids come last.

    Of several lines of a job, the status decides: succeeded, then failed, skipped, not_run. With equal status the line
    with more attempts counts, else the first.
    """
    best: dict[str, JobLine] = {}
    for line in lines:
        known = best.get(line.id)
        if known is None or (RANKS[line.status], line.attempt or 0) > (RANKS[known.status], known.attempt or 0):
            best[line.id] = line
    missing = {
        name: JobLine(id=name, status="not_run", reason="the run ended before it")
        for name in job_ids
        if name not in best
    }
    return [best.get(name) or missing[name] for name in dict.fromkeys([*job_ids, *best])]


def merge_exit_codes(lines: Sequence[JobLine], codes: Sequence[int | None]) -> int:
    """Return the exit code of a run from its merged lines and its workers' exit codes (None: killed).

    If every job has ended, only the lines count.
    """
    if all(line.status != "not_run" for line in lines):
        return exit_code_of_lines(lines)
    ended = [DIED if code is None else code for code in codes]
    return next((code for code in FIRST_CODES if code in ended), DIED)

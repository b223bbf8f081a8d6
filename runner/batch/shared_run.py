"""Shared run: what the workers of one run say, as one log, one view of progress, one line a job and one exit code.

In:   the messages of `worker_link.py`, a worker each. Out: events, progress, a `SharedRun`.
Never: how a worker is started or told to stop.
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

SAID_ONCE = ("job_skipped", "leases_are_warnings")  # every worker finds them
RANKS = {"not_run": 0, "skipped": 1, "failed": 2, "succeeded": 3}
# Of workers that leave jobs undone, the first of these that one ended with: what must be mended before a rerun, what
# stopped the run, what a rerun mends.
FIRST_CODES = (2, 130, 143, 3, 1)
DIED = 3  # the exit code that a worker counts with which was killed


@dataclass(frozen=True)
class SharedRun:
    """What the workers came to together."""

    exit_code: int
    lines: tuple[JobLine, ...]  # one a job, in the manifest's order
    error: RunnerError | None = None  # what stopped a worker and left jobs undone, if the exit code follows from it


@dataclass
class WorkerReport:
    """What one worker has said so far. `name`: of the place where it works, in the log."""

    name: str
    jobs: set[str] = field(default_factory=set)  # under way in it
    finished: int = 0  # jobs of which it has said that they ended
    ended: int | None = None  # its exit code, from the outcome that it sent
    error: RunnerError | None = None  # with which it failed, in place of an outcome
    stopped_by: RunnerError | None = None  # what stopped its run, from the outcome

    @property
    def over(self) -> bool:
        """Whether it has told its outcome, or the error in its place."""
        return self.ended is not None or self.error is not None

    @property
    def code(self) -> int | None:
        """Its exit code; None where it was killed before it could say."""
        return self.error.exit_code if self.error is not None else self.ended


class JoinedReports:
    """All that the workers of one run have said. `field`: names a worker's place in the log, e.g. `gpu`."""

    def __init__(self, job_ids: Sequence[str], progress: Progress, field: str) -> None:
        self._job_ids, self._progress, self._field = job_ids, progress, field
        self._reports: list[WorkerReport] = []
        self._lines: list[JobLine] = []
        self._finished: set[str] = set()
        self._said: set[tuple[str, str]] = set()  # (event, job) of those that are said once
        self._log = structlog.get_logger()

    def open(self, name: str) -> WorkerReport:
        """The report of one worker more."""
        self._reports.append(WorkerReport(name))
        return self._reports[-1]

    def hear(self, report: WorkerReport, what: str, *more: Any) -> None:
        """Take one message of a worker."""
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
        """The worker has ended or died: what it had under way waits."""
        for job_id in sorted(report.jobs):
            self._progress.phase(job_id, "waiting")
        report.jobs.clear()

    def merge(self) -> SharedRun:
        """What all came to. Raises the first RunnerError of a worker where none of them began its jobs."""
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
        else:  # it looked at the job, which another worker has
            return
        self._progress.phase(job_id, phase)

    def _finish(self, report: WorkerReport, line: JobLine) -> None:
        report.jobs.discard(line.id)
        report.finished += 1
        self._lines.append(line)
        if line.id not in self._finished:  # a job that one has rendered is skipped by all others
            self._finished.add(line.id)
            self._progress.finished(line)

    def _write_event(self, report: WorkerReport, level: str, event: dict[str, Any]) -> None:
        if event.get("event") in SAID_ONCE:
            said = str(event["event"]), str(event.get("job"))
            if said in self._said:
                return
            self._said.add(said)
        name = event.pop("event", "")
        getattr(self._log, level)(name, **event | {self._field: report.name})


def merge_lines(job_ids: Sequence[str], lines: Iterable[JobLine]) -> list[JobLine]:
    """One line a job, in the order of `job_ids`: succeeded goes over failed, skipped and not_run, in this order.

    Of two lines of one status the one with more attempts counts, else the first. Ids that `job_ids` lacks come last.
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
    """The exit code of a run from its merged lines and the exit codes of its workers, None for one that was killed.

    Where every job has an end it follows from the lines alone, whatever became of a worker.
    """
    if all(line.status != "not_run" for line in lines):
        return exit_code_of_lines(lines)
    ended = [DIED if code is None else code for code in codes]
    return next((code for code in FIRST_CODES if code in ended), DIED)

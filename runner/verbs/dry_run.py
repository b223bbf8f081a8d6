"""Dry run: decides, as `run` does, what it would do with each job, and why.

In:   jobs, an engine that is not loaded, the output storage. Out: one line and one `Action` per job.
Never: leases, loading, writing.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

from runner.batch.ledger import Decision, Ledger
from runner.batch.survey import Identified, decide_jobs, make_surveyor
from runner.errors import JobCrashed, RunnerError
from runner.records.output_layout import JOBS
from runner.records.record import ErrorRecord, JobLine
from runner.spec.manifest import Job

__all__ = ["Action", "decide_lines"]

Action = Literal["run", "skip", "leased", "exhausted", "fail"]


def decide_lines(
    jobs: Sequence[Job], engine: Identified, ledger: Ledger, input_roots: Sequence[str]
) -> list[tuple[JobLine, Action]]:
    """Return for each job, in order, its line and what `run` would do with it now. Jobs are checked in parallel.

    A line is `not_run` for a job that would run or that another runner has, `skipped` for one that is done, `failed`
    for one that has used all attempts or whose inputs cannot be used. Raises errors that would stop the run:
    ConfigInvalid, WeightsMissing, WeightsCorrupt; storage.*.
    """
    storage = ledger.storage
    storage.use_own_clock()
    next(storage.list(JOBS), None)  # raises once for an unreachable store, not once per job
    decide = make_surveyor(engine, ledger, input_roots)
    return [_line(job, found) for job, found in zip(jobs, decide_jobs(jobs, storage, decide), strict=True)]


def _line(job: Job, found: Decision | RunnerError) -> tuple[JobLine, Action]:
    if isinstance(found, RunnerError):
        if found.stops_run:
            raise found
        error = ErrorRecord.of(found, "prepare")
        return JobLine(id=job.id, status="failed", reason="its inputs cannot be used", error=error), "fail"
    reason, attempt = found.reason, found.attempt
    if found.action == "skip":
        return JobLine(id=job.id, status="skipped", reason=reason, attempt=attempt), "skip"
    if found.action == "exhausted":
        last = found.error or ErrorRecord.of(JobCrashed(reason, where=job.id), "generate")
        error = last.model_copy(update={"retryable": False})  # the same command would not try it again
        return JobLine(id=job.id, status="failed", reason=reason, attempt=attempt, error=error), "exhausted"
    return JobLine(id=job.id, status="not_run", reason=reason, attempt=attempt), found.action

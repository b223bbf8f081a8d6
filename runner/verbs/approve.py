"""Approve: accepts a night's renders as the baseline of later nights.

In:   an output storage, a baseline, a reason. Out: one `ApproveRow` per job. Never: printing; comparing renders.
"""

from __future__ import annotations

import getpass
import os
import platform
from collections.abc import Collection, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, replace
from typing import Literal

from runner.batch.scratch import scratch_folder
from runner.errors import ConfigInvalid
from runner.records.events import default_logging
from runner.regression.approving import ApprovalRequest, Approved, Refused
from runner.regression.baseline import Baseline, BaselineJob
from runner.regression.baseline_layout import JobName, name_job
from runner.storage import open_storage, probe_writable
from runner.verbs.selection import fits
from runner.verbs.settings import ApproveSettings
from runner.verbs.status import StatusRow, read_jobs

__all__ = ["ApproveRow", "approve", "default_approver", "missing_jobs"]

COPIES_AT_ONCE = 4


@dataclass(frozen=True)
class ApproveRow:
    """The result for one job. `detail`: the approval in force, or why it was refused."""

    id: str
    action: Literal["approved", "unchanged", "removed", "refused"]
    detail: str
    notes: tuple[str, ...] = ()


@default_logging()
def approve(settings: ApproveSettings) -> list[ApproveRow]:
    """The verb `approve`. Return one row per job, by id.

    A job of `out` that failed or is running is refused. With `missing`, a job of the baseline that `out` does not have
    is removed from the baseline. Raises ConfigInvalid if no job fits; InputUnreadable; storage.*.
    """
    out, storage = open_storage(settings.out), open_storage(settings.baseline)
    jobs = read_jobs(out)
    chosen = [row for row in jobs.rows if fits(row.id, settings.job)]
    request = ApprovalRequest(
        settings.who or default_approver(), settings.why, as_of=settings.as_of, replace_newer=settings.replace_newer
    )
    probe_writable(storage)
    with scratch_folder(settings.cache) as scratch:
        baseline = Baseline(storage, scratch=scratch)
        records = jobs.records.values()
        leaving = []
        if settings.missing:
            places = [name_job(record) for record in records if record.status == "succeeded"]
            standing = baseline.find(places)
            gone = missing_jobs(baseline, places, standing, [row.id for row in jobs.rows])
            leaving = [job.name for job in gone if fits(job.name.job_id, settings.job)]
        if not chosen and not leaving:
            raise ConfigInvalid(
                f"has no job that fits {' or '.join(settings.job)}" if settings.job else "has no job",
                where=out.root,
                todo="`video-lab status` lists the jobs",
            )

        def accept(row: StatusRow) -> ApproveRow:
            record = jobs.records.get(row.id)
            if row.status != "succeeded" or record is None:
                return ApproveRow(row.id, "refused", f"{row.status}: {row.reason}")
            return _row(row.id, baseline.approve(out, record, request), "approved")

        with ThreadPoolExecutor(COPIES_AT_ONCE) as pool:
            rows = list(pool.map(accept, chosen))
        run_id = max((record.finished_at, record.run_id) for record in records)[1] if records else ""
        for name in leaving:
            removed = baseline.approve_removal(name, replace(request, run_id=run_id))
            rows.append(_row(name.job_id, removed, "removed"))
    return sorted(rows, key=lambda row: row.id)


def missing_jobs(
    baseline: Baseline, night: Sequence[JobName], found: Mapping[JobName, BaselineJob], known: Collection[str]
) -> list[BaselineJob]:
    """Return the jobs of the baseline that the night lacks: their ids are not in `known`.

    night: the jobs that succeeded; found: their baseline renders. The baseline of the night's device is used; if it has
    none, those of the devices in `found`. Raises as `Baseline.jobs` does.
    """
    missing: dict[str, BaselineJob] = {}
    for device, recipe in dict.fromkeys((name.device, name.recipe) for name in night):
        devices = {job.name.device for job in found.values() if job.name.recipe == recipe}
        jobs = baseline.jobs(device, recipe, without=known)
        if not jobs and device not in devices:
            jobs = [job for other in sorted(devices) for job in baseline.jobs(other, recipe, without=known)]
        for job in jobs:
            missing.setdefault(job.name.job_id, job)
    return list(missing.values())


def default_approver() -> str:
    """Return USER@HOST; the user's number if the user has no name."""
    name = str(os.getuid())
    with suppress(OSError, KeyError):
        name = getpass.getuser()
    return f"{name}@{platform.node() or 'unknown'}"


def _row(job_id: str, found: Approved | Refused, done: Literal["approved", "removed"]) -> ApproveRow:
    if isinstance(found, Refused):
        return ApproveRow(job_id, "refused", found.why)
    action: Literal["approved", "unchanged", "removed", "refused"] = "unchanged" if found.unchanged else done
    return ApproveRow(job_id, action, found.approval.sentence(), found.notes)

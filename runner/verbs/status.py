"""Status: how far a run has come, read from the output folder alone.

In:   an output storage. Out: a `RunStatus`: one `StatusRow` a job of the run's manifest, which the run keeps beside its
summaries, and one for each other job that has a record or a mark. Never: inputs, so that a job whose inputs alone have
changed since it was rendered counts as done until a run reads them.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Literal

from pydantic import BaseModel, ConfigDict

from runner.batch.fingerprint import settings_digest
from runner.batch.lease import Sighting
from runner.batch.ledger import Ledger
from runner.batch.run_jobs import newest_run, read_run_jobs
from runner.errors import ConfigInvalid
from runner.records.events import default_logging
from runner.records.output_layout import ATTEMPT, JOBS, RESULT, split_job_key
from runner.records.record import ResultRecord, RunJobsRecord
from runner.storage import Storage, open_storage
from runner.verbs.settings import StatusSettings

__all__ = ["RunStatus", "StatusRow", "read_jobs", "read_run_status", "status"]

READS_AT_ONCE = 32
STATES = ("succeeded", "failed", "running", "lost", "pending")


class StatusRow(BaseModel):
    model_config = ConfigDict(frozen=True)

    id: str
    status: Literal["succeeded", "failed", "running", "lost", "pending"]
    detail: str  # why, in words; of a job that is done what its output is
    attempt: int = 0
    seconds: float | None = None
    output: str | None = None
    finished_at: str | None = None
    host: str | None = None  # of a job that is running or lost
    heard_s: float | None = None  # seconds since its runner was last heard of
    warnings: tuple[str, ...] = ()
    listed: bool = True  # whether the run's manifest has the job


@dataclass(frozen=True)
class RunStatus:
    """How far a run has come.

    run_id, manifest: of the run whose jobs are counted; None where no run has kept its jobs: then all that are there
    are. rows: in the manifest's order, then the jobs that it has not. records: of the jobs that have one.
    """

    out: str
    run_id: str | None
    manifest: str | None
    rows: tuple[StatusRow, ...]
    records: Mapping[str, ResultRecord]

    @property
    def counts(self) -> dict[str, int]:
        """Jobs of the manifest by status, and their total."""
        found = Counter[str](row.status for row in self.rows if row.listed)
        return {"total": sum(found.values())} | {name: found[name] for name in STATES}

    @property
    def exit_code(self) -> int:
        """3 if a job of the manifest is still to be done, else 1 if one has failed, else 0."""
        found = self.counts
        if found["running"] or found["lost"] or found["pending"]:
            return 3
        return 1 if found["failed"] else 0


@default_logging()
def status(settings: StatusSettings) -> RunStatus:
    """The verb `status`. Raises ConfigInvalid, storage.*."""
    return read_run_status(open_storage(settings.out))


def read_run_status(storage: Storage, run_id: str | None = None) -> RunStatus:
    """The status of one run, by default of the one that began last.

    `running`: a runner holds the job's lease. `lost`: its runner is not heard of any more, or its process has ended; a
    rerun takes the job over. `pending`: it has not begun, or its settings have changed since. Raises ConfigInvalid
    where nothing at all lies, or no such run; storage.*.
    """
    found = dict(_read_all(storage))
    chosen = newest_run(storage) if run_id is None else run_id
    kept = None if chosen is None else read_run_jobs(storage, chosen)
    if run_id is not None and kept is None:
        raise ConfigInvalid(
            f"no run {run_id} has kept its jobs", where=storage.root, todo="Leave --run out for the newest one"
        )
    records = {job_id: record for job_id, (_, record) in found.items() if record is not None}
    if kept is None:
        rows = [row for row, _ in found.values()]
    else:
        rows = [
            _listed_row(job_id, digest, kept, *found.get(job_id, (None, None))) for job_id, digest in kept.jobs.items()
        ]
        rows += [row.model_copy(update={"listed": False}) for row, _ in found.values() if row.id not in kept.jobs]
    return RunStatus(storage.root, kept.run_id if kept else None, kept.manifest if kept else None, tuple(rows), records)


def read_jobs(storage: Storage) -> list[tuple[StatusRow, ResultRecord | None]]:
    """What lies there of every job that has a record or a mark, by id, whatever the manifests say: its row and its
    record, where it has one. Raises as `read_run_status` does."""
    return [both for _, both in _read_all(storage)]


def _read_all(storage: Storage) -> list[tuple[str, tuple[StatusRow, ResultRecord | None]]]:
    if next(storage.list(), None) is None:
        raise ConfigInvalid("holds nothing", where=storage.root, todo="Name the folder that was given to --out")
    keys = (split_job_key(info.key) for info in storage.list(JOBS))
    ids = sorted({names[0] for names in keys if names is not None and names[1] in (RESULT, ATTEMPT)})
    ledger = Ledger(storage)
    with ThreadPoolExecutor(READS_AT_ONCE) as pool:
        found = pool.map(lambda job_id: (ledger.leases.look(job_id), ledger.result(job_id)), ids)
        rows = [(_row(job_id, *both), both[1]) for job_id, both in zip(ids, found, strict=True)]
    return [(row.id, (row, record)) for row, record in rows if row is not None]


def _listed_row(
    job_id: str, digest: str | None, run: RunJobsRecord, row: StatusRow | None, record: ResultRecord | None
) -> StatusRow:
    """The row of a job of the run's manifest: what lies there counts if it was made with the settings of the run."""
    if row is None:
        return StatusRow(id=job_id, status="pending", detail="not begun")
    if row.status in ("running", "lost") or record is None:
        return row
    changed = digest is not None and digest != settings_digest(record.fingerprint_parts)
    if changed or (run.force and record.run_id != run.run_id):
        why = "its settings have changed since" if changed else f"rendered anew by run {run.run_id}"
        return StatusRow(id=job_id, status="pending", detail=f"{why}: {row.status} at {row.finished_at}")
    return row


def _row(job_id: str, sighting: Sighting, record: ResultRecord | None) -> StatusRow | None:
    mark = sighting.mark
    if mark is not None and mark.error is None:
        kept = f", {mark.segments_done} segments finished" if mark.segments_done else ""
        where = {"attempt": mark.attempt, "host": mark.host, "heard_s": round(sighting.age_s, 1)}
        if sighting.live:
            detail = f"{mark.stage} since {mark.started_at}{kept}"
            return StatusRow(id=job_id, status="running", detail=detail, **where)
        why = "its process has ended" if sighting.gone else "its runner is not heard of any more"
        detail = f"{why}: {mark.stage} since {mark.started_at}{kept}; a rerun takes it over"
        return StatusRow(id=job_id, status="lost", detail=detail, **where)
    if mark is not None and mark.error is not None:
        detail = f"{mark.error.code}: {mark.error.message}"
        if record is not None and record.output is not None:
            detail += f"; an older output stands: {record.output.uri}"
        return StatusRow(id=job_id, status="failed", detail=detail, attempt=mark.attempt, finished_at=mark.finished_at)
    if record is None:
        return None
    if record.error is not None:
        detail = f"{record.error.code}: {record.error.message}"
    else:
        output = record.output
        detail = f"{output.frames} frames {output.width}x{output.height} at {output.fps} fps" if output else ""
    return StatusRow(
        id=job_id,
        status=record.status,
        detail=detail,
        attempt=record.attempt,
        seconds=round(sum(record.timings_s.values()), 3),
        output=record.output.uri if record.output else None,
        finished_at=record.finished_at,
        warnings=tuple(record.warnings),
    )

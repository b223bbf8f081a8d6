"""Status: what an output folder holds, read from its records alone.

In:   an output storage. Out: one `StatusRow` a job that has a record or a mark. Never: a manifest; a job that was never
begun leaves nothing to read.
"""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from typing import Literal

from pydantic import BaseModel, ConfigDict

from runner.batch.lease import Sighting
from runner.batch.ledger import Ledger
from runner.errors import ConfigInvalid
from runner.records.events import default_logging
from runner.records.output_layout import ATTEMPT, JOBS, RESULT, split_job_key
from runner.records.record import ResultRecord
from runner.storage import Storage, open_storage
from runner.verbs.settings import StatusSettings

__all__ = ["StatusRow", "read_jobs", "read_status", "status"]

READS_AT_ONCE = 16


class StatusRow(BaseModel):
    model_config = ConfigDict(frozen=True)

    id: str
    status: Literal["succeeded", "failed", "running", "lost"]
    detail: str
    attempt: int
    seconds: float | None = None
    output: str | None = None
    finished_at: str | None = None


@default_logging()
def status(settings: StatusSettings) -> list[StatusRow]:
    """The verb `status`: one row a job, by id. Raises ConfigInvalid, storage.*."""
    return read_status(open_storage(settings.out))


def read_status(storage: Storage) -> list[StatusRow]:
    """One row a job, by id. `running`: a runner holds its lease. `lost`: its runner is not heard of any more, or its
    process has ended; a rerun takes the job over.

    Raises ConfigInvalid where nothing at all lies: no run has written there, or the path is mistyped; storage.*.
    """
    return [row for row, _ in read_jobs(storage)]


def read_jobs(storage: Storage) -> list[tuple[StatusRow, ResultRecord | None]]:
    """The rows of `read_status`, each with the job's record, where it has one."""
    if next(storage.list(), None) is None:
        raise ConfigInvalid("holds nothing", where=storage.root, todo="Name the folder that was given to --out")
    keys = (split_job_key(info.key) for info in storage.list(JOBS))
    ids = sorted({names[0] for names in keys if names is not None and names[1] in (RESULT, ATTEMPT)})
    ledger = Ledger(storage)
    with ThreadPoolExecutor(READS_AT_ONCE) as pool:
        found = pool.map(lambda job_id: (ledger.leases.look(job_id), ledger.result(job_id)), ids)
        rows = [(_row(job_id, *both), both[1]) for job_id, both in zip(ids, found, strict=True)]
    return [(row, record) for row, record in rows if row is not None]


def _row(job_id: str, sighting: Sighting, record: ResultRecord | None) -> StatusRow | None:
    mark = sighting.mark
    if mark is not None and mark.error is None:
        kept = f", {mark.segments_done} segments finished" if mark.segments_done else ""
        if sighting.live:
            detail = f"running on {mark.host}, {sighting.heard}: {mark.stage} since {mark.started_at}{kept}"
            return StatusRow(id=job_id, status="running", detail=detail, attempt=mark.attempt)
        why = "its process has ended" if sighting.gone else f"last {sighting.heard}"
        detail = f"lost on {mark.host}, {why}: {mark.stage} since {mark.started_at}{kept}; a rerun takes it over"
        return StatusRow(id=job_id, status="lost", detail=detail, attempt=mark.attempt)
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
    )

"""Status: reads the progress of a run from its output folder alone.

In:   an output storage. Out: a `RunStatus`: one `StatusRow` per job of the run's manifest, which the run keeps beside
its summaries, and one per other job that has a record or a mark. Never: inputs. So a job counts as done even if its
inputs have changed since; a later run reads the inputs and finds that.

Each look lists the output folder once. It reads only the records and marks that are new or changed since the last look.
"""

from __future__ import annotations

import gc
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict

from runner.batch.fingerprint import settings_digest
from runner.batch.lease import Leases, Sighting
from runner.batch.ledger import output_key_wrong, parse_record
from runner.batch.run_jobs import list_runs, read_run_jobs
from runner.errors import ConfigInvalid, InputError, first_few
from runner.records.events import default_logging
from runner.records.output_layout import ATTEMPT, FRAMES, JOBS, OUTPUT, RESULT, job_key, split_job_key
from runner.records.record import AttemptMark, ErrorRecord, OutputRecord, ResultRecord, RunJobsRecord
from runner.storage import ObjectInfo, Storage, open_storage
from runner.timing import unix_time
from runner.verbs.flag_values import parse_age
from runner.verbs.settings import StatusSettings
from runner.verbs.status_watch import RunUnknown, wait_for_end

__all__ = ["RunStatus", "SeenMark", "StatusReader", "StatusRow", "read_jobs", "read_run_status", "status"]

READS_AT_ONCE = 16
GC_THRESHOLD = 100_000  # objects
STATES = ("succeeded", "failed", "running", "lost", "pending")
RATE_JOBS = 50  # the rate is computed from this many last jobs: it shows a stall in minutes, but not one slow job
RUNS_NAMED = 10
NOTHING = Sighting(None, None)  # no lease


@dataclass(frozen=True)
class SeenMark:
    """The mark of a job that is running or lost."""

    mark: AttemptMark
    heard_at: float  # time of its last renewal, seconds since 1970


class StatusRow(BaseModel):
    """One job. `output` and `film` describe the existing output, also if the job will be rendered again."""

    model_config = ConfigDict(frozen=True)

    id: str
    status: Literal["succeeded", "failed", "running", "lost", "pending"]
    reason: str = ""  # why it has this status, in words; empty for a job that is done
    code: str | None = None  # of the error that it failed with
    attempt: int = 0
    seconds: float | None = None
    output: str | None = None
    film: str = ""  # `81 frames 480x832 at 16 fps`
    run_id: str | None = None  # of the run that the record or the mark is from
    started_at: str | None = None
    finished_at: str | None = None
    stage: str | None = None  # of a job that is running or lost, as the next two
    host: str | None = None
    heard_s: float | None = None  # seconds since its runner's last report
    warnings: tuple[str, ...] = ()
    listed: bool = True  # whether the run's manifest has the job


@dataclass(frozen=True)
class RunStatus:
    """The progress of a run.

    run_id, manifest: of the run whose jobs are counted; None if no run has written its list of jobs: then all jobs of
    the folder are counted. rows: in the manifest's order, then jobs outside the manifest. records: of the jobs that
    have one. read_at: seconds since 1970. marks: of the jobs that are running or lost.
    """

    out: str
    run_id: str | None
    manifest: str | None
    rows: tuple[StatusRow, ...]
    records: Mapping[str, ResultRecord]
    read_at: float = 0.0
    marks: Mapping[str, SeenMark] = field(default_factory=dict)

    @property
    def counts(self) -> dict[str, int]:
        """Jobs of the manifest by status, their total, and how many of them have warnings."""
        found = Counter[str](row.status for row in self.rows if row.listed)
        warned = sum(bool(row.warnings) for row in self.rows if row.listed)
        return {"total": sum(found.values())} | {name: found[name] for name in STATES} | {"with_warnings": warned}

    @property
    def other_counts(self) -> dict[str, int]:
        """Number of jobs outside the manifest, by status."""
        found = Counter[str](row.status for row in self.rows if not row.listed)
        return {name: found[name] for name in STATES}

    @property
    def left(self) -> int:
        """Jobs of the manifest that have not ended."""
        found = self.counts
        return found["running"] + found["lost"] + found["pending"]

    @property
    def exit_code(self) -> int:
        """3 if a job of the manifest has not ended, else 1 if one has failed, else 0."""
        if self.left:
            return 3
        return 1 if self.counts["failed"] else 0

    @property
    def rate_per_hour(self) -> float | None:
        """Jobs per hour of this run on all hosts, from the last RATE_JOBS ended jobs until now.

        Jobs that were done before the run do not count. None if no job has ended in this run.
        """
        ended = sorted(
            (_seconds_of(row.finished_at), _seconds_of(row.started_at or row.finished_at))
            for row in self.rows
            if row.listed and row.finished_at and row.run_id == self.run_id and row.status in ("succeeded", "failed")
        )
        if not ended or self.run_id is None:
            return None
        last = ended[-RATE_JOBS:]
        # The time before the first end counts too: from the end of the job before it, else from the run's first start.
        begin = ended[-RATE_JOBS - 1][0] if len(ended) > RATE_JOBS else min(started for _, started in ended)
        return 3600 * len(last) / max(1.0, self.read_at - begin)

    @property
    def eta_s(self) -> float | None:
        """Seconds until all jobs of the manifest have ended, at this rate; None without a rate or a running job."""
        rate = self.rate_per_hour
        return 3600 * self.left / rate if rate and self.counts["running"] else None

    def to_json(self) -> dict[str, Any]:
        """Return the object that `status --json` prints."""
        rate, eta = self.rate_per_hour, self.eta_s
        return {
            "out": self.out,
            "run_id": self.run_id,
            "manifest": self.manifest,
            "counts": self.counts,
            "rate_per_hour": None if rate is None else round(rate, 3),
            "eta_s": None if eta is None else round(eta, 1),
            "exit_code": self.exit_code,
            "jobs": [row.model_dump(mode="json") for row in self.rows],
        }


@default_logging()
def status(settings: StatusSettings, show: Callable[[RunStatus], None] | None = None) -> RunStatus:
    """The verb `status`. With `wait` or `watch` it returns when no job is left, or after `timeout`.

    It also waits for a named run that has not written its list of jobs yet. `show` is called with the status of each
    look. Raises ConfigInvalid, storage.*.
    """
    reader = StatusReader(open_storage(settings.out), settings.run)
    if not (settings.wait or settings.watch):
        return reader.read()
    timeout_s = None if settings.timeout is None else parse_age(settings.timeout)
    return wait_for_end(reader.read, every_s=settings.every, timeout_s=timeout_s, show=show)


def read_run_status(storage: Storage, run_id: str | None = None) -> RunStatus:
    """Return the status of one look."""
    return StatusReader(storage, run_id).read()


def read_jobs(storage: Storage) -> RunStatus:
    """Return every job that has a record or a mark, by id. Manifests and outputs are not read.

    Raises ConfigInvalid if the storage is empty; storage.*.
    """
    return StatusReader(storage).read_all()


# -- reading -----------------------------------------------------------------------------------------------------------


@dataclass
class _Found:
    """The contents of one job's folder."""

    sighting: Sighting = NOTHING
    looked_at: float = 0.0  # time of the sighting, by the reader's timer
    record: ResultRecord | None = None
    digest: str = ""  # of the settings that the record was made with
    damaged: bool = False  # the record's file exists but is no valid record
    outputs: dict[str, tuple[int, int, str | None]] = field(default_factory=dict)  # key → (bytes, files, identity)


@dataclass
class _Copy:
    """The content of one key whose entry in the listing was `entry`."""

    entry: tuple[int, float, str | None]
    read: Future[Any]  # of a _RecordFile or a _MarkFile

    @property
    def is_read(self) -> bool:
        return self.read.done() and not self.read.cancelled() and self.read.exception() is None


@dataclass(frozen=True)
class _RecordFile:
    """A result.json. `there`: whether the file existed when it was read."""

    there: bool
    record: ResultRecord | None = None
    digest: str = ""


@dataclass(frozen=True)
class _MarkFile:
    """An attempt.json."""

    sighting: Sighting
    read_at: float  # by the reader's timer


class StatusReader:
    """Reads the progress of a run at each call of `read`. For one thread only.

    run_id: None for the run that began last, chosen at each look. clock: seconds since 1970. timer: monotonic seconds.
    """

    def __init__(
        self,
        storage: Storage,
        run_id: str | None = None,
        *,
        clock: Callable[[], float] = time.time,
        timer: Callable[[], float] = time.monotonic,
    ) -> None:
        self._storage, self._run_id, self._clock, self._timer = storage, run_id, clock, timer
        self._leases = Leases(storage)
        self._copies: dict[str, _Copy] = {}
        self._run: tuple[ObjectInfo, RunJobsRecord | None] | None = None
        self._listed_at = 0.0  # start of the last listing, by the timer

    def read(self) -> RunStatus:
        """Return the status now.

        `running`: a runner holds the job's lease. `lost`: its runner has stopped renewing the lease, or its process has
        ended; a rerun takes the job over. `pending`: the job has not begun, its settings have changed since, or its
        output is gone. Raises ConfigInvalid if the storage is empty or has no such run; storage.*.
        """
        with _reading() as pool:
            run = pool.submit(self._read_run)
            found = self._read_found(pool)
            kept = run.result()
            wrong = {
                job_id: pool.submit(self._output_wrong, job_id, job.record.output)
                for job_id, job in found.items()
                if job.record is not None
                and job.record.status == "succeeded"
                and not self._is_listed(job, job.record.output)
            }
            problems = {job_id: problem.result() for job_id, problem in wrong.items()}
        if not found and kept is None:
            self._require_something()
        own = {job_id: _row(job_id, job.sighting, job.record, problems.get(job_id)) for job_id, job in found.items()}
        if kept is None:
            rows = [row for _, row in sorted(own.items()) if row is not None]
        else:
            rows = [_listed_row(job_id, digest, kept, own, found) for job_id, digest in kept.jobs.items()]
            others = [row for job_id, row in sorted(own.items()) if row is not None and job_id not in kept.jobs]
            rows += [row.model_copy(update={"listed": False}) for row in others]
        return self._status(kept, rows, found)

    def read_all(self) -> RunStatus:
        """Return the status as `read_jobs` does."""
        with _reading() as pool:
            found = self._read_found(pool)
        if not found:
            self._require_something()
        rows = (_row(job_id, job.sighting, job.record) for job_id, job in sorted(found.items()))
        return self._status(None, [row for row in rows if row is not None], found)

    def _status(self, run: RunJobsRecord | None, rows: Sequence[StatusRow], found: Mapping[str, _Found]) -> RunStatus:
        now, timer = self._clock(), self._timer()
        marks = {
            job_id: SeenMark(job.sighting.mark, now - (timer - job.looked_at) - job.sighting.age_s)
            for job_id, job in found.items()
            if job.sighting.mark is not None and job.sighting.mark.error is None
        }
        records = {job_id: job.record for job_id, job in found.items() if job.record is not None}
        run_id, manifest = (None, None) if run is None else (run.run_id, run.manifest)
        return RunStatus(self._storage.root, run_id, manifest, tuple(rows), records, now, marks)

    def _require_something(self) -> None:
        if next(self._storage.list(), None) is None:
            raise ConfigInvalid("is empty", where=self._storage.root, todo="Name the folder that was given to --out")

    def _read_run(self) -> RunJobsRecord | None:
        """Return the list of jobs of the chosen run; None if no run has written one."""
        runs = list_runs(self._storage)
        chosen = self._run_id if self._run_id is not None else next(iter(runs), None)
        if chosen is None:
            return None
        if chosen not in runs:
            names = first_few(list(runs), RUNS_NAMED)
            raise RunUnknown(
                f"there is no list of jobs of run {chosen}; runs with a list: {names or 'none'}",
                where=self._storage.root,
                todo="Name one of them, or leave out --run for the newest one",
            )
        if self._run is None or self._run[0] != runs[chosen]:
            self._run = runs[chosen], read_run_jobs(self._storage, chosen)
        return self._run[1]

    def _read_found(self, pool: ThreadPoolExecutor) -> dict[str, _Found]:
        """List the jobs, and meanwhile read the records and marks that have changed since the last look."""
        self._copies = {key: copy for key, copy in self._copies.items() if copy.is_read}  # else the last look failed
        self._listed_at = self._timer()
        found: dict[str, _Found] = {}
        listed: dict[str, ObjectInfo] = {}
        for info in self._storage.list(JOBS):
            names = split_job_key(info.key)
            if names is None:
                continue
            job_id, name = names
            job = found.get(job_id) or found.setdefault(job_id, _Found())
            if name in (RESULT, ATTEMPT):
                listed[info.key] = info
                self._begin_read(pool, info, name, job_id)
            elif name == OUTPUT:
                job.outputs[info.key] = (info.bytes, 1, info.identity)
            elif name.startswith(FRAMES):  # counted together, by folder
                folder = info.key[: info.key.rindex("/") + 1]
                nbytes, files, _ = job.outputs.get(folder, (0, 0, None))
                job.outputs[folder] = (nbytes + info.bytes, files + 1, None)
        self._copies = {key: copy for key, copy in self._copies.items() if key in listed}
        for job_id, job in found.items():
            self._fill(job_id, job)
        return found

    def _begin_read(self, pool: ThreadPoolExecutor, info: ObjectInfo, name: str, job_id: str) -> None:
        entry = (info.bytes, info.modified, info.identity)
        known = self._copies.get(info.key)
        if known is None or known.entry != entry:
            read = pool.submit(self._read_record if name == RESULT else self._read_mark, job_id)
            self._copies[info.key] = _Copy(entry, read)

    def _fill(self, job_id: str, job: _Found) -> None:
        mark, record = (self._copies.get(job_key(job_id, name)) for name in (ATTEMPT, RESULT))
        sighting, file = NOTHING, _RecordFile(False)
        if mark is not None:
            seen: _MarkFile = mark.read.result()
            # The entry in the listing is unchanged, so the mark was not renewed after it was read.
            job.looked_at = max(self._listed_at, seen.read_at)
            sighting = seen.sighting.later(job.looked_at - seen.read_at)
        if record is not None:
            file = record.read.result()
        if (mark is not None and sighting.version is None) or (record is not None and not file.there):
            # Removed between listing and reading: the job made progress meanwhile, so both are read again.
            sighting, file = self._leases.look(job_id), self._read_record(job_id)
            job.looked_at = self._timer()
        job.sighting, job.record, job.digest = sighting, file.record, file.digest
        job.damaged = file.there and file.record is None

    def _read_mark(self, job_id: str) -> _MarkFile:
        return _MarkFile(self._leases.look(job_id), self._timer())

    def _read_record(self, job_id: str) -> _RecordFile:
        try:
            data = self._storage.read_bytes(job_key(job_id, RESULT))
        except InputError:  # a folder, or something else that cannot be read
            return _RecordFile(True)
        if data is None:
            return _RecordFile(False)
        record = parse_record(data)
        return _RecordFile(True, record, "" if record is None else settings_digest(record.fingerprint_parts))

    def _is_listed(self, job: _Found, output: OutputRecord | None) -> bool:
        """Whether the listing agrees with the record about the output. Files on a disk are not hashed."""
        if output is None:
            return False
        nbytes, files, identity = job.outputs.get(output.key, (-1, 0, None))
        return (nbytes, files) == (output.bytes, output.files) and identity in (None, output.identity)

    def _output_wrong(self, job_id: str, output: OutputRecord | None) -> str | None:
        """Return why the output differs from its record; None if it does not.

        The storage is read again, because the record may be newer than the listing.
        """
        wrong = output_key_wrong(job_id, output)
        if output is None or wrong is not None:
            return wrong
        job = _Found()
        if output.key.endswith("/"):
            there = list(self._storage.list(output.key))
            if there:
                job.outputs[output.key] = (sum(info.bytes for info in there), len(there), None)
        elif (info := self._storage.stat(output.key)) is not None:
            job.outputs[output.key] = (info.bytes, 1, info.identity)
        if self._is_listed(job, output):
            return None
        if not job.outputs:
            return f"the output is gone: {output.key}"
        nbytes, files, _ = job.outputs[output.key]
        if (nbytes, files) == (output.bytes, output.files):
            return f"the output is not what the record says: {output.key} has another ETag"
        return (
            f"the output is not what the record says: {output.key} has {nbytes} bytes in {files} files, "
            f"recorded were {output.bytes} in {output.files}"
        )


@contextmanager
def _reading() -> Iterator[ThreadPoolExecutor]:
    """Return threads for reading. If the block raises, reads that have not begun are cancelled.

    Garbage is collected less often meanwhile. The records of many jobs stay in memory, and checking them repeatedly
    took a tenth of the CPU time (measured with 10,000 jobs).
    """
    threshold = gc.get_threshold()
    gc.set_threshold(max(GC_THRESHOLD, threshold[0]) if threshold[0] else 0, *threshold[1:])
    pool = ThreadPoolExecutor(READS_AT_ONCE, thread_name_prefix="status")
    try:
        yield pool
    finally:
        pool.shutdown(cancel_futures=True)
        gc.set_threshold(*threshold)


# -- rows --------------------------------------------------------------------------------------------------------------


def _listed_row(
    job_id: str,
    digest: str | None,
    run: RunJobsRecord,
    rows: Mapping[str, StatusRow | None],
    found: Mapping[str, _Found],
) -> StatusRow:
    """Return the row of a job of the run's manifest. An existing result counts if its settings are those of the run."""
    row, job = rows.get(job_id), found.get(job_id)
    if row is None or job is None:
        damaged = job is not None and job.damaged
        return StatusRow(id=job_id, status="pending", reason="its record cannot be read" if damaged else "not begun")
    mark, record = job.sighting.mark, job.record
    if row.status not in ("succeeded", "failed") or record is None:
        return row
    if mark is not None and mark.error is not None and mark.fingerprint != record.fingerprint:
        return row  # the failure has other settings than the older record, perhaps those of the run
    changed = digest is not None and digest != job.digest
    if changed or (run.force and row.run_id != run.run_id):
        why = "its settings have changed since" if changed else f"to be rendered again by run {run.run_id}"
        reason = f"{why}: {row.status} at {row.finished_at}"
        return row.model_copy(update={"status": "pending", "reason": reason, "code": None, "warnings": ()})
    return row


def _row(
    job_id: str, sighting: Sighting, record: ResultRecord | None, output_wrong: str | None = None
) -> StatusRow | None:
    """Return the row of a job from its mark and record. `output_wrong`: why a succeeded job's output does not count."""
    mark = sighting.mark
    if mark is not None and mark.error is None:
        kept = f", {mark.segments_done} segments finished" if mark.segments_done else ""
        reason, state = f"{mark.stage} since {mark.started_at}{kept}", "running"
        if not sighting.live:
            why = "its process has ended" if sighting.gone else "its runner has stopped reporting"
            reason, state = f"{why}: {reason}; a rerun takes it over", "lost"
        return StatusRow(
            id=job_id,
            status="running" if state == "running" else "lost",
            reason=reason,
            attempt=mark.attempt,
            run_id=mark.run_id,
            started_at=mark.started_at,
            stage=mark.stage,
            host=mark.host,
            heard_s=round(sighting.age_s, 1),
        )
    if mark is not None and mark.error is not None:
        older = record.output if record is not None else None
        return StatusRow(
            id=job_id,
            status="failed",
            reason=_sentence(mark.error) + ("; an older output is kept" if older else ""),
            code=mark.error.code,
            attempt=mark.attempt,
            output=older.uri if older else None,
            film=_film(older),
            run_id=mark.run_id,
            started_at=mark.started_at,
            finished_at=mark.finished_at,
        )
    if record is None:
        return None
    reason = output_wrong or ("" if record.error is None else _sentence(record.error))
    return StatusRow(
        id=job_id,
        status="pending" if output_wrong else record.status,
        reason=reason,
        code=None if record.error is None else record.error.code,
        attempt=record.attempt,
        seconds=round(sum(record.timings_s.values()), 3),
        output=record.output.uri if record.output and not output_wrong else None,
        film="" if output_wrong else _film(record.output),
        run_id=record.run_id,
        started_at=record.started_at,
        finished_at=record.finished_at,
        warnings=() if output_wrong else tuple(record.warnings),
    )


def _sentence(error: ErrorRecord) -> str:
    return f"{error.code}: {error.message}"


def _film(output: OutputRecord | None) -> str:
    return "" if output is None else f"{output.frames} frames {output.width}x{output.height} at {output.fps} fps"


def _seconds_of(moment: str | None) -> float:
    """Return a record's time as seconds since 1970; 0 if it cannot be parsed."""
    return unix_time(moment or "") or 0.0

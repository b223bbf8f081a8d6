"""Run jobs: keep the list of a run's jobs with the run, so that the remaining jobs can be found later.

In:   jobs of a manifest and their fingerprint parts; an output storage. Out: `runs/<run-id>/jobs.json`.
Never: which jobs are done.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping
from typing import Any

from runner.batch.fingerprint import public_parts, settings_digest
from runner.errors import InputUnreadable, RunnerError
from runner.records.output_layout import RUN_JOBS, RUNS, run_file_key, split_run_key
from runner.records.record import RunJobsRecord
from runner.spec.manifest import Job
from runner.storage import ObjectInfo, Storage

__all__ = ["keep_run_jobs", "list_runs", "read_run_jobs"]


def keep_run_jobs(
    storage: Storage,
    run_id: str,
    jobs: Iterable[Job],
    parts: Callable[[Job], Mapping[str, Any]],
    *,
    manifest: str,
    recipe: str,
    force: bool = False,
) -> None:
    """Write the jobs of the whole manifest into the folder of the run. Every shard writes the same bytes.

    `parts`: returns a job's fingerprint parts without its inputs, see `fingerprint_parts`. An equal file is written
    again too, so that the newest file belongs to the newest run. Raises storage.*.
    """
    kept = {job.id: _digest(job, parts) for job in jobs}
    if kept:
        record = RunJobsRecord(run_id=run_id, manifest=manifest, recipe=recipe, force=force, jobs=kept)
        storage.write_bytes(run_file_key(run_id, RUN_JOBS), record.to_json())


def _digest(job: Job, parts: Callable[[Job], Mapping[str, Any]]) -> str | None:
    try:
        return settings_digest(public_parts(parts(job)))
    except (RunnerError, OSError):  # e.g. its LoRA is missing; the job's own shard reports that
        return None


def list_runs(storage: Storage) -> dict[str, ObjectInfo]:
    """Return the runs that have kept their jobs (run id → the file), the newest first. Raises storage.*."""
    kept = {
        names[0]: info
        for info in storage.list(RUNS)
        if (names := split_run_key(info.key)) is not None and names[1] == RUN_JOBS
    }
    return dict(sorted(kept.items(), key=lambda item: (item[1].modified, item[0]), reverse=True))


def read_run_jobs(storage: Storage, run_id: str) -> RunJobsRecord | None:
    """Return the record that `keep_run_jobs` wrote; None if the run has none.

    Raises InputUnreadable for a damaged file, storage.*.
    """
    key = run_file_key(run_id, RUN_JOBS)
    data = storage.read_bytes(key)
    if data is None:
        return None
    try:
        return RunJobsRecord.model_validate(json.loads(data))
    except ValueError as err:
        raise InputUnreadable(
            f"the jobs of run {run_id} cannot be read: {str(err).splitlines()[0]}",
            where=f"{storage.root.rstrip('/')}/{key}",
            todo="Remove the file, or run the manifest again",
        ) from err

"""Kept limits: the regression limits of each job, from the files of a run or from a manifest.

In:   jobs of a manifest; an output storage. Out: `runs/<run-id>/regression.json`, and limits by job id.
Never: defaults, judging.

`compare` needs no manifest, because `run` writes the limits of all jobs into the folder of its summaries, once per run.
All shards and processes would write the same bytes, so it does not matter which of them is first.
"""

from __future__ import annotations

import json
from collections.abc import Iterable

import pydantic

from runner.errors import InputUnreadable
from runner.records.output_layout import REGRESSION, RUNS, run_file_key, split_run_key
from runner.records.record import LimitsRecord, LimitsRow
from runner.spec.manifest import Job, Manifest
from runner.spec.regression_limits import RegressionLimits
from runner.storage import ObjectInfo, Storage

__all__ = ["keep_limits", "limits_by_job", "limits_of_manifest"]


def keep_limits(storage: Storage, run_id: str, jobs: Iterable[Job]) -> None:
    """Write the limits of `jobs` (the whole manifest) into the folder of the run.

    Writes nothing if no job has a limit and no earlier run kept any. Writes nothing either if the same limits are there
    already, so that the file's time is the time when they were first given. Raises storage.*.
    """
    ids: dict[RegressionLimits, list[str]] = {}
    for job in jobs:
        ids.setdefault(job.regression, []).append(job.id)
    if not ids.keys() - {RegressionLimits()} and not _kept_files(storage):
        return
    rows = [
        LimitsRow(limits=limits.model_dump(mode="json", exclude_none=True), job_ids=found)
        for limits, found in ids.items()
    ]
    key, data = run_file_key(run_id, REGRESSION), LimitsRecord(rows=rows).to_json()
    if storage.read_bytes(key) != data:
        storage.write_bytes(key, data)


def limits_by_job(storage: Storage) -> dict[str, RegressionLimits]:
    """Return job id → its limits, from all runs into this output folder. The newest file with the job counts.

    Files of the same time are ordered by run id. Raises InputUnreadable for a damaged file; storage.*.
    """
    limits: dict[str, RegressionLimits] = {}
    for info in sorted(_kept_files(storage), key=lambda info: (info.modified, info.key)):
        data = storage.read_bytes(info.key)
        if data is not None:  # None: the run was removed meanwhile
            limits |= _parse(data, info.uri)
    return limits


def limits_of_manifest(manifest: Manifest) -> dict[str, RegressionLimits]:
    """Return job id → its limits, for every job of the manifest."""
    return {job.id: job.regression for job in manifest.jobs}


def _kept_files(storage: Storage) -> list[ObjectInfo]:
    return [info for info in storage.list(RUNS) if (split_run_key(info.key) or ("", ""))[1] == REGRESSION]


def _parse(data: bytes, uri: str) -> dict[str, RegressionLimits]:
    found: dict[str, RegressionLimits] = {}
    try:
        for row in LimitsRecord.model_validate(json.loads(data)).rows:
            found |= dict.fromkeys(row.job_ids, RegressionLimits.model_validate(row.limits))
    except (ValueError, pydantic.ValidationError) as err:
        reason = str(err).splitlines()[0]
        raise InputUnreadable(
            f"the kept regression limits cannot be read: {reason}",
            where=uri,
            todo="Remove the file, or pass the manifest with --manifest",
        ) from err
    return found

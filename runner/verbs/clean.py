"""Clean: finds the leftovers of killed processes in an output folder, and removes them.

In:   an output storage, an age. Out: one `CleanRow` per leftover, with what was done to it. Never: outputs, records.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

from runner.batch.ledger import Ledger
from runner.errors import ConfigInvalid, InputNotFound, RunnerError
from runner.records.events import default_logging
from runner.records.output_layout import ATTEMPT, JOBS, is_part, job_key, split_job_key
from runner.storage import Leftover, Storage, open_storage
from runner.verbs.flag_values import AGE_UNITS, parse_age
from runner.verbs.settings import CleanSettings

__all__ = ["CleanRow", "age_text", "clean", "clean_output"]


@dataclass(frozen=True)
class CleanRow:
    """One leftover and what was done to it."""

    leftover: Leftover
    action: Literal["would remove", "removed", "kept", "failed"]
    reason: str  # why it was kept, or could not be removed
    age_s: float
    error: RunnerError | None = None


@default_logging()
def clean(settings: CleanSettings) -> list[CleanRow]:
    """The verb `clean`. A row with an `error` could not be removed. Raises ConfigInvalid, storage.*."""
    storage, age_s = open_storage(settings.out), parse_age(settings.older_than)
    return list(clean_output(storage, age_s, remove=settings.yes, checkpoints=settings.checkpoints))


def clean_output(
    storage: Storage, older_than_s: float, *, remove: bool, checkpoints: bool = False, now: float | None = None
) -> Iterator[CleanRow]:
    """Yield each leftover after it was removed or kept. Without `remove` nothing is removed.

    A leftover is kept if it is younger than `older_than_s` seconds, if a process is writing it, or if its job may run:
    it is below `jobs/<id>/`, a runner has the job's lease, and no file lock shows that its process has ended.
    Without `checkpoints`, finished segments are kept too, because a rerun resumes from them. `now`: seconds since
    1970, for tests.

    Raises ConfigInvalid if the storage is empty, as for a mistyped path; storage.*.
    """
    now = time.time() if now is None else now
    jobs = _Jobs(storage)
    count = 0
    for leftover in _found(storage):
        count += 1
        age = now - leftover.modified
        reason = _reason_to_keep(leftover, age, older_than_s, jobs, checkpoints=checkpoints)
        if reason:
            yield CleanRow(leftover, "kept", reason, age)
        elif not remove:
            yield CleanRow(leftover, "would remove", "", age)
        else:
            yield _removed(storage, leftover, age)
    if not count and next(storage.list(), None) is None:
        raise ConfigInvalid("is empty", where=storage.root, todo="Name the folder that was given to --out")


class _Jobs:
    """Facts of each job, each read once."""

    def __init__(self, storage: Storage) -> None:
        self._ledger = Ledger(storage)
        self._held: dict[str, bool] = {}
        self._done: dict[str, bool] = {}

    def is_held(self, job_id: str) -> bool:
        """Whether a runner may have the job. A mark of version 0.1.0 has no lease time: the job counts as held."""
        if job_id not in self._held:
            seen = self._ledger.leases.look(job_id)
            old = seen.mark is not None and seen.mark.error is None and seen.mark.lease_s is None
            torn = seen.mark is None and seen.version is not None
            self._held[job_id] = seen.live or old or torn
        return self._held[job_id]

    def is_done(self, job_id: str) -> bool:
        """Whether the job has a record of success."""
        if job_id not in self._done:
            record = self._ledger.result(job_id)
            self._done[job_id] = record is not None and record.status == "succeeded"
        return self._done[job_id]


def _found(storage: Storage) -> Iterator[Leftover]:
    try:
        yield from storage.leftovers()
        for info in storage.list(JOBS):
            names = split_job_key(info.key)
            if names is not None and is_part(names[1]):
                yield Leftover(info.uri, info.key, info.bytes, info.modified, "finished segment")
    except InputNotFound as error:  # the bucket itself
        raise ConfigInvalid(error.what, where=storage.root, todo="Name what was given to --out") from error


def _reason_to_keep(leftover: Leftover, age: float, least: float, jobs: _Jobs, *, checkpoints: bool) -> str:
    if age < least:
        return f"younger than {age_text(least)}"
    names = split_job_key(leftover.key)
    if leftover.abandoned or names is None:
        return ""
    job_id, _ = names
    if jobs.is_held(job_id):
        return f"its job may be running: {job_key(job_id, ATTEMPT)} exists"
    if leftover.kind == "finished segment" and not checkpoints and not jobs.is_done(job_id):
        return "a rerun resumes from it; --checkpoints removes it"
    return ""


def _removed(storage: Storage, leftover: Leftover, age: float) -> CleanRow:
    try:
        gone = storage.remove_leftover(leftover)
    except RunnerError as error:
        return CleanRow(leftover, "failed", error.message, age, error)
    if gone:
        return CleanRow(leftover, "removed", "", age)
    return CleanRow(leftover, "kept", "in use, or already gone", age)


def age_text(seconds: float) -> str:
    """Return an age as `parse_age` reads it: 5400 → `90m`."""
    unit = next((unit for unit in "dhm" if seconds and seconds % AGE_UNITS[unit] == 0), "s")
    return f"{seconds / AGE_UNITS[unit]:g}{unit}"

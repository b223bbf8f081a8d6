"""Clean: what killed processes left in an output folder, and its removal.

In:   an output storage, an age. Out: one `CleanRow` a leftover, with what was done about it. Never: outputs, records.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

from runner.batch.ledger import Ledger
from runner.errors import ConfigInvalid, InputNotFound, RunnerError
from runner.records.events import default_logging
from runner.records.output_layout import ATTEMPT, job_key, split_job_key
from runner.storage import Leftover, Storage, open_storage
from runner.verbs.settings import AGE_UNITS, CleanSettings, parse_age

__all__ = ["CleanRow", "age_text", "clean", "clean_output"]


@dataclass(frozen=True)
class CleanRow:
    leftover: Leftover
    action: Literal["would remove", "removed", "kept", "failed"]
    reason: str  # why it was kept, or could not be removed
    age_s: float
    error: RunnerError | None = None


@default_logging()
def clean(settings: CleanSettings) -> list[CleanRow]:
    """The verb `clean`. A row with an `error` could not be removed. Raises ConfigInvalid, storage.*."""
    return list(clean_output(open_storage(settings.out), parse_age(settings.older_than), remove=settings.yes))


def clean_output(
    storage: Storage, older_than_s: float, *, remove: bool, now: float | None = None
) -> Iterator[CleanRow]:
    """Each leftover, after it was dealt with. Without `remove` nothing is removed.

    Kept: what is younger, what a process is writing, and what a running job may hold: below `jobs/<id>/` while that
    job's mark stands, unless the file's lock shows that its process is gone. `now`: seconds since 1970, for tests.
    Raises ConfigInvalid where nothing at all lies: the path is mistyped; storage.*.
    """
    now = time.time() if now is None else now
    marks: dict[str, bool] = {}
    count = 0
    for leftover in _found(storage):
        count += 1
        age = now - leftover.modified
        reason = _reason_to_keep(storage, leftover, age, older_than_s, marks)
        if reason:
            yield CleanRow(leftover, "kept", reason, age)
        elif not remove:
            yield CleanRow(leftover, "would remove", "", age)
        else:
            yield _removed(storage, leftover, age)
    if not count and next(storage.list(), None) is None:
        raise ConfigInvalid("holds nothing", where=storage.root, todo="Name the folder that was given to --out")


def _found(storage: Storage) -> Iterator[Leftover]:
    try:
        yield from storage.leftovers()
    except InputNotFound as error:  # the bucket itself
        raise ConfigInvalid(error.what, where=storage.root, todo="Name what was given to --out") from error


def _reason_to_keep(storage: Storage, leftover: Leftover, age: float, least: float, marks: dict[str, bool]) -> str:
    if age < least:
        return f"younger than {age_text(least)}"
    names = split_job_key(leftover.key)
    if leftover.abandoned or names is None:
        return ""
    job_id, _ = names
    mark = job_key(job_id, ATTEMPT)
    if job_id not in marks:
        attempt = Ledger(storage).attempt(job_id)
        ended = attempt is not None and attempt.error is not None
        marks[job_id] = not ended and storage.exists(mark)
    return f"its job may be running: {mark} stands" if marks[job_id] else ""


def _removed(storage: Storage, leftover: Leftover, age: float) -> CleanRow:
    try:
        gone = storage.remove_leftover(leftover)
    except RunnerError as error:
        return CleanRow(leftover, "failed", error.message, age, error)
    return CleanRow(leftover, "removed", "", age) if gone else CleanRow(leftover, "kept", "in use, or gone by now", age)


def age_text(seconds: float) -> str:
    """As `parse_age` reads it: 5400 → `90m`."""
    unit = next((unit for unit in "dhm" if seconds and seconds % AGE_UNITS[unit] == 0), "s")
    return f"{seconds / AGE_UNITS[unit]:g}{unit}"

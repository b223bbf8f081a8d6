"""Selection: selects the jobs whose ids fit `--only`, and then the first `--limit` of them.

In:   jobs, globs, a limit. Out: the selected jobs in the manifest's order; ConfigInvalid for a glob that fits no job.
Never: storage, shards, which jobs are done: the same flags select the same jobs at every call.
"""

from __future__ import annotations

import difflib
from collections.abc import Sequence
from fnmatch import fnmatchcase

from runner.errors import ConfigInvalid
from runner.spec.manifest import Job

__all__ = ["fits", "select_jobs"]

NEAR = 3  # most ids that an error message proposes
WILDCARDS = str.maketrans("", "", "*?[]!")


def fits(job_id: str, globs: Sequence[str]) -> bool:
    """Whether one of the globs fits the id (case-sensitive); without globs every job fits."""
    return not globs or any(fnmatchcase(job_id, glob) for glob in globs)


def select_jobs(jobs: Sequence[Job], only: Sequence[str], limit: int | None) -> list[Job]:
    """Return the first `limit` (None: all) of the jobs whose ids fit `only`, in the order of `jobs`.

    Raises ConfigInvalid, which names each glob that fits no job, and the ids nearest to it.
    """
    ids = [job.id for job in jobs]
    wrong = [_no_fit_message(glob, ids) for glob in only if not any(fnmatchcase(job_id, glob) for job_id in ids)]
    if wrong:
        raise ConfigInvalid(
            "; ".join(wrong),
            where="--only",
            todo="Write an id of the manifest or a glob such as 'anna-*'; upper and lower case are different",
        )
    return [job for job in jobs if fits(job.id, only)][:limit]


def _no_fit_message(glob: str, ids: Sequence[str]) -> str:
    bare = glob.translate(WILDCARDS).lower()
    by_lower = {job_id.lower(): job_id for job_id in reversed(ids)}  # of two ids that differ in case, the first
    near = [by_lower[name] for name in difflib.get_close_matches(bare, by_lower, NEAR, cutoff=0.5)]
    hint = f"; did you mean {' or '.join(near)}?" if near else ""
    return f"no job of the manifest fits {glob!r}{hint}"

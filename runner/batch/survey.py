"""Survey: which jobs are done, found for thousands of jobs with few requests, many at a time.

In:   jobs, the output storage, a function that decides one job. Out: decisions in the order of the jobs.
Never: running anything. A job that is not simply done is decided again, with fresh eyes, right before it runs.

An object store is listed once for outputs and marks; then a record costs one request and each distinct input one.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Generator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor

from runner.batch.ledger import Decision, Listing
from runner.errors import RunnerError
from runner.records.output_layout import JOBS, split_job_key
from runner.spec.manifest import Job
from runner.storage import Storage

__all__ = ["survey_jobs"]

AT_ONCE = 32
AHEAD = 8 * AT_ONCE  # decisions that wait to be read
LIST_FROM = 64  # jobs: for fewer, a question a job is cheaper than a list of all that lies there

Decide = Callable[[Job, Listing | None], Decision]


def survey_jobs(jobs: Sequence[Job], storage: Storage, decide: Decide) -> Generator[Decision | None]:
    """For each job, in order, its decision if it is to be skipped, else None. Nothing is raised: None stands for it.

    Closing the iterator ends the survey.
    """
    pool = ThreadPoolExecutor(AT_ONCE, thread_name_prefix="survey")
    waiting: deque[Future[Decision | None]] = deque()
    try:
        listing = _list_outputs(jobs, storage)
        for job in jobs:
            waiting.append(pool.submit(_skipped, job, listing, decide))
            if len(waiting) > AHEAD:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()
    finally:
        pool.shutdown(wait=False, cancel_futures=True)


def _list_outputs(jobs: Sequence[Job], storage: Storage) -> Listing | None:
    """What lies below `jobs/` for these jobs, single frames left out; None where asking for each is as good."""
    if len(jobs) < LIST_FROM or not storage.lists_identities:
        return None
    wanted = {job.id for job in jobs}
    try:
        found = ((split_job_key(info.key), info) for info in storage.list(JOBS))
        return {info.key: info for names, info in found if names and names[0] in wanted and "/" not in names[1]}
    except RunnerError:  # not allowed to list, or the store is away: each job will say so itself
        return None


def _skipped(job: Job, listing: Listing | None, decide: Decide) -> Decision | None:
    try:
        decision = decide(job, listing)
    except Exception:  # the job's own turn raises it again, where it is handled
        return None
    return decision if decision.action == "skip" and not decision.suspect else None

"""Survey: decide what to do with each of thousands of jobs, with few requests, in parallel.

In:   jobs, the output storage, an engine's digests. Out: decisions in the order of the jobs.
Never: running or writing anything. A job that is not done is decided again right before it runs.

An object store is listed once for outputs and marks. After that, each record and each distinct input costs one request.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Generator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import closing
from dataclasses import replace
from typing import Any, Protocol

from runner.batch.fingerprint import fingerprint, fingerprint_parts
from runner.batch.inputs import InputIndex
from runner.batch.ledger import Decision, Ledger, Listing
from runner.errors import RunnerError, as_runner_error
from runner.records.output_layout import JOBS, split_job_key
from runner.records.record import InputRecord
from runner.spec.manifest import Job
from runner.spec.options import JobOptions
from runner.storage import Storage

__all__ = ["Identified", "decide_jobs", "job_parts", "make_surveyor", "survey_jobs"]

AT_ONCE = 32
AHEAD = 8 * AT_ONCE  # most decisions that wait to be read
LIST_FROM = 64  # jobs: for fewer, one request per job is cheaper than a complete listing

Decide = Callable[[Job, Listing | None], Decision]


class Identified(Protocol):
    """The properties of an engine that enter a job's fingerprint."""

    @property
    def identity(self) -> Mapping[str, str]:
        """Digests of the recipe and the weights, by name."""
        ...

    @property
    def effective(self) -> Callable[[JobOptions], JobOptions]:
        """Return options with the recipe's defaults filled in."""
        ...

    @property
    def own(self) -> Callable[[Job], Mapping[str, str]]:
        """Return the digests of what only this job uses, e.g. its LoRAs."""
        ...


def job_parts(
    engine: Identified,
    job: Job,
    inputs: Mapping[str, InputRecord],
    own: Mapping[str, str],
    reader: str | None = None,
) -> dict[str, Any]:
    """Return the parts of the job's fingerprint. `own`: the result of `engine.own`; `reader`: of `find_reader`."""
    effective = replace(job, options=engine.effective(job.options))
    return fingerprint_parts(effective, inputs, {**engine.identity, **own}, reader)


def make_surveyor(engine: Identified, ledger: Ledger, input_roots: Sequence[str]) -> Decide:
    """Return a function that decides one job as the loop does. It raises errors of the job's inputs; storage.*.

    The function reads each distinct input once. Safe from any thread.
    """
    index = InputIndex(ledger.hashes, input_roots)

    def decide(job: Job, listing: Listing | None) -> Decision:
        inputs = index.identify(job)
        parts = job_parts(engine, job, inputs, engine.own(job), index.find_reader(job, inputs))
        return ledger.decide(job.id, fingerprint(parts), parts, listing)

    return decide


def decide_jobs(jobs: Sequence[Job], storage: Storage, decide: Decide) -> Generator[Decision | RunnerError]:
    """Yield each job's decision, in order, or the error that `decide` raised. Closing the iterator ends the survey."""
    pool = ThreadPoolExecutor(AT_ONCE, thread_name_prefix="survey")
    waiting: deque[Future[Decision | RunnerError]] = deque()
    try:
        listing = _list_outputs(jobs, storage)
        for job in jobs:
            waiting.append(pool.submit(_decide, job, listing, decide))
            if len(waiting) > AHEAD:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()
    finally:
        pool.shutdown(wait=False, cancel_futures=True)


def survey_jobs(jobs: Sequence[Job], storage: Storage, decide: Decide) -> Generator[Decision | None]:
    """Yield, for each job in order, its decision if the job is to be skipped, else None; also None for an error.

    Closing the iterator ends the survey.
    """
    with closing(decide_jobs(jobs, storage, decide)) as found:
        for one in found:  # None for an error: it is raised again and handled when the job runs
            yield one if isinstance(one, Decision) and one.action == "skip" and not one.suspect else None


def _list_outputs(jobs: Sequence[Job], storage: Storage) -> Listing | None:
    """List the objects of these jobs below `jobs/`, without single frames; None if requests per job are better."""
    if len(jobs) < LIST_FROM or not storage.lists_identities:
        return None
    job_ids = {job.id for job in jobs}
    try:
        found = ((split_job_key(info.key), info) for info in storage.list(JOBS))
        return {info.key: info for names, info in found if names and names[0] in job_ids and "/" not in names[1]}
    except RunnerError:  # listing is denied, or the store does not answer: the jobs report it
        return None


def _decide(job: Job, listing: Listing | None, decide: Decide) -> Decision | RunnerError:
    try:
        return decide(job, listing)
    except Exception as error:
        return as_runner_error(error, where=job.id)

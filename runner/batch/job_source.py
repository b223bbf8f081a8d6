"""Job source: where the jobs of a batch loop come from.

In:   jobs. Out: one `Todo` at a time, some of them again for another try. Never: how a job runs.

`ShardJobs` is the list of one shard. Another source, e.g. a mailbox that a driver fills while the loop runs, is one
class that implements `JobSource` and is passed to `Batch`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from runner.batch.ledger import Decision
from runner.batch.queues import WorkList
from runner.spec.manifest import Job

__all__ = ["JobSource", "ShardJobs", "Todo"]


@dataclass
class Todo:
    """A job that waits."""

    job: Job
    decision: Decision | None = None  # taken before: another try in this run, or one put off
    tried: tuple[str, ...] = ()  # error codes of its attempts in this run
    looked: bool = False  # it was decided before and put back, as another runner holds it; the survey knows it no more


class JobSource(Protocol):
    """Hands out jobs. Each one taken must be settled or put back. Every method may be called from any thread."""

    @property
    def jobs(self) -> Sequence[Job]:
        """Those known at the start, in the order of `take`: the loop finds out together which of them are done."""
        ...

    def take(self) -> Todo | None:
        """The next job, waiting for one if need be; None when no more will come."""
        ...

    def settle(self) -> None:
        """One job that was taken is over."""
        ...

    def put_back(self, todo: Todo, delay_s: float = 0.0, rank: int = 0) -> bool:
        """One job that was taken shall be tried again, after the others, not before `delay_s`, lower ranks first.

        False if the source is closed and keeps nothing. Either way the job is no longer taken.
        """
        ...

    def wait_taken(self, at_most: int) -> None:
        """Wait until no more than `at_most` jobs are taken and not settled, or the source is closed."""
        ...

    def close(self) -> list[Todo]:
        """Hand out nothing more; what was still waiting."""
        ...


class ShardJobs(WorkList[Todo]):
    """The jobs of one shard, in the order in which they are started. Implements `JobSource`."""

    def __init__(self, jobs: Sequence[Job]) -> None:
        super().__init__(Todo(job) for job in jobs)
        self.jobs = tuple(jobs)

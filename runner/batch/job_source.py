"""Job source: hands the jobs of a run to the batch loop.

In:   jobs. Out: one `Todo` at a time; a job that is put back comes again. Never: how a job runs.

`ShardJobs` is the list of one shard. Another source, e.g. a queue that is filled while the loop runs, is a class that
implements `JobSource` and is passed to `Batch`.
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
    """A job that waits to be run."""

    job: Job
    decision: Decision | None = None  # an earlier decision, if the job was put back
    tried: tuple[str, ...] = ()  # error codes of its attempts in this run
    looked: bool = False  # put back as another runner has it; no longer in the survey


class JobSource(Protocol):
    """Hands out jobs. Each job that is taken must be settled or put back. All methods are safe from any thread."""

    @property
    def jobs(self) -> Sequence[Job]:
        """The jobs known at the start, in the order of `take`. The loop surveys them together (survey.py)."""
        ...

    def take(self) -> Todo | None:
        """Return the next job; wait for one if necessary. None when no more will come."""
        ...

    def settle(self) -> None:
        """Note that one job that was taken needs nothing more of this run."""
        ...

    def put_back(self, todo: Todo, delay_s: float = 0.0, rank: int = 0) -> bool:
        """Put back a job that was taken. It comes again after the others, after `delay_s` at least, lower ranks first.

        False if the source is closed and does not keep the job. In both cases the job no longer counts as taken.
        """
        ...

    def wait_taken(self, at_most: int) -> None:
        """Wait until at most `at_most` jobs are taken and not settled, or until the source is closed."""
        ...

    def close(self) -> list[Todo]:
        """Hand out no more jobs. Return those that were still waiting."""
        ...


class ShardJobs(WorkList[Todo]):
    """The jobs of one shard, in the order in which they are started. Implements `JobSource`."""

    def __init__(self, jobs: Sequence[Job]) -> None:
        super().__init__(Todo(job) for job in jobs)
        self.jobs = tuple(jobs)

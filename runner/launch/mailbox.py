"""Mailbox: the jobs of one worker, sent by a driver while the worker's batch loop runs.

In:   jobs, one at a time, and the end of the jobs. Out: a `JobSource` for the loop.
Never: which worker a job is for (hand_out.py); how a job runs.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from time import monotonic

from runner.batch.job_source import Todo
from runner.batch.queues import WorkList
from runner.spec.manifest import Job

__all__ = ["Mailbox"]


class Mailbox(WorkList[Todo]):
    """Jobs in the order in which they are sent. Implements `JobSource`; thread-safe.

    A job that the loop puts back is taken again when its delay has passed and no job that was sent meanwhile waits.
    After `end` no more jobs may be sent. The loop then ends when all its jobs are settled, including those put back.
    """

    jobs: Sequence[Job] = ()  # empty at the start: each job is decided when it is taken

    def __init__(self, clock: Callable[[], float] = monotonic) -> None:
        super().__init__(clock=clock, ended=False)

    def send(self, job: Job) -> bool:
        """Send the worker a job. Returns False if its loop is stopping: the job stays with the driver.

        Raises ValueError after `end`.
        """
        return self.add(Todo(job))

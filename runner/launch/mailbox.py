"""Mailbox: the jobs of one worker, sent by a driver while the worker's batch loop runs.

In:   jobs, one at a time, and that no more will come. Out: a `JobSource` for the loop.
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
    """Jobs in the order in which they are sent. Implements `JobSource`; safe from any thread.

    A job that the loop puts back comes when its delay has passed and no job waits that was sent meanwhile. `end` says
    that no more will be sent: the loop then ends when all its jobs are settled, those put back among them.
    """

    jobs: Sequence[Job] = ()  # none is known at the start: each is decided when it is taken

    def __init__(self, clock: Callable[[], float] = monotonic) -> None:
        super().__init__(clock=clock, ended=False)

    def send(self, job: Job) -> bool:
        """Hand the worker a job. False if its loop is stopping: the job stays with the driver.

        Raises ValueError after `end`.
        """
        return self.add(Todo(job))

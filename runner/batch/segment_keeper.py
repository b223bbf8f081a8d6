"""Segment keeper: resume jobs: find the segments that an earlier attempt finished, and keep those of this attempt.

In:   tasks of the loop. Out: the segment at which a task starts, its delivery with the segments before that, kept
segments, events and notes about them.
Never: how a segment is stored (job_checkpoint.py) or encoded (delivery.py).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import suppress

from runner.batch.delivery import Delivery
from runner.batch.job_checkpoint import Chain, Checkpoints, Found
from runner.batch.ledger import Ledger
from runner.batch.task import SegmentItem, Task
from runner.errors import InternalError, LeaseLost, RunnerError
from runner.generation.protocol import ResumePoint
from runner.records.events import EventLog

__all__ = ["SegmentKeeper"]

RESUMED = "resumed "  # how a note begins


class SegmentKeeper:
    """Keeps the finished segments of the jobs of one run. Without `checkpoints` it keeps and finds none."""

    def __init__(self, checkpoints: Checkpoints | None, ledger: Ledger, events: EventLog) -> None:
        self._checkpoints, self._ledger, self._events = checkpoints, ledger, events

    def find(self, task: Task, identity: Mapping[str, str]) -> None:
        """Find the segments that an earlier attempt finished. `identity`: the generator's `resume_identity`.

        Nothing is kept for jobs of one segment, and for generators that cannot resume. Raises LeaseLost; storage.*.
        """
        assert task.plan
        task.chain, task.kept = None, Found()
        if self._checkpoints is None or not identity or task.plan.segments < 2:
            return
        task.chain = Chain.of(task.job.id, task.fingerprint, identity, task.plan.segments)
        with task.timer.stage("fetch"):
            task.kept = self._checkpoints.find(task.chain, task.folder / "kept")
        self._note_begin(task)

    def start(self, task: Task, identity: Mapping[str, str], make: Callable[[], Delivery]) -> ResumePoint | None:
        """Open the task's delivery with the finished segments. Return the point where generation starts.

        `identity`: the present `resume_identity`, as the memory mode may have been lowered since preparation. Raises
        the errors of `make`; LeaseLost; storage.*.
        """
        assert task.plan
        if task.chain is not None and not task.chain.fits(identity):
            self.find(task, identity)
        task.delivery = make()
        try:
            for index, packed in enumerate(task.kept.parts):
                task.delivery.restore(index, packed)
        except InternalError as error:
            self.forget(task)
            task.kept = Found(why=error.what)
            self._note_begin(task)
            task.delivery = make()
        self._report_start(task, task.plan.segments)
        return task.kept.point

    def begin_anew(self, task: Task, identity: Mapping[str, str]) -> None:
        """Make the next `start` begin at segment 1, as a segment was made in another way than the kept ones."""
        task.resumed_at = None
        task.notes = [note for note in task.notes if not note.startswith(RESUMED)]
        self.find(task, identity)

    def keep(self, task: Task, item: SegmentItem) -> None:
        """Keep a segment that was written to the delivery. Raises LeaseLost.

        Other errors are reported and do not fail the job: the segment is then kept together with the next one.
        """
        point, chain, delivery = item.segment.resume, task.chain, task.delivery
        if self._checkpoints is None or chain is None or point is None or delivery is None:
            return
        if not chain.fits(item.identity):  # a later attempt could not find out how each segment was made
            task.chain = None
            self.forget(task)
            return
        packed = task.folder / "part.tar"
        try:
            with task.timer.stage("checkpoint"):
                for index in range(self._checkpoints.kept(chain), point.segment):
                    delivery.pack_part(index, packed)
                    self._checkpoints.save_part(chain, packed)
                self._checkpoints.save_state(chain, point, packed)
                self._ledger.note_segments(task.job.id, point.segment)
        except LeaseLost:
            raise
        except RunnerError as error:
            self._events.emit("segment_not_kept", level="warning", job=task.job.id, message=error.message)

    def published(self, task: Task) -> None:
        """Remove the kept segments of a published job if they are on another storage than the output.

        On the output storage the ledger removes them.
        """
        if self._checkpoints is not None and self._checkpoints.storage is not self._ledger.storage:
            self.forget(task)

    def forget(self, task: Task) -> None:
        """Remove the kept segments of a job that is published, or whose segments may be wrong."""
        if self._checkpoints is not None:
            with suppress(RunnerError):  # they only cost space
                self._checkpoints.remove(task.job.id)

    def _note_begin(self, task: Task) -> None:
        done = 0 if task.kept.point is None else task.kept.point.segment
        self._ledger.note_segments(task.job.id, done, before=True)

    def _report_start(self, task: Task, count: int) -> None:
        """Report in the log and in the record where the task starts."""
        point, job_id = task.kept.point, task.job.id
        if point is not None:
            whole = point.segment >= count
            task.resumed_at = point.segment + 1
            task.note(
                RESUMED + (f"after segment {count}/{count}" if whole else f"at segment {point.segment + 1}/{count}")
            )
            self._events.emit("job_resumed", job=job_id, segment=point.segment + 1, segments=count)
        elif task.kept.why:
            task.note(f"began at segment 1/{count}: {task.kept.why}")
            self._events.emit("job_not_resumed", job=job_id, reason=task.kept.why, segments=count)

"""Settlement: how each job ends: published, failed, put back for another try, left to another runner, or given back.

In:   tasks that were generated or have failed. Out: outputs, records, lines of the summary, events; and `fatal`, the
error that no later job would escape. Never: which stage is next, threads: any thread of the loop may call this.
"""

from __future__ import annotations

import shutil
import time
from collections.abc import Callable, Collection, Mapping
from typing import Any, Literal

from runner.batch.job_source import JobSource, Todo
from runner.batch.ledger import Decision, JobTaken, Ledger
from runner.batch.memory_sampler import MemorySampler
from runner.batch.progress import Progress
from runner.batch.segment_keeper import SegmentKeeper
from runner.batch.stop import Stop
from runner.batch.summary import SummaryWriter
from runner.batch.task import Spans, Task
from runner.errors import DeviceLost, InputError, LeaseLost, OutOfMemory, RunnerError, as_runner_error
from runner.records.events import EventLog
from runner.records.record import ErrorRecord, JobLine, ResultRecord
from runner.spec.manifest import Job
from runner.storage import Storage

__all__ = ["Settlement"]

TRIES_IN_ONE_RUN = 3
RETRY_DELAY_S = 2.0  # doubled at each further attempt
LOOK_AGAIN_S = 5.0  # between two looks at a job that another runner has
LAST = 10**9  # rank of such jobs: after all others
# Of the event of a job's end. A rerun of a large manifest would begin with thousands of lines on jobs that are done.
LEVELS: Mapping[str, Literal["debug", "error"]] = {"skipped": "debug", "failed": "error"}


class Settlement:
    """The ends of one run's jobs.

    fatal: what ends the run, None while nothing does. spans: when each stage of the last jobs ran.
    `describe`: the generator's description, empty before it is loaded.
    """

    def __init__(
        self,
        source: JobSource,
        storage: Storage,
        ledger: Ledger,
        summary: SummaryWriter,
        events: EventLog,
        *,
        recipe: str,
        describe: Callable[[], Mapping[str, Any]],
        keeper: SegmentKeeper,
        progress: Progress,
        sampler: MemorySampler,
        stop: Stop,
    ) -> None:
        self.fatal: RunnerError | None = None
        self.spans = Spans()
        self._source, self._storage, self._ledger = source, storage, ledger
        self._summary, self._events, self._progress = summary, events, progress
        self._recipe, self._describe, self._keeper = recipe, describe, keeper
        self._sampler, self._stop = sampler, stop

    def succeed(self, task: Task) -> None:
        """Publish the output, then the record. Raises what publishing raises: then the task has failed."""
        begin = time.monotonic()
        job_id = task.job.id
        assert task.delivery is not None  # a plan has at least one segment
        published = task.delivery.publish(
            self._storage, job_id, lambda local, key: self._ledger.publish(job_id, local, key)
        )
        self.spans.add(job_id, "deliver", begin)
        task.spans["deliver"] = (task.deliver_begin or begin, time.monotonic())
        if published.sound is not None:
            task.note(published.sound.text, warning=published.sound.missing)
        record = self._record(task, status="succeeded", output=published.output)
        standing = self._ledger.succeed(record, task.decision)
        # The job has succeeded, whatever fails from here on.
        self._tidy(job_id, standing, published.keys if standing.run_id == record.run_id else None)
        self._keeper.published(task)
        self.settle(task)
        self._report(
            JobLine(
                id=job_id,
                status="succeeded",
                reason=task.decision.reason,
                attempt=task.decision.attempt,
                output=standing.output.uri if standing.output is not None else None,
                seconds=round(time.monotonic() - task.begin, 3),
                warnings=standing.warnings,
            ),
            standing,
        )

    def fail(self, task: Task, error: RunnerError, stage: str) -> None:
        """Record the failure, or put the job back for another try. `stage`: prepare, generate or deliver."""
        attempt, job = task.decision.attempt, task.job
        if isinstance(self.fatal, DeviceLost) and stage == "prepare" and not isinstance(error, InputError):
            self.give_back(task)  # the device failed under the job that was generating
            return
        if isinstance(error, LeaseLost):
            self._lose(task)
            return
        if self.worth_another_try(task, error):
            delay = RETRY_DELAY_S * 2 ** len(task.tried)
            self._events.emit(
                "job_retry", level="warning", job=job.id, code=error.code, message=error.message, wait_s=delay
            )
            again = self._ledger.another_try(job.id, task.decision, error.code)
            self.close(task)
            self._progress.phase(job.id, "waiting")
            if not self._source.put_back(Todo(job, again, (*task.tried, error.code)), delay):
                self.abandon(job.id)  # the run is ending, and nothing else would remove the mark
            return
        if stage == "deliver" and error.blames_job:  # the finished segments themselves may be wrong
            self._keeper.forget(task)
        self.stop_for(error)
        found = ErrorRecord.of(error, stage)
        record = self._record(task, status="failed", error=found)
        try:
            # Inputs that cannot be read now say nothing against what was made of them before.
            blames_job = error.blames_job and bool(task.inputs)
            if self._ledger.fail(record, task.decision, blames_job=blames_job) == "recorded":
                self.abandon(job.id)
            else:
                self._events.emit("older_output_kept", level="warning", job=job.id, attempt=attempt)
        except LeaseLost:
            self._lose(task)
            return
        except Exception as second:  # the very storage may be what fails
            unstored = as_runner_error(second)
            self._events.emit(
                "record_not_written", level="error", job=job.id, code=unstored.code, message=unstored.message
            )
            self.stop_for(unstored)
        self.settle(task)
        line = JobLine(
            id=job.id,
            status="failed",
            reason=task.decision.reason,
            attempt=attempt,
            seconds=round(time.monotonic() - task.begin, 3),
            error=found,
            warnings=record.warnings,
        )
        self._report(line, record)

    def worth_another_try(self, task: Task, error: RunnerError) -> bool:
        """Whether the job shall run again in this run. Out of memory: once, one memory mode lower."""
        limit = 0 if self._ledger.force else self._ledger.max_attempts
        if not error.retryable or self._stop.draining or self.fatal:
            return False
        if isinstance(error, OutOfMemory):
            return error.code not in task.tried and not 0 < limit <= task.decision.counted + 1
        return len(task.tried) + 1 < min(TRIES_IN_ONE_RUN, limit or TRIES_IN_ONE_RUN)

    def _lose(self, task: Task) -> None:
        """Leave a job to the runner that has taken it over, and look at it again at the end. It was no attempt."""
        self._events.emit("lease_lost", level="warning", job=task.job.id)
        self._ledger.lose(task.job.id)
        self.put_off(task)

    def put_off(self, task: Task) -> None:
        """Look at a job again at the end, as another runner has it."""
        self.close(task)
        self._progress.phase(task.job.id, "waiting")
        self._source.put_back(Todo(task.job, tried=task.tried, looked=True), LOOK_AGAIN_S, rank=LAST)

    def give_back(self, task: Task) -> None:
        """Leave a job that did not run to its end to another run. It was no attempt."""
        if task.job.id in self._ledger.open_attempts:  # else the mark that stands is that of an earlier attempt
            self.abandon(task.job.id)
        self._progress.phase(task.job.id, "waiting")
        self.settle(task)

    def note_span(self, task: Task, stage: str, begin: float) -> None:
        """Note that a thread had the job for `stage` from `begin`, monotonic, until now."""
        self.spans.add(task.job.id, stage, begin)
        task.spans[stage] = (begin, time.monotonic())

    def skip(self, job: Job, decision: Decision) -> None:
        """Count a job that is done already."""
        warnings = decision.previous.warnings if decision.previous is not None else []
        line = JobLine(id=job.id, status="skipped", reason=decision.reason, attempt=decision.attempt, warnings=warnings)
        self._report(line)

    def exhaust(self, task: Task) -> None:
        """Count a job as failed that has been tried as often as allowed."""
        job, decision = task.job, task.decision
        error = decision.error
        if error is None:
            record = self._ledger.crashed(job.id, task.parts, self._summary.run_id, self._recipe, decision)
            error = record.error if record else None
        error = error and error.model_copy(update={"retryable": False})  # the same command would not try it
        self._report(JobLine(id=job.id, status="failed", reason=decision.reason, attempt=decision.attempt, error=error))

    def _tidy(self, job_id: str, record: ResultRecord, published: Collection[str] | None = None) -> None:
        try:
            self._ledger.tidy(job_id, record, published)
        except RunnerError as error:
            self._events.emit("mark_not_removed", level="warning", job=job_id, message=error.message)

    def tidy_lost(self, job_id: str, decision: Decision) -> None:
        """Remove what a process that died left of a job that is done: else it would count as lost for ever."""
        try:
            self._ledger.tidy_lost(job_id, decision)
        except JobTaken:  # by another runner, which does the same
            return
        except RunnerError as error:
            self._events.emit("mark_not_removed", level="warning", job=job_id, message=error.message)

    def settle(self, task: Task) -> None:
        """Close a task whose job needs nothing more of this run."""
        self.close(task)
        self._source.settle()

    def close(self, task: Task) -> None:
        """Release what the attempt holds; its job may run again."""
        if not task.settled:
            left_device = task.spans["generate"][1] if "generate" in task.spans else None
            self._summary.note_work(task.gpu_s, task.identity.get("device", ""), left_device)
        task.settled = True
        if task.delivery is not None:
            task.delivery.abort()
        if task.conditions is not None and not task.generating:
            task.conditions.close()
        shutil.rmtree(task.folder, ignore_errors=True)

    def abandon(self, job_id: str) -> None:
        """Give the lease of a job back, and remove its mark."""
        try:
            self._ledger.abandon(job_id)
        except RunnerError as error:
            self._events.emit("mark_not_removed", level="warning", job=job_id, message=error.message)

    def stop_for(self, error: RunnerError) -> None:
        """Start no more jobs if every later one would meet the same error."""
        if error.stops_run and self.fatal is None:
            self.fatal = error
            self.start_no_more()

    def break_off(self, event: str, error: Exception, where: str) -> None:
        """Start nothing more: what failed is needed by every job."""
        found = self.fatal = as_runner_error(error, where=where)
        self._events.emit(event, level="error", code=found.code, message=found.message)
        self.start_no_more()

    def start_no_more(self) -> None:
        """Let no further job start."""
        for todo in self._source.close():
            if todo.tried:  # it waited for another try, and its mark with it
                self.abandon(todo.job.id)

    def _report(self, line: JobLine, record: ResultRecord | None = None) -> None:
        fields: dict[str, Any] = {"job": line.id}
        if line.status != "succeeded":  # why it ran was said when it began
            fields["reason"] = line.reason
        if line.error is not None:
            fields |= {"code": line.error.code, "message": line.error.message, "stage": line.error.stage}
        if line.seconds is not None:
            fields["seconds"] = line.seconds
        self._events.emit(f"job_{line.status}", level=LEVELS.get(line.status, "info"), **fields)
        self._progress.finished(line)
        try:
            self._summary.add(line, record, None if line.status == "skipped" else self._sampler.rss())
        except RunnerError as error:
            self._events.emit("summary_not_written", level="error", code=error.code, message=error.message)
            self.stop_for(error)

    def _record(self, task: Task, **more: Any) -> ResultRecord:
        return task.record(
            run_id=self._summary.run_id,
            shard=self._summary.shard,
            recipe=self._recipe,
            engine=dict(self._describe()),
            overlapped=self.spans.overlapping(task.job.id, "generate"),
            **more,
        )

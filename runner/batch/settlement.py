"""Settlement: end each job. A job is finished, or returned for a later try; or an error stops the run.

    finished   publish_job, skip_job, fail_job (without another try), fail_exhausted_job
    returned   fail_job (with another try), postpone_job (another runner has it), return_job (left to another run)
    stopped    stop_run, stop_run_for, close_source

In:   tasks that were generated or have failed. Out: outputs, records, lines of the summary, events; and `fatal`, the
error that every later job would meet.
Never: which stage is next, threads. Any thread of the loop may call these methods.
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
from runner.errors import DeviceLost, InputError, InternalError, LeaseLost, OutOfMemory, RunnerError, as_runner_error
from runner.records.events import EventLog
from runner.records.record import ErrorRecord, JobLine, ResultRecord
from runner.spec.manifest import Job
from runner.storage import Storage

__all__ = ["Settlement"]

TRIES_IN_ONE_RUN = 3
RETRY_DELAY_S = 2.0  # doubled at each further attempt
LOOK_AGAIN_S = 5.0  # between two checks of a job that another runner has
LAST = 10**9  # rank of such jobs: after all others
# Log level of a job's end. A rerun of a large manifest would else begin with thousands of lines on finished jobs.
LEVELS: Mapping[str, Literal["debug", "error"]] = {"skipped": "debug", "failed": "error"}


class Settlement:
    """Ends the jobs of one run.

    fatal: the error that stopped the run, None while there is none. spans: when each stage of the last jobs ran.
    `describe`: returns the generator's description, which is empty before the generator is loaded.
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

    def publish_job(self, task: Task) -> None:
        """Publish the output, then the record. If publishing raises, the task has failed."""
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
        stored = self._ledger.succeed(record, task.decision)
        # The job has succeeded, even if something fails after this line.
        self._tidy_job(job_id, stored, published.keys if stored.run_id == record.run_id else None)
        self._keeper.published(task)
        self.finish_job(task)
        self._report(
            JobLine(
                id=job_id,
                status="succeeded",
                reason=task.decision.reason,
                attempt=task.decision.attempt,
                output=stored.output.uri if stored.output is not None else None,
                seconds=round(time.monotonic() - task.begin, 3),
                warnings=stored.warnings,
            ),
            stored,
        )

    def fail_job(self, task: Task, error: RunnerError, stage: str) -> None:
        """Put the job back for another try, or record its failure. `stage`: prepare, generate or deliver."""
        attempt, job = task.decision.attempt, task.job
        if isinstance(self.fatal, DeviceLost) and stage == "prepare" and not isinstance(error, InputError):
            self.return_job(task)  # the device failed in the job that was being generated
            return
        if isinstance(error, LeaseLost):
            self._leave_lost_job(task)
            return
        if self.should_retry(task, error):
            delay = RETRY_DELAY_S * 2 ** len(task.tried)
            self._events.emit(
                "job_retry", level="warning", job=job.id, code=error.code, message=error.message, wait_s=delay
            )
            again = self._ledger.another_try(job.id, task.decision, error.code)
            self.release_task(task)
            self._progress.phase(job.id, "waiting")
            if not self._source.put_back(Todo(job, again, (*task.tried, error.code)), delay):
                self.return_lease(job.id)  # the run is stopping, and nothing else would remove the mark
            return
        if stage == "deliver" and error.blames_job:  # the finished segments may be wrong
            self._keeper.forget(task)
        self.stop_run_for(error)
        if isinstance(error, InternalError) and error.trace is not None:
            self._events.emit("job_traceback", level="error", job=job.id, exception=error.trace)
        found = ErrorRecord.of(error, stage)
        record = self._record(task, status="failed", error=found)
        try:
            # If the inputs cannot be read now, an output made from them earlier is still good.
            blames_job = error.blames_job and bool(task.inputs)
            if self._ledger.fail(record, task.decision, blames_job=blames_job) == "recorded":
                self.return_lease(job.id)
            else:
                self._events.emit("older_output_kept", level="warning", job=job.id, attempt=attempt)
        except LeaseLost:
            self._leave_lost_job(task)
            return
        except Exception as second:  # e.g. the storage itself fails
            unstored = as_runner_error(second)
            self._events.emit(
                "record_not_written", level="error", job=job.id, code=unstored.code, message=unstored.message
            )
            self.stop_run_for(unstored)
        self.finish_job(task)
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

    def should_retry(self, task: Task, error: RunnerError) -> bool:
        """Return whether the job runs again in this run. After out of memory: once, one memory mode lower."""
        limit = 0 if self._ledger.force else self._ledger.max_attempts
        if not error.retryable or self._stop.draining or self.fatal:
            return False
        if isinstance(error, OutOfMemory):
            return error.code not in task.tried and not 0 < limit <= task.decision.counted + 1
        return len(task.tried) + 1 < min(TRIES_IN_ONE_RUN, limit or TRIES_IN_ONE_RUN)

    def _leave_lost_job(self, task: Task) -> None:
        """Leave a job to the runner that has taken it over, and check it again at the end. It is not an attempt."""
        self._events.emit("lease_lost", level="warning", job=task.job.id)
        self._ledger.lose(task.job.id)
        self.postpone_job(task)

    def postpone_job(self, task: Task) -> None:
        """Put back a job that another runner has, to check it again at the end."""
        self.release_task(task)
        self._progress.phase(task.job.id, "waiting")
        self._source.put_back(Todo(task.job, tried=task.tried, looked=True), LOOK_AGAIN_S, rank=LAST)

    def return_job(self, task: Task) -> None:
        """Leave an unfinished job to another run. It is not an attempt."""
        if task.job.id in self._ledger.open_attempts:  # else the mark belongs to an earlier attempt
            self.return_lease(task.job.id)
        self._progress.phase(task.job.id, "waiting")
        self.finish_job(task)

    def note_span(self, task: Task, stage: str, begin: float) -> None:
        """Note that `stage` of the job lasted from `begin` (monotonic seconds) until now."""
        self.spans.add(task.job.id, stage, begin)
        task.spans[stage] = (begin, time.monotonic())

    def skip_job(self, job: Job, decision: Decision) -> None:
        """Report a job that is done already."""
        warnings = decision.previous.warnings if decision.previous is not None else []
        line = JobLine(id=job.id, status="skipped", reason=decision.reason, attempt=decision.attempt, warnings=warnings)
        self._report(line)

    def fail_exhausted_job(self, task: Task) -> None:
        """Report a job as failed that was tried as often as allowed."""
        job, decision = task.job, task.decision
        error = decision.error
        if error is None:
            record = self._ledger.crashed(job.id, task.parts, self._summary.run_id, self._recipe, decision)
            error = record.error if record else None
        error = error and error.model_copy(update={"retryable": False})  # the same command would not try it again
        self._report(JobLine(id=job.id, status="failed", reason=decision.reason, attempt=decision.attempt, error=error))

    def _tidy_job(self, job_id: str, record: ResultRecord, published: Collection[str] | None = None) -> None:
        try:
            self._ledger.tidy(job_id, record, published)
        except RunnerError as error:
            self._events.emit("mark_not_removed", level="warning", job=job_id, message=error.message)

    def tidy_lost_job(self, job_id: str, decision: Decision) -> None:
        """Tidy a finished job whose process died: else it would always count as lost."""
        try:
            self._ledger.tidy_lost(job_id, decision)
        except JobTaken:  # another runner tidies it
            return
        except RunnerError as error:
            self._events.emit("mark_not_removed", level="warning", job=job_id, message=error.message)

    def finish_job(self, task: Task) -> None:
        """Release a task whose job needs nothing more of this run, and settle the job."""
        self.release_task(task)
        self._source.settle()

    def release_task(self, task: Task) -> None:
        """Release what the attempt holds. Its job may run again."""
        if not task.settled:
            left_device = task.spans["generate"][1] if "generate" in task.spans else None
            self._summary.note_work(task.gpu_s, task.identity.get("device", ""), left_device)
        task.settled = True
        if task.delivery is not None:
            task.delivery.abort()
        if task.conditions is not None and not task.generating:
            task.conditions.close()
        shutil.rmtree(task.folder, ignore_errors=True)

    def return_lease(self, job_id: str) -> None:
        """Release the lease of a job, which removes its mark."""
        try:
            self._ledger.abandon(job_id)
        except RunnerError as error:
            self._events.emit("mark_not_removed", level="warning", job=job_id, message=error.message)

    def stop_run_for(self, error: RunnerError) -> None:
        """Stop the run if every later job would meet `error`."""
        if error.stops_run and self.fatal is None:
            self.fatal = error
            self.close_source()

    def stop_run(self, event: str, error: Exception, where: str) -> None:
        """Stop the run: the part that failed is needed by every job. `event`: name of the log event."""
        found = self.fatal = as_runner_error(error, where=where)
        self._events.emit(event, level="error", code=found.code, message=found.message)
        self.close_source()

    def close_source(self) -> None:
        """Close the source, so that no further job starts."""
        for todo in self._source.close():
            if todo.tried:  # it waited for another try, so its mark is still there
                self.return_lease(todo.job.id)

    def _report(self, line: JobLine, record: ResultRecord | None = None) -> None:
        fields: dict[str, Any] = {"job": line.id}
        if line.status != "succeeded":  # the reason was reported when the job began
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
            self.stop_run_for(error)

    def _record(self, task: Task, **more: Any) -> ResultRecord:
        return task.record(
            run_id=self._summary.run_id,
            shard=self._summary.shard,
            recipe=self._recipe,
            engine=dict(self._describe()),
            overlapped=self.spans.overlapping(task.job.id, "generate"),
            **more,
        )

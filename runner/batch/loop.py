"""Batch: the loop. While job k denoises, job k+1 is fetched and prepared and job k-1 is encoded and published.

    prefetch thread   todo ─ survey, ledger: done? ─ fetch ─ generator.prepare ─►  prepared
    main thread       prepared ─ generator.generate ─ a segment at a time ─►  frames
    delivery thread   frames ─ encode ─ publish ─ result.json last

In:   a source of jobs, an engine that loads the generator at first use, the output storage.
Out:  records, and an exit code.
Never: skeletons, latents, weights.

A job that fails does not stop the batch. An error that every later job would meet stops it. A task leaves the loop in
one of three ways (settlement.py): the job is finished, the job is returned for a later try, or the run is stopped.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import closing, suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from runner.batch.delivery import Delivery
from runner.batch.fingerprint import fingerprint
from runner.batch.inputs import InputIndex, fetch_request
from runner.batch.job_checkpoint import Checkpoints
from runner.batch.job_source import JobSource, Todo
from runner.batch.lease import LeaseKeeper
from runner.batch.ledger import Decision, JobTaken, Ledger, Stage
from runner.batch.memory_sampler import MemorySampler
from runner.batch.pace import SegmentPace
from runner.batch.progress import Progress
from runner.batch.queues import ByteQueue, Closed
from runner.batch.run_pace import StepCount
from runner.batch.segment_keeper import SegmentKeeper
from runner.batch.settlement import Settlement
from runner.batch.stop import Abandoned, PrefetchThread, Stop
from runner.batch.summary import SummaryWriter
from runner.batch.survey import job_parts, make_surveyor, survey_jobs
from runner.batch.task import EndItem, SegmentItem, Task
from runner.errors import DeviceLost, LeaseLost, OutOfMemory, RunnerError, as_runner_error
from runner.finishing.stages import SegmentStage, finish_segments, finished_clip, split_states
from runner.generation.protocol import Generator
from runner.records.events import EventLog
from runner.spec.manifest import Job
from runner.spec.options import JobOptions
from runner.storage import Storage

__all__ = ["FRAME_BUFFER_BYTES", "Batch", "Engine"]

FRAME_BUFFER_BYTES = 512 * 2**20  # decoded segments waiting for the encoder
FRAME_BUFFER_ITEMS = 16  # also limited in number, as each job among them holds open files
STORE_WAIT_S = 5.0  # at the end of a stopped run: time to remove marks from a slow store
REPORT_WAITING_S = 60.0  # between two events `waiting_for_another_runner`


@dataclass(frozen=True)
class Engine:
    """A generator that is loaded when the first job needs it. A run without work loads nothing."""

    recipe: str
    identity: Mapping[str, str]  # digests of recipe and weights, for the fingerprint
    load: Callable[[], Generator[Any]]
    effective: Callable[[JobOptions], JobOptions] = lambda options: options  # fills in the recipe's defaults
    files: Callable[[], Sequence[Path]] = tuple  # the model files that `load` reads
    own: Callable[[Job], Mapping[str, str]] = lambda job: {}  # digests of what only this job uses, e.g. its LoRAs
    stages: Callable[[JobOptions], Sequence[SegmentStage]] = lambda options: ()  # finishing stages of a job's frames


class Batch:
    """One run over the jobs of one source. `run` may be called once."""

    def __init__(
        self,
        source: JobSource,
        engine: Engine,
        storage: Storage,
        ledger: Ledger,
        summary: SummaryWriter,
        events: EventLog,
        *,
        stop: Stop,
        scratch: Path,
        progress: Progress,
        sampler: MemorySampler,
        input_roots: Sequence[str] = (),
        checkpoints: Checkpoints | None = None,
        frame_buffer_bytes: int = FRAME_BUFFER_BYTES,
    ) -> None:
        self._engine, self._storage, self._ledger = engine, storage, ledger
        self._summary, self._events, self._progress = summary, events, progress
        self._stop, self._scratch, self._sampler = stop, scratch, sampler
        self._source, self._input_roots = source, input_roots
        self._keeper = SegmentKeeper(checkpoints, ledger, events)
        self._settlement = Settlement(
            source,
            storage,
            ledger,
            summary,
            events,
            recipe=engine.recipe,
            describe=lambda: self._generator.description if self._generator else {},
            keeper=self._keeper,
            progress=progress,
            sampler=sampler,
            stop=stop,
        )
        self._prepared: ByteQueue[Task] = ByteQueue(max_bytes=2**40, max_items=1)
        self._frames: ByteQueue[SegmentItem | EndItem] = ByteQueue(frame_buffer_bytes, FRAME_BUFFER_ITEMS)
        self._lease_lock = threading.Lock()
        self._leased_task: Task | None = None  # the task being prepared, while its mark is on the storage
        self._generator: Generator[Any] | None = None
        self._waiting_reported_at = float("-inf")
        self.error: RunnerError | None = None  # what stopped the run; None if it ran to its end or a signal came

    def run(self) -> int:
        """Run all jobs and return the exit code. Errors of jobs and signals are not raised."""
        prefetch = PrefetchThread(target=self._run_thread, args=(self._prefetch_all,), name="prefetch", daemon=True)
        deliver = threading.Thread(target=self._run_thread, args=(self._deliver_all,), name="deliver", daemon=True)
        watch = threading.Thread(target=self._watch_stop, name="stop", daemon=True)
        with self._sampler, LeaseKeeper(self._ledger.leases):
            for thread in (prefetch, deliver, watch):
                thread.start()
            self._run_thread(self._generate_all)
            self._frames.close()
            deliver.join()
            prefetch.join(timeout=None if not self._stop.draining else 1.0)
            if self._stop.draining:
                watch.join(timeout=STORE_WAIT_S)  # it removes the marks of jobs that waited for another try
            if prefetch.is_alive():  # a long preparation is not waited for, see stop.leave; it is not an attempt
                self._return_lease()
            else:
                if self._generator is not None:
                    self._generator.close()
                # The store did not answer when these leases were to be released.
                for job_id in self._ledger.open_attempts:
                    self._settlement.return_lease(job_id)
        code = self._summary.exit_code(self._stop_code())
        self._events.emit("run_finished", exit_code=code, counts=self._summary.counts)
        fatal = self.error = self._settlement.fatal
        try:
            self._summary.finish(fatal.message if fatal else self._stop.name, self._stop_code())
        except RunnerError as error:
            self._events.emit("summary_not_written", level="error", code=error.code, message=error.message)
            code, self.error = error.exit_code, error
        return code

    # -- prefetch thread ------------------------------------------------------------------------------------------

    def _prefetch_all(self) -> None:
        """Take jobs from the source until it is empty; skip those that are done and prepare the others."""
        # With --force every job runs, so no survey is needed.
        jobs = () if self._ledger.force else self._source.jobs
        decide = make_surveyor(self._engine, self._ledger, self._input_roots)
        survey = survey_jobs(jobs, self._storage, decide)
        try:
            while (todo := self._source.take()) is not None:
                done = next(survey, None) if todo.decision is None and not todo.looked else None
                if done is not None:
                    self._settlement.skip_job(todo.job, done)
                    self._source.settle()
                else:
                    self._prefetch_job(todo)
        finally:
            survey.close()
        self._prepared.close()

    def _prefetch_job(self, todo: Todo) -> None:
        """Decide one job, and prepare it if it runs now."""
        task = self._open_task(todo)
        try:
            action = self._decide_job(task, todo.decision)
            if action == "leased":
                self._report_leased(todo, task.decision.reason)
                self._settlement.postpone_job(task)
                return
            if action != "run":
                self._settlement.finish_job(task)
                return
            if task.decision.suspect and todo.decision is None:  # it runs after all others are done
                self._settlement.release_task(task)
                self._source.put_back(Todo(todo.job, task.decision), rank=task.decision.attempt)
                return
            if task.decision.suspect:
                self._source.wait_taken(1)
            self._prepare_job(task)
            self._prepared.put(task)
            self._leased_task = None
            if task.decision.suspect:
                self._source.wait_taken(0)
        except Closed:
            self._settlement.return_job(task)
        except JobTaken:
            self._report_leased(todo, "another runner has just taken it")
            self._settlement.postpone_job(task)
        except Exception as error:
            found = as_runner_error(error, where=todo.job.id)
            # Now, as the next job would begin before the delivery thread stops the run.
            self._settlement.stop_run_for(found)
            self._queue_end(EndItem(task, found, "prepare"))

    def _decide_job(self, task: Task, earlier: Decision | None) -> str:
        """Fingerprint the job and decide what to do. Record a skipped or exhausted job. Return the action."""
        job = task.job
        own: Mapping[str, str] = {}
        reader: str | None = None
        problem = None
        try:
            index = InputIndex(self._ledger.hashes, self._input_roots)
            task.inputs = index.identify(job)
            reader = index.find_reader(job, task.inputs)
            own = self._engine.own(job)
        except Exception as error:  # the attempt still gets a fingerprint: its failure replaces an older one
            problem = error
        task.parts = job_parts(self._engine, job, task.inputs, own, reader)
        task.fingerprint = fingerprint(task.parts)
        task.decision = earlier or self._ledger.decide(job.id, task.fingerprint, task.parts)
        if problem is not None:
            raise problem
        decision = task.decision
        if decision.action == "skip":
            if decision.suspect:  # else it would always count as lost
                self._settlement.tidy_lost_job(job.id, decision)
            self._settlement.skip_job(job, decision)
        elif decision.action == "exhausted":
            self._settlement.fail_exhausted_job(task)
        return decision.action

    def _report_leased(self, todo: Todo, reason: str) -> None:
        """Report that another runner has the job: at the first check, then every REPORT_WAITING_S."""
        if not todo.looked:
            self._events.emit("job_leased", job=todo.job.id, reason=reason)
        elif time.monotonic() - self._waiting_reported_at > REPORT_WAITING_S:
            self._waiting_reported_at = time.monotonic()
            self._events.emit("waiting_for_another_runner", job=todo.job.id, reason=reason)

    def _prepare_job(self, task: Task) -> None:
        job, timer = task.job, task.timer
        self._take_lease(task)
        self._events.emit("job_started", job=job.id, attempt=task.decision.attempt, reason=task.decision.reason)
        if self._generator is None:
            self._progress.phase(job.id, "loading the model")
        generator = self._load_generator()
        self._progress.phase(job.id, "preparing")
        timer.probe = generator.probe
        begin = task.fetch_begin = time.monotonic()
        with timer.stage("fetch"):
            request, unverified = fetch_request(job, task.folder, task.inputs, self._input_roots)
        task.audio_from = request.video
        conditions = task.conditions = generator.prepare(request, timer)
        self._add_warnings(task, [*unverified, *conditions.report.get("warnings", ())])
        task.plan = generator.plan(conditions.clip.frames, conditions.clip.size, job.options)
        self._keeper.find(task, self._identity(task))
        self._settlement.note_span(task, "prepare", begin)
        self._events.emit(
            "job_prepared", level="debug", job=job.id, frames=conditions.clip.frames, segments=task.plan.segments
        )

    def _add_warnings(self, task: Task, warnings: Iterable[str]) -> None:
        for text in warnings:
            task.note(text, warning=True)
            if not task.tried:  # a retry would report the same again
                self._events.emit("job_warning", level="warning", job=task.job.id, message=text)

    def _take_lease(self, task: Task) -> None:
        """Take the job's lease. Raises Closed if the run is stopping: the lease might then never be released."""
        with self._lease_lock:
            if self._stop.draining:
                raise Closed
            self._ledger.begin(
                task.job.id, task.decision, task.fingerprint, self._summary.run_id, alone=task.decision.suspect
            )
            self._leased_task = task

    def _return_lease(self) -> None:
        # If the lock is not free in time, the store hangs, and it is unknown whether the mark will be written.
        if self._lease_lock.acquire(timeout=STORE_WAIT_S):
            if self._leased_task is not None:
                self._settlement.return_lease(self._leased_task.job.id)
            self._lease_lock.release()

    def _load_generator(self) -> Generator[Any]:
        if self._generator is None:
            begin = time.monotonic()
            self._events.emit("engine_loading", recipe=self._engine.recipe)
            try:
                self._generator = self._engine.load()
            except Exception as error:  # every other job would fail the same way
                self._settlement.stop_run("engine_failed", error, "loading the model")
                raise Closed from error
            self._summary.note_loading(begin)
            self._events.emit("engine_loaded", seconds=round(time.monotonic() - begin, 3))
        return self._generator

    # -- main thread ----------------------------------------------------------------------------------------------

    def _generate_all(self) -> None:
        """Generate the prepared tasks one after the other, and queue the end of each."""
        for task in self._prepared:
            if self._stop.draining or self._settlement.fatal:
                self._queue_end(EndItem(task, returned=True))
                continue
            begin = time.monotonic()
            self._progress.phase(task.job.id, "generating")
            try:
                self._confirm_lease(task)
                self._generate_job(task)
                ended = EndItem(task)
            except Abandoned:
                ended = EndItem(task, returned=True)
            except Exception as error:
                found = as_runner_error(error, where=task.job.id)
                if isinstance(found, DeviceLost):  # now, before another thread meets the same error and blames its job
                    self._settlement.stop_run_for(found)
                if isinstance(found, OutOfMemory) and self._settlement.should_retry(task, found):
                    self._fall_back_memory_mode()
                ended = EndItem(task, found, "generate")
            if ended.error is None and not ended.returned:
                self._progress.phase(task.job.id, "publishing")
                # Now, as the job may wait for delivery while the next one is generated.
                self._note_stage(task, "delivering")
            else:
                self._progress.phase(task.job.id, "waiting")
            self._settlement.note_span(task, "generate", begin)
            seconds = round(time.monotonic() - begin, 3)
            self._events.emit("job_generated", level="debug", job=task.job.id, seconds=seconds)
            self._queue_end(ended)

    def _fall_back_memory_mode(self) -> None:
        """Switch the generator to the next lower memory mode, for the retry and all later jobs."""
        assert self._generator
        begin = time.monotonic()
        try:
            lowered = self._generator.fall_back_memory_mode()
            self._summary.note_loading(begin)
            self._events.emit("memory_lowered" if lowered else "memory_is_lowest", level="warning")
        except Exception as error:  # the model is unloaded: every later job would fail the same way
            self._settlement.stop_run("engine_failed", error, "loading the model one memory mode lower")

    def _generate_job(self, task: Task) -> None:
        assert task.conditions
        task.generating = True
        try:
            if not self._generate_segments(task):
                self._generate_segments(task)  # from its first segment
        finally:
            task.conditions.close()
            task.generating = False

    def _generate_segments(self, task: Task) -> bool:
        """Generate the segments after the kept ones. Return False if the job must restart at segment 1."""
        assert self._generator and task.conditions and task.plan

        plan = task.plan

        def on_step(done: int, total: int) -> None:
            pace.step(done)
            self._check_continue(task, pace)
            self._progress.step(task.job.id, StepCount.of(plan, done, total))

        # First, so that sound that cannot be read fails the job before anything is generated.
        clip, options = task.conditions.clip, task.job.options
        stages = self._engine.stages(options)
        task.finishing = {stage.name: {} for stage in stages}
        finished, people = finished_clip(clip, stages), task.conditions.people
        make = partial(Delivery.of, clip, finished, task.folder, options, task.audio_from, task.timer, people)
        start = self._keeper.start(task, self._identity(task), make)
        task.identity = self._identity(task)
        point, states = (None, None) if start is None else split_states(start)
        task.drift = None if start is None else start.drift
        pace = SegmentPace(task.plan, 0 if start is None else start.segment)
        generated = self._generator.generate(task.conditions, task.plan, task.timer, on_step, point)
        with closing(finish_segments(generated, stages, task.timer, task.plan.segments, states)) as segments:
            for segment in segments:
                identity = task.identity = self._identity(task)
                if start is not None and task.chain is not None and not task.chain.fits(identity):
                    self._keeper.begin_anew(task, identity)  # e.g. the blocks could not be compiled this time
                    return False
                task.drift = segment.drift or task.drift
                nbytes = segment.frames.nbytes + (segment.pose.nbytes if segment.pose is not None else 0)
                self._frames.put(SegmentItem(task, segment, identity), nbytes)
                pace.segment_done()
                if segment.index + 1 < task.plan.segments:
                    self._check_continue(task, pace)
        self._add_warnings(task, () if task.drift is None else task.drift.warnings)
        self._add_warnings(task, self._generator.job_warnings(task.plan, options))
        task.finishing = {stage.name: dict(stage.report) for stage in stages}
        return True

    def _identity(self, task: Task) -> dict[str, str]:
        """Return the generator's `resume_identity`, with the place of preparation if it is not the usual one."""
        assert self._generator and task.conditions
        identity, prepared_on = dict(self._generator.resume_identity), task.conditions.report.get("prepared_on")
        return identity | {"preprocess": str(prepared_on)} if identity and prepared_on else identity

    def _confirm_lease(self, task: Task) -> None:
        """Note that the job is being generated, and check its lease. Raises LeaseLost."""
        try:
            self._ledger.confirm(task.job.id, task.decision)
        except LeaseLost:
            raise
        except RunnerError as error:  # the store does not answer now; publishing checks the lease again
            self._events.emit("mark_not_written", level="warning", job=task.job.id, message=error.message)

    def _check_continue(self, task: Task, pace: SegmentPace) -> None:
        """Raise LeaseLost if another runner has the job; Abandoned if the time left after a signal is too short."""
        if task.settled:
            raise Abandoned
        if self._ledger.leases.is_lost(task.job.id):
            raise LeaseLost("another runner has taken this job over", where=task.job.id, todo="Nothing has to be done")
        if not self._stop.draining:
            return
        left = pace.left_in_job() if task.chain is None else pace.left_in_segment()
        if self._stop.abandon or (left is not None and left + task.part_s > self._stop.seconds_left()):
            raise Abandoned

    # -- delivery thread ------------------------------------------------------------------------------------------

    def _deliver_all(self) -> None:
        """Encode the segments, and end each task: published, failed or returned."""
        for item in self._frames:
            task = item.task
            if task.settled:
                continue
            try:
                if isinstance(item, SegmentItem):
                    assert task.delivery is not None
                    begin = time.monotonic()
                    task.deliver_begin = task.deliver_begin or begin
                    task.delivery.write(item.segment)
                    self._keeper.keep(task, item)
                    task.part_s = time.monotonic() - begin
                elif item.returned:
                    self._settlement.return_job(task)
                elif item.error is not None:
                    self._settlement.fail_job(task, item.error, item.stage)
                else:
                    self._settlement.publish_job(task)
            except Exception as error:
                if task.settled:  # the job has ended already: the error is one of the loop
                    raise
                self._settlement.fail_job(task, as_runner_error(error, where=task.job.id), "deliver")

    # -- shared ---------------------------------------------------------------------------------------------------

    def _open_task(self, todo: Todo) -> Task:
        folder = self._scratch / todo.job.id
        folder.mkdir(parents=True, exist_ok=True)
        return Task(todo.job, folder, self._sampler.window(), todo.tried)

    def _note_stage(self, task: Task, stage: Stage) -> None:
        try:
            self._ledger.advance(task.job.id, stage)
        except LeaseLost:
            return  # publishing raises it again
        except RunnerError as error:  # only the next run needs the mark, if this process dies
            self._events.emit("mark_not_written", level="warning", job=task.job.id, message=error.message)

    def _queue_end(self, ended: EndItem) -> None:
        """Pass the end of a task on to the delivery thread."""
        try:
            self._frames.put(ended)
        except Closed:  # delivery has ended: the run was stopped while this job was being prepared
            self._settlement.return_job(ended.task)

    def _watch_stop(self) -> None:
        self._stop.requested.wait()
        left = round(self._stop.seconds_left(), 1)
        self._events.emit("stopping", level="warning", signal=self._stop.name, drain_s=left)
        self._prepared.close()
        self._settlement.close_source()
        with suppress(RunnerError):  # if the process is killed after the signal, no job is the cause
            self._ledger.note_stopping()

    def _run_thread(self, stage: Callable[[], None]) -> None:
        """Run one thread's work. An exception of the loop itself ends the run with `internal`."""
        try:
            stage()
        except Exception as error:
            try:
                self._settlement.stop_run("loop_broken", error, "the batch loop")
            finally:
                self._prepared.close()
                self._frames.close()

    def _stop_code(self) -> int | None:
        """Return the exit code of a run that was stopped early; None if it ran to its end."""
        if self._settlement.fatal is not None:
            return self._settlement.fatal.exit_code
        if self._stop.draining and self._summary.counts["not_run"]:
            return self._stop.exit_code
        return None

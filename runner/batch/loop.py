"""Batch: the loop. While job k denoises, job k+1 is fetched and prepared and job k-1 is encoded and published.

    prefetch thread   todo ─ survey, ledger: done? ─ fetch ─ generator.prepare ─►  prepared
    main thread       prepared ─ generator.generate ─ a segment at a time ─►  frames
    delivery thread   frames ─ encode ─ publish ─ result.json last

In:   a source of jobs, an engine that loads the generator when first needed, the output storage.
Out:  records, and an exit code.
Never: skeletons, latents, weights. One bad job never stops the batch; an error that every later job would meet does.
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
from runner.batch.task import Ended, Piece, Task
from runner.errors import DeviceLost, LeaseLost, OutOfMemory, RunnerError, as_runner_error
from runner.finishing.stages import SegmentStage, finish_segments, finished_clip, split_states
from runner.generation.protocol import Generator
from runner.records.events import EventLog
from runner.spec.manifest import Job
from runner.spec.options import JobOptions
from runner.storage import Storage

__all__ = ["FRAME_BUFFER_BYTES", "Batch", "Engine"]

FRAME_BUFFER_BYTES = 512 * 2**20  # decoded segments waiting for the encoder
FRAME_BUFFER_ITEMS = 16  # the same, as each job among them holds open files
STORE_WAIT_S = 5.0  # at the end of a stopped run: for marks to be removed from a store that is slow
TELL_WAITING_S = 60.0  # between two events that say so


@dataclass(frozen=True)
class Engine:
    """A generator that is loaded when the first job needs it: a run with nothing to do loads nothing."""

    recipe: str
    identity: Mapping[str, str]  # recipe and weights, for the fingerprint
    load: Callable[[], Generator[Any]]
    effective: Callable[[JobOptions], JobOptions] = lambda options: options  # with the recipe's defaults filled in
    files: Callable[[], Sequence[Path]] = tuple  # the model's, as `load` will read them
    own: Callable[[Job], Mapping[str, str]] = lambda job: {}  # identity of what a job alone adds, e.g. its LoRAs
    stages: Callable[[JobOptions], Sequence[SegmentStage]] = lambda options: ()  # of a job's frames, before the encoder


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
        self._frames: ByteQueue[Piece | Ended] = ByteQueue(frame_buffer_bytes, FRAME_BUFFER_ITEMS)
        self._marking = threading.Lock()
        self._marked: Task | None = None  # being prepared, its mark on the storage
        self._generator: Generator[Any] | None = None
        self._told_waiting = float("-inf")
        self.error: RunnerError | None = None  # what stopped the run; None where it ran to its end, or a signal came

    def run(self) -> int:
        """Work through the jobs; the exit code. Raises nothing that a job or a signal can cause."""
        prefetch = PrefetchThread(target=self._guard, args=(self._prefetch_all,), name="prefetch", daemon=True)
        deliver = threading.Thread(target=self._guard, args=(self._deliver_all,), name="deliver", daemon=True)
        watch = threading.Thread(target=self._watch_stop, name="stop", daemon=True)
        with self._sampler, LeaseKeeper(self._ledger.leases):
            for thread in (prefetch, deliver, watch):
                thread.start()
            self._guard(self._generate_all)
            self._frames.close()
            deliver.join()
            prefetch.join(timeout=None if not self._stop.draining else 1.0)
            if self._stop.draining:
                watch.join(timeout=STORE_WAIT_S)  # it removes the marks of jobs that waited for another try
            if prefetch.is_alive():  # a long preparation is not waited for, see stop.leave; it was no attempt
                self._unmark()
            else:
                if self._generator is not None:
                    self._generator.close()
                # The store did not answer when these were to be given back.
                for job_id in self._ledger.open_attempts:
                    self._settlement.abandon(job_id)
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
        # With --force every job runs, so there is nothing to find out.
        jobs = () if self._ledger.force else self._source.jobs
        decide = make_surveyor(self._engine, self._ledger, self._input_roots)
        survey = survey_jobs(jobs, self._storage, decide)
        try:
            while (todo := self._source.take()) is not None:
                done = next(survey, None) if todo.decision is None and not todo.looked else None
                if done is not None:
                    self._settlement.skip(todo.job, done)
                    self._source.settle()
                else:
                    self._prefetch(todo)
        finally:
            survey.close()
        self._prepared.close()

    def _prefetch(self, todo: Todo) -> None:
        task = self._open(todo)
        try:
            action = self._decide(task, todo.decision)
            if action == "leased":
                self._say_leased(todo, task.decision.reason)
                self._settlement.put_off(task)
                return
            if action != "run":
                self._settlement.settle(task)
                return
            if task.decision.suspect and todo.decision is None:  # last, when the others are safe
                self._settlement.close(task)
                self._source.put_back(Todo(todo.job, task.decision), rank=task.decision.attempt)
                return
            if task.decision.suspect:
                self._source.wait_taken(1)
            self._prepare(task)
            self._prepared.put(task)
            self._marked = None
            if task.decision.suspect:
                self._source.wait_taken(0)
        except Closed:
            self._settlement.give_back(task)
        except JobTaken:
            self._say_leased(todo, "another runner has just taken it")
            self._settlement.put_off(task)
        except Exception as error:
            found = as_runner_error(error, where=todo.job.id)
            self._settlement.stop_for(found)  # now, or the next job would begin before delivery hears of it
            self._hand_over(Ended(task, found, "prepare"))

    def _decide(self, task: Task, taken: Decision | None) -> str:
        """What to do with the job: the decision's action, after what it asks for short of running was done."""
        job = task.job
        own: Mapping[str, str] = {}
        reader: str | None = None
        problem = None
        try:
            index = InputIndex(self._ledger.hashes, self._input_roots)
            task.inputs = index.identify(job)
            reader = index.find_reader(job, task.inputs)
            own = self._engine.own(job)
        except Exception as error:  # the attempt still gets an identity, and its failure the place of an older one
            problem = error
        task.parts = job_parts(self._engine, job, task.inputs, own, reader)
        task.fingerprint = fingerprint(task.parts)
        task.decision = taken or self._ledger.decide(job.id, task.fingerprint, task.parts)
        if problem is not None:
            raise problem
        decision = task.decision
        if decision.action == "skip":
            if decision.suspect:  # else it would count as lost for ever
                self._settlement.tidy_lost(job.id, decision)
            self._settlement.skip(job, decision)
        elif decision.action == "exhausted":
            self._settlement.exhaust(task)
        return decision.action

    def _say_leased(self, todo: Todo, reason: str) -> None:
        """That another runner has the job: at the first look, and then now and again while this run waits for it."""
        if not todo.looked:
            self._events.emit("job_leased", job=todo.job.id, reason=reason)
        elif time.monotonic() - self._told_waiting > TELL_WAITING_S:
            self._told_waiting = time.monotonic()
            self._events.emit("waiting_for_another_runner", job=todo.job.id, reason=reason)

    def _prepare(self, task: Task) -> None:
        job, timer = task.job, task.timer
        self._mark(task)
        self._events.emit("job_started", job=job.id, attempt=task.decision.attempt, reason=task.decision.reason)
        if self._generator is None:
            self._progress.phase(job.id, "loading the model")
        generator = self._load()
        self._progress.phase(job.id, "preparing")
        timer.probe = generator.probe
        begin = task.fetch_begin = time.monotonic()
        with timer.stage("fetch"):
            request, unverified = fetch_request(job, task.folder, task.inputs, self._input_roots)
        task.audio_from = request.video
        conditions = task.conditions = generator.prepare(request, timer)
        self._warn(task, [*unverified, *conditions.report.get("warnings", ())])
        task.plan = generator.plan(conditions.clip.frames, conditions.clip.size, job.options)
        self._keeper.find(task, self._identity(task))
        self._settlement.note_span(task, "prepare", begin)
        self._events.emit(
            "job_prepared", level="debug", job=job.id, frames=conditions.clip.frames, segments=task.plan.segments
        )

    def _warn(self, task: Task, warnings: Iterable[str]) -> None:
        for text in warnings:
            task.note(text, warning=True)
            if not task.tried:  # a retry finds the same
                self._events.emit("job_warning", level="warning", job=task.job.id, message=text)

    def _mark(self, task: Task) -> None:
        """Take the job's lease; Closed if the run is ending, when nothing might give it back again."""
        with self._marking:
            if self._stop.draining:
                raise Closed
            self._ledger.begin(
                task.job.id, task.decision, task.fingerprint, self._summary.run_id, alone=task.decision.suspect
            )
            self._marked = task

    def _unmark(self) -> None:
        # Where the lock is not had in time the store hangs, and nothing can tell whether a mark will get there.
        if self._marking.acquire(timeout=STORE_WAIT_S):
            if self._marked is not None:
                self._settlement.abandon(self._marked.job.id)
            self._marking.release()

    def _load(self) -> Generator[Any]:
        if self._generator is None:
            begin = time.monotonic()
            self._events.emit("engine_loading", recipe=self._engine.recipe)
            try:
                self._generator = self._engine.load()
            except Exception as error:  # no job is at fault, and no other would fare better
                self._settlement.break_off("engine_failed", error, "loading the model")
                raise Closed from error
            self._summary.note_loading(begin)
            self._events.emit("engine_loaded", seconds=round(time.monotonic() - begin, 3))
        return self._generator

    # -- main thread ----------------------------------------------------------------------------------------------

    def _generate_all(self) -> None:
        for task in self._prepared:
            if self._stop.draining or self._settlement.fatal:
                self._hand_over(Ended(task, given_back=True))
                continue
            begin = time.monotonic()
            self._progress.phase(task.job.id, "generating")
            try:
                self._confirm(task)
                self._generate(task)
                ended = Ended(task)
            except Abandoned:
                ended = Ended(task, given_back=True)
            except Exception as error:
                found = as_runner_error(error, where=task.job.id)
                if isinstance(found, DeviceLost):  # now, before another thread meets the same and blames its own job
                    self._settlement.stop_for(found)
                if isinstance(found, OutOfMemory) and self._settlement.worth_another_try(task, found):
                    self._fall_back_memory_mode()
                ended = Ended(task, found, "generate")
            if ended.error is None and not ended.given_back:
                self._progress.phase(task.job.id, "publishing")
                self._advance(task, "delivering")  # now, as it may wait for delivery while the next one generates
            else:
                self._progress.phase(task.job.id, "waiting")
            self._settlement.note_span(task, "generate", begin)
            seconds = round(time.monotonic() - begin, 3)
            self._events.emit("job_generated", level="debug", job=task.job.id, seconds=seconds)
            self._hand_over(ended)

    def _fall_back_memory_mode(self) -> None:
        """One memory mode down, for the retry and all that follows."""
        assert self._generator
        begin = time.monotonic()
        try:
            lowered = self._generator.fall_back_memory_mode()
            self._summary.note_loading(begin)
            self._events.emit("memory_lowered" if lowered else "memory_is_lowest", level="warning")
        except Exception as error:  # the model is gone, and no later job would fare better
            self._settlement.break_off("engine_failed", error, "loading the model one memory mode lower")

    def _generate(self, task: Task) -> None:
        assert task.conditions
        task.generating = True
        try:
            if not self._render(task):
                self._render(task)  # from its first segment
        finally:
            task.conditions.close()
            task.generating = False

    def _render(self, task: Task) -> bool:
        """Generate the job, from where an earlier attempt ended; False if it turns out that it must begin anew."""
        assert self._generator and task.conditions and task.plan

        plan = task.plan

        def on_step(done: int, total: int) -> None:
            pace.step(done)
            self._check_going_on(task, pace)
            self._progress.step(task.job.id, StepCount.of(plan, done, total))

        # Now, as sound that cannot be read shall fail the job before it costs anything.
        clip, options = task.conditions.clip, task.job.options
        stages = self._engine.stages(options)
        task.finishing = {stage.name: {} for stage in stages}
        finished, people = finished_clip(clip, stages), task.conditions.people
        make = partial(Delivery.of, clip, finished, task.folder, options, task.audio_from, task.timer, people)
        start = self._keeper.start(task, self._identity(task), make)
        task.identity = self._identity(task)
        own, states = (None, None) if start is None else split_states(start)
        task.drift = None if start is None else start.drift
        pace = SegmentPace(task.plan, 0 if start is None else start.segment)
        generated = self._generator.generate(task.conditions, task.plan, task.timer, on_step, own)
        with closing(finish_segments(generated, stages, task.timer, task.plan.segments, states)) as segments:
            for segment in segments:
                identity = task.identity = self._identity(task)
                if start is not None and task.chain is not None and not task.chain.fits(identity):
                    self._keeper.begin_anew(task, identity)  # e.g. the blocks could not be compiled this time
                    return False
                task.drift = segment.drift or task.drift
                nbytes = segment.frames.nbytes + (segment.pose.nbytes if segment.pose is not None else 0)
                self._frames.put(Piece(task, segment, identity), nbytes)
                pace.segment_done()
                if segment.index + 1 < task.plan.segments:
                    self._check_going_on(task, pace)
        self._warn(task, () if task.drift is None else task.drift.warnings)
        self._warn(task, self._generator.job_warnings(task.plan, options))
        task.finishing = {stage.name: dict(stage.report) for stage in stages}
        return True

    def _identity(self, task: Task) -> dict[str, str]:
        """The generator's `resume_identity`, and where this job was prepared if that is not where the others are."""
        assert self._generator and task.conditions
        identity, elsewhere = dict(self._generator.resume_identity), task.conditions.report.get("prepared_on")
        return identity | {"preprocess": str(elsewhere)} if identity and elsewhere else identity

    def _confirm(self, task: Task) -> None:
        """Note that the job is being generated, which shows that its lease still holds. Raises LeaseLost."""
        try:
            self._ledger.confirm(task.job.id, task.decision)
        except LeaseLost:
            raise
        except RunnerError as error:  # the store does not answer now; publishing is fenced
            self._events.emit("mark_not_written", level="warning", job=task.job.id, message=error.message)

    def _check_going_on(self, task: Task, pace: SegmentPace) -> None:
        """Raise LeaseLost if another runner has the job, Abandoned if the time that a signal left is too short."""
        if task.settled:
            raise Abandoned
        if self._ledger.leases.is_lost(task.job.id):
            raise LeaseLost("another runner has taken this job over", where=task.job.id)
        if not self._stop.draining:
            return
        left = pace.left_in_job() if task.chain is None else pace.left_in_segment()
        if self._stop.abandon or (left is not None and left + task.part_s > self._stop.seconds_left()):
            raise Abandoned

    # -- delivery thread ------------------------------------------------------------------------------------------

    def _deliver_all(self) -> None:
        for item in self._frames:
            task = item.task
            if task.settled:
                continue
            try:
                if isinstance(item, Piece):
                    assert task.delivery is not None
                    begin = time.monotonic()
                    task.deliver_begin = task.deliver_begin or begin
                    task.delivery.write(item.segment)
                    self._keeper.keep(task, item)
                    task.part_s = time.monotonic() - begin
                elif item.given_back:
                    self._settlement.give_back(task)
                elif item.error is not None:
                    self._settlement.fail(task, item.error, item.stage)
                else:
                    self._settlement.succeed(task)
            except Exception as error:
                if task.settled:  # its outcome stands; it is the loop itself that broke
                    raise
                self._settlement.fail(task, as_runner_error(error, where=task.job.id), "deliver")

    # -- shared ---------------------------------------------------------------------------------------------------

    def _open(self, todo: Todo) -> Task:
        folder = self._scratch / todo.job.id
        folder.mkdir(parents=True, exist_ok=True)
        return Task(todo.job, folder, self._sampler.window(), todo.tried)

    def _advance(self, task: Task, stage: Stage) -> None:
        try:
            self._ledger.advance(task.job.id, stage)
        except LeaseLost:
            return  # publishing finds it too
        except RunnerError as error:  # the mark only serves the next run, should this process die
            self._events.emit("mark_not_written", level="warning", job=task.job.id, message=error.message)

    def _hand_over(self, ended: Ended) -> None:
        try:
            self._frames.put(ended)
        except Closed:  # delivery is over: the run was stopped while this job was being prepared
            self._settlement.give_back(ended.task)

    def _watch_stop(self) -> None:
        self._stop.requested.wait()
        left = round(self._stop.seconds_left(), 1)
        self._events.emit("stopping", level="warning", signal=self._stop.name, drain_s=left)
        self._prepared.close()
        self._settlement.start_no_more()
        with suppress(RunnerError):  # a process that is killed after its signal died in no job
            self._ledger.note_stopping()

    def _guard(self, stage: Callable[[], None]) -> None:
        """Run one thread's work. If the loop itself breaks, end the run with `internal` rather than hang."""
        try:
            stage()
        except Exception as error:
            try:
                self._settlement.break_off("loop_broken", error, "the batch loop")
            finally:
                self._prepared.close()
                self._frames.close()

    def _stop_code(self) -> int | None:
        """What the exit code must be if the run was cut short; None if it ran to its end."""
        if self._settlement.fatal is not None:
            return self._settlement.fatal.exit_code
        if self._stop.draining and self._summary.counts["not_run"]:
            return self._stop.exit_code
        return None

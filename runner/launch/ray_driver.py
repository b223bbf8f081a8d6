"""Ray driver: the command's side of `run --on ray`: starts workers, hands out jobs, replaces lost workers.

In:   jobs, forecast seconds, a cluster, the function that a worker runs. Out: a `SharedRun`, events, progress.
Never: how Ray is called (ray_cluster.py); which job is next (hand_out.py); how a job runs.

One thread makes all decisions. Ray's threads put the answers of workers and of the cluster into one queue for it.
"""

from __future__ import annotations

import os
import queue
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Protocol

import structlog

from runner.batch.progress import Progress
from runner.batch.shared_run import JoinedReports, SharedRun, WorkerReport
from runner.batch.stop import Stop
from runner.errors import ConfigInvalid, RunnerError, as_runner_error
from runner.generation.protocol import JobDemand
from runner.launch.hand_out import HandOut
from runner.launch.ray_cluster import RayActor, RayNode, RayPlace, WorkerGone, WorkerSilent
from runner.launch.ray_places import next_places
from runner.launch.ray_worker import WorkerOrder, describe_code
from runner.spec.manifest import Job

__all__ = ["END_S", "OpenCluster", "RayWork", "run_on_ray"]

END_S = 60.0  # a worker that has not ended so long after its drain time is killed; assumed
LOOK_EVERY_S = 2.0  # between two requests for the cluster's nodes
FETCH_S = 20.0  # a worker keeps a request for messages open so long
SILENT_S = 60.0  # a worker that cannot be reached for so long counts as lost
ASK_AGAIN_S = 1.0
# Starts of workers at one place without a finished job, after which the place is closed. One more than the default
# attempts of a job, so that a job that always kills its worker is given up before the place is closed.
STARTS = 5
KEEP_S = 60.0  # a job is kept so long for a starting worker; slower ones wait for resources of their node; assumed
TELL_PENDING_S = 30.0  # a worker that waits for its place so long is reported by an event

Clock = Callable[[], float]
Answer = Callable[[Any, Exception | None], None]  # (return value, error)


class OpenCluster(Protocol):
    """An open cluster, see RayCluster."""

    def nodes(self) -> list[RayNode]: ...

    def start(self, place: RayPlace, variables: Mapping[str, str]) -> RayActor: ...


@dataclass(frozen=True)
class RayWork:
    """The work of all workers. `run`, `settings`: see WorkerOrder.

    workers: maximum number of CPU workers; None: one worker per GPU. variables: place → additional environment
    variables of its worker. keep: called when the cluster is open; stores the run's facts for later commands and
    returns WorkerOrder.shared_file. demands: of all jobs.
    """

    run: Callable[..., Any]
    settings: Any
    jobs: Sequence[Job]
    seconds: Mapping[str, float]  # forecast, by job id
    workers: int | None = None
    variables: Callable[[RayPlace], Mapping[str, str]] = lambda place: {}
    keep: Callable[[], tuple[str, bytes] | None] = lambda: None
    demands: Sequence[JobDemand] = ()


def run_on_ray(
    opening: AbstractContextManager[OpenCluster], work: RayWork, progress: Progress, *, stop: Stop
) -> SharedRun:
    """Open the cluster, run all jobs on it, close it, and return the joint result of its workers.

    `stop` receives signals. In the main thread SIGINT and SIGTERM are passed on, each once to each worker; a worker
    that does not end then is killed. Raises ConfigInvalid, ClusterDenied, ClusterUnavailable for the cluster, and the
    first RunnerError of a worker if no worker began its jobs.
    """
    driver = _Driver(work, progress, stop)
    in_main_thread = threading.current_thread() is threading.main_thread()
    if not in_main_thread:  # Python delivers signals to the main thread only
        structlog.get_logger().info("signals_ignored", why="the run is not in the main thread")
    with stop.listening(driver.count_signal) if in_main_thread else nullcontext():
        with opening as cluster:
            driver.shared_file = work.keep()
            progress.started(len(work.jobs))
            try:
                return driver.run(cluster)
            finally:
                progress.close()
                driver.end()


@dataclass
class _LiveWorker:
    """One worker, from its start to its end."""

    name: str  # the place's name, with a number from its second worker on
    place: RayPlace
    actor: RayActor
    report: WorkerReport
    started: float
    stage: str = "starting"  # starting, working, over
    pid: int | None = None
    seen: int = 0  # messages
    silent_since: float | None = None
    stops: int = 0  # signals that were passed on
    has: set[str] = field(default_factory=set)  # jobs that were handed to it and have not ended
    told_end: bool = False


@dataclass
class _PlaceState:
    """The state of a place and its workers."""

    place: RayPlace
    worker: _LiveWorker | None = None
    in_vain: int = 0  # consecutive starts without a finished job
    closed: bool = False  # not used again
    not_before: float = 0.0
    names: int = 0  # workers that were started here: each has a different name


class _Driver:
    """The workers of one command."""

    def __init__(self, work: RayWork, progress: Progress, stop: Stop, clock: Clock = time.monotonic) -> None:
        self._work, self._stop, self._clock = work, stop, clock
        self.shared_file: tuple[str, bytes] | None = None  # what the workers must find in OUT
        self._reports = JoinedReports([job.id for job in work.jobs], progress, "worker")
        self._hand_out = HandOut(work.jobs, work.seconds)
        self._places: dict[tuple[str, int], _PlaceState] = {}
        self._answers: queue.SimpleQueue[Callable[[], None] | None] = queue.SimpleQueue()
        self._later: list[tuple[float, Callable[[], None]]] = []
        self._cluster: OpenCluster | None = None
        self._looking = False
        self._looked = False
        self._look_at = 0.0
        self._signals = 0
        self._kill_at = float("inf")
        self._log = structlog.get_logger()

    def count_signal(self) -> None:
        """Count a signal. Called in the signal handler; SimpleQueue.put is reentrant."""
        self._signals += 1
        self._answers.put(None)

    # -- the loop -------------------------------------------------------------------------------------------------

    def run(self, cluster: OpenCluster) -> SharedRun:
        self._cluster = cluster
        while not self._is_over():
            self._look_at_nodes()
            self._start_workers()
            self._hand_out_jobs()
            self._pass_on_signals()
            try:
                action = self._answers.get(timeout=self._seconds_to_wait())
            except queue.Empty:
                action = None
            if action is not None:
                action()
            self._run_later()
        if self._stop.draining:  # the workers know nothing of the jobs that they did not get
            self._reports.open("the command").ended = self._stop.exit_code
        return self._reports.merge()

    def end(self) -> None:
        """Kill all workers that are left, after the run or an error of this process."""
        for worker in self._workers():
            worker.actor.kill()

    def _is_over(self) -> bool:
        if self._workers():
            return self._hand_out.left == 0 and all(worker.stage == "starting" for worker in self._workers())
        if self._hand_out.left == 0 or self._stop.draining:
            return True
        return self._looked and not any(not state.closed for state in self._places.values())

    def _workers(self) -> list[_LiveWorker]:
        return [state.worker for state in self._places.values() if state.worker is not None]

    def _seconds_to_wait(self) -> float:
        due = [at for at, _ in self._later]
        due += [state.not_before for state in self._places.values() if state.worker is None and not state.closed]
        due += [self._kill_at, self._look_at]
        return min(LOOK_EVERY_S, max(0.01, min(due) - self._clock()))

    def _run_later(self) -> None:
        now = self._clock()
        due = [action for at, action in self._later if at <= now]
        self._later = [(at, action) for at, action in self._later if at > now]
        for action in due:
            action()

    def _ask(
        self, worker: _LiveWorker, hear: Callable[[Any, Exception | None], None], method: str, *values: Any
    ) -> None:
        """Call a method of the worker; this thread later calls `hear` with the result, unless the worker is over."""

        def answer(value: Any, error: Exception | None) -> None:
            self._answers.put(lambda: hear(value, error) if worker.stage != "over" else None)

        worker.actor.ask(answer, method, *values)

    # -- nodes and places -----------------------------------------------------------------------------------------

    def _look_at_nodes(self) -> None:
        """Request the nodes in a thread: the request may hang, and signals must still be handled."""
        if self._looking or self._clock() < self._look_at:
            return
        self._looking, cluster = True, self._cluster
        assert cluster is not None

        def look() -> None:
            try:
                nodes: list[RayNode] | None = cluster.nodes()
            except Exception:  # the head does not answer now; lost workers are noticed by their failed calls
                nodes = None
            self._answers.put(partial(self._see_nodes, nodes))

        threading.Thread(target=look, name="nodes", daemon=True).start()

    def _see_nodes(self, nodes: list[RayNode] | None) -> None:
        self._looking, self._look_at = False, self._clock() + LOOK_EVERY_S
        if nodes is None:
            return
        living = {node.id for node in nodes}
        for key, state in list(self._places.items()):
            if state.place.node.id in living:
                continue
            if state.worker is not None:
                self._lose(state.worker, "its node is gone")
            del self._places[key]
        for place in next_places(nodes, [state.place for state in self._places.values()], self._work.workers):
            self._places[place.node.id, place.slot] = _PlaceState(place)
            self._log.debug("ray_place", worker=place.name)
        if not self._looked and not self._places:
            raise ConfigInvalid(
                "the Ray cluster has no GPU"
                if self._work.workers is None
                else "the Ray cluster has no CPU for workers",
                where="--on",
                todo="Add nodes with GPUs, or give --workers N to compute on CPUs",
            )
        self._looked = True

    def _start_workers(self) -> None:
        if self._stop.draining or not self._looked:
            return
        busy = len(self._workers())
        for state in self._places.values():
            if state.worker is not None or state.closed or self._clock() < state.not_before:
                continue
            if busy >= max(1, self._hand_out.left):  # more workers than remaining jobs are useless
                break
            busy += 1
            self._start(state)

    def _start(self, state: _PlaceState) -> None:
        assert self._cluster is not None
        place = state.place
        state.names += 1
        actor = self._cluster.start(place, self._work.variables(place))
        name = place.name if state.names == 1 else f"{place.name}+{state.names - 1}"
        worker = _LiveWorker(name, place, actor, self._reports.open(place.name), self._clock())
        state.worker = worker
        self._ask(worker, partial(self._check, worker), "describe")
        self._later.append((self._clock() + TELL_PENDING_S, partial(self._tell_pending, worker)))

    def _tell_pending(self, worker: _LiveWorker) -> None:
        if worker.stage == "starting" and worker.pid is None:
            what = "GPU" if worker.place.gpus else "CPU"
            self._log.warning(
                "ray_worker_waits", worker=worker.place.name, why=f"Ray has not assigned a {what} of its node to it yet"
            )

    # -- one worker -----------------------------------------------------------------------------------------------

    def _check(self, worker: _LiveWorker, facts: Any, error: Exception | None) -> None:
        """Check that the started process has the driver's version; then begin its work."""
        if error is not None:
            self._go_wrong(worker, error, partial(self._ask, worker, partial(self._check, worker), "describe"))
            return
        if "missing" in facts or facts["code"] != describe_code():
            there = f"is not installed ({facts['missing']})" if "missing" in facts else f"has version {facts['code']}"
            self._fail(
                worker,
                ConfigInvalid(
                    f"node {worker.place.node.name}: video-lab-runner {there}; this machine has {describe_code()}",
                    where="--on",
                    todo="Install the same version on all nodes",
                ),
            )
            return
        worker.pid = facts["pid"]
        work, place = self._work, worker.place
        order = WorkerOrder(
            work.run, work.settings, place.sharing, place.gpus > 0, os.getcwd(), self.shared_file, work.demands
        )
        self._ask(worker, partial(self._begin, worker), "begin", order)

    def _begin(self, worker: _LiveWorker, _: Any, error: Exception | None) -> None:
        if isinstance(error, WorkerSilent):  # it may have begun, and must not begin twice
            self._lose(worker, str(error))
        elif error is not None:
            self._go_wrong(worker, error, lambda: None)
        else:
            worker.stage = "working"
            self._log.info("ray_worker_started", worker=worker.place.name, pid=worker.pid)
            self._hand_out.join(worker.name)
            self._fetch(worker)

    def _fetch(self, worker: _LiveWorker) -> None:
        if worker.stage == "working":
            self._ask(worker, partial(self._hear, worker), "fetch", worker.seen, FETCH_S)

    def _hear(self, worker: _LiveWorker, answer: Any, error: Exception | None) -> None:
        if error is not None:
            self._go_wrong(worker, error, partial(self._fetch, worker))
            return
        worker.silent_since = None
        worker.seen, messages = answer
        for what, *more in messages:
            self._reports.hear(worker.report, what, *more)
            if what == "phase":
                self._hand_out.note_phase(worker.name, *more)
            elif what == "finished":
                worker.has.discard(more[0].id)
                self._hand_out.note_end(worker.name, more[0].id)
        if worker.report.over:
            self._close(worker)
        else:
            self._fetch(worker)

    def _hand_out_jobs(self) -> None:
        if self._stop.draining:
            return
        workers = {worker.name: worker for worker in self._workers()}
        if not self._keeps_for_starting():
            for name, job in self._hand_out.next_jobs():
                workers[name].has.add(job.id)
                self._send(workers[name], job)
        if self._hand_out.left == 0:
            for worker in workers.values():
                if worker.stage == "working" and not worker.told_end:
                    worker.told_end = True
                    self._ask(worker, lambda *_: None, "end")

    def _keeps_for_starting(self) -> bool:
        """Whether to keep the remaining jobs for starting workers instead of giving them ahead to busy ones."""
        workers = self._workers()
        since = self._clock() - KEEP_S
        starting = sum(worker.stage == "starting" and worker.started > since for worker in workers)
        waiting = self._hand_out.left - sum(len(worker.has) for worker in workers)
        return 0 < waiting <= starting and all(worker.has for worker in workers if worker.stage == "working")

    def _send(self, worker: _LiveWorker, job: Job) -> None:
        def hear(_: Any, error: Exception | None) -> None:
            if error is not None:  # the worker ignores a job that it already has, so a retry is safe
                self._go_wrong(worker, error, partial(self._send, worker, job))

        if worker.stage == "working":
            self._ask(worker, hear, "send", job)

    def _go_wrong(self, worker: _LiveWorker, error: Exception, again: Callable[[], None]) -> None:
        """Handle a failed call: the worker is lost, or cannot be reached now, or has raised an error."""
        if isinstance(error, WorkerSilent):
            worker.silent_since = worker.silent_since or self._clock()
            if self._clock() - worker.silent_since < SILENT_S:
                self._later.append((self._clock() + ASK_AGAIN_S, lambda: again() if worker.stage != "over" else None))
                return
            self._lose(worker, f"it cannot be reached for {SILENT_S:.0f} s")
        elif isinstance(error, WorkerGone):
            self._lose(worker, str(error))
        else:
            self._fail(worker, as_runner_error(error))

    # -- its end --------------------------------------------------------------------------------------------------

    def _close(self, worker: _LiveWorker) -> None:
        """Close the worker after it has reported its result or an error."""
        error = worker.report.error or worker.report.stopped_by
        state = self._leave(worker)
        if error is not None:
            self._log.error("ray_worker_failed", worker=worker.place.name, code=error.code, message=error.message)
        if state is not None:
            # After a lost device a new process may continue. A failure before the first job would happen again.
            state.closed = error is None or worker.report.finished == 0 or not error.retryable
            state.in_vain = 0

    def _fail(self, worker: _LiveWorker, error: RunnerError) -> None:
        """Close the worker and its place: no worker can work there."""
        worker.report.error = error
        self._close(worker)

    def _lose(self, worker: _LiveWorker, how: str) -> None:
        """Handle a worker that died. Its jobs go to other workers; a new worker starts at its place, up to STARTS."""
        jobs = sorted(worker.report.jobs)
        state = self._leave(worker)
        if worker.pid is None:  # e.g. because its node was ending
            self._log.warning("ray_worker_not_started", worker=worker.place.name, why=how)
        else:
            self._log.error(
                "ray_worker_died",
                worker=worker.place.name,
                pid=worker.pid,
                how=how,
                jobs=jobs,
                todo="Other workers take its jobs. If it was killed, look for the out-of-memory killer in the node's "
                "log",
            )
        if state is None:
            return
        state.in_vain = 0 if worker.report.finished else state.in_vain + 1
        state.not_before = self._clock() + LOOK_EVERY_S / 2 * max(1, state.in_vain)  # a node that ends is noticed first
        if state.in_vain >= STARTS:
            state.closed = True
            self._log.error("ray_place_given_up", worker=worker.place.name, starts=STARTS)

    def _leave(self, worker: _LiveWorker) -> _PlaceState | None:
        """End the worker: its jobs wait again and its process is killed. Return the state of its place, if any."""
        worker.stage = "over"
        self._reports.leave(worker.report)
        self._hand_out.leave(worker.name)
        worker.actor.kill()
        state = self._places.get((worker.place.node.id, worker.place.slot))
        if state is None or state.worker is not worker:
            return None
        state.worker = None
        return state

    # -- signals --------------------------------------------------------------------------------------------------

    def _pass_on_signals(self) -> None:
        if not self._signals:
            return
        drain_s = self._work.settings.drain_s if self._signals == 1 else 0.0
        self._kill_at = min(self._kill_at, self._clock() + drain_s + END_S)
        for worker in self._workers():
            if worker.stage == "starting":  # it has no job
                self._leave(worker)
                continue
            while worker.stops < self._signals:
                worker.stops += 1
                self._ask(worker, lambda *_: None, "stop", self._stop.signal)
        if self._clock() >= self._kill_at:
            for worker in self._workers():
                self._log.error("ray_worker_killed", worker=worker.place.name, why="it did not end after a signal")
                self._leave(worker)

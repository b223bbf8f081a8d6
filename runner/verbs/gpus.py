"""GPUs: runs `run --gpus` as one process per GPU of this machine; the processes share one manifest by leases.

In:   the value of the flag (`all`, `0,2`), settings of a run. Out: the merged lines of all jobs and an exit code; one
progress and one log.
Never: how a process renders. If a process dies, the others go on and run its jobs when its leases end.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext, suppress
from dataclasses import dataclass
from multiprocessing import Pipe
from multiprocessing.connection import Connection, wait
from typing import Any

import structlog

from runner.batch.progress import Progress
from runner.batch.shared_run import JoinedReports, SharedRun, WorkerReport
from runner.batch.stop import Stop
from runner.errors import ConfigInvalid
from runner.preprocess.networks.providers import usable_cpus
from runner.records.record import environment
from runner.verbs.gpu_process import Assignment
from runner.verbs.settings import RunSettings

__all__ = ["GpuPlace", "find_gpus", "places_for", "run_processes"]

VISIBLE = "CUDA_VISIBLE_DEVICES"
# Read when the libraries are first imported: OpenMP (torch, ONNX Runtime), MKL, OpenBLAS (numpy).
THREAD_VARIABLES = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS")
END_S = 60.0  # seconds after the drain time until a process that has not ended is killed; assumed
START = "import json, sys; sys.path[:] = json.loads(sys.argv[2]); from runner.verbs.gpu_process import main; main()"


@dataclass(frozen=True)
class GpuPlace:
    """The GPU of one process: its name in the log, and the variables added to the process's environment."""

    name: str
    variables: Mapping[str, str]


def find_gpus(
    asked: str, variables: Mapping[str, str], count: Callable[[], int] = lambda: len(environment()["gpus"])
) -> list[str]:
    """Return the GPUs that `asked` (`all`, or numbers from 0) selects, each as CUDA_VISIBLE_DEVICES would name it.

    If that variable is set, a number is an index into its list. Otherwise `count` returns the number of GPUs, from the
    driver, without torch. Raises ConfigInvalid if there is no GPU, or not the requested one.
    """
    named = variables.get(VISIBLE)
    if named is not None:
        there = []
        for name in (word.strip() for word in named.split(",")):
            if not name or name.startswith("-"):  # CUDA ends the list here
                break
            there.append(name)
        source = f"{VISIBLE}={named}"
    else:
        there = [str(number) for number in range(count())]
        source = "the driver"
    if not there:
        raise ConfigInvalid(
            f"{source} names no GPU" if named is not None else "the driver of this machine finds no GPU",
            where="--gpus",
            todo="Check the driver (nvidia-smi) and, in a container, that GPUs are passed on; or leave out --gpus",
        )
    if asked == "all":
        return there
    numbers = [int(word) for word in asked.split(",")]
    if missing := [number for number in numbers if number >= len(there)]:
        raise ConfigInvalid(
            f"there is no GPU {missing[0]}: {source} has {len(there)}, counted from 0",
            where="--gpus",
            todo="Write --gpus all",
        )
    return [there[number] for number in numbers]


def places_for(gpus: Sequence[str], variables: Mapping[str, str], cpus: int | None = None) -> list[GpuPlace]:
    """Return a place for each of `gpus`. The machine's cores are divided among them.

    `cpus`: number of cores; by default those that this process may use. A number of threads that `variables` sets
    already is kept, for each process.
    """
    threads = max(1, (cpus or usable_cpus({})) // len(gpus))
    shared = {name: str(threads) for name in THREAD_VARIABLES if name not in variables}
    if VISIBLE not in variables:  # the driver (nvidia-smi) numbers GPUs in bus order, CUDA by default by speed
        shared |= {"CUDA_DEVICE_ORDER": variables.get("CUDA_DEVICE_ORDER", "PCI_BUS_ID")}
    return [GpuPlace(f"GPU {gpu}" if gpu.isdigit() else gpu, shared | {VISIBLE: gpu}) for gpu in gpus]


@dataclass
class _Process:
    """One process, seen from the parent."""

    place: GpuPlace
    process: subprocess.Popen[bytes]
    connection: Connection
    report: WorkerReport
    stops: int = 0  # number of signals passed on
    waits_to_load: bool = False
    open: bool = True

    def send(self, message: object) -> None:
        with suppress(OSError):  # the process has died; the loop finds that when it reads its messages
            self.connection.send(message)


def run_processes(
    settings: RunSettings,
    places: Sequence[GpuPlace],
    run: Callable[..., Any],
    job_ids: Sequence[str],
    progress: Progress,
    *,
    stop: Stop,
    read_files: Callable[[Callable[[], bool]], object] = lambda go_on: None,
) -> SharedRun:
    """Run `run(settings, …)` in one process per place, wait for all, and return their merged result.

    `run`: a function of a module (it is pickled): `verbs.run.run` with its keyword `share`. `progress` gets the end of
    each job once. `read_files` reads the model into the page cache before the first process loads it; it ends when its
    argument returns False.

    `stop` receives signals. In the main thread SIGINT and SIGTERM are passed on once to each process; a process that
    does not end then is killed. If this process dies, the others stop as after SIGTERM. Raises the RunnerError of a
    process if none of them began its jobs.
    """
    reader, writer = os.pipe()
    os.set_blocking(writer, False)

    def wake() -> None:
        with suppress(OSError):  # the pipe is full, so the loop continues in any case
            os.write(writer, b"\0")

    group = _GpuGroup(settings, run, job_ids, progress, stop, read_files, wake)
    in_main_thread = threading.current_thread() is threading.main_thread()
    if not in_main_thread:  # Python hands signals to the main thread alone
        structlog.get_logger().info("signals_ignored", why="the run is not in the main thread")
    progress.started(len(job_ids))
    try:
        with stop.listening(group.count_signal, writer) if in_main_thread else nullcontext():
            return group.run(places, reader)
    finally:
        progress.close()
        group.end()
        for descriptor in (reader, writer):
            os.close(descriptor)


class _GpuGroup:
    """The processes of one command, and their reports."""

    def __init__(
        self,
        settings: RunSettings,
        run: Callable[..., Any],
        job_ids: Sequence[str],
        progress: Progress,
        stop: Stop,
        read_files: Callable[[Callable[[], bool]], object],
        wake: Callable[[], None],
    ) -> None:
        self._settings, self._run = settings, run
        self._stop, self._read_files, self._wake = stop, read_files, wake
        self._processes: list[_Process] = []
        self._reports = JoinedReports(job_ids, progress, "gpu")
        self._signals = 0
        self._kill_at = float("inf")
        self._reading: threading.Thread | None = None
        self._have_read = threading.Event()
        self._log = structlog.get_logger()

    def count_signal(self) -> None:
        """Count a signal. It is called in the signal handler; only the loop writes to the processes."""
        self._signals += 1

    def run(self, places: Sequence[GpuPlace], wake_descriptor: int) -> SharedRun:
        for place in places:
            if self._stop.draining:
                break
            self._processes.append(self._start(place, len(places)))
        while waiting := {process.connection: process for process in self._processes if process.open}:
            for ready in wait([*waiting, wake_descriptor], timeout=self._seconds_to_kill()):
                if isinstance(ready, int):
                    os.read(ready, 4096)
                elif isinstance(ready, Connection):
                    self._hear(waiting[ready])
            self._pass_on_signals()
            self._let_load()
        return self._reports.merge()

    def end(self) -> None:
        """Close all connections, so that the processes end; kill those that do not end in time."""
        for process in self._processes:
            process.connection.close()
        deadline = time.monotonic() + self._settings.drain_s + END_S
        for process in self._processes:
            try:
                process.process.wait(max(0.0, deadline - time.monotonic()))
            except subprocess.TimeoutExpired:
                process.process.kill()
                process.process.wait()

    def _start(self, place: GpuPlace, count: int) -> _Process:
        ours, theirs = Pipe()
        try:
            started = subprocess.Popen(
                [sys.executable, "-c", START, str(theirs.fileno()), json.dumps(sys.path)],
                env={**os.environ, **place.variables},
                pass_fds=[theirs.fileno()],
                stdin=subprocess.DEVNULL,
                start_new_session=True,  # Ctrl-C at the terminal reaches only this process, which passes it on
            )
        finally:
            theirs.close()
        process = _Process(place, started, ours, self._reports.open(place.name))
        process.send(Assignment(self._run, self._settings, count))
        self._log.info("gpu_process_started", gpu=place.name, pid=started.pid)
        return process

    def _hear(self, process: _Process) -> None:
        try:
            what, *more = process.connection.recv()
        except (EOFError, OSError):
            self._close(process)
            return
        if what == "loading":
            process.waits_to_load = True
        else:
            self._reports.hear(process.report, what, *more)

    def _close(self, process: _Process) -> None:
        """Handle a closed connection: the process is ending or was killed."""
        process.open = False
        code = process.process.wait()
        report = process.report
        self._reports.leave(report)
        if not report.over:
            self._log.error(
                "gpu_process_died",
                gpu=process.place.name,
                pid=process.process.pid,
                how=f"exit code {code}" if code >= 0 else signal.strsignal(-code) or f"signal {-code}",
                todo="The other processes go on. If it was killed, look for the out-of-memory killer in the system log",
            )
        elif report.error is not None:
            error = report.error
            self._log.error("gpu_process_failed", gpu=process.place.name, code=error.code, message=error.message)

    def _pass_on_signals(self) -> None:
        for process in self._processes:
            while process.open and process.stops < self._signals:
                process.stops += 1
                process.send(("stop", self._stop.signal))
        if self._signals and self._seconds_to_kill() == 0:
            for process in self._processes:
                if process.open:
                    self._log.error("gpu_process_killed", gpu=process.place.name, why="it did not end after a signal")
                    process.process.kill()
                    process.report.ended = self._stop.exit_code

    def _seconds_to_kill(self) -> float | None:
        """Return the seconds until stopped processes are killed; None if no signal has come."""
        if not self._signals:
            return None
        drain_s = self._settings.drain_s if self._signals == 1 else 0.0
        self._kill_at = min(self._kill_at, time.monotonic() + drain_s + END_S)
        return max(0.0, self._kill_at - time.monotonic())

    def _let_load(self) -> None:
        """Let waiting processes load the model after its files are read. The first one starts the reading."""
        waiting = [process for process in self._processes if process.waits_to_load]
        if waiting and self._reading is None:
            self._reading = threading.Thread(target=self._read, name="page cache", daemon=True)
            self._reading.start()
        if self._have_read.is_set():
            for process in waiting:
                process.waits_to_load = False
                process.send(("load",))

    def _read(self) -> None:
        try:
            self._read_files(lambda: not self._stop.draining)
        except Exception as error:  # reading ahead only saves time
            self._log.warning("model_files_not_read", message=str(error))
        finally:
            self._have_read.set()
            self._wake()

"""GPU process: one of the processes of `run --gpus`, from its start to its end.

In:   a connection to the process that started it: what to run, then signals and permissions to load.
Out:  over the same connection events, progress, and the outcome or an error.
Never: which GPU: the environment names the one that this process sees.

Signals reach this process over the connection alone, each once. A scheduler may send a signal to every process of a
job; directly received ones are ignored, as the second would count as "now".
"""

from __future__ import annotations

import os
import signal
import sys
import threading
from collections.abc import Callable, MutableMapping
from contextlib import suppress
from dataclasses import dataclass
from multiprocessing.connection import Connection
from typing import Any

import structlog

from runner.batch.run_pace import Phase, StepCount
from runner.batch.stop import Stop, leave
from runner.errors import as_runner_error
from runner.records.library_messages import capture_library_messages
from runner.records.record import JobLine
from runner.redact import redact_tree
from runner.verbs.settings import RunSettings

__all__ = ["Assignment", "MachineShare", "main"]


@dataclass(frozen=True)
class MachineShare:
    """What a run does otherwise that is one of `processes` that one command runs on this machine.

    It is stopped by `stop` and listens to no signal. `before_load` returns when this process may load its model.
    """

    processes: int
    stop: Stop
    before_load: Callable[[], None]


@dataclass(frozen=True)
class Assignment:
    """The first message to a process: `run(settings, progress, share=…)` is what it shall do."""

    run: Callable[..., Any]
    settings: RunSettings
    processes: int


class _Parent:
    """The connection to the process that started this one. `Progress` of this process's run. Safe from any thread."""

    def __init__(self, connection: Connection) -> None:
        self._connection = connection
        self._lock = threading.Lock()

    def tell(self, *message: Any) -> None:
        """Send a message. A parent that has died hears nothing; `listen` ends the run."""
        with self._lock, suppress(OSError):
            self._connection.send(message)

    def listen(self, stop: Stop, may_load: threading.Event) -> None:
        """Pass on what the parent says, until it is gone: then as if SIGTERM had come."""
        try:
            while True:
                what, *more = self._connection.recv()
                if what == "stop":
                    stop.request(*more)
                may_load.set()  # after a signal too: the model is not loaded any more, and nothing shall wait for it
        except (EOFError, OSError):
            stop.request(signal.SIGTERM)
            may_load.set()

    def log(self, logger: object, method: str, event: MutableMapping[str, Any]) -> Any:
        """A structlog processor: the parent writes the event."""
        self.tell("log", method, redact_tree(event))
        raise structlog.DropEvent

    def started(self, jobs: int) -> None:
        """Nothing: the parent knows the jobs."""

    def phase(self, job_id: str, phase: Phase) -> None:
        self.tell("phase", job_id, phase)

    def step(self, job_id: str, at: StepCount) -> None:
        self.tell("step", job_id, at)

    def finished(self, line: JobLine) -> None:
        self.tell("finished", line)

    def close(self) -> None:
        """Nothing: the outcome follows."""


def main() -> None:
    """Do what the process at the other end of descriptor `sys.argv[1]` assigns, and end with the run's exit code."""
    for signum in (signal.SIGINT, signal.SIGTERM):
        signal.signal(signum, signal.SIG_IGN)
    connection = Connection(int(sys.argv[1]))
    os.set_inheritable(connection.fileno(), False)  # a compiler that outlives this process would keep it open
    parent = _Parent(connection)
    structlog.configure(
        processors=[structlog.processors.format_exc_info, parent.log],
        wrapper_class=structlog.BoundLogger,
        cache_logger_on_first_use=False,
    )
    capture_library_messages()
    code = 1
    try:
        assignment: Assignment = connection.recv()
        code = _work(assignment, parent)
    except Exception as error:
        found = as_runner_error(error)
        if found is not error:  # a bug of ours: its traceback helps to find it
            structlog.get_logger().error("gpu_process_broke", exc_info=True)
        parent.tell("failed", found)
        code = found.exit_code
    leave(code)
    sys.exit(code)


def _work(assignment: Assignment, parent: _Parent) -> int:
    stop, may_load = Stop(assignment.settings.drain_s), threading.Event()
    threading.Thread(target=parent.listen, args=(stop, may_load), name="parent", daemon=True).start()

    def before_load() -> None:
        parent.tell("loading")
        may_load.wait()

    share = MachineShare(assignment.processes, stop, before_load)
    outcome = assignment.run(assignment.settings, parent, share=share)
    parent.tell("ended", outcome.exit_code, outcome.lines, outcome.error)
    return int(outcome.exit_code)

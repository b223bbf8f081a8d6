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
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from multiprocessing.connection import Connection
from typing import Any

from runner.batch.stop import Stop, leave
from runner.batch.worker_link import MachineShare, WorkerLink
from runner.verbs.settings import RunSettings

__all__ = ["Assignment", "main"]


@dataclass(frozen=True)
class Assignment:
    """The first message to a process: `run(settings, progress, share=…)` is what it shall do."""

    run: Callable[..., Any]
    settings: RunSettings
    processes: int


class _Parent:
    """The connection to the process that started this one. Safe from any thread."""

    def __init__(self, connection: Connection) -> None:
        self._connection = connection
        self._lock = threading.Lock()

    def send(self, message: tuple[Any, ...]) -> None:
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


def main() -> None:
    """Do what the process at the other end of descriptor `sys.argv[1]` assigns, and end with the run's exit code."""
    for signum in (signal.SIGINT, signal.SIGTERM):
        signal.signal(signum, signal.SIG_IGN)
    connection = Connection(int(sys.argv[1]))
    os.set_inheritable(connection.fileno(), False)  # a compiler that outlives this process would keep it open
    parent = _Parent(connection)
    link = WorkerLink(parent.send)
    link.take_log()
    code = link.run(lambda: _work(connection.recv(), parent, link), "gpu_process_broke")
    leave(code)
    sys.exit(code)


def _work(assignment: Assignment, parent: _Parent, link: WorkerLink) -> Any:
    stop, may_load = Stop(assignment.settings.drain_s), threading.Event()
    threading.Thread(target=parent.listen, args=(stop, may_load), name="parent", daemon=True).start()

    def before_load() -> None:
        link.tell("loading")
        may_load.wait()

    share = MachineShare(assignment.processes, stop, before_load)
    return assignment.run(assignment.settings, link, share=share)

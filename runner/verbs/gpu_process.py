"""GPU process: runs one of the processes of `run --gpus`, from its start to its end.

In:   a connection to the parent process: the assignment, then signals and permissions to load.
Out:  events, progress, and the outcome or an error, over the same connection.
Never: the choice of the GPU: the environment names the one GPU that this process sees.

This process gets each signal once, over the connection. Signals received directly are ignored: a scheduler may send a
signal to every process of a job, and a second signal would mean "end now".
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
    """The first message to a process. It calls `run(settings, progress, share=…)`."""

    run: Callable[..., Any]
    settings: RunSettings
    processes: int


class _Parent:
    """The connection to the parent process. Thread-safe."""

    def __init__(self, connection: Connection) -> None:
        self._connection = connection
        self._lock = threading.Lock()

    def send(self, message: tuple[Any, ...]) -> None:
        """Send a message. If the parent has died it is dropped, and `listen` ends the run."""
        with self._lock, suppress(OSError):
            self._connection.send(message)

    def listen(self, stop: Stop, may_load: threading.Event) -> None:
        """Pass on the parent's messages. When the parent has ended, stop as after SIGTERM."""
        try:
            while True:
                what, *more = self._connection.recv()
                if what == "stop":
                    stop.request(*more)
                may_load.set()  # after a signal too: the model is not loaded then, and nothing may wait for it
        except (EOFError, OSError):
            stop.request(signal.SIGTERM)
            may_load.set()


def main() -> None:
    """Run the assignment that comes over descriptor `sys.argv[1]`, and exit with the run's exit code."""
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

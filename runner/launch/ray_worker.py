"""Ray worker: one process of `run --on ray`; it runs the batch loop on jobs that the driver sends.

In:   what to run, jobs one at a time, signals. Out: messages, which the driver fetches in order.
Never: which job is next; calling Ray: `ray_actor.py` makes an actor of the class that stands here.

Ray calls the methods from several threads. The run has a thread of its own, so that it can be told to stop, and asked,
while it works.
"""

from __future__ import annotations

import dataclasses
import hashlib
import os
import platform
import socket
import threading
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from runner import __version__
from runner.batch.stop import Stop
from runner.batch.worker_link import MachineShare, WorkerLink
from runner.errors import ConfigInvalid
from runner.generation.protocol import JobDemand
from runner.launch.mailbox import Mailbox
from runner.records.record import environment
from runner.spec.manifest import Job
from runner.storage import open_storage

__all__ = ["RayWorker", "WorkerOrder", "describe_code", "describe_process"]

Message = tuple[Any, ...]


@dataclass(frozen=True)
class WorkerOrder:
    """What a worker shall do: `run(settings, progress, source=…, share=…)`, `settings` being a RunSettings.

    workers: how many work on its machine. gpu: whether Ray has given it one. folder: the working directory of the
    command, for relative paths. shared_file: a key of OUT and the bytes there, which the worker must find before it
    takes a job; None: nothing. demands: of all jobs that it may get.
    """

    run: Callable[..., Any]
    settings: Any
    workers: int
    gpu: bool
    folder: str
    shared_file: tuple[str, bytes] | None = None
    demands: Sequence[JobDemand] = ()


class RayWorker:
    """The run of one worker. Safe from any thread."""

    def __init__(self, order: WorkerOrder) -> None:
        self._order = order
        self._stop = Stop(order.settings.drain_s)
        self._mailbox = Mailbox()
        self._sent: set[str] = set()
        self._changed = threading.Condition()
        self._messages: list[Message] = []  # those that the driver has not said to have
        self._dropped = 0  # those before them
        self._thread = threading.Thread(target=self._work, name="run", daemon=True)
        self._thread.start()

    def send(self, job: Job) -> bool:
        """Hand it a job; a second time the same job counts for nothing. False if its loop is stopping."""
        with self._changed:
            if job.id in self._sent:
                return True
            self._sent.add(job.id)
        return self._mailbox.send(job)

    def end(self) -> None:
        """No more jobs will come: the run ends when those that it has are done."""
        self._mailbox.end()

    def stop(self, signum: int) -> None:
        """Pass on a signal: the first one lets it drain, the second ends it now."""
        self._stop.request(signum)

    def join(self) -> None:
        """Wait until its run has ended."""
        self._thread.join()

    def fetch(self, seen: int, wait_s: float) -> tuple[int, list[Message]]:
        """The messages after the first `seen` ones, and how many there are with them; waits for one at most `wait_s`.

        A question that is asked again, as its answer was lost, gets the same messages.
        """
        with self._changed:
            del self._messages[: max(0, seen - self._dropped)]
            self._dropped = max(self._dropped, seen)
            self._changed.wait_for(lambda: self._messages, wait_s)
            return self._dropped + len(self._messages), list(self._messages)

    def _tell(self, message: Message) -> None:
        with self._changed:
            self._messages.append(message)
            self._changed.notify_all()

    def _work(self) -> None:
        link = WorkerLink(self._tell)
        link.take_log()
        link.run(lambda: self._run(link))

    def _run(self, link: WorkerLink) -> Any:
        order = self._order
        with suppress(OSError):  # a node that lacks it has no use for relative paths either
            os.chdir(order.folder)
        if order.shared_file is not None:
            _require_shared(order.settings.out, *order.shared_file)
        settings = order.settings
        if order.gpu and settings.device == "auto" and environment()["gpus"]:  # never silently on the CPU instead
            settings = dataclasses.replace(settings, device="cuda")
        share = MachineShare(order.workers, self._stop, lambda: None, order.demands)
        return order.run(settings, link, source=self._mailbox, share=share)


def describe_process() -> dict[str, Any]:
    """This process, for the driver: `host`, `pid`, and `code`, which must be the driver's own."""
    return {"host": socket.gethostname(), "pid": os.getpid(), "code": describe_code()}


@cache
def describe_code() -> str:
    """`0.1.0 (3f9c1a2b, Python 3.11)`: the version of this package, and a digest of what its modules say.

    Settings and jobs travel pickled; between two states of the code they may mean two things.
    """
    digest = hashlib.sha256()
    package = Path(__file__).resolve().parent.parent
    for path in sorted(package.rglob("*.py")):
        digest.update(str(path.relative_to(package)).encode() + b"\0" + path.read_bytes())
    python = ".".join(platform.python_version_tuple()[:2])
    return f"{__version__} ({digest.hexdigest()[:8]}, Python {python})"


def _require_shared(out: str, key: str, data: bytes) -> None:
    """Raise ConfigInvalid where OUT is not the folder that the driver has written to: outputs would be scattered."""
    if open_storage(out).read_bytes(key) != data:
        raise ConfigInvalid(
            f"OUT is not the same folder on node {socket.gethostname()}: it lacks {key}",
            where=out,
            todo="Mount one folder on all nodes under this path, or write to s3://…",
        )

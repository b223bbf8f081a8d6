"""Ray worker: one process of `run --on ray`; it runs the batch loop on jobs that the driver sends.

In:   the function to run, jobs one at a time, signals. Out: messages, which the driver fetches in order.
Never: which job is next; calls to Ray: `ray_actor.py` makes an actor of this file's class.

Ray calls the methods from several threads. The run has a separate thread, so that the worker can receive signals and
send messages while it works.
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
    """The order for a worker: it calls `run(settings, progress, source=…, share=…)`; `settings` is a RunSettings.

    workers: number of workers on its machine. gpu: whether Ray has assigned a GPU to it. folder: the working directory
    of the command, for relative paths. shared_file: a key of OUT and its content, which the worker checks before it
    takes a job; None: no check. demands: of all jobs that it may get.
    """

    run: Callable[..., Any]
    settings: Any
    workers: int
    gpu: bool
    folder: str
    shared_file: tuple[str, bytes] | None = None
    demands: Sequence[JobDemand] = ()


class RayWorker:
    """The run of one worker. Thread-safe."""

    def __init__(self, order: WorkerOrder) -> None:
        self._order = order
        self._stop = Stop(order.settings.drain_s)
        self._mailbox = Mailbox()
        self._sent: set[str] = set()
        self._changed = threading.Condition()
        self._messages: list[Message] = []  # messages that the driver has not confirmed
        self._dropped = 0  # number of confirmed messages before them
        self._thread = threading.Thread(target=self._work, name="run", daemon=True)
        self._thread.start()

    def send(self, job: Job) -> bool:
        """Send a job to the loop; a job that was sent before is ignored. Returns False if the loop is stopping."""
        with self._changed:
            if job.id in self._sent:
                return True
            self._sent.add(job.id)
        return self._mailbox.send(job)

    def end(self) -> None:
        """Announce that no more jobs will come: the run ends when its jobs are done."""
        self._mailbox.end()

    def stop(self, signum: int) -> None:
        """Pass on a signal: after the first one the run drains, the second one ends it now."""
        self._stop.request(signum)

    def join(self) -> None:
        """Wait until the run has ended."""
        self._thread.join()

    def fetch(self, seen: int, wait_s: float) -> tuple[int, list[Message]]:
        """Return (number of all messages so far, messages after the first `seen`); wait at most `wait_s` for one.

        A request that is repeated after a lost answer returns the same messages.
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
        with suppress(OSError):  # on a node without this folder relative paths do not work in any case
            os.chdir(order.folder)
        if order.shared_file is not None:
            _require_shared(order.settings.out, *order.shared_file)
        settings = order.settings
        if order.gpu and settings.device == "auto" and environment()["gpus"]:  # never fall back to the CPU silently
            settings = dataclasses.replace(settings, device="cuda")
        share = MachineShare(order.workers, self._stop, lambda: None, order.demands)
        return order.run(settings, link, source=self._mailbox, share=share)


def describe_process() -> dict[str, Any]:
    """Describe this process for the driver: `host`, `pid`, and `code`, which must equal the driver's."""
    return {"host": socket.gethostname(), "pid": os.getpid(), "code": describe_code()}


@cache
def describe_code() -> str:
    """Return e.g. `0.1.0 (3f9c1a2b, Python 3.11)`: the package's version and a digest of its modules' source.

    Settings and jobs are sent pickled, so that driver and worker must have the same code.
    """
    digest = hashlib.sha256()
    package = Path(__file__).resolve().parent.parent
    for path in sorted(package.rglob("*.py")):
        digest.update(str(path.relative_to(package)).encode() + b"\0" + path.read_bytes())
    python = ".".join(platform.python_version_tuple()[:2])
    return f"{__version__} ({digest.hexdigest()[:8]}, Python {python})"


def _require_shared(out: str, key: str, data: bytes) -> None:
    """Raise ConfigInvalid if OUT is not the driver's folder: outputs would be spread over several folders."""
    if open_storage(out).read_bytes(key) != data:
        raise ConfigInvalid(
            f"OUT is not the same folder on node {socket.gethostname()}: it lacks {key}",
            where=out,
            todo="Mount one folder on all nodes under this path, or write to s3://…",
        )

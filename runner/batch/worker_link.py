"""Worker link: what a worker of a shared run tells the process that started it: events, progress, the outcome.

In:   a function that sends one message, a tuple. Out: messages `log`, `phase`, `step`, `finished`, `ended`, `failed`;
`shared_run.py` reads them. Never: how a message travels: over a pipe (`run --gpus`) or by a call (`run --on ray`).
"""

from __future__ import annotations

from collections.abc import Callable, MutableMapping, Sequence
from dataclasses import dataclass
from typing import Any

import structlog

from runner.batch.run_pace import Phase, StepCount
from runner.batch.stop import Stop
from runner.errors import as_runner_error
from runner.generation.protocol import JobDemand
from runner.records.library_messages import capture_library_messages
from runner.records.record import JobLine
from runner.redact import redact_tree

__all__ = ["MachineShare", "WorkerLink"]


@dataclass(frozen=True)
class MachineShare:
    """What a run does otherwise that is one of `processes` that one command runs on this machine.

    It is stopped by `stop` and listens to no signal. `before_load` returns when this process may load its model.
    `demands`: of all jobs that the command shares out, where it knows more of them than this process.
    """

    processes: int
    stop: Stop
    before_load: Callable[[], None]
    demands: Sequence[JobDemand] = ()


class WorkerLink:
    """The way to the process that started this worker. `Progress` of this worker's run. Safe from any thread if `send`
    is."""

    def __init__(self, send: Callable[[tuple[Any, ...]], None]) -> None:
        self._send = send

    def tell(self, *message: Any) -> None:
        self._send(message)

    def take_log(self) -> None:
        """From now on every event of this process goes over the link, and what libraries log too."""
        structlog.configure(
            processors=[structlog.processors.format_exc_info, self._log],
            wrapper_class=structlog.BoundLogger,
            cache_logger_on_first_use=False,
        )
        capture_library_messages()

    def _log(self, logger: object, method: str, event: MutableMapping[str, Any]) -> Any:
        """A structlog processor: the other process writes the event."""
        self.tell("log", method, redact_tree(event))
        raise structlog.DropEvent

    def run(self, work: Callable[[], Any], bug_event: str = "worker_broke") -> int:
        """Call `work`, which returns an outcome; tell the outcome, or the error that it raised. The exit code."""
        try:
            outcome = work()
        except Exception as error:
            found = as_runner_error(error)
            if found is not error:  # a bug of ours: its traceback helps to find it
                structlog.get_logger().error(bug_event, exc_info=True)
            self.tell("failed", found)
            return found.exit_code
        self.tell("ended", outcome.exit_code, outcome.lines, outcome.error)
        return int(outcome.exit_code)

    def started(self, jobs: int) -> None:
        """Nothing: the other process knows the jobs."""

    def phase(self, job_id: str, phase: Phase) -> None:
        self.tell("phase", job_id, phase)

    def step(self, job_id: str, at: StepCount) -> None:
        self.tell("step", job_id, at)

    def finished(self, line: JobLine) -> None:
        self.tell("finished", line)

    def close(self) -> None:
        """Nothing: the outcome follows."""

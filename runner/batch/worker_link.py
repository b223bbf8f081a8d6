"""Worker link: send events, progress and the outcome of a worker to the process that started it.

In:   a function that sends one message (a tuple). Out: messages `log`, `phase`, `step`, `finished`, `ended`, `failed`,
which `shared_run.py` reads. Never: the transport: a pipe (`run --gpus`) or a remote call (`run --on ray`).
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
    """Settings of a run that is one of `processes` started by one command on this machine.

    `stop` stops the run; it handles no signals. `before_load` returns when this process may load its model.
    `demands`: those of all jobs of the command, if the command knows more jobs than this process.
    """

    processes: int
    stop: Stop
    before_load: Callable[[], None]
    demands: Sequence[JobDemand] = ()


class WorkerLink:
    """The connection to the process that started this worker; implements `Progress`. As thread-safe as `send`."""

    def __init__(self, send: Callable[[tuple[Any, ...]], None]) -> None:
        self._send = send

    def tell(self, *message: Any) -> None:
        """Send one message."""
        self._send(message)

    def take_log(self) -> None:
        """Send every event of this process, and library messages, over the link from now on."""
        structlog.configure(
            processors=[structlog.processors.format_exc_info, self._log],
            wrapper_class=structlog.BoundLogger,
            cache_logger_on_first_use=False,
        )
        capture_library_messages()

    def _log(self, logger: object, method: str, event: MutableMapping[str, Any]) -> Any:
        """Send the event instead of writing it (a structlog processor)."""
        self.tell("log", method, redact_tree(event))
        raise structlog.DropEvent

    def run(self, work: Callable[[], Any], bug_event: str = "worker_broke") -> int:
        """Call `work`, send its outcome or the error that it raised, and return the exit code."""
        try:
            outcome = work()
        except Exception as error:
            found = as_runner_error(error)
            if found is not error:  # a bug: log its traceback
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

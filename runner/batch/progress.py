"""Progress: a bar for a person at a terminal; elsewhere the event lines say enough."""

from __future__ import annotations

import threading
from typing import TYPE_CHECKING, Any, Protocol

from runner.records.record import JobLine

if TYPE_CHECKING:
    from rich.progress import TaskID

__all__ = ["BarProgress", "Progress", "SilentProgress", "choose_progress"]


class Progress(Protocol):
    """Shows how a run gets on. `Batch` calls `step` and `finished`, from any thread; who made the batch the others."""

    def started(self, jobs: int) -> None: ...

    def step(self, job_id: str, done: int, total: int) -> None: ...

    def finished(self, line: JobLine) -> None: ...

    def close(self) -> None: ...


class SilentProgress:
    def started(self, jobs: int) -> None:
        """Nothing: the run's first event has said so."""

    def step(self, job_id: str, done: int, total: int) -> None:
        """Nothing: a line a step would bury the events."""

    def finished(self, line: JobLine) -> None:
        """Nothing: the event of the job's end has been logged."""

    def close(self) -> None:
        """Nothing to close."""


class BarProgress:
    """Rich bars on standard error: jobs, and the model evaluations of each running job.

    A row goes to the next job when its job has ended or has done all evaluations: a process needs one row.
    """

    def __init__(self, console: Any) -> None:
        from rich.progress import (
            BarColumn,
            MofNCompleteColumn,
            Progress,
            TextColumn,
            TimeElapsedColumn,
            TimeRemainingColumn,
        )

        columns = (
            TextColumn("{task.description:<24}"),
            BarColumn(),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TimeRemainingColumn(),
        )
        self._bars = Progress(*columns, console=console, transient=True)
        self._jobs = self._bars.add_task("jobs", total=None)
        self._rows: dict[str, TaskID] = {}  # of jobs that are under way
        self._free: list[TaskID] = []
        self._lock = threading.Lock()

    def started(self, jobs: int) -> None:
        self._bars.update(self._jobs, total=jobs)
        self._bars.start()

    def step(self, job_id: str, done: int, total: int) -> None:
        with self._lock:
            row = self._rows.get(job_id)
            if row is None:
                row = self._free.pop() if self._free else self._bars.add_task(job_id, total=total)
                self._rows[job_id] = row
            self._bars.update(row, description=job_id[:24], completed=done, total=total)
            if done == total:
                self._give_back(job_id)

    def finished(self, line: JobLine) -> None:
        with self._lock:
            self._give_back(line.id)
        self._bars.update(self._jobs, advance=1)

    def _give_back(self, job_id: str) -> None:
        row = self._rows.pop(job_id, None)
        if row is not None:
            self._free.append(row)

    def close(self) -> None:
        self._bars.stop()


def choose_progress(log_format: str) -> BarProgress | SilentProgress:
    """A bar only where standard error is a terminal and the log is for people."""
    from rich.console import Console

    console = Console(stderr=True)
    return BarProgress(console) if console.is_terminal and log_format != "json" else SilentProgress()

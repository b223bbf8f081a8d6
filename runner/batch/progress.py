"""Progress: a bar for a person at a terminal; elsewhere the event lines say enough."""

from __future__ import annotations

from typing import Any

from runner.records.record import JobLine

__all__ = ["BarProgress", "SilentProgress", "choose_progress"]


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
    """Two rich bars on standard error: jobs, and model evaluations of the running job."""

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
        self._steps = self._bars.add_task("steps", total=None, visible=False)

    def started(self, jobs: int) -> None:
        self._bars.update(self._jobs, total=jobs)
        self._bars.start()

    def step(self, job_id: str, done: int, total: int) -> None:
        self._bars.update(self._steps, description=job_id[:24], completed=done, total=total, visible=True)

    def finished(self, line: JobLine) -> None:
        self._bars.update(self._jobs, advance=1)

    def close(self) -> None:
        self._bars.stop()


def choose_progress(log_format: str) -> BarProgress | SilentProgress:
    """A bar only where standard error is a terminal and the log is for people."""
    from rich.console import Console

    console = Console(stderr=True)
    return BarProgress(console) if console.is_terminal and log_format != "json" else SilentProgress()

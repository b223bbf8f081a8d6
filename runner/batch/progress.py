"""Progress: show how far a run is: bars on a terminal, else a line every ten seconds.

In:   phases, steps and ends of jobs. Out: bars or lines on standard error. Never: forecasts (run_pace.py).
"""

from __future__ import annotations

import sys
import threading
import time
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, Protocol

import structlog

from runner.batch.run_pace import Phase, RunPace, StepCount, describe_place
from runner.records.record import JobLine

if TYPE_CHECKING:
    from rich.progress import TaskID

__all__ = ["BarProgress", "LineProgress", "Progress", "SilentProgress", "choose_progress"]

LINE_EVERY_S = 10.0


class Progress(Protocol):
    """Shows how far a run is. `Batch` calls `phase`, `step` and `finished` from any thread; its caller the others."""

    def started(self, jobs: int) -> None:
        """The run begins, with this many jobs."""

    def phase(self, job_id: str, phase: Phase) -> None:
        """A job enters a phase. `waiting`: it is not under way, and runs again later or in another run."""

    def step(self, job_id: str, at: StepCount) -> None:
        """A step of a job has ended."""

    def finished(self, line: JobLine) -> None:
        """A job has ended: it succeeded, failed or was skipped."""

    def close(self) -> None:
        """The run has ended."""


class SilentProgress:
    """Shows nothing."""

    def started(self, jobs: int) -> None:
        """Nothing."""

    def phase(self, job_id: str, phase: Phase) -> None:
        """Nothing."""

    def step(self, job_id: str, at: StepCount) -> None:
        """Nothing."""

    def finished(self, line: JobLine) -> None:
        """Nothing."""

    def close(self) -> None:
        """Nothing."""


class LineProgress:
    """Writes a log line every `every_s` seconds while a job is under way, the first after `every_s` seconds.

    as_numbers: write an event `progress` with numbers instead of a text.
    """

    def __init__(
        self,
        *,
        as_numbers: bool = False,
        every_s: float = LINE_EVERY_S,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._pace = RunPace(clock)
        self._as_numbers, self._every_s = as_numbers, every_s
        self._closed = threading.Event()
        self._thread = threading.Thread(target=self._write_lines, name="progress", daemon=True)

    def started(self, jobs: int) -> None:
        self._pace.start(jobs)
        self._thread.start()

    def phase(self, job_id: str, phase: Phase) -> None:
        self._pace.enter(job_id, phase)

    def step(self, job_id: str, at: StepCount) -> None:
        self._pace.step(job_id, at)

    def finished(self, line: JobLine) -> None:
        self._pace.finish(line.id)

    def close(self) -> None:
        """Stop, and return when no more lines are written."""
        self._closed.set()
        if self._thread.is_alive():
            self._thread.join(timeout=self._every_s)

    def _write_lines(self) -> None:
        while not self._closed.wait(self._every_s):
            self._write_line()

    def _write_line(self) -> None:
        position = self._pace.position()
        if position is None:
            return
        if self._as_numbers:
            structlog.get_logger().info("progress", **position.fields)
        else:
            structlog.get_logger().info(position.text)


class BarProgress:
    """Shows bars of rich on standard error: all jobs with the ETA, and below a row for each job being generated.

    If no job is being generated, one row shows the phase of another job. Log lines appear above the bars.
    """

    def __init__(self, console: Any, clock: Callable[[], float] = time.monotonic) -> None:
        from rich.progress import BarColumn, ProgressColumn, TextColumn
        from rich.progress import Progress as Bars
        from rich.table import Column
        from rich.text import Text

        pace = self._pace = RunPace(clock)

        class PlaceColumn(ProgressColumn):
            """A column that is drawn at each refresh, as the ETA changes between two steps."""

            def render(self, task: Any) -> Text:
                place = task.fields["place"]
                if place is None:
                    done, jobs = pace.counts()
                    position = pace.position()
                    place = f"{done}/{jobs} done" + (f" · {position.eta}" if position and position.eta else "")
                return Text(place, no_wrap=True)

        width = max(8, min(24, console.width - 40))  # the rest is for the bar and the text behind it
        one_line = Column(no_wrap=True, overflow="ellipsis", max_width=width)
        self._bars = Bars(
            TextColumn("{task.description}", markup=False, table_column=one_line),
            BarColumn(bar_width=None, table_column=Column(ratio=1, min_width=4)),
            PlaceColumn(table_column=Column(no_wrap=True)),
            console=console,
            transient=True,
            expand=True,
            # Else printed results would go to standard error instead of the file or pipe.
            redirect_stdout=sys.stdout is not None and sys.stdout.isatty(),
        )
        self._all = self._bars.add_task("jobs", total=None, place=None)
        self._rows: list[TaskID] = []
        self._names: list[str | None] = []  # name of the job in each row; None: the row is free
        self._lock = threading.Lock()

    def started(self, jobs: int) -> None:
        self._pace.start(jobs)
        self._bars.update(self._all, total=jobs)
        self._bars.start()

    def phase(self, job_id: str, phase: Phase) -> None:
        self._pace.enter(job_id, phase)
        self._draw()

    def step(self, job_id: str, at: StepCount) -> None:
        self._pace.step(job_id, at)
        self._draw()

    def finished(self, line: JobLine) -> None:
        self._pace.finish(line.id)
        self._draw()

    def close(self) -> None:
        self._bars.stop()

    def _draw(self) -> None:
        """Draw all rows. A job keeps its row; a new job gets a free one."""
        with self._lock:
            shown = self._pace.shown()
            self._bars.update(self._all, completed=self._pace.counts()[0])
            self._names = [name if name in shown else None for name in self._names]
            for name in shown:
                if name not in self._names:
                    self._give_row(name)
            for row, shows in zip(self._rows, self._names, strict=True):
                if shows is None:
                    self._bars.update(row, visible=False)
                    continue
                phase, at = shown[shows]
                done, total = (at.done, at.total) if at is not None else (0, 1)
                place = describe_place(phase, at)
                self._bars.update(row, description=shows, completed=done, total=total, place=place, visible=True)

    def _give_row(self, name: str) -> None:
        if None not in self._names:
            self._rows.append(self._bars.add_task(name, total=1, place="", visible=False))
            self._names.append(None)
        self._names[self._names.index(None)] = name


def choose_progress(log_format: str, every_s: float = LINE_EVERY_S) -> BarProgress | LineProgress:
    """Return bars if standard error is a terminal and the log is not JSON; else lines every `every_s` seconds."""
    if log_format != "json" and sys.stderr is not None and sys.stderr.isatty():
        from rich.console import Console

        console = Console(stderr=True)
        if console.is_terminal and not console.is_dumb_terminal:
            return BarProgress(console)
    return LineProgress(as_numbers=log_format == "json", every_s=every_s)

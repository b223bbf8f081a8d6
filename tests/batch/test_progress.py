"""Progress: rows of the bar, one for each job that is under way at the same time."""

from __future__ import annotations

import io

import pytest
from rich.console import Console

from runner.batch.progress import BarProgress
from runner.records.record import JobLine


@pytest.fixture
def bar():
    """A bar on a terminal that is not there, and `rows()`: (text, done, total) of each row below the first."""
    progress = BarProgress(Console(file=io.StringIO(), force_terminal=True))

    def rows() -> list[tuple[str, float, float | None]]:
        return [(task.description, task.completed, task.total) for task in progress._bars.tasks[1:]]

    progress.started(5)
    yield progress, rows
    progress.close()


def end(progress: BarProgress, name: str) -> None:
    progress.finished(JobLine(id=name, status="succeeded", reason="test"))


def test_one_process_has_one_row(bar):
    """A job is encoded while the next one denoises: its row goes to the next when its evaluations are done."""
    progress, rows = bar
    for done in range(1, 5):
        progress.step("a", done, 4)
    assert rows() == [("a", 4, 4)]
    progress.step("b", 1, 6)
    end(progress, "a")
    progress.step("b", 2, 6)
    assert rows() == [("b", 2, 6)]
    assert progress._bars.tasks[0].completed == 1


def test_processes_have_a_row_each(bar):
    progress, rows = bar
    for name in "abc":
        progress.step(name, 1, 4)
    assert rows() == [("a", 1, 4), ("b", 1, 4), ("c", 1, 4)]
    end(progress, "b")  # it failed half-way
    progress.step("d", 3, 4)
    progress.step("a", 2, 4)
    assert rows() == [("a", 2, 4), ("d", 3, 4), ("c", 1, 4)]


def test_a_job_that_is_tried_again_keeps_its_row(bar):
    progress, rows = bar
    progress.step("a", 3, 4)
    progress.step("a", 1, 4)
    assert rows() == [("a", 1, 4)]

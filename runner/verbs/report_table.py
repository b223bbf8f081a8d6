"""Report table: prints a run's report: totals, one row per job, failures, warnings, places of the files.

In:   the result of `report`. Out: text without secrets that fits the terminal. Never: calculations beyond a percentage.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial

from rich.console import Console
from rich.markup import escape

from runner.errors import first_few
from runner.records.output_layout import JOBS
from runner.records.run_report import GpuSeconds, JobReport, RunReport
from runner.verbs.fitted_table import TableLayout, new_table, print_fitted
from runner.verbs.report import Reported
from runner.verbs.tables import coloured, open_console, print_json

__all__ = ["print_report"]

GAP = 1  # cells between two columns
NAMED = 3  # jobs that a warning names
UNKNOWN = "?"


@dataclass(frozen=True)
class _Column:
    """One column. It is left out if no row has a value."""

    name: str
    cell: Callable[[JobReport], str]
    right: bool = False
    rank: int = 0  # 0: always shown; else the column of highest rank is left out first if the terminal has no room


def print_report(found: Reported, *, as_json: bool, console: Console | None = None) -> None:
    report = found.report
    if as_json:
        print_json(report.model_dump(mode="json"))
        return
    console = console or open_console()
    for line in _totals(report):
        console.print(escape(line), soft_wrap=True)
    if report.jobs:
        console.print()
        _print_table(console, report)
    failed = [job for job in report.jobs if job.status == "failed"]
    if failed:
        console.print("\n[bold]failures[/]")
    for job in failed:
        why = f"{job.error.code}: {job.error.message}" if job.error else job.reason
        console.print(f"[red]{escape(job.id)}[/]  {escape(why)}", soft_wrap=True)
    warnings = _warnings(report.jobs)
    if warnings or report.notes:
        console.print("\n[bold]warnings[/]")
    for note, jobs in warnings.items():
        console.print(f"[yellow]![/] {escape(first_few(jobs, NAMED))}  {escape(note)}", soft_wrap=True)
    for note in report.notes:
        console.print(f"[yellow]![/] {escape(note)}", soft_wrap=True)
    console.print()
    for place in found.files:
        console.print(f"report: {escape(place)}", soft_wrap=True)


def _totals(report: RunReport) -> Iterator[str]:
    counts = " · ".join(f"{count} {name}" for name, count in report.counts.items() if count and name != "total")
    yield f"run {report.run_id} in {report.out}: {_count(report.counts['total'], 'job')}" + (
        f", {counts}" if counts else ""
    )
    hosts = len({process.host for process in report.processes})
    where = f" on {_count(hosts, 'host')}, {_count(len(report.processes), 'process', 'es')}" if hosts else ""
    yield f"{report.seconds:.1f} s{where} · {report.film_s:.1f} s of film"
    spent = _spent(report.gpu_seconds) if report.processes else "not known"
    yield f"GPU seconds {spent}"
    if report.gpu_hour is not None:
        cost = UNKNOWN if report.cost is None else _price(report.cost)
        by_film = UNKNOWN if report.cost_per_film_s is None else _price(report.cost_per_film_s)
        yield f"cost {cost} at {report.gpu_hour:g} per GPU hour · {by_film} per second of film"
    if report.caches:
        yield "caches: " + " · ".join(
            f"{name} {use.hits} of {use.hits + use.misses} hits" for name, use in report.caches.items()
        )


def _spent(spent: GpuSeconds) -> str:
    parts = {"work": spent.work, "loading": spent.loading, "idle": spent.idle}
    shares = (f"{name} {seconds / (spent.total or 1):.1%}" for name, seconds in parts.items())
    return f"{spent.total:.1f}: " + " · ".join(shares)


def _print_table(console: Console, report: RunReport) -> None:
    """Print each row on one line if the terminal has room; columns that are left out are named below the table."""
    columns = [column for column in _columns(report) if column.rank == 0 or any(map(column.cell, report.jobs))]
    spare = sorted((column for column in columns if column.rank), key=lambda column: -column.rank)

    def layout(count: int) -> TableLayout:
        left_out = [column.name for column in reversed(spare[:count])]
        kept = [column for column in columns if column not in spare[:count]]
        names = [column.name for column in kept]
        table = new_table(*names, whole=[name for name in names if name != "job"], gap=GAP)
        for made, column in zip(table.columns, kept, strict=True):
            made.justify = "right" if column.right else "left"
        for job in report.jobs:
            cells = [escape(column.cell(job)) for column in kept]
            cells[1] = coloured(job.status)
            table.add_row(*cells)
        below = []
        if left_out:
            below.append(f"no room for: {', '.join(left_out)}; use a wider terminal, the page or --json to see them")
        if "output" in left_out:
            below.append(f"outputs are in {escape(report.out.rstrip('/'))}/{JOBS}")
        return TableLayout(table, below, folds=True)

    print_fitted(console, [partial(layout, count) for count in range(len(spare) + 1)])


def _columns(report: RunReport) -> list[_Column]:
    root = report.out.rstrip("/") + "/"
    return [
        _Column("job", lambda job: job.id),
        _Column("status", lambda job: job.status),
        _Column("!", lambda job: "!" if job.warnings else "", rank=1),
        _Column("wall s", lambda job: _seconds(job.wall_s), right=True, rank=2),
        _Column("GPU s", lambda job: _seconds(job.gpu_s), right=True, rank=3),
        _Column("forecast s", lambda job: _seconds(job.forecast_s), right=True, rank=6),
        _Column("GB", lambda job: _gigabytes(job.device_bytes), right=True, rank=5),
        _Column(
            "forecast GB", lambda job: _gigabytes(job.forecast_bytes) if job.device_bytes else "", right=True, rank=7
        ),
        _Column("cost", lambda job: "" if job.cost is None else _price(job.cost), right=True, rank=4),
        _Column("output", lambda job: (job.output or "").removeprefix(root), rank=8),
    ]


def _warnings(jobs: Sequence[JobReport]) -> dict[str, list[str]]:
    """Return warning → the jobs that have it."""
    found: dict[str, list[str]] = {}
    for job in jobs:
        for note in job.warnings:
            found.setdefault(note, []).append(job.id)
    return found


def _seconds(seconds: float | None) -> str:
    return "" if seconds is None else f"{seconds:.1f}"


def _gigabytes(count: int | None) -> str:
    return "" if count is None else f"{count / 1e9:.1f}"


def _price(price: float) -> str:
    """Return a price with two decimals, or with three significant digits if it is less than 1."""
    return f"{price:.2f}" if price >= 1 or price == 0 else f"{price:.3g}"


def _count(number: int, noun: str, plural: str = "s") -> str:
    return f"{number} {noun}" if number == 1 else f"{number} {noun}{plural}"

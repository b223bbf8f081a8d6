"""Status table: prints a status once, or at each look while `status` waits.

In:   a `RunStatus`. Out: a table and sentences on standard output. Never: the wording, which is in status_lines.py.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any, Self

from rich.console import Console, Group
from rich.live import Live
from rich.markup import escape
from rich.table import Table

from runner.verbs.fitted_table import TableLayout, new_table, print_fitted
from runner.verbs.status_lines import (
    FOLD_FROM,
    counts_line,
    details,
    notable_rows,
    others_line,
    pace_line,
    short_reason,
    source_line,
)
from runner.verbs.tables import coloured, open_console, print_json

if TYPE_CHECKING:
    from runner.verbs.status import RunStatus, StatusRow

__all__ = ["StatusWatch", "print_status"]

COLUMNS = ("job", "status", "attempt", "seconds", "reason", "output")
SHARES = {"job": 2, "reason": 3, "output": 2}  # of the room left by other columns; their cells may be folded or cut
SPARE_COLUMNS = ("attempt", "seconds")  # left out in this order


def print_status(found: RunStatus, *, as_json: bool, all_rows: bool = False) -> None:
    """Print the table, the details below it, and the counts. `all_rows`: show all rows, even of many jobs."""
    if as_json:
        print_json(found.to_json())
        return
    console = open_console()
    rows = list(found.rows)
    if len(rows) > FOLD_FROM and not all_rows:
        rows = notable_rows(rows)
    if rows:
        print_fitted(console, _layouts(rows))
    _print_details(console, details(found.rows))
    if len(rows) < len(found.rows):
        console.print(f"{len(found.rows) - len(rows)} jobs that are done or have not begun: --all shows them")
    if (others := others_line(found)) is not None:
        console.print(others, soft_wrap=True)
    console.print(escape(source_line(found)), soft_wrap=True)
    console.print(escape(counts_line(found)), soft_wrap=True)


def _layouts(rows: Sequence[StatusRow]) -> list[Callable[[], TableLayout]]:
    """Return layouts: all columns; without empty columns; without the least important columns."""
    cells = [_cells(row) for row in rows]
    empty = tuple(name for name in COLUMNS if not any(found[name] for found in cells))
    spare = tuple(name for name in SPARE_COLUMNS if name not in empty)

    def layout(left_out: Sequence[str]) -> TableLayout:
        named = [name for name in left_out if name not in empty]
        below = [f"no room for: {', '.join(named)}"] if named else []
        return TableLayout(_status_table(cells, [name for name in COLUMNS if name not in left_out]), below)

    fewer = [empty + spare[:count] for count in range(len(spare) + 1)]
    return [partial(layout, left_out) for left_out in ((), *fewer)]


def _status_table(cells: Sequence[Mapping[str, str]], columns: Sequence[str]) -> Table:
    """Return the table. Texts that are too long for a column are printed below it."""
    table = new_table(*columns, whole=[name for name in columns if name not in SHARES])
    for found in cells:
        table.add_row(*(found[name] for name in columns))
    return table


def _lines_table(rows: Sequence[StatusRow]) -> Table:
    """Return the table as wide as the screen, one line per row; long cells are cut."""
    table = _status_table([_cells(row) for row in rows], COLUMNS)
    table.expand = True
    for column in table.columns:
        column.no_wrap = True
        if (share := SHARES.get(str(column.header))) is not None:
            column.ratio, column.overflow = share, "ellipsis"
    return table


def _cells(row: StatusRow) -> dict[str, str]:
    """Column → markup."""
    return {
        "job": escape(row.id) + ("" if row.listed else " [dim](other manifest)[/]"),
        "status": coloured(row.status) + (" [yellow]![/]" if row.warnings else ""),
        "attempt": str(row.attempt or ""),
        "seconds": "" if row.seconds is None else f"{row.seconds:.1f}",
        "reason": escape(short_reason(row)),
        "output": escape(row.film),
    }


def _print_details(console: Console, found: Sequence[tuple[str, str]]) -> None:
    """Print `job: sentence` lines below the table."""
    for job_id, sentence in found:
        console.print(f"[bold]{escape(job_id)}[/]: {escape(sentence)}", soft_wrap=True)


class StatusWatch:
    """Shows each look of `status --watch`: redrawn in place on a terminal, one line per look elsewhere."""

    def __init__(self) -> None:
        self._console = open_console()
        self._live: Live | None = None

    def __enter__(self) -> Self:
        if self._console.is_terminal:
            # The log is printed above the table only if both go to the same terminal.
            shared = sys.stderr is not None and sys.stderr.isatty()
            self._live = Live(console=self._console, auto_refresh=False, transient=True, redirect_stderr=shared)
            self._live.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if self._live is not None:
            self._live.transient = kind is None  # after Ctrl-C the last look stays; else the whole table comes next
            self._live.stop()

    def show(self, found: RunStatus) -> None:
        if self._live is None:
            line = f"{counts_line(found)} · {pace_line(found)}"
            self._console.print(escape(line), soft_wrap=True)
            return
        rows = list(found.rows) if len(found.rows) <= FOLD_FROM else notable_rows(found.rows)
        # Running and lost jobs change, so they come first if the screen has no room for all rows.
        rows.sort(key=lambda row: row.status not in ("running", "lost"))
        lines = [source_line(found), counts_line(found), pace_line(found)]
        wrapped = sum(len(line) // self._console.width + 1 for line in lines)
        room = max(1, self._console.height - wrapped - 4)  # a header, a line about the rest, two for words that wrap
        shown, left_out = rows[:room], len(rows) - room
        parts: list[Any] = [_lines_table(shown)] if shown else []
        parts += [f"and {left_out} more"] if left_out > 0 else []
        parts += [self._console.render_str(escape(line)) for line in lines]
        self._live.update(Group(*parts), refresh=True)

"""Status table: what `status` prints: once, or at each look while it waits.

In:   a `RunStatus`. Out: a table and sentences on standard output. Never: the sentences themselves: status_lines.py.
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
SHARES = {"job": 2, "reason": 3, "output": 2}  # of what the other columns leave; their cells may be folded or cut
SPARE_COLUMNS = ("attempt", "seconds")  # the first goes first


def print_status(found: RunStatus, *, as_json: bool, all_rows: bool = False) -> None:
    """The table, what it has no room for, and the counts. `all_rows`: of many jobs too, each has its row."""
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
    """All columns; then without those that have no value, and without those that a reader needs least."""
    cells = [_cells(row) for row in rows]
    empty = tuple(name for name in COLUMNS if not any(found[name] for found in cells))
    spare = tuple(name for name in SPARE_COLUMNS if name not in empty)

    def layout(left_out: Sequence[str]) -> TableLayout:
        told = [name for name in left_out if name not in empty]
        below = [f"left out for want of room: {', '.join(told)}"] if told else []
        return TableLayout(_status_table(cells, [name for name in COLUMNS if name not in left_out]), below)

    fewer = [empty + spare[:count] for count in range(len(spare) + 1)]
    return [partial(layout, left_out) for left_out in ((), *fewer)]


def _status_table(cells: Sequence[Mapping[str, str]], columns: Sequence[str]) -> Table:
    """What is too long for a column comes below the table."""
    table = new_table(*columns, whole=[name for name in columns if name not in SHARES])
    for found in cells:
        table.add_row(*(found[name] for name in columns))
    return table


def _lines_table(rows: Sequence[StatusRow]) -> Table:
    """The same as wide as the screen, one line a row, whatever is cut."""
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


def _print_details(console: Console, told: Sequence[tuple[str, str]]) -> None:
    """`job: sentence`, one a line, below a table that has no room for it."""
    for job_id, sentence in told:
        console.print(f"[bold]{escape(job_id)}[/]: {escape(sentence)}", soft_wrap=True)


class StatusWatch:
    """Shows each look of `status --watch`: on a terminal redrawn in place, elsewhere one line a look."""

    def __init__(self) -> None:
        self._console = open_console()
        self._live: Live | None = None

    def __enter__(self) -> Self:
        if self._console.is_terminal:
            # The log goes above the table where both share the terminal, and stays where it is sent elsewhere.
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
        # What is under way is what changes: it stands above the rest where the screen has no room for all.
        rows.sort(key=lambda row: row.status not in ("running", "lost"))
        told = [source_line(found), counts_line(found), pace_line(found)]
        wrapped = sum(len(line) // self._console.width + 1 for line in told)
        room = max(1, self._console.height - wrapped - 4)  # a header, a line about the rest, two for words that wrap
        shown, left_out = rows[:room], len(rows) - room
        parts: list[Any] = [_lines_table(shown)] if shown else []
        parts += [f"and {left_out} more"] if left_out > 0 else []
        parts += [self._console.render_str(escape(line)) for line in told]
        self._live.update(Group(*parts), refresh=True)

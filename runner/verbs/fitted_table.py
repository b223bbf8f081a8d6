"""Fitted table: prints the fullest of several layouts of a table that fits the terminal.

In:   layouts, the fullest first; a console. Out: the table on the console, and below it the texts that do not fit.
Never: the meaning of the cells.

Without a terminal nothing is cut or wrapped: the fullest layout is printed, without spaces at the ends of lines.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from rich.cells import cell_len
from rich.console import Console
from rich.table import Table

__all__ = ["UNLIMITED", "TableLayout", "new_table", "print_fitted", "print_table"]

LEAST_WIDTH = 12  # characters of a folded cell: a job's id is still readable
UNLIMITED = 100_000  # characters: the width without a terminal


@dataclass(frozen=True)
class TableLayout:
    """A table and the lines of markup below it. `folds`: long cells of the first column may be folded."""

    table: Table
    below: Sequence[str] = ()
    folds: bool = False


def new_table(*columns: str, whole: Sequence[str] = (), gap: int = 2) -> Table:
    """Return a table without rules, `gap` spaces between columns. `whole`: columns whose cells are never folded."""
    table = Table(box=None, pad_edge=False, header_style="bold", padding=(0, gap, 0, 0))
    for column in columns:
        table.add_column(column, overflow="fold", no_wrap=column in whole)
    return table


def print_fitted(console: Console, layouts: Sequence[Callable[[], TableLayout]]) -> None:
    """Print the first layout whose lines fit the terminal unfolded; otherwise the last one, folded."""
    chosen = layouts[0]()
    for layout in layouts[1:]:
        if _fits(console, chosen):
            break
        chosen = layout()
    print_table(console, chosen.table)
    for line in chosen.below:
        console.print(line, soft_wrap=True)


def print_table(console: Console, table: Table) -> None:
    """Print the table as wide as the console."""
    if console.is_terminal:
        console.print(table)
        return
    with console.capture() as captured:
        console.print(table)
    lines = [line.rstrip() for line in captured.get().splitlines()]
    console.print("\n".join(lines), markup=False, highlight=False, soft_wrap=True)


def _fits(console: Console, layout: TableLayout) -> bool:
    if not console.is_terminal:
        return True
    width = console.measure(layout.table, options=console.options.update(width=UNLIMITED)).maximum
    if layout.folds:
        first = max((cell_len(str(cell)) for cell in layout.table.columns[0].cells), default=0)
        width -= max(0, first - LEAST_WIDTH)
    return width <= console.width

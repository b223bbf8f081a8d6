"""Fitted table: the fullest of several layouts of a table that the terminal has room for.

In:   layouts, the fullest first; a console. Out: the table on the console, and below it what its cells had no room for.
Never: what the cells mean.

Off a terminal nothing is cut or wrapped: the fullest layout is printed, without spaces at the ends of lines.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from rich.cells import cell_len
from rich.console import Console
from rich.table import Table

__all__ = ["UNLIMITED", "TableLayout", "new_table", "print_fitted", "print_table"]

LEAST_WIDTH = 12  # columns of a cell that is folded: a job's id is still read as one
UNLIMITED = 100_000  # columns: the width off a terminal


@dataclass(frozen=True)
class TableLayout:
    """A table, and lines of markup that stand below it. `folds`: long cells of the first column may be folded."""

    table: Table
    below: Sequence[str] = ()
    folds: bool = False


def new_table(*columns: str, whole: Sequence[str] = (), gap: int = 2) -> Table:
    """A table without lines, `gap` spaces between columns. `whole`: columns whose cells are never folded."""
    table = Table(box=None, pad_edge=False, header_style="bold", padding=(0, gap, 0, 0))
    for column in columns:
        table.add_column(column, overflow="fold", no_wrap=column in whole)
    return table


def print_fitted(console: Console, layouts: Sequence[Callable[[], TableLayout]]) -> None:
    """Print the first layout whose lines fit the terminal unfolded, else the last one, folded."""
    chosen = layouts[0]()
    for layout in layouts[1:]:
        if _fits(console, chosen):
            break
        chosen = layout()
    print_table(console, chosen.table)
    for line in chosen.below:
        console.print(line, soft_wrap=True)


def print_table(console: Console, table: Table) -> None:
    """Print it as wide as the console is."""
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

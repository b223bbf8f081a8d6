"""Inspection table: prints the result of `inspect`.

In:   an `Inspection`. Out: lines, a table of people and advice on standard output; or one JSON object.
Never: decisions.
"""

from __future__ import annotations

from rich.markup import escape

from runner.records.inspection import Inspection
from runner.verbs.fitted_table import new_table, print_table
from runner.verbs.inspection_sheet import facts_line, measures
from runner.verbs.tables import open_console, print_json

__all__ = ["print_inspection"]


def print_inspection(found: Inspection, *, as_json: bool) -> None:
    """Print the video's facts, one row per person, one line per advice, and the path of the sheet."""
    if as_json:
        print_json(found.model_dump(mode="json"))
        return
    console = open_console()
    console.print(escape(f"{found.source}: {facts_line(found)}"), soft_wrap=True)
    if found.people:
        rows = [(str(person.number), *measures(person).values()) for person in found.people]
        table = new_table("person", *measures(found.people[0]))
        for cells in rows:
            table.add_row(*cells)
        print_table(console, table)
    for advice in found.advice:
        person = "" if advice.person is None else f"person {advice.person}: "
        console.print(f"[yellow]![/] {escape(person + advice.text)}", soft_wrap=True)
    if not found.advice:
        console.print("no advice: no problem was found", soft_wrap=True)
    if found.sheet is not None:
        console.print(f"sheet: {escape(found.sheet)}", soft_wrap=True)

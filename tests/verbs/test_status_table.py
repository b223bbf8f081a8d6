from __future__ import annotations

import io
import re

from runner.verbs import tables
from runner.verbs.status import RunStatus, StatusRow
from runner.verbs.status_table import StatusWatch, print_status


def test_a_watched_status_fits_the_screen(monkeypatch):
    """Each row has one line; where there are too many, the counts stay."""
    rows = [StatusRow(id=f"{'long' * 20}-{n}", status="failed", code="internal", reason="r" * 300) for n in range(40)]
    rows[30] = StatusRow(id="now", status="running", stage="generating", host="gpu-a", heard_s=3.0)
    found = RunStatus("out", "r", "m.yaml", tuple(rows), {})
    console = tables._Console(width=80, height=20, force_terminal=True, color_system=None, file=io.StringIO())
    monkeypatch.setattr("runner.verbs.status_table.open_console", lambda: console)
    with StatusWatch() as watch:
        watch.show(found)
        drawn = console.file.getvalue()
    lines = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]|\r", "", drawn).rstrip().split("\n")
    assert 15 < len(lines) <= 20 and max(map(len, lines)) <= 80
    assert lines[1].split() == ["now", "running", "generating", "on", "gpu-a,…"]
    assert lines[2].split()[1:] == ["failed", "internal"]
    assert re.fullmatch(r"and \d+ more", lines[-4].strip())
    assert lines[-3:] == [
        "out, run r of m.yaml:",
        "0 of 40 done · 39 failed · 1 running (gpu-a heard of 3 s ago)",
        "no job of this run has ended yet",
    ]


def test_a_long_reason_stands_below_the_table_of_a_status(monkeypatch):
    reason = "input.unreadable: " + "the stream is damaged " * 20
    row = StatusRow(id="a", status="failed", code="input.unreadable", reason=reason.strip())
    console = tables._Console(width=80, force_terminal=True, color_system=None, file=io.StringIO())
    monkeypatch.setattr("runner.verbs.status_table.open_console", lambda: console)
    print_status(RunStatus("out", "r", "m.yaml", (row,), {}), as_json=False)
    header, cells, *rest = console.file.getvalue().splitlines()
    assert max(len(header), len(cells)) <= 80 and "input.unreadable" in cells
    assert rest[0] == f"a: {row.reason}"

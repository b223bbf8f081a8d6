from __future__ import annotations

import io
import re

from runner.verbs import tables
from runner.verbs.status import RunStatus, StatusRow
from runner.verbs.status_table import StatusWatch, print_status


def test_watched_status_fits_screen(monkeypatch):
    """Each row has one line; if there are too many rows, the counts are still shown."""
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


def printed(rows: list[StatusRow], width: int, monkeypatch) -> list[str]:
    console = tables._Console(width=width, force_terminal=True, color_system=None, file=io.StringIO())
    monkeypatch.setattr("runner.verbs.status_table.open_console", lambda: console)
    print_status(RunStatus("out", "r", "m.yaml", tuple(rows), {}), as_json=False)
    return [line.rstrip() for line in console.file.getvalue().splitlines()]


def test_status_table_in_narrow_terminal_has_columns_that_fit(monkeypatch):
    """An id is folded only after empty and less important columns were left out."""
    name, film = "mira-replaces-the-greeter", "21 frames 96x144 at 16 fps"
    done = [StatusRow(id=name, status="succeeded", attempt=1, seconds=1.6, film=film)]
    assert printed(done, 89, monkeypatch)[:2] == [
        "job                        status     attempt  seconds  output",
        f"{name}  succeeded  1        1.6      {film}",
    ]
    assert printed(done, 80, monkeypatch)[:3] == [
        "job                        status     seconds  output",
        f"{name}  succeeded  1.6      {film}",
        "no room for: attempt",
    ]
    assert printed(done, 66, monkeypatch)[1:3] == [
        f"{name}  succeeded  {film}",
        "no room for: attempt, seconds",
    ]
    failed = StatusRow(id="b", status="failed", attempt=3, code="job.crashed", reason="job.crashed: it died")
    assert printed([*done, failed], 85, monkeypatch)[0].split() == ["job", "status", "reason", "output"]
    assert printed(done, 200, monkeypatch)[0].split() == ["job", "status", "attempt", "seconds", "reason", "output"]


def test_status_table_shows_long_reason_below_table(monkeypatch):
    reason = "input.unreadable: " + "the stream is damaged " * 20
    row = StatusRow(id="a", status="failed", code="input.unreadable", reason=reason.strip())
    header, cells, *rest = printed([row], 80, monkeypatch)
    assert max(len(header), len(cells)) <= 80 and "input.unreadable" in cells
    assert rest[0] == f"a: {row.reason}"

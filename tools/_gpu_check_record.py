"""Record: the results so far of a part of the GPU check, in a JSON file that is valid at any time.

In:   rows of tables, one at a time. Out: a file that is replaced after every row, and a line on the terminal.
Never: the meaning of the rows. A process that is killed leaves the rows before.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from _json_file import write_json

__all__ = ["NotInTime", "PartRecord", "error_text", "write_whole"]

Row = dict[str, Any]


class NotInTime(Exception):
    """A row would probably not end within its part's time."""


class PartRecord:
    """One part: its state, and rows by table. `seconds`: the part's time from now on."""

    def __init__(
        self,
        path: Path,
        name: str,
        *,
        scale: str,
        seconds: float,
        clock: Callable[[], float] = time.monotonic,
        show: Callable[[str], None] = lambda line: print(line, flush=True),
    ) -> None:
        self.path, self.name, self._clock, self._show = path, name, clock, show
        self._began = clock()
        self._deadline = self._began + seconds
        self.tables: dict[str, list[Row]] = {}
        self.found: dict[str, Any] = {"part": name, "scale": scale, "state": "running", "error": None, "seconds": 0.0}
        self._write()

    def left(self) -> float:
        """Return the seconds until the part must end."""
        return self._deadline - self._clock()

    def add(self, table: str, row: Mapping[str, Any]) -> None:
        self.tables.setdefault(table, []).append(dict(row))
        self._write()
        self._show(f"  {self.name}, {table}: {row_text(row)}")

    def replace(self, tables: Mapping[str, list[Row]]) -> None:
        """Replace the tables with these names."""
        new = [(table, row) for table, rows in tables.items() for row in rows if row not in self.tables.get(table, [])]
        self.tables |= tables
        self._write()
        for table, row in new:
            self._show(f"  {self.name}, {table}: {row_text(row)}")

    def measure(
        self, table: str, what: Mapping[str, Any], work: Callable[[], Mapping[str, Any]], expected: float = 0.0
    ) -> None:
        """Add a row of `what` and `work`'s result, or why there is none: an error, or fewer than `expected` seconds."""
        try:
            if self.left() < expected:
                raise NotInTime(f"{expected:.0f} s are expected, {self.left():.0f} s are left")
            row = dict(what) | dict(work())
        # Any error of a kernel, a driver or a package goes into this row; the other rows are still measured.
        except Exception as err:
            row = dict(what) | {"error": error_text(err)}
        self.add(table, row)

    def end(self, state: str, error: str | None = None) -> None:
        self.found |= {"state": state, "error": error}
        self._write()

    def _write(self) -> None:
        self.found |= {"seconds": round(self._clock() - self._began, 3), "tables": self.tables}
        write_whole(self.path, self.found)


def error_text(err: BaseException) -> str:
    """Return an exception as one line of at most 300 characters."""
    lines = str(err).strip().splitlines()
    return f"{type(err).__name__}: {lines[0] if lines else 'no message'}"[:300]


def row_text(row: Mapping[str, Any]) -> str:
    """Return a row on one line, without nested values."""
    plain = {name: value for name, value in row.items() if not isinstance(value, dict | list) and value is not None}
    return ", ".join(
        f"{name} {value:.4g}" if isinstance(value, float) else f"{name} {value}" for name, value in plain.items()
    )


def write_whole(path: Path, found: Any) -> None:
    """Write `found` as JSON to `path` atomically: a reader finds the old file or the new one."""
    write_json(path, _finite(found))


def _finite(value: Any) -> Any:
    """Replace NaN and infinity by text, because JSON does not have them."""
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    if isinstance(value, Mapping):
        return {str(name): _finite(some) for name, some in value.items()}
    return [_finite(some) for some in value] if isinstance(value, list | tuple) else value

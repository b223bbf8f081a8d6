"""What a part of the GPU check has found so far, as a JSON file that is whole at any moment.

Enters: rows of tables, one at a time. Leaves: a file that is replaced after every row, and a line on the terminal. A
process that is killed leaves the rows before. Knows nothing of what is measured.
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
    """A row would probably end after the time that its part has."""


class PartRecord:
    """One part: its state, and rows by table. `seconds` are those that the part may take from now on."""

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
        """Seconds until the part must end."""
        return self._deadline - self._clock()

    def add(self, table: str, row: Mapping[str, Any]) -> None:
        self.tables.setdefault(table, []).append(dict(row))
        self._write()
        self._show(f"  {self.name}, {table}: {row_text(row)}")

    def replace(self, tables: Mapping[str, list[Row]]) -> None:
        """These tables, each as a whole, in the place of those of the same names."""
        new = [(table, row) for table, rows in tables.items() for row in rows if row not in self.tables.get(table, [])]
        self.tables |= tables
        self._write()
        for table, row in new:
            self._show(f"  {self.name}, {table}: {row_text(row)}")

    def measure(
        self, table: str, what: Mapping[str, Any], work: Callable[[], Mapping[str, Any]], expected: float = 0.0
    ) -> None:
        """A row of `what` and what `work` gives; where that raises, or `expected` seconds are not left, of why not."""
        try:
            if self.left() < expected:
                raise NotInTime(f"{expected:.0f} s are expected, {self.left():.0f} s are left")
            row = dict(what) | dict(work())
        # Whatever a kernel, a driver or a package raises: this row says so, the others stand.
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
    """An exception in one line of at most 300 characters."""
    lines = str(err).strip().splitlines()
    return f"{type(err).__name__}: {lines[0] if lines else 'no message'}"[:300]


def row_text(row: Mapping[str, Any]) -> str:
    """A row on one line: plain values only."""
    plain = {name: value for name, value in row.items() if not isinstance(value, dict | list) and value is not None}
    return ", ".join(
        f"{name} {value:.4g}" if isinstance(value, float) else f"{name} {value}" for name, value in plain.items()
    )


def write_whole(path: Path, found: Any) -> None:
    """`found` as JSON at `path`: the old file or the new one is there, never a part of either."""
    write_json(path, _finite(found))


def _finite(value: Any) -> Any:
    """JSON has no NaN and no infinity: they become words."""
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    if isinstance(value, Mapping):
        return {str(name): _finite(some) for name, some in value.items()}
    return [_finite(some) for some in value] if isinstance(value, list | tuple) else value

"""Findings: the results of a whole GPU check, the tables of its parts by name."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

__all__ = ["Findings", "number"]

Row = Mapping[str, Any]


class Findings:
    """The JSON of a check. A table that was not measured is empty."""

    def __init__(self, check: Mapping[str, Any]) -> None:
        self.check = check

    @property
    def full_scale(self) -> bool:
        """Whether the check was measured on a GPU, with models of the real size."""
        return self.check.get("scale") == "full"

    def rows(self, part: str, table: str, **having: Any) -> list[Row]:
        """Return rows of `part` without an error that have these values."""
        tables = self.check.get("parts", {}).get(part, {}).get("tables", {})
        rows = [row for row in tables.get(table, []) if "error" not in row and "not_measured" not in row]
        return [row for row in rows if all(row.get(name) == value for name, value in having.items())]

    def failed(self, part: str, table: str, **having: Any) -> list[Row]:
        """Return rows of `part` with an error that have these values."""
        tables = self.check.get("parts", {}).get(part, {}).get("tables", {})
        rows = [row for row in tables.get(table, []) if "error" in row]
        return [row for row in rows if all(row.get(name) == value for name, value in having.items())]

    def row(self, part: str, table: str, **having: Any) -> Row:
        """Return the first row without an error that has these values, or an empty row."""
        return next(iter(self.rows(part, table, **having)), {})


def number(value: Any) -> float | None:
    """Return a measured number; None for text and for missing values."""
    return float(value) if isinstance(value, int | float) and not isinstance(value, bool) else None

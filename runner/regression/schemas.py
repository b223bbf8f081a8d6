"""Schemas: JSON Schemas of `comparison.json`, and of a night of a baseline's history.

In:   the models. Out: JSON Schemas by file name. Never: values.

    python -m runner.regression.schemas schemas/        writes the schemas of the repository
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

from runner.records.record import schemas, write_schemas
from runner.regression.findings import NightComparison
from runner.regression.nights import Night

__all__ = ["comparison_schemas"]


def comparison_schemas() -> dict[str, dict[str, Any]]:
    """Return file name → JSON Schema (draft 2020-12)."""
    return schemas({"comparison": NightComparison, "night": Night})


if __name__ == "__main__":
    write_schemas(comparison_schemas(), Path(sys.argv[1]))

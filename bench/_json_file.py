"""JSON file: the numbers of a benchmark, for another program or a later look."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any


def write_json(path: Path | None, found: Any) -> None:
    """Write `found` to `path`, folders included; None: the benchmark was not asked for a file."""
    if path is not None:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(found, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")

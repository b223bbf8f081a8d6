"""JSON file: the numbers of a benchmark, for another program or a later look."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any


def write_json(path: Path | None, found: Any) -> None:
    """Write `found` to `path`, folders included; None: the benchmark was not asked for a file.

    The file is replaced as a whole: a benchmark that writes again and is killed leaves its last numbers readable.
    """
    if path is not None:
        path.parent.mkdir(parents=True, exist_ok=True)
        unfinished = path.with_name(f"{path.name}.{os.getpid()}.tmp")
        unfinished.write_text(json.dumps(found, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
        os.replace(unfinished, path)

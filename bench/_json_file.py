"""JSON file: writes the numbers of a benchmark for other programs and for later use."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any


def write_json(path: Path | None, found: Any) -> None:
    """Write `found` to `path` and create its folders. None: writes nothing.

    The file is replaced atomically, so that a benchmark that is killed leaves its last complete numbers.
    """
    if path is not None:
        path.parent.mkdir(parents=True, exist_ok=True)
        unfinished = path.with_name(f"{path.name}.{os.getpid()}.tmp")
        unfinished.write_text(json.dumps(found, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
        os.replace(unfinished, path)

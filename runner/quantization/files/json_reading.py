"""JSON objects: read a JSON file, or parse a text, that must hold one object.

In:   a path or a text, what to do where it is missing or damaged. Out: a dict, or a RunnerError that names the place.
Never: what the object means.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from runner.errors import WeightsCorrupt, WeightsMissing

__all__ = ["parse_json_object", "read_json_object"]


def parse_json_object(text: str | bytes, where: object, remedy: str | None = None) -> dict[str, Any]:
    """Parse `text`. Raises WeightsCorrupt for other texts than one JSON object; `remedy` is its advice."""
    try:
        value = json.loads(text)
    except (ValueError, RecursionError) as err:
        raise WeightsCorrupt(f"not JSON ({err})", where=where, todo=remedy) from err
    if not isinstance(value, dict):
        raise WeightsCorrupt("not a JSON object", where=where, todo=remedy)
    return value


def read_json_object(path: Path, missing: str, remedy: str | None = None) -> dict[str, Any]:
    """Read a file in UTF-8. `missing`, `remedy`: advice for a file that is not there, and for a damaged one.

    Raises WeightsMissing; WeightsCorrupt, see `parse_json_object`; OSError for a file that cannot be read.
    """
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError as err:
        raise WeightsMissing("no such file", where=path, todo=missing) from err
    except UnicodeDecodeError as err:
        raise WeightsCorrupt(f"not JSON ({err})", where=path, todo=remedy) from err
    return parse_json_object(text, path, remedy)

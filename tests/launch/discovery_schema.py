"""Discovery schema: checks JSON against the description that Google publishes of an API, as its Python client ships it.

In:   the name of a document, a schema of it, a value. Out: what is wrong with the value. Never: a network.
"""

from __future__ import annotations

import json
import re
from functools import cache
from importlib.resources import files
from typing import Any

__all__ = ["problems", "schema"]

FORMATS = {
    "int64": re.compile(r"-?[0-9]{1,19}"),
    "google-duration": re.compile(r"[0-9]{1,12}(?:\.[0-9]{1,9})?s"),
}


@cache
def document(name: str) -> dict[str, Any]:
    text = files("googleapiclient").joinpath("discovery_cache", "documents", name).read_text(encoding="utf-8")
    found: dict[str, Any] = json.loads(text)
    return found


def schema(name: str, of: str) -> dict[str, Any]:
    """The schema `of` of the document, e.g. ("batch.v1.json", "Job")."""
    found: dict[str, Any] = document(name)["schemas"][of]
    return found


def problems(name: str, of: str, value: Any) -> list[str]:
    """Everything about `value` that the schema `of` does not allow: also keys that it does not have, that only the
    service writes, and that are deprecated."""
    return list(_problems(name, schema(name, of), value, of))


def _problems(name: str, wanted: dict[str, Any], value: Any, at: str) -> list[str]:
    if "$ref" in wanted:
        return _problems(name, schema(name, wanted["$ref"]), value, at)
    kind = wanted["type"]
    if kind == "object":
        return _object_problems(name, wanted, value, at)
    if kind == "array":
        if not isinstance(value, list):
            return [f"{at}: no array"]
        return [
            problem for n, item in enumerate(value) for problem in _problems(name, wanted["items"], item, f"{at}[{n}]")
        ]
    if kind == "string":
        if not isinstance(value, str):
            return [f"{at}: {value!r} is no string"]
        if value not in wanted.get("enum", [value]):
            return [f"{at}: {value!r} is none of {wanted['enum']}"]
        form = FORMATS[wanted["format"]] if "format" in wanted else None
        return [] if form is None or form.fullmatch(value) else [f"{at}: {value!r} is no {wanted['format']}"]
    right = {"integer": type(value) is int, "boolean": isinstance(value, bool)}[kind]
    return [] if right else [f"{at}: {value!r} is no {kind}"]


def _object_problems(name: str, wanted: dict[str, Any], value: Any, at: str) -> list[str]:
    if not isinstance(value, dict):
        return [f"{at}: no object"]
    found = []
    for key, item in value.items():
        known = wanted.get("properties", {}).get(key, wanted.get("additionalProperties"))
        if known is None:
            found.append(f"{at}.{key}: unknown")
        elif known.get("readOnly") or known.get("deprecated"):
            found.append(f"{at}.{key}: read-only or deprecated")
        else:
            found += _problems(name, known, item, f"{at}.{key}")
    return found

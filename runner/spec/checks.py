"""Manifest checks: compare a located value with a pydantic model and write one sentence for each problem.

In:   `Located` values and models. Out: instances; problems as sentences with suggestions. Never: files, jobs.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable, Mapping
from dataclasses import replace
from typing import Any, TypeVar, get_args

from pydantic import BaseModel, ValidationError
from pydantic.fields import FieldInfo
from pydantic_core import ErrorDetails

from runner.spec.options import JobOptions
from runner.spec.regression_limits import RegressionLimits
from runner.spec.text import Located, Problem, join_path, short

__all__ = ["Loc", "Problems", "check", "merge", "shown", "without"]

Loc = tuple[int | str, ...]  # a path of keys and indices below some value
M = TypeVar("M", bound=BaseModel)

_BOUNDS = {
    "greater_than_equal": ("ge", "at least"),
    "greater_than": ("gt", "more than"),
    "less_than_equal": ("le", "at most"),
    "less_than": ("lt", "less than"),
}
_KINDS = {
    "int_type": "a whole number",
    "float_type": "a number",
    "finite_number": "a finite number",
    "bool_type": "yes or no",
    "string_type": "text",
    "list_type": "a list",
}


def keys_of(model: type[BaseModel]) -> dict[str, FieldInfo]:
    """Key in a manifest -> field. A field whose key is a Python keyword has an alias."""
    return {field.alias or name: field for name, field in model.model_fields.items()}


class Problems(list[Problem]):
    """The problems found so far."""

    def add(self, line: int, path: str, what: str) -> None:
        """Add a problem."""
        self.append(Problem(line, path, what))

    def sentences(self) -> list[str]:
        """All problems as sentences, in the order of their lines."""
        return [str(problem) for problem in sorted(self, key=lambda problem: problem.line)]


def check(model: type[M], node: Located, path: str, problems: Problems) -> tuple[M | None, list[Loc]]:
    """Return `node` as a `model` (None if it is invalid) and the paths of the invalid values in it.

    Each invalid value is added to `problems` under `path.…`, unless the parser has reported it already.
    """
    if node.reported:
        return None, [()]
    if not isinstance(node.value, dict):
        problems.add(node.line, path, f"must be a mapping (keys: {_listed(keys_of(model))}), not {shown(node)}")
        return None, [()]
    try:
        return model.model_validate(node.data), []
    except ValidationError as err:
        wrong: list[Loc] = []
        for error in err.errors(include_url=False, include_input=False):
            loc = error["loc"]
            at = node.at(loc)
            wrong.append(loc)
            if not at.reported:
                problems.add(at.line, _dotted(path, loc), _sentence(error, at, model))
        return None, wrong


def merge(base: Located | None, over: Located | None, model: type[BaseModel]) -> Located:
    """Merge the values of `over` over those of `base`, at every depth of `model`. A null in `over` clears the value of
    `base`.

    No null of a known key remains, so that each such field takes the model's default.
    """
    if over is None:
        over = Located({}, base.line if base else 0)
    if over.value is None and not over.reported:
        return replace(over, value={})
    if not isinstance(over.value, dict):
        return over  # `check` reports that this is not a mapping
    under = base.value if base is not None and isinstance(base.value, dict) else {}
    merged: dict[str, Located] = {}
    for key in {**under, **over.value}:
        inner = _submodel(model, key)
        item = over.value.get(key)
        if inner is not None:
            merged[key] = merge(under.get(key), item, inner)
        elif item is None:
            merged[key] = under[key]
        elif item.value is not None or key not in keys_of(model):
            merged[key] = item
    for key in [key for key, item in merged.items() if item.value is None and key in keys_of(model)]:
        del merged[key]
    return replace(over, value=merged)


def without(node: Located, wrong: Iterable[Loc]) -> Located:
    """Return `node` without the values at the paths `wrong`. The path `()` removes everything."""
    for loc in wrong:
        if not loc:
            return replace(node, value={}, reported=False)
        inner = node.get(str(loc[0]))
        if inner is not None:
            rest = {key: item for key, item in node.value.items() if key != loc[0]}
            if len(loc) > 1 and isinstance(inner.value, dict):
                rest[str(loc[0])] = without(inner, [loc[1:]])
            node = replace(node, value=rest)
    return node


def shown(node: Located) -> str:
    """Describe a value for a message: the text '5', the number 5, a list."""
    if isinstance(node.value, dict):
        return "a mapping"
    if isinstance(node.value, list):
        return "a list"
    if isinstance(node.value, str):
        return f"the text {short(node.value)}"
    if node.value is None:
        return "nothing"
    written = (node.text or "")[:60]
    return f"the yes/no value {written}" if isinstance(node.value, bool) else f"the number {written}"


def _sentence(error: ErrorDetails, at: Located, model: type[BaseModel]) -> str:
    kind, context = error["type"], error.get("ctx", {})
    if kind == "extra_forbidden":
        return _unknown(error["loc"], model)
    if kind == "missing":
        return "is required"
    if kind == "value_error":
        return str(context["error"])
    if kind in ("model_type", "dict_type"):
        inner = _model_at(model, error["loc"])
        keys = f" (keys: {_listed(keys_of(inner))})" if inner else ""
        return f"must be a mapping{keys}, not {shown(at)}"
    if kind == "literal_error":
        choices = re.findall(r"'([^']*)'", context["expected"])
        return f"must be {context['expected'].replace(chr(39), '')}, not {shown(at)}{_did_you_mean(at.value, choices)}"
    if kind in ("too_short", "string_too_short"):
        return "must not be empty"
    if kind in _BOUNDS:
        name, words = _BOUNDS[kind]
        bound = context[name]
        whole = int(bound) if isinstance(bound, float) and bound.is_integer() else bound  # 0.0 reads as 0
        return f"must be {words} {whole}, not {at.text}"
    if kind in _KINDS:
        return f"must be {_KINDS[kind]}, not {shown(at)}{_quotes(kind, at)}"
    return f"{error['msg'][:1].lower()}{error['msg'][1:]}, not {shown(at)}"


def _quotes(kind: str, at: Located) -> str:
    """Return advice to add or remove quotes, where they are the cause; else an empty string."""
    if kind == "string_type" and at.text is not None and at.value is not None:
        return f"; put it in quotes: '{at.text[:60]}'"
    is_text = kind in ("int_type", "float_type") and isinstance(at.value, str)
    if is_text and re.fullmatch(r"[-+]?[0-9.]+([eE][-+]?[0-9]+)?", at.value):
        return "; YAML takes it for text, write it in plain digits" if at.plain else "; write it without quotes"
    return ""


def _unknown(loc: Loc, model: type[BaseModel]) -> str:
    """Describe an unknown key: with the closest known one, the place where it belongs, or the list of known keys."""
    key = str(loc[-1])
    here = _model_at(model, loc[:-1]) or model
    if close := difflib.get_close_matches(key, keys_of(here), 1):
        return f"unknown key; did you mean {close[0]}?"
    places = _option_places()
    if close := difflib.get_close_matches(key, places, 1, 0.8):
        known = "belongs" if close[0] == key else "unknown key; did you mean"
        return f"belongs under {places[key]}" if known == "belongs" else f"{known} {places[close[0]]}.{close[0]}?"
    return f"unknown key; known here: {_listed(keys_of(here))}"


def _did_you_mean(value: Any, choices: list[str]) -> str:
    close = difflib.get_close_matches(value, choices, 1) if isinstance(value, str) else []
    return f"; did you mean {close[0]}?" if close else ""


def _option_places() -> dict[str, str]:
    """Option or regression limit -> the path of the mapping that holds it in a job."""
    places: dict[str, str] = {}
    todo: list[tuple[str, type[BaseModel]]] = [("regression", RegressionLimits), ("options", JobOptions)]
    while todo:
        path, model = todo.pop()
        for name in keys_of(model):
            places.setdefault(name, path)
            if inner := _submodel(model, name):
                todo.append((f"{path}.{name}", inner))
    return places


def _submodel(model: type[BaseModel], key: str) -> type[BaseModel] | None:
    """The model of the field `key`, also where the field may be None. None for a field that is not a model."""
    field = keys_of(model).get(key)
    kinds = [field.annotation, *get_args(field.annotation)] if field else []
    return next((kind for kind in kinds if isinstance(kind, type) and issubclass(kind, BaseModel)), None)


def _model_at(model: type[BaseModel], loc: Loc) -> type[BaseModel] | None:
    inner: type[BaseModel] | None = model
    for key in loc:
        inner = _submodel(inner, str(key)) if inner else None
    return inner


def _dotted(path: str, loc: Loc) -> str:
    for key in loc:
        path = f"{path}[{key}]" if isinstance(key, int) else join_path(path, key)
    return path


def _listed(fields: Mapping[str, Any]) -> str:
    return ", ".join(fields)

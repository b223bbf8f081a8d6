"""Hashed fields: list the options and recipe fields that a fingerprint has, with their keys and values.

In:   a value of a pydantic model or dataclass, and the keys that version 0.1.0 hashed. Out: flat keys and JSON values.
Never: digests, inputs, weights.

field_marks.py has the marks that declare how a field is hashed.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import cache
from typing import Annotated, Any, get_args, get_origin, get_type_hints

from pydantic import BaseModel
from pydantic_core import to_jsonable_python

from runner.spec.field_marks import HashedAs, Introduced, NotHashed

__all__ = [
    "OPTION_KEYS",
    "RECIPE_KEYS",
    "hashed_values",
    "introduced_defaults",
]

# The keys that version 0.1.0 hashed. Never change them: records have them. After `[]`: fields of models in a list.
OPTION_KEYS = frozenset(
    {
        "mode",
        "size",
        "fps",
        "start_s",
        "max_frames",
        "seed",
        "steps",
        "guidance_scale",
        "negative_prompt",
        "max_segment_frames",
        "overlap_frames",
        "loras",
        "loras[].name",
        "loras[].strength",
        "keep_audio",
        "output.format",
        "output.crf",
        "preprocess.parity",
        "preprocess.detect_every",
        "preprocess.subject",
        "preprocess.pose",
        "preprocess.mask.iterations",
        "preprocess.mask.kernel",
        "preprocess.mask.w_len",
        "preprocess.mask.h_len",
        "preprocess.smooth",
        "preprocess.retarget",
    }
)
RECIPE_KEYS = frozenset(
    {"scheduler", "grid", "shift", "dtype", "vae_dtype", "weights", "fp4", "distilled", "compute", "attention"}
)


@dataclass(frozen=True)
class FieldRule:
    """How one field is hashed."""

    attribute: str
    dumped: str  # its key in the JSON of its model
    path: str  # its key in the fingerprint, dotted, from the root: that of `HashedAs`, else as the code calls it today
    mark: Introduced | HashedAs | NotHashed | None
    nested: bool  # a model: each of its fields is hashed on its own


def hashed_values(value: Any, known: frozenset[str]) -> dict[str, Any]:
    """Return key → JSON value of each hashed field of `value`, a pydantic model or dataclass.

    known: the keys of version 0.1.0.

    Raises TypeError for a class with a field that is neither known nor marked.
    """
    cls: type = type(value)
    _check(cls, known)
    dumped = value.model_dump(mode="json") if isinstance(value, BaseModel) else to_jsonable_python(value)
    return dict(_flat(value, dumped, ""))


def introduced_defaults(cls: type, known: frozenset[str]) -> dict[str, Any]:
    """Return key → introduced default (JSON) of the fields of `cls` later than 0.1.0: the value of a missing key."""
    _check(cls, known)
    return {
        path: to_jsonable_python(mark.default)
        for path, mark in _marks(cls, "")
        if isinstance(mark, Introduced) and "[]" not in path
    }


def _flat(value: Any, dumped: Mapping[str, Any], prefix: str) -> Iterable[tuple[str, Any]]:
    cls: type = type(value)
    for rule in _rules(cls, prefix):
        inner = getattr(value, rule.attribute)
        if rule.nested:
            yield from _flat(inner, dumped[rule.dumped], f"{rule.path}.")
            continue
        item = _pruned(inner, dumped[rule.dumped], f"{rule.path}[].")
        if isinstance(rule.mark, NotHashed) or _is_introduced(item, rule.mark):
            continue
        if isinstance(rule.mark, HashedAs) and isinstance(item, str):
            item = rule.mark.values.get(item, item)
        yield rule.path, item


def _pruned(value: Any, dumped: Any, prefix: str) -> Any:
    """Return `dumped` without the fields that are not hashed, in models at any depth."""
    if isinstance(value, BaseModel):
        return {path.removeprefix(prefix): item for path, item in _flat(value, dumped, prefix)}
    if isinstance(value, list | tuple):
        return [_pruned(item, done, prefix) for item, done in zip(value, dumped, strict=True)]
    return dumped


def _is_introduced(item: Any, mark: object) -> bool:
    if not isinstance(mark, Introduced):
        return False
    default = to_jsonable_python(mark.default)
    return bool(
        item == default and isinstance(item, bool) == isinstance(default, bool)
    )  # 0 equals 0.0, but is not false


@cache
def _rules(cls: type, prefix: str) -> tuple[FieldRule, ...]:
    found = []
    for name, (dumped, annotation, metadata) in _fields(cls).items():
        marks = [mark for mark in metadata if isinstance(mark, Introduced | HashedAs | NotHashed)]
        mark = marks[0] if marks else None
        path = mark.key if isinstance(mark, HashedAs) else f"{prefix}{dumped}"
        nested = mark is None and isinstance(annotation, type) and issubclass(annotation, BaseModel)
        found.append(FieldRule(name, dumped, path, mark, nested))
    return tuple(found)


def _fields(cls: type) -> dict[str, tuple[str, Any, tuple[Any, ...]]]:
    """Attribute → (its key in JSON, its type, its metadata from `Annotated`)."""
    if issubclass(cls, BaseModel):
        return {
            name: (info.serialization_alias or info.alias or name, info.annotation, tuple(info.metadata))
            for name, info in cls.model_fields.items()
        }
    found = {}
    hints = get_type_hints(cls, include_extras=True)
    for name in cls.__dataclass_fields__:  # type: ignore[attr-defined]
        hint = hints[name]
        parts = get_args(hint) if get_origin(hint) is Annotated else (hint,)
        found[name] = (name, parts[0], parts[1:])
    return found


def _marks(cls: type, prefix: str) -> Iterable[tuple[str, Introduced | HashedAs | NotHashed | None]]:
    """(path, mark) of each hashed value of `cls`, and of the fields of models in lists."""
    types = {name: annotation for name, (_, annotation, _) in _fields(cls).items()}
    for rule in _rules(cls, prefix):
        if rule.nested:
            yield from _marks(types[rule.attribute], f"{rule.path}.")
            continue
        yield rule.path, rule.mark
        if not isinstance(rule.mark, NotHashed):
            for model in _models_in(types[rule.attribute]):
                yield from _marks(model, f"{rule.path}[].")


def _models_in(annotation: Any) -> Iterable[type[BaseModel]]:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        yield annotation
    for inner in get_args(annotation):
        yield from _models_in(inner)


@cache
def _check(cls: type, known: frozenset[str]) -> None:
    marks = list(_marks(cls, ""))
    paths = [path for path, _ in marks]
    for path, mark in marks:
        if paths.count(path) > 1:
            raise TypeError(f"{cls.__name__}: two fields are hashed as {path!r}")
        if isinstance(mark, Introduced) and path in known:
            raise TypeError(f"{cls.__name__}.{path} is a key of version 0.1.0: remove Introduced, it is always hashed")
        if isinstance(mark, Introduced | NotHashed) or path in known:
            continue
        raise TypeError(
            f"{cls.__name__}.{path} is no key of version 0.1.0: declare it as Annotated[…, Introduced(DEFAULT)] with "
            "the default of today, so that old records stay done; HashedAs(KEY) if it is an old field with a new "
            "name; NotHashed() if it does not change the frames"
        )
    if missing := sorted(known.difference(paths)):
        raise TypeError(
            f"{cls.__name__} lacks {missing}, which version 0.1.0 hashed: "
            f"mark the field that took its place with HashedAs({missing[0]!r})"
        )

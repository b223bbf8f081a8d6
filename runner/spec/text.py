"""Manifest text: parse YAML or JSON lines into plain values with their line numbers.

In:   text. Out: `Located` trees (mappings, lists, text, numbers, yes/no, null) and the problems that were found.
Never: the meaning of the keys, files, options. Only plain data is made, and the size of expanded aliases is limited.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import yaml

from runner.redact import escape_control, redact

__all__ = [
    "MAX_DEPTH",
    "MAX_VALUES",
    "Located",
    "Problem",
    "TextInvalid",
    "join_path",
    "parse_json_line",
    "parse_yaml",
    "short",
]

MAX_DEPTH = 60
MAX_VALUES = 2_000_000  # with aliases expanded; a hundred thousand jobs stay below it

_LOADER = getattr(yaml, "CSafeLoader", yaml.SafeLoader)  # libyaml is ten times faster; not every wheel has it
_TAG = "tag:yaml.org,2002:"
_STR, _INT, _FLOAT, _BOOL, _NULL = (_TAG + name for name in ("str", "int", "float", "bool", "null"))
_SCALAR_TAGS = {_STR, _INT, _FLOAT, _BOOL, _NULL}
# A number in YAML 1.2 (its core schema, §10.3.2). PyYAML follows YAML 1.1, in which 1_000 and 1:30 are numbers too, and
# 010 is eight, not ten.
_NUMBER_1_2 = re.compile(
    r"[-+]?(\.[0-9]+|[0-9]+(\.[0-9]*)?)([eE][-+]?[0-9]+)?|0o[0-7]+|0x[0-9a-fA-F]+|[-+]?\.inf|\.nan", re.I
)
_LEADING_ZERO = re.compile(r"[-+]?0[0-9_]+")


@dataclass(frozen=True, slots=True)
class Problem:
    """One problem of a manifest: its line (from 1; 0: the whole file), the path of its key, and what is wrong."""

    line: int
    path: str
    what: str

    def __str__(self) -> str:
        parts = (f"line {self.line}" if self.line else "", self.path, self.what)
        return escape_control(": ".join(part for part in parts if part), lines=True)


class TextInvalid(Exception):
    """The text cannot be read to its end."""

    def __init__(self, line: int, what: str) -> None:
        self.problem = Problem(line, "", what)
        super().__init__(str(self.problem))


@dataclass(frozen=True, slots=True, eq=False)
class Located:
    """A value and its line.

    value: dict[str, Located] | list[Located] | str | int | float | bool | None
    line:  of the key for a mapping's values, else of the value itself; from 1.
    text:  the scalar as written, None for a collection.
    plain: a YAML scalar without quotes.
    size:  number of values in it, itself included; an alias counts each time it is used.
    reported: it is invalid, and the problem has been added already.
    """

    value: Any
    line: int
    text: str | None = None
    plain: bool = False
    size: int = 1
    reported: bool = False

    @property
    def data(self) -> Any:
        """The bare value: dicts, lists and scalars without lines."""
        if isinstance(self.value, dict):
            return {key: item.data for key, item in self.value.items()}
        if isinstance(self.value, list):
            return [item.data for item in self.value]
        return self.value

    def get(self, key: str) -> Located | None:
        """Return the entry of a mapping; None if it is missing or if this is not a mapping."""
        return self.value.get(key) if isinstance(self.value, dict) else None

    def at(self, path: tuple[int | str, ...]) -> Located:
        """Return the value at `path`, or the innermost value on the way that exists."""
        node = self
        for step in path:
            inner = node.get(step) if isinstance(step, str) else dict(enumerate(node.items())).get(step)
            if inner is None:
                break
            node = inner
        return node

    def items(self) -> Iterator[Located]:
        """The items of a list; none for other values."""
        return iter(self.value if isinstance(self.value, list) else ())


def parse_yaml(text: str) -> tuple[Located | None, list[Problem]]:
    """Return the document in `text` (None if it is empty) and its problems other than broken syntax.

    Raises TextInvalid for broken syntax and for text that expands to more than `MAX_VALUES`.
    """
    try:
        composer = _Composer(text)
        return composer.document(), composer.problems
    except yaml.MarkedYAMLError as err:
        mark = err.problem_mark or err.context_mark
        last = len(text.rstrip().splitlines())  # the mark of a missing token is after the last line
        if "nesting depth" in (err.problem or ""):  # libyaml's limit, which can be lower than MAX_DEPTH
            raise TextInvalid(min(mark.line + 1, last) if mark else 0, f"nested more than {MAX_DEPTH} deep") from err
        begun = f" begun on line {err.context_mark.line + 1}" if err.context_mark else ""
        what = ", ".join(part for part in (f"{err.context}{begun}" if err.context else "", err.problem) if part)
        raise TextInvalid(min(mark.line + 1, last) if mark else 0, f"not valid YAML: {what}") from err
    except yaml.YAMLError as err:  # a character that YAML does not allow
        position = getattr(err, "position", None)
        line = text.count("\n", 0, position) + 1 if isinstance(position, int) else 0
        reason = str(getattr(err, "reason", err)).splitlines()[0]
        raise TextInvalid(line, f"not valid YAML: {reason}") from err


class _Composer:
    """Compose `Located` values from libyaml's events, one by one. Depth and size are checked while they grow."""

    def __init__(self, text: str) -> None:
        self.loader: Any = _LOADER(text)
        self.problems: list[Problem] = []
        self.anchors: dict[str, Located | None] = {}  # None: still open; an alias to it would contain itself
        self.values = 0

    def document(self) -> Located | None:
        get = self.loader.get_event
        get()  # stream start
        if isinstance(get(), yaml.StreamEndEvent):
            return None
        root = self._node(get(), 0, "")
        get()  # document end
        after = get()
        if not isinstance(after, yaml.StreamEndEvent):
            self._problem(after, "", "a second document begins here; a manifest is one document")
        return root

    def _node(self, event: Any, depth: int, path: str) -> Located:
        line = event.start_mark.line + 1
        if depth > MAX_DEPTH:
            raise TextInvalid(line, f"nested more than {MAX_DEPTH} deep")
        if isinstance(event, yaml.AliasEvent):
            return self._alias(event, line, path)
        if event.anchor:
            self.anchors[event.anchor] = None
        if isinstance(event, yaml.ScalarEvent):
            node = self._scalar(event, line, path)
        elif isinstance(event, yaml.SequenceStartEvent):
            self._check_tag(event, {_TAG + "seq"}, path)
            items: list[Located] = []
            while not isinstance(inner := self.loader.get_event(), yaml.SequenceEndEvent):
                items.append(self._node(inner, depth + 1, f"{path}[{len(items)}]"))
            node = Located(items, line, size=1 + sum(item.size for item in items))
        else:
            self._check_tag(event, {_TAG + "map"}, path)
            node = self._mapping(line, depth, path)
        self._count(1, line)
        if event.anchor:
            self.anchors[event.anchor] = node
        return node

    def _alias(self, event: Any, line: int, path: str) -> Located:
        node = self.anchors.get(event.anchor)
        if node is None:
            why = "contains itself" if event.anchor in self.anchors else f"has no anchor &{event.anchor} before it"
            self._problem(event, path, f"the alias *{event.anchor} {why}")
            return Located(None, line, reported=True)
        self._count(node.size, line)
        return replace(node, line=line)

    def _count(self, by: int, line: int) -> None:
        self.values += by
        if self.values > MAX_VALUES:
            raise TextInvalid(line, f"the manifest expands to more than {MAX_VALUES} values; split it")

    def _mapping(self, line: int, depth: int, path: str) -> Located:
        entries: dict[str, Located] = {}
        lines: dict[str, int] = {}  # key written in this mapping -> its line
        merged: list[Located] = []
        while not isinstance(event := self.loader.get_event(), yaml.MappingEndEvent):
            key_line = event.start_mark.line + 1
            key = self._key(event, depth, path)
            inside = join_path(path, key or "?")
            value = replace(self._node(self.loader.get_event(), depth + 1, inside), line=key_line)
            if key is None:
                continue
            if key == "<<" and isinstance(event, yaml.ScalarEvent) and event.implicit[0]:
                merged += self._merge_sources(value, inside)
            elif key in lines:
                self.problems.append(Problem(key_line, inside, f"written twice; the first is on line {lines[key]}"))
            else:
                entries[key], lines[key] = value, key_line
        for source in merged:  # the mapping's keys come before those of the sources, and the first source before others
            self._count(len(source.value), line)
            for key, value in source.value.items():
                entries.setdefault(key, value)
        return Located(entries, line, size=1 + sum(item.size for item in entries.values()))

    def _key(self, event: Any, depth: int, path: str) -> str | None:
        """Return a key as written, also `yes:` and `1:`: all keys of a manifest are text. None for other values."""
        line = event.start_mark.line + 1
        if isinstance(event, yaml.ScalarEvent):
            self._check_tag(event, {_STR}, path)
            _check_text(event.value, line)
            if event.anchor:
                self.anchors[event.anchor] = Located(event.value, line, event.value)
            return str(event.value)
        node = self._node(event, depth + 1, path)
        if isinstance(event, yaml.AliasEvent) and isinstance(node.value, str):
            return node.value
        if not node.reported:
            self._problem(event, path, "a key must be text")
        return None

    def _merge_sources(self, value: Located, path: str) -> list[Located]:
        sources = list(value.items()) if isinstance(value.value, list) else [value]
        if not value.reported and not all(isinstance(source.value, dict) for source in sources):
            self.problems.append(Problem(value.line, path, "must be a mapping, or a list of mappings, to merge"))
        return [source for source in sources if isinstance(source.value, dict)]

    def _scalar(self, event: Any, line: int, path: str) -> Located:
        text, plain = event.value, not event.style  # None from PyYAML's own parser, "" from libyaml's
        _check_text(text, line)
        tag = event.tag
        if not tag:
            tag = self.loader.resolve(yaml.ScalarNode, text, event.implicit)
            if tag not in _SCALAR_TAGS:  # a date, `=` or `<<` as a value: text, as in YAML 1.2
                tag = _STR
            if plain and self._means_two_things(event, tag, path):
                return Located(text, line, text, plain, reported=True)
        elif tag == "!":
            tag = _STR
        elif self._check_tag(event, _SCALAR_TAGS, path):
            return Located(None, line, text, plain, reported=True)
        if tag == _STR:
            return Located(text, line, text, plain)
        try:
            value = self._construct(tag, event)
        except (ValueError, OverflowError, LookupError):  # `!!int x`, `!!bool maybe`, too many digits
            self._problem(event, path, f"{short(text)} is not a valid {tag.removeprefix(_TAG)}")
            return Located(None, line, text, plain, reported=True)
        return Located(value, line, text, plain)

    def _construct(self, tag: str, event: Any) -> Any:
        make = {
            _INT: self.loader.construct_yaml_int,
            _FLOAT: self.loader.construct_yaml_float,
            _BOOL: self.loader.construct_yaml_bool,
            _NULL: self.loader.construct_yaml_null,
        }[tag]
        return make(yaml.ScalarNode(tag, event.value, event.start_mark, event.end_mark))

    def _means_two_things(self, event: Any, tag: str, path: str) -> bool:
        """Report a plain scalar that is a number in YAML 1.1 and another number, or text, in YAML 1.2."""
        text = event.value
        leading_zero = _LEADING_ZERO.fullmatch(text) is not None
        if tag not in (_INT, _FLOAT) or (_NUMBER_1_2.fullmatch(text) and not leading_zero):
            return False
        plainly = "without the leading zero" if leading_zero else "plainly, in digits"
        what = f"{text[:60]} means different things to different YAML tools"
        self._problem(event, path, f"{what}; quote it ('{text[:60]}') if it is text, or write the number {plainly}")
        return True

    def _check_tag(self, event: Any, accepted: set[str], path: str) -> bool:
        """Report a tag that is not accepted. Returns True if it was refused."""
        if not event.tag or event.tag == "!" or event.tag in accepted:
            return False
        tag = event.tag.replace(_TAG, "!!")
        self._problem(
            event, path, f"the tag {tag} is not accepted: a manifest is plain text, numbers, lists and mappings"
        )
        return True

    def _problem(self, event: Any, path: str, what: str) -> None:
        self.problems.append(Problem(event.start_mark.line + 1, path, what))


def join_path(path: str, key: str) -> str:
    """Join a path and a key: `jobs[0]` and `options` give `jobs[0].options`."""
    return ".".join(part for part in (path, key) if part)


def short(text: str) -> str:
    """Return `text` in quotes, at most 60 characters. It is redacted first: half a password would not be recognised."""
    text = redact(text)
    return "'" + (text if len(text) <= 60 else text[:57] + "...") + "'"


def parse_json_line(text: str, line: int) -> tuple[Located, list[Problem]]:
    """Parse one line of JSON lines. Raises TextInvalid if it is not JSON; NaN and Infinity are refused too."""
    problems: list[Problem] = []

    def pairs(entries: list[tuple[str, Any]]) -> dict[str, Any]:
        seen: dict[str, Any] = {}
        for key, value in entries:
            if key in seen:
                problems.append(Problem(line, key, "written twice in one object"))
            seen.setdefault(key, value)
        return seen

    def refuse(constant: str) -> Any:
        raise ValueError(f"{constant} is not JSON")

    try:
        value = json.loads(text, object_pairs_hook=pairs, parse_constant=refuse)
    except json.JSONDecodeError as err:
        raise TextInvalid(line, f"not valid JSON: {err.msg} (column {err.colno})") from err
    except RecursionError as err:
        raise TextInvalid(line, f"nested more than {MAX_DEPTH} deep") from err
    except ValueError as err:  # NaN, or a number with more digits than Python converts
        reason = "a number has too many digits" if "digits" in str(err) else str(err)
        raise TextInvalid(line, f"not valid JSON: {reason}") from err
    return _locate(value, line, 0), problems


def _locate(value: Any, line: int, depth: int) -> Located:
    if depth > MAX_DEPTH:
        raise TextInvalid(line, f"nested more than {MAX_DEPTH} deep")
    if isinstance(value, dict):
        for key in value:
            _check_text(key, line)
        inner = {key: _locate(item, line, depth + 1) for key, item in value.items()}
        return Located(inner, line, size=1 + sum(item.size for item in inner.values()))
    if isinstance(value, list):
        items = [_locate(item, line, depth + 1) for item in value]
        return Located(items, line, size=1 + sum(item.size for item in items))
    if isinstance(value, str):
        _check_text(value, line)
        return Located(value, line, value)
    return Located(value, line, json.dumps(value))


def _check_text(text: str, line: int) -> None:
    """Refuse half a surrogate pair: an escape can write it, but no file name, record or terminal can."""
    try:
        text.encode()
    except UnicodeEncodeError as err:
        raise TextInvalid(line, f"{short(ascii(text)[1:-1])} has half a character (a lone surrogate)") from err

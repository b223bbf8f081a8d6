"""Mutations of valid inputs: of the values of a JSON document, of the lines of a text, of the bytes of any file.

A program is a list of steps, each a kind and three numbers. Every program can be applied to every input, so that
Hypothesis can shorten what it finds.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

from hypothesis import strategies as st

__all__ = ["PROGRAM", "Object", "Raw", "Step", "dump", "mutated", "parse"]


class Object(list[tuple[str, Any]]):
    """A JSON object as pairs: a key may stand in it twice."""


class Raw(str):
    """Text that goes into the document as it is."""


DEEP = 3000
MOST = 5000  # values of a document that still grows
SCALARS: tuple[Any, ...] = (
    *(None, True, False, 0, 1, -1, 7, 0.5, -0.0, 2**31, -(2**31) - 1, 2**53 + 1, 2**60, 2**63, 2**64, -(2**63)),
    *(Raw("1e999"), Raw("-1e999"), Raw("1e-999"), Raw("NaN"), Raw("-Infinity"), Raw("9" * 5000), Raw("0.1e400")),
    *("", " ", "\0", "\x1b[31m", "\u202e", "\u2028", "\ud800", "\ufeff", "é" * 300, "a" * 10_000, "null", "true", "~"),
    *("1_000", "1:30", "0x1f", "..", "../../etc/passwd", "/", "s3://", "s3://b/k", "s3://b/k?X-Amz-Signature=1"),
    *("fp32", "replace", "16x16", "0x0", "99999999x2", "auto", "F32", "BF16", "I16", "U8", "F4", "F8_E8M0", "BOOL"),
    *("(a+)+$", "(", ".*", "a{99999}", "weight_packed", "blocks.0.attn1.to_q.weight"),
    *([], Object(), [[]], [0, 2**63], [2**62, 4], [-1], [2**64], [1] * 70, [0] * 9, [0, 0], [0, 2**60], [None]),
    *(Raw("[" * DEEP + "]" * DEEP), Raw('{"a":' * DEEP + "1" + "}" * DEEP), Raw("[" * 900 + "]" * 900), Raw("[1,")),
    *(Raw('{"a":' * 900 + "1" + "}" * 900), Raw("[" * 50 + "]" * 50), Raw("[" * 100_000)),
)
TOKENS: tuple[bytes, ...] = tuple(
    [bytes([n]) for n in (0, 1, 9, 10, 13, 27, 32, 127, 128, 255)]
    + [
        b'"',
        b"'",
        b"{",
        b"}",
        b"[",
        b"]",
        b":",
        b": ",
        b",",
        b"- ",
        b"? ",
        b"#",
        b"|",
        b">",
        b"\\",
        b"%YAML 1.2\n---\n",
    ]
    + [b"&a ", b"*a", b"<<: *a", b"---\n", b"...\n", b"!!python/object/apply:os.system ", b"!!binary ", b"!!set "]
    + [b"\xef\xbb\xbf", b"\xff\xfe", b"\xc3\x28", "\u0085".encode(), "\u2028".encode(), "\u202e".encode(), b"\r\n"]
    + [b"\\ud800", b"\\u0000", b"1e999", b"9" * 400, b"0o17", b".inf", b"-.nan", b"2026-01-01", b"yes", b"=", b"\t"]
    + [b"[" * 2000, b"{a: " * 2000, b"- " * 2000, b"[" * 70 + b"]" * 70, b"a: &b [*b]", b"x" * 20_000]
    + [(2**60).to_bytes(8, "little"), b"\xff" * 8, b"\0" * 8, (2**31).to_bytes(8, "little"), b"version: 2\n", b"jobs:"]
)
TREE = ("replace", "remove", "repeat", "rename", "copy", "swap", "wrap", "twice")
TEXT = ("flip", "cut", "drop", "again", "insert", "overwrite", "splice", "line", "length")

Step = tuple[str, int, int, int]
NUMBER = st.integers(0, 2**16)
PROGRAM = st.tuples(
    NUMBER, st.lists(st.tuples(st.sampled_from(TREE + TEXT), NUMBER, NUMBER, NUMBER), min_size=1, max_size=6)
)


def parse(text: bytes) -> Any:
    """A JSON document, its objects as pairs."""
    return json.loads(text, object_pairs_hook=Object)


def dump(value: Any) -> str:
    """The document as text; raw texts may break it."""
    if isinstance(value, Raw):
        return value
    if isinstance(value, Object):
        return "{" + ", ".join(f"{json.dumps(key)}: {dump(item)}" for key, item in value) + "}"
    if isinstance(value, list):
        return "[" + ", ".join(map(dump, value)) + "]"
    return json.dumps(value)


def mutated(data: bytes, steps: list[Step], others: list[bytes], split: Callable[[bytes], Any]) -> bytes:
    """`data` after all steps: first those of its document, then those of its bytes.

    `split`: bytes → (document as `parse` gives it, or None; how to put a document's text among the other bytes).
    """
    tree, join = split(data)
    holder = [tree]
    for kind, a, b, c in steps:
        if kind in TREE and tree is not None:
            _change(holder, kind, a, b, c)
    if tree is not None and any(kind in TREE for kind, *_ in steps):
        data = join(dump(holder[0]).encode("utf-8", "surrogatepass"))
    for kind, a, b, c in steps:
        if kind in TEXT:
            data = _edit(data, kind, a, b, c, others)
    return data[: 1 << 20]


def _places(holder: list[Any]) -> list[tuple[Any, int]]:
    """(collection, index) of every value, the whole document first."""
    found: list[tuple[Any, int]] = [(holder, 0)]
    for collection, index in found:
        value = _at(collection, index)
        if isinstance(value, list):
            found.extend((value, i) for i in range(len(value)))
    return found


def _at(collection: Any, index: int) -> Any:
    return collection[index][1] if isinstance(collection, Object) else collection[index]


def _put(collection: Any, index: int, value: Any) -> None:
    collection[index] = (collection[index][0], value) if isinstance(collection, Object) else value


def _change(holder: list[Any], kind: str, a: int, b: int, c: int) -> None:
    places = _places(holder)
    if len(places) > MOST:
        return
    collection, index = places[a % len(places)]
    value = _at(collection, index)
    if kind == "replace":
        _put(collection, index, _copied(SCALARS[b % len(SCALARS)]))
    elif kind == "wrap":
        _put(collection, index, [value] if b % 2 else Object([("a", value)]))
    elif kind in ("copy", "swap"):
        other, there = places[b % len(places)]
        taken, kept = _copied(_at(other, there)), _copied(value)
        if kind == "swap":
            _put(other, there, kept)  # of no effect where one lies in the other
        _put(collection, index, taken)
    elif collection is holder:
        return
    elif kind == "remove":
        del collection[index]
    elif kind == "repeat":
        key = [collection[index][0]] if isinstance(collection, Object) else []
        copies = [_copied(value) for _ in range(1 + b % 40)]
        collection[index:index] = [(key[0], one) for one in copies] if key else copies
    elif isinstance(collection, Object):
        key = collection[c % len(collection)][0] if kind == "twice" else SCALARS[b % len(SCALARS)]
        collection[index] = (key if isinstance(key, str) else str(key)[:50], value)


def _copied(value: Any) -> Any:
    if isinstance(value, Object):
        return Object((key, _copied(item)) for key, item in value)
    return [_copied(item) for item in value] if isinstance(value, list) else value


def _edit(data: bytes, kind: str, a: int, b: int, c: int, others: list[bytes]) -> bytes:
    size = max(1, len(data))
    at, span, token = a % size, 1 + b % 64, TOKENS[c % len(TOKENS)]
    if kind == "flip":
        return data[:at] + bytes(byte ^ (1 << b % 8) for byte in data[at : at + 1]) + data[at + 1 :]
    if kind == "cut":
        return data[:at]
    if kind == "drop":
        return data[:at] + data[at + span :]
    if kind == "again":
        return data[: at + span] + data[at : at + span] * (1 + c % 50) + data[at + span :]
    if kind == "insert":
        return data[:at] + token + data[at:]
    if kind == "overwrite":
        return data[:at] + token + data[at + len(token) :]
    if kind == "splice":
        other = others[b % len(others)]
        return data[:at] + other[c % max(1, len(other)) :]
    if kind == "line":
        lines = data.splitlines(keepends=True) or [b""]
        lines.insert(b % (len(lines) + 1), lines[a % len(lines)] if c % 2 else token)
        return b"".join(lines)
    lengths = (0, 1, 7, len(data) - 8, len(data), len(data) + 1, 100_000_001, 2**31, 2**32, 2**60, 2**63, 2**64 - 1)
    return (lengths[b % len(lengths)] % 2**64).to_bytes(8, "little") + data[8:]

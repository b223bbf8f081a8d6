"""Manifest source: read a manifest's text, and resolve the paths in it.

In:   a path, a URI or a stream; a path in a manifest. Out: text, located values, absolute paths and URIs.
Never: the meaning of a job. Broken bytes are reported as a problem of the manifest.
"""

from __future__ import annotations

import io
import json
import os
import posixpath
import re
from collections.abc import Collection
from pathlib import Path
from typing import IO

from runner.errors import BucketMissing, ConfigInvalid, InputNotFound, ManifestInvalid
from runner.spec.checks import Problems, shown
from runner.spec.text import MAX_VALUES, Located, TextInvalid, parse_json_line, parse_yaml
from runner.storage import is_remote, local_path, open_storage
from runner.storage.uris import remote_forms, split_object, split_uri

__all__ = ["MAX_BYTES", "decode", "is_json_lines", "read_json_lines", "read_source", "read_yaml", "resolve_place"]

MAX_BYTES = 64 << 20
_TOO_LARGE = f"is larger than {MAX_BYTES >> 20} MB; split it into several manifests"
_JOB_KEYS = {"id", "custom_id", "reference", "video"}


def read_source(source: str, stdin: IO[str]) -> tuple[str, str]:
    """Return (text, folder or URI that its relative paths start from). Raises ManifestInvalid, storage.*."""
    where = "stdin" if source == "-" else source
    try:
        if source == "-":
            return decode(_read_stream(stdin)), os.getcwd()
        if is_remote(source):
            return decode(_read_object(source)), source.rpartition("/")[0]
        path = local_path(source)
        return decode(_read_file(path)), os.path.abspath(path.parent)
    except TextInvalid as err:
        raise ManifestInvalid([str(err.problem)], where=where) from err
    except BucketMissing as err:
        raise ManifestInvalid([f"{err.what}. {err.todo}"], where=where) from err
    except ConfigInvalid as err:
        raise ManifestInvalid([err.message], where=where) from err


def decode(raw: bytes) -> str:
    """Decode UTF-8 with or without a byte order mark. Raises TextInvalid for other bytes, zero bytes and too many."""
    if len(raw) > MAX_BYTES:
        raise TextInvalid(0, _TOO_LARGE)
    if raw[:2] in (b"\xff\xfe", b"\xfe\xff"):
        raise TextInvalid(0, "is UTF-16, not UTF-8; save it as UTF-8")
    try:
        text = raw.decode("utf-8-sig")
    except UnicodeDecodeError as err:
        line = raw.count(b"\n", 0, err.start) + 1
        raise TextInvalid(line, f"is not UTF-8 text (byte 0x{raw[err.start]:02x}); save it as UTF-8") from err
    if "\0" in text:
        raise TextInvalid(text[: text.index("\0")].count("\n") + 1, "has a zero byte, so it is not a text file")
    return text


def is_json_lines(text: str, source: str) -> bool:
    """Return True for JSON lines: by the name's ending; else if the first line is a JSON object without the keys `jobs`
    and `matrix`."""
    suffix = posixpath.splitext(source)[1].lower()
    if suffix in (".jsonl", ".ndjson", ".yaml", ".yml"):
        return suffix in (".jsonl", ".ndjson")
    first = next((line for line in _lines(text) if line and not line.startswith("#")), "")
    if not re.match(r'\{\s*["}]', first) or not first.endswith("}"):
        return False
    try:
        parsed = json.loads(first)
    except (ValueError, RecursionError):
        return True  # its problem is reported with its line, and the lines after it are read
    return not {"jobs", "matrix"} & set(parsed)


def read_yaml(text: str, problems: Problems) -> Located | None:
    """Return the document's mapping without its `x-…` keys; None, after adding a problem, for anything else.

    Raises TextInvalid.
    """
    root, found = parse_yaml(text)
    problems += found
    if root is None or (root.value is None and not root.reported):
        problems.add(0, "", "is empty; it needs version: 1 and jobs: or matrix:")
        return None
    if not isinstance(root.value, dict):
        problems.add(root.line, "", f"must be a mapping with version: and jobs: or matrix:, not {shown(root)}")
        return None
    return Located({key: item for key, item in root.value.items() if not key.startswith("x-")}, root.line)


def read_json_lines(text: str, problems: Problems, header_keys: set[str]) -> tuple[Located, list[tuple[str, Located]]]:
    """Return (the first line if it is a header, else an empty mapping; a list of ("", job)).

    The path of each job is empty: its line identifies it. A broken line is a problem, and the other lines are still
    read. Raises TextInvalid for more than MAX_VALUES values.
    """
    header: Located | None = None
    entries: list[tuple[str, Located]] = []
    values = 0
    for number, line in enumerate(_lines(text), start=1):
        if not line or line.startswith("#"):
            continue
        values += line.count(",") + line.count(":") + 1
        if values > MAX_VALUES:
            raise TextInvalid(number, f"the manifest has more than {MAX_VALUES} values; split it")
        try:
            node, found = parse_json_line(line, number)
        except TextInvalid as err:
            problems.append(err.problem)
            node, found = Located({}, number, reported=True), []
        problems += found
        is_header = isinstance(node.value, dict) and header_keys & set(node.value) and not _JOB_KEYS & set(node.value)
        if is_header and header is None and not entries:
            header = node
        elif is_header:
            problems.add(number, "", "only the first line may have defaults and run keys")
        else:
            entries.append(("", node))
    if not entries and not problems:
        problems.add(0, "", "has no jobs; write one JSON object per line")
    return header or Located({}, 1), [entry for entry in entries if not entry[1].reported]


def resolve_place(text: str, base: str, foreign: Collection[str] = ()) -> str:
    """Return an input as an absolute path or a URI. Relative paths start from `base`.

    foreign: schemes of object stores that are accepted although this runner does not read them itself.
    Raises ValueError with what to write instead.
    """
    if any(ord(c) < 0x20 or ord(c) == 0x7F for c in text):
        raise ValueError("has a control character; check the quotes around it")
    if text.endswith("/"):
        raise ValueError("names a folder; name one file")
    scheme, bucket, key = split_uri(text)
    if is_remote(text) or ("://" in text and scheme in foreign):
        if not bucket or not key:
            raise ValueError(f"must name a bucket and a key: {scheme}://bucket/folder/file")
        return f"{scheme}://{bucket}/{key}"
    try:
        path = local_path(text)
    except ConfigInvalid as err:
        raise ValueError(f"{err.what}; write a path or {remote_forms()}") from err
    if path.is_absolute() or not is_remote(base):
        return str(Path(base, path))
    scheme, bucket, prefix = split_uri(base)
    parts = [part for part in prefix.split("/") if part]
    for part in path.parts:
        if part != "..":
            parts.append(part)
        elif parts:
            parts.pop()
        else:
            raise ValueError(f"leads out of the manifest's bucket; write the {scheme}:// URI in full")
    return f"{scheme}://{bucket}/{'/'.join(parts)}"


def _lines(text: str) -> list[str]:
    """Return the lines, without space at their ends. Only line feeds end a line: JSON strings may have U+2028."""
    return [line.strip() for line in text.split("\n")]


def _read_stream(stream: IO[str]) -> bytes:
    raw = getattr(stream, "buffer", None)
    if isinstance(raw, io.BufferedIOBase):
        return raw.read(MAX_BYTES + 1)
    return stream.read(MAX_BYTES + 1).encode("utf-8", "surrogateescape")


def _read_file(path: Path) -> bytes:
    try:
        with path.open("rb") as file:
            return file.read(MAX_BYTES + 1)
    except FileNotFoundError as err:
        raise TextInvalid(0, "no such file; check the path, or write - to read the manifest from stdin") from err
    except IsADirectoryError as err:
        raise TextInvalid(0, "is a folder; name the manifest in it") from err
    except OSError as err:  # no permission, a name too long, a broken disk
        raise TextInvalid(0, f"cannot be read: {err.strerror or err}; check the file and its owner") from err


def _read_object(uri: str) -> bytes:
    try:
        root, name = split_object(uri)
    except InputNotFound as err:
        example = f"{split_uri(uri)[0]}://bucket/folder/manifest.yaml"
        raise TextInvalid(0, f"names a bucket or a folder; name the manifest in it: {example}") from err
    storage = open_storage(root)
    info = storage.stat(name)
    if info is None:
        raise TextInvalid(0, "no such object; check the bucket and the key")
    if info.bytes > MAX_BYTES:
        raise TextInvalid(0, _TOO_LARGE)
    return storage.read_bytes(name) or b""

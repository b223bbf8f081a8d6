"""Flag values: checks and converts the values of flags. Each check takes the flag's name and a value.

In:   a value, as text from the command line or as a Python value. Out: the value in its type; ConfigInvalid, which
names the flag. Never: which verb has the flag, files, networks.

A check imports its modules when it is called, because `--help` reads the settings and must be fast.
"""

from __future__ import annotations

import difflib
import math
import os
import re
from collections.abc import Callable, Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

from runner.errors import ConfigInvalid
from runner.spec.recipes import DEFAULT_RECIPE, get_recipe

if TYPE_CHECKING:
    from runner.spec.manifest import Manifest

__all__ = [
    "AGE_UNITS",
    "ALL_LAYERS",
    "EXPORTS",
    "Check",
    "are_gpus",
    "are_parts",
    "are_revisions",
    "are_texts",
    "are_variables",
    "check_by",
    "is_age",
    "is_export",
    "is_interval",
    "is_job_options",
    "is_manifest",
    "is_megabytes",
    "is_on",
    "is_one_of",
    "is_path",
    "is_price",
    "is_rank",
    "is_read_options",
    "is_reason",
    "is_recipe",
    "is_rule",
    "is_run_id",
    "is_seconds",
    "is_shards",
    "is_spot",
    "is_store",
    "is_switch",
    "is_text",
    "is_time",
    "is_whole",
    "parse_age",
]

ALL_LAYERS = "all"  # the one rule that is known without importing torch
EXPORTS = ("lite", "cache-dit")  # other programs' layouts of SVDQ files
MAX_EMBED_MB = 1024
MAX_INTERVAL_S = 86400
MAX_REASON = 2000  # characters
AUTO = "auto"
# Names of variables that hold credentials. Others are recognised by the words in their names, see `are_variables`.
CREDENTIALS = ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_SESSION_TOKEN", "HF_TOKEN")
AGE_UNITS = {"s": 1, "m": 60, "h": 3600, "d": 86400}  # seconds

Check = Callable[[str, Any], Any]  # (name of the flag, value) -> the value as the field holds it; raises ConfigInvalid


def _wrong(flag: str, value: object, wanted: str, todo: str) -> ConfigInvalid:
    return ConfigInvalid(f"must be {wanted}, not {value!r}", where=flag, todo=todo)


def is_text(flag: str, value: Any) -> str:
    text = os.fspath(value) if isinstance(value, os.PathLike) else value
    if not isinstance(text, str):
        raise _wrong(flag, value, "text", "Give a str or a path")
    return text


def is_path(flag: str, value: Any) -> Path:
    if not isinstance(value, str | Path):
        raise _wrong(flag, value, "a path on this machine", "Give a str or a Path")
    return Path(value)


def is_switch(flag: str, value: Any) -> bool:
    if not isinstance(value, bool):
        raise _wrong(flag, value, "True or False", f"Give True to switch {flag} on")
    return value


def is_one_of(choices: Sequence[str], flag: str, value: Any) -> str:
    if value not in choices:
        near = difflib.get_close_matches(value, choices, 1) if isinstance(value, str) else []
        hint = f"; did you mean {near[0]}?" if near else ""
        wanted = f"{', '.join(choices[:-1])} or {choices[-1]}"
        raise ConfigInvalid(
            f"must be {wanted}, not {value!r}{hint}", where=flag, todo=f"Write e.g. {flag} {choices[0]}"
        )
    return str(value)


def is_whole(least: int, flag: str, value: Any) -> int:
    text = value.strip() if isinstance(value, str) else value
    if isinstance(text, str) and re.fullmatch(r"[+-]?[0-9]{1,18}", text):
        text = int(text)
    if not isinstance(text, int) or isinstance(text, bool) or text < least:
        raise _wrong(flag, value, f"a whole number, {least} or more", f"Write e.g. {flag} {least + 3}")
    return text


def is_shards(flag: str, value: Any) -> int | str:
    return AUTO if value == AUTO else is_whole(1, flag, value)


def is_seconds(flag: str, value: Any) -> float:
    try:
        seconds = float("nan" if isinstance(value, bool) else value)
    except (TypeError, ValueError):
        seconds = math.nan
    if not seconds >= 0:
        raise _wrong(flag, value, "a number of seconds, 0 or more", f"Write e.g. {flag} 20")
    return seconds


def is_interval(flag: str, value: Any) -> float:
    seconds = is_seconds(flag, value)
    if not 0 < seconds <= MAX_INTERVAL_S:
        raise _wrong(flag, value, f"a number of seconds, above 0 and up to {MAX_INTERVAL_S}", f"Write e.g. {flag} 20")
    return seconds


def is_megabytes(flag: str, value: Any) -> float:
    try:
        size = float("nan" if isinstance(value, bool) else value)
    except (TypeError, ValueError):
        size = math.nan
    if not 0 <= size <= MAX_EMBED_MB:
        raise _wrong(flag, value, f"a number of megabytes, 0 to {MAX_EMBED_MB}", f"Write e.g. {flag} 4")
    return size


def is_price(flag: str, value: Any) -> float:
    try:
        price = float("nan" if isinstance(value, bool) else value)
    except (TypeError, ValueError):
        price = math.nan
    if not 0 <= price < math.inf:
        raise _wrong(flag, value, "a price, 0 or more", f"Write e.g. {flag} 2.49")
    return price


def is_reason(flag: str, value: Any) -> str:
    text = " ".join(is_text(flag, value).split())
    if not text or len(text) > MAX_REASON:
        raise _wrong(flag, value, f"a text of 1 to {MAX_REASON} characters", f"Write e.g. {flag} 'new LoRA, reviewed'")
    return text


def is_time(flag: str, value: Any) -> str:
    try:
        found = datetime.fromisoformat(is_text(flag, value))
    except ValueError:
        found = None
    if found is None or found.tzinfo is None:
        raise _wrong(flag, value, "a time with its zone, ISO 8601", f"Write e.g. {flag} 2026-01-31T04:00:00Z")
    return found.astimezone(UTC).isoformat(timespec="milliseconds")


def is_age(flag: str, value: Any) -> str:
    try:
        parse_age(is_text(flag, value))
    except ValueError as error:
        raise ConfigInvalid(str(error), where=flag, todo=f"Write e.g. {flag} 1h") from error
    return str(value)


def are_texts(flag: str, value: Any) -> tuple[str, ...]:
    if isinstance(value, str) or not isinstance(value, Sequence):
        raise _wrong(flag, value, "a list of texts", f"Give a list; on the command line repeat {flag}")
    return tuple(is_text(flag, item) for item in value)


def are_variables(flag: str, value: Any) -> tuple[str, ...]:
    """Return NAME=VALUE texts. Credentials are refused: the texts are written into files and job definitions."""
    from runner.redact import redact

    texts = are_texts(flag, value)
    names = []
    for text in texts:
        name, equals, content = text.partition("=")
        if not equals or not re.fullmatch(r"[A-Za-z_][A-Za-z0-9_]*", name):
            todo = f"Write e.g. {flag} OMP_NUM_THREADS=8"
            raise ConfigInvalid(f"must be NAME=VALUE, not {redact(text)!r}", where=flag, todo=todo)
        probe = f"?{name}=some-value"  # `redact` masks a URL parameter whose name suggests a credential
        if name in CREDENTIALS or redact(probe) != probe or redact(text) != text or redact(content) != content:
            raise ConfigInvalid(
                f"{name} holds a credential, and variables are written into files and job definitions",
                where=flag,
                todo="Give the tasks a role, a service account or a secret of the platform instead",
            )
        names.append(name)
    if twice := [name for name in dict.fromkeys(names) if names.count(name) > 1]:
        raise ConfigInvalid(f"{twice[0]} is given twice", where=flag, todo="Give each variable once")
    return texts


def is_store(flag: str, value: Any) -> str:
    from runner.storage.uris import is_remote, remote_forms

    uri = is_text(flag, value)
    if not is_remote(uri):
        raise _wrong(flag, value, "a place in an object store", f"Write {remote_forms()}")
    return uri.rstrip("/")


def is_manifest(flag: str, value: Any) -> str | Manifest:
    if isinstance(value, str | os.PathLike):
        return is_text(flag, value)
    from runner.spec.manifest import Manifest

    if not isinstance(value, Manifest):
        raise _wrong(flag, value, "a path, a URI, - or a Manifest", "Give a path, or what load_manifest returns")
    return value


def check_by(flag: str, judge: Callable[[], object]) -> None:
    """Call `judge`. A ConfigInvalid that it raises gets the name of the flag."""
    try:
        judge()
    except ConfigInvalid as error:
        where = None if flag in error.what else flag
        raise ConfigInvalid(error.what, where=where, todo=error.todo) from error


def is_recipe(flag: str, value: Any) -> str:
    name = is_text(flag, value)
    check_by(flag, lambda: get_recipe(name))
    return name


def is_run_id(flag: str, value: Any) -> str:
    from runner.records.output_layout import SUMMARY, run_key
    from runner.storage.base import check_key

    run_id = is_text(flag, value)
    try:
        check_key(run_key(run_id, "shard", SUMMARY))
    except ConfigInvalid as error:
        raise ConfigInvalid(error.what, where=flag, todo="Give a valid folder name, e.g. night-7") from error
    return run_id


def is_spot(flag: str, value: Any) -> str:
    from runner.batch.spot import choose_notices

    kind = is_text(flag, value)
    check_by(flag, lambda: choose_notices(kind))
    return kind


def are_gpus(flag: str, value: Any) -> str:
    text = is_text(flag, value).replace(" ", "")
    numbers = text.split(",")
    if text != "all" and not all(re.fullmatch(r"[0-9]{1,4}", number) for number in numbers):
        raise _wrong(flag, value, "all, or numbers from 0, separated by commas", f"Write e.g. {flag} all")
    if len({number if text == "all" else int(number) for number in numbers}) < len(numbers):
        raise _wrong(flag, value, "different numbers", "Give each GPU once")
    return text


def is_on(flag: str, value: Any) -> str:
    from runner.launch.ray_address import parse_on

    text = is_text(flag, value).strip()
    check_by(flag, lambda: parse_on(text))
    return text


def is_rule(flag: str, value: Any) -> str:
    name = is_text(flag, value)
    if name != ALL_LAYERS:  # the table of the other rules needs torch
        from runner.quantization.rules import get_rule

        check_by(flag, lambda: get_rule(name))
    return name


def is_rank(flag: str, value: Any) -> int:
    from runner.quantization.formats.svdq_layout import SVDQ_LAYOUTS

    rank = is_whole(1, flag, value)
    try:
        next(iter(SVDQ_LAYOUTS.values())).with_rank(rank)
    except ValueError as error:
        raise ConfigInvalid(str(error), where=flag, todo=f"Write e.g. {flag} 64") from error
    return rank


def is_export(flag: str, value: Any) -> tuple[str, Path]:
    todo = f"Write e.g. {flag} {EXPORTS[0]} folder"
    if isinstance(value, str) or not isinstance(value, Sequence) or len(value) != 2:
        raise _wrong(flag, value, "a program and a folder", todo)
    kind, folder = value
    return is_one_of(EXPORTS, flag, kind), is_path(flag, folder)


def is_read_options(flag: str, value: Any) -> str:
    from runner.quantization.files.read_options import parse_read_options

    text = is_text(flag, value)
    check_by(flag, lambda: parse_read_options(text))
    return text


def are_parts(flag: str, value: Any) -> tuple[str, ...]:
    from runner.weights.repositories import sources_of

    parts = are_texts(flag, value)
    check_by(flag, lambda: sources_of(DEFAULT_RECIPE, parts))
    return parts


def are_revisions(flag: str, value: Any) -> tuple[str, ...]:
    texts = are_texts(flag, value)
    for text in texts:
        if "=" not in text:
            raise _wrong(flag, text, "REPO=REVISION", f"Write e.g. {flag} owner/name=main")
    return texts


def is_job_options(flag: str, value: Any) -> str | Mapping[str, Any]:
    if isinstance(value, Mapping):
        return value
    import yaml

    text = is_text(flag, value)
    try:
        yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise ConfigInvalid(
            f"is not valid YAML ({error})", where=flag, todo="Write e.g. '{fps: 30, size: 480x832}'"
        ) from error
    return text


def parse_age(text: str) -> float:
    """Return an age in seconds: `30m` → 1800.0. The units are s, m, h and d. Raises ValueError."""
    found = re.fullmatch(r"([0-9]+(?:\.[0-9]+)?)([smhd])", text.strip())
    if found is None:
        raise ValueError(f"{text!r} is not an age; write e.g. 30m, 1h, 2d or 0s")
    return float(found[1]) * AGE_UNITS[found[2]]

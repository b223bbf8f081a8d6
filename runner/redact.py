"""Redact: text as it may leave the process: secrets masked, characters that no reader would see written as escapes.

In:   text, or a JSON-able value that holds text. Out: the same with `***` in place of each secret. Names of parameters,
hosts and paths stay readable: `https://user:***@host/clip.mp4?X-Amz-Signature=***`.
Never: files, streams; what is fetched, hashed or compared keeps its own text. Every way out calls this module: records
(record.py), the log and the events (events.py), tables and messages on the terminal (tables.py, cli.py).
"""

from __future__ import annotations

import os
import re
from collections.abc import Collection, Mapping
from typing import Any
from urllib.parse import quote

__all__ = ["escape_control", "for_people", "redact", "redact_patterns", "redact_tree"]

MASK = "***"
SECRET_VARIABLES = ("AWS_SECRET_ACCESS_KEY", "AWS_SESSION_TOKEN", "HF_TOKEN")  # masked verbatim, wherever they stand
SHORTEST = 8  # characters of such a value; a shorter one would be found inside ordinary words

_EQUALS = r"(?:=|%3D)"
_VALUE = r"(?:(?!%26)[^\s&\"'<>`#])*"  # up to the next parameter, quote or space
# Parameters whose name alone says what they hold, wherever they stand.
_TELLING = re.compile(
    r"(?<![A-Za-z0-9])((?:x-(?:amz|goog|oss)-(?:signature|credential|security-token)|AWSAccessKeyId"
    r"|(?:CopySource)?SSECustomerKey|(?:aws_?)?secret_?access_?key|(?:aws_?)?session_?token)[\"']?"
    rf"\s*(?:{_EQUALS}|:)\s*[\"']?)({_VALUE})",
    re.I,
)
# Parameters of a query string, by any name that holds one of these words or is one of the short ones.
_QUERY = re.compile(
    r"((?:[?&;]|%3F|%26)(?:amp;)?"
    r"(?:(?:[\w.-]*?(?:signature|credential|secret|password|passwd|token|api[-_]?key|access[-_]?key)(?:id|s)?)"
    rf"|sig|se|sp|key|pwd|pass|auth|authorization|policy|key-pair-id){_EQUALS})({_VALUE})",
    re.I,
)
# user:password@ of a URL. AWS's secret keys hold slashes: where no @ stands before the first slash, the text up to the
# first @ is the password. A port is none, unless an @ follows before the path; s3:// URIs have no ports.
_USER = r"[^/\s:@?#\"'<>]*:"
_USERINFO = re.compile(
    rf"(s3:/+{_USER}(?=[^/\s?#]*@|[^\s@]{{0,4096}}@)"
    rf"|[A-Za-z][A-Za-z0-9+.-]{{1,30}}:/+{_USER}(?=[^/\s?#]*@|(?!\d{{1,5}}(?:[/?#\s\"']|$))[^\s@]{{0,4096}}@))"
    r"([^/\s?#]*(?=@)|[^\s@]{0,4096}(?=@))",
    re.I,
)
_USER_ALONE = re.compile(r"([A-Za-z][A-Za-z0-9+.-]{1,30}://)([^/\s:@?#\"'<>]+)(?=@)")
# The header, as text or as an entry of a dict that was printed; its value goes to the end of the quotes or the line.
_HEADER = re.compile(r"((?:proxy-)?authorization[\"']?\s*[:=]\s*[\"']?)([^\"'\r\n]+)", re.I)
_KEYS = {"authorization", "proxy-authorization", "password", "secret_access_key", "session_token"}
_KEYS |= {"aws_secret_access_key", "aws_session_token", "x-amz-security-token", "ssecustomerkey"}

# C0 and C1 controls but for tab and line feed, and what changes the direction or the lines of what is shown.
_UNSEEN = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u061c\u200e\u200f\u2028-\u202e\u2066-\u2069]")


def redact(text: str) -> str:
    """`text` with its secrets masked. Idempotent.

    Masked: values of signature-, credential- and token-like parameters, user information of URLs, values of
    `Authorization`, and what SECRET_VARIABLES hold in this environment, as it is and percent-encoded.
    """
    return _redact(text, _known_secrets())


def redact_patterns(text: str) -> str:
    """`text` without what its form alone shows to be a secret: the same on every machine, whatever its environment."""
    lower = text.lower()
    if "=" in text or "%3d" in lower or "@" in text or any(word in lower for word in ("authorization", "key", "token")):
        for _ in range(8):  # one mask can bring the next into reach
            masked = _HEADER.sub(rf"\1{MASK}", text)
            masked = _USERINFO.sub(rf"\1{MASK}", masked)
            masked = _USER_ALONE.sub(rf"\1{MASK}", masked)
            masked = _QUERY.sub(_masked_value, _TELLING.sub(_masked_value, masked))
            if masked == text:
                break
            text = masked
    return text


def redact_tree(value: Any, *, keep: Collection[str] = ()) -> Any:
    """A JSON-able value with every text in it redacted, keys included; other objects become their text.

    `keep`: keys whose values stay as they are, because a later run compares them.
    """
    return _tree(value, keep, _known_secrets())


def escape_control(text: str, *, lines: bool = False) -> str:
    r"""`text` with NUL, escape and other control characters, and those that turn text around, as \x00 or \u202e.

    Tab and line feed stay; with `lines`, a line feed is escaped too.
    """
    text = _UNSEEN.sub(lambda found: _escaped(found[0]), text)
    return text.replace("\n", r"\n") if lines else text


def for_people(text: str) -> str:
    """`text` for a terminal: redacted, then with its control characters escaped."""
    return escape_control(redact(text))


def _escaped(character: str) -> str:
    number = ord(character)
    return f"\\x{number:02x}" if number < 0x100 else f"\\u{number:04x}"


def _known_secrets() -> list[str]:
    """What the environment holds now, the longest first."""
    values = [value for name in SECRET_VARIABLES if len(value := os.environ.get(name, "")) >= SHORTEST]
    return sorted({form for value in values for form in (value, quote(value), quote(value, safe=""))}, key=len)[::-1]


def _redact(text: str, known: list[str]) -> str:
    for secret in known:
        text = text.replace(secret, MASK)
    return redact_patterns(text)


def _masked_value(found: re.Match[str]) -> str:
    """A comma or full stop at its end belongs to the sentence around it."""
    name, value = found[1], found[2]
    kept = value.rstrip(".,:;!?)]}")
    return name + (MASK if kept else "") + value[len(kept) :]


def _tree(value: Any, keep: Collection[str], known: list[str]) -> Any:
    if isinstance(value, str):
        return _redact(value, known)
    if value is None or isinstance(value, bool | int | float):
        return value
    if isinstance(value, Mapping):
        return {_redact(str(key), known): _entry(str(key), item, keep, known) for key, item in value.items()}
    if isinstance(value, list | tuple | set | frozenset):
        return [_tree(item, keep, known) for item in value]
    return _redact(str(value), known)


def _entry(key: str, value: Any, keep: Collection[str], known: list[str]) -> Any:
    if key in keep:
        return value
    if isinstance(value, str) and value and key.lower() in _KEYS:
        return MASK
    return _tree(value, keep, known)

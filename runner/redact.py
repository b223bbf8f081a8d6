"""Redact: mask secrets in text, and escape invisible characters, before text leaves the process.

In:   text, or a JSON-able value that holds text. Out: the same with `***` in place of each secret. Names of parameters,
hosts and paths stay readable: `https://user:***@host/clip.mp4?X-Amz-Signature=***`.
Never: files or streams; text that is fetched, hashed or compared is not changed. All output goes through this module:
records (record.py), the log and the events (events.py), tables and messages on the terminal (tables.py, cli.py).
"""

from __future__ import annotations

import os
import re
from collections.abc import Collection, Mapping
from typing import Any
from urllib.parse import quote

__all__ = ["escape_control", "for_people", "redact", "redact_patterns", "redact_tree"]

MASK = "***"
SECRET_VARIABLES = ("AWS_SECRET_ACCESS_KEY", "AWS_SESSION_TOKEN", "HF_TOKEN")  # their values are masked everywhere
SHORTEST = 8  # characters; a shorter value could be part of an ordinary word

_EQUALS = r"(?:=|%3D)"
_VALUE = r"(?:(?!%26)[^\s&\"'<>`#])*"  # up to the next parameter, quote or space
# Parameters whose name alone marks a secret, anywhere in a text.
_SECRET_NAME = re.compile(
    r"(?<![A-Za-z0-9])((?:x-(?:amz|goog|oss)-(?:signature|credential|security-token)|AWSAccessKeyId"
    r"|(?:CopySource)?SSECustomerKey|(?:aws_?)?secret_?access_?key|(?:aws_?)?session_?token)[\"']?"
    rf"\s*(?:{_EQUALS}|:)\s*[\"']?)({_VALUE})",
    re.I,
)
# Parameters of a query string whose name contains one of these words, or is one of the short names.
_QUERY = re.compile(
    r"((?:[?&;]|%3F|%26)(?:amp;)?"
    r"(?:(?:[\w.-]*?(?:signature|credential|secret|password|passwd|token|api[-_]?key|access[-_]?key)(?:id|s)?)"
    rf"|sig|se|sp|key|pwd|pass|auth|authorization|policy|key-pair-id){_EQUALS})({_VALUE})",
    re.I,
)
# user:password@ of a URL. AWS's secret keys may contain slashes: without an @ before the first slash, the text up to
# the first @ is the password. A port is not a password, unless an @ follows before the path. s3:// URIs have no ports.
_USER = r"[^/\s:@?#\"'<>]*:"
_USERINFO = re.compile(
    rf"(s3:/+{_USER}(?=[^/\s?#]*@|[^\s@]{{0,4096}}@)"
    rf"|[A-Za-z][A-Za-z0-9+.-]{{1,30}}:/+{_USER}(?=[^/\s?#]*@|(?!\d{{1,5}}(?:[/?#\s\"']|$))[^\s@]{{0,4096}}@))"
    r"([^/\s?#]*(?=@)|[^\s@]{0,4096}(?=@))",
    re.I,
)
_USER_ALONE = re.compile(r"([A-Za-z][A-Za-z0-9+.-]{1,30}://)([^/\s:@?#\"'<>]+)(?=@)")
# The Authorization header, as text or in a printed dict. Its value ends at the quotation mark or the line end.
_HEADER = re.compile(r"((?:proxy-)?authorization[\"']?\s*[:=]\s*[\"']?)([^\"'\r\n]+)", re.I)
_KEYS = {"authorization", "proxy-authorization", "password", "secret_access_key", "session_token"}
_KEYS |= {"aws_secret_access_key", "aws_session_token", "x-amz-security-token", "ssecustomerkey"}

# C0 and C1 controls except tab and line feed, and characters that change the direction or the line of shown text.
_INVISIBLE = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u061c\u200e\u200f\u2028-\u202e\u2066-\u2069]")


def redact(text: str) -> str:
    """Return `text` with its secrets masked. Idempotent.

    Masked are: values of signature-, credential- and token-like parameters; user information of URLs; values of
    `Authorization`; and the values of SECRET_VARIABLES in this environment, plain and percent-encoded.
    """
    return _redact(text, _known_secrets())


def redact_patterns(text: str) -> str:
    """Return `text` with the secrets masked that their form shows. The result does not depend on the environment."""
    lower = text.lower()
    if "=" in text or "%3d" in lower or "@" in text or any(word in lower for word in ("authorization", "key", "token")):
        for _ in range(8):  # one mask can make the next one match
            masked = _HEADER.sub(rf"\1{MASK}", text)
            masked = _USERINFO.sub(rf"\1{MASK}", masked)
            masked = _USER_ALONE.sub(rf"\1{MASK}", masked)
            masked = _QUERY.sub(_masked_value, _SECRET_NAME.sub(_masked_value, masked))
            if masked == text:
                break
            text = masked
    return text


def redact_tree(value: Any, *, keep: Collection[str] = ()) -> Any:
    """Return a JSON-able value with every text in it redacted, keys included. Other objects become their text.

    `keep`: keys whose values are not changed, because a later run compares them.
    """
    return _tree(value, keep, _known_secrets())


def escape_control(text: str, *, lines: bool = False) -> str:
    r"""Return `text` with control characters, and characters that reverse text, written as \x00 or \u202e.

    Tab and line feed stay. With `lines`, a line feed is escaped too.
    """
    text = _INVISIBLE.sub(lambda found: _escaped(found[0]), text)
    return text.replace("\n", r"\n") if lines else text


def for_people(text: str) -> str:
    """Return `text` for a terminal: redacted, then with its control characters escaped."""
    return escape_control(redact(text))


def _escaped(character: str) -> str:
    number = ord(character)
    return f"\\x{number:02x}" if number < 0x100 else f"\\u{number:04x}"


def _known_secrets() -> list[str]:
    """Return the secrets of the environment now, the longest first."""
    values = [value for name in SECRET_VARIABLES if len(value := os.environ.get(name, "")) >= SHORTEST]
    return sorted({form for value in values for form in (value, quote(value), quote(value, safe=""))}, key=len)[::-1]


def _redact(text: str, known: list[str]) -> str:
    for secret in known:
        text = text.replace(secret, MASK)
    return redact_patterns(text)


def _masked_value(found: re.Match[str]) -> str:
    """Mask the value of a match. Punctuation at its end belongs to the sentence around it and stays."""
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

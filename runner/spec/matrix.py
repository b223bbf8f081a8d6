"""Matrix: make a job id for each pair of a reference and a video.

In:   the references and the videos as written in the manifest. Out: one job id for each pair. Never: files, options.
An id depends on the set of names, not on their order. So a reordered manifest has the same ids as before.
"""

from __future__ import annotations

import hashlib
import posixpath
import re
from collections import defaultdict
from collections.abc import Iterable, Sequence

from runner.redact import redact_patterns

__all__ = ["ID_PATTERN", "check_id", "matrix_ids", "same_file"]

# Names of devices on Windows, in upper or lower case, with any suffix. Windows also drops a dot at the end of a name.
_DEVICE = "(?:[cC][oO][nN]|[pP][rR][nN]|[aA][uU][xX]|[nN][uU][lL]|(?:[cC][oO][mM]|[lL][pP][tT])[0-9])(?:[.]|$)"
ID_PATTERN = f"(?!{_DEVICE})[A-Za-z0-9_-](?:[A-Za-z0-9._-]{{0,126}}[A-Za-z0-9_-])?"
_MAX_ID = 128
_HASH_LENGTHS = (8, 16, 32, 64)  # hexadecimal digits; more than 8 only where two jobs would share an id


def check_id(text: str) -> str:
    """Return `text` if it can be a job's id, and so a folder's name. Raises ValueError with what to write instead."""
    if text in (".", ".."):
        raise ValueError(f"{text} names a folder, not a job")
    if re.fullmatch(ID_PATTERN, text):
        return text
    if not text:
        raise ValueError("must not be empty")
    if len(text) > _MAX_ID:
        raise ValueError(f"is {len(text)} characters long; an id has at most {_MAX_ID}")
    near = _make_valid(_slug(redact_patterns(text))[0])
    hint = f"; try {near}" if near else ""
    if not re.fullmatch("[A-Za-z0-9._-]+", text):
        raise ValueError(f"'{text}' may hold only A-Z a-z 0-9 . _ - (it becomes a folder's name){hint}")
    if re.match(_DEVICE, text):
        raise ValueError(f"{text} is the name of a device on Windows and cannot be a folder there{hint}")
    if text.startswith("."):
        raise ValueError(f"{text} begins with a dot, as hidden and unfinished files do{hint}")
    raise ValueError(f"{text} ends with a dot, which Windows drops from a folder's name{hint}")


def matrix_ids(references: Sequence[str], videos: Sequence[str]) -> dict[tuple[str, str], str]:
    """Return (reference, video) -> id, for every pair of distinct names.

    `refs/anna.png` × `dances/samba.mp4` becomes `anna-samba`. A short hash of both names as written is added in three
    cases: letters were lost (贝拉, spaces, too long, the secret of a presigned URL); two pairs would share an id (upper
    and lower case count as equal); `check_id` would refuse the plain id.
    """
    stems = {name: posixpath.splitext(_file_name(redact_patterns(name)))[0] for name in {*references, *videos}}
    slugs = {name: _slug(stem) for name, stem in stems.items()}
    pairs = sorted({(reference, video) for reference in references for video in videos})
    level = {}  # pair -> length of the hash in its id: 0 none, else _HASH_LENGTHS[level - 1]
    for pair in pairs:
        faithful = all(slugs[name][1] for name in pair)
        level[pair] = 0 if faithful and re.fullmatch(ID_PATTERN, _pair_id(pair, slugs, 0)) else 1
    ids = {pair: _pair_id(pair, slugs, level[pair]) for pair in pairs}
    while clashing := _clashing(ids):
        raised = [pair for pair in clashing if level[pair] < len(_HASH_LENGTHS)]
        if not raised:  # equal SHA-256 of different names
            raise ValueError("two pairs of the matrix have the same id")
        for pair in raised:
            level[pair] += 1
            ids[pair] = _pair_id(pair, slugs, level[pair])
    return ids


def same_file(name: str) -> str:
    """Return `name` without `./` and double slashes, so that two spellings of one relative path are equal."""
    scheme, separator, rest = name.partition("://")
    return name if separator else posixpath.normpath(scheme + rest)


def _file_name(name: str) -> str:
    return name.rstrip("/").rpartition("/")[2]


def _slug(text: str) -> tuple[str, bool]:
    """Return `text` in the letters that an id may have, and True if no letter was lost."""
    if re.fullmatch(r"[A-Za-z0-9._-]+", text):
        return text, True
    return re.sub(r"[^A-Za-z0-9._]+", "-", text).strip("-._"), False


def _make_valid(name: str) -> str:
    """Return `name` without `-._` at its ends; with `job-` before a device's name."""
    name = name.strip("-._")
    return f"job-{name}" if re.match(_DEVICE, name) else name


def _pair_id(pair: tuple[str, str], slugs: dict[str, tuple[str, bool]], level: int) -> str:
    stem = "-".join(slugs[name][0] for name in pair if slugs[name][0])
    if level == 0:
        return stem
    length = _HASH_LENGTHS[level - 1]
    digest = hashlib.sha256("\0".join(same_file(name) for name in pair).encode()).hexdigest()[:length]
    room = _MAX_ID - 1 - length
    stem = _make_valid(stem[:room])[:room].strip("-._")
    return f"{stem or 'job'}-{digest}"


def _clashing(ids: dict[tuple[str, str], str]) -> Iterable[tuple[str, str]]:
    """The pairs whose ids equal another's or differ only in case: on many file systems these are one folder."""
    groups = defaultdict(list)
    for pair, name in ids.items():
        groups[name.lower()].append(pair)
    return [pair for group in groups.values() if len(group) > 1 for pair in group]

"""Matrix: every reference with every video, and a name for each pair.

In:   the references and the videos as the manifest writes them. Out: one job id a pair. Never: files, options, lines.
An id depends on the set of names alone, never on their order, so a reordered manifest finds its finished jobs again.
"""

from __future__ import annotations

import hashlib
import posixpath
import re
from collections import defaultdict
from collections.abc import Iterable, Sequence

from runner.redact import redact_patterns

__all__ = ["ID_PATTERN", "check_id", "matrix_ids", "same_file"]

# What Windows takes for a device, in any case and whatever follows the first dot. It also drops a dot at a name's end.
_DEVICE = "(?:[cC][oO][nN]|[pP][rR][nN]|[aA][uU][xX]|[nN][uU][lL]|(?:[cC][oO][mM]|[lL][pP][tT])[0-9])(?:[.]|$)"
ID_PATTERN = f"(?!{_DEVICE})[A-Za-z0-9_-](?:[A-Za-z0-9._-]{{0,126}}[A-Za-z0-9_-])?"
_MAX_ID = 128
_HASH_LENGTHS = (8, 16, 32, 64)  # hexadecimal digits; more only where eight leave two jobs alike


def check_id(text: str) -> str:
    """`text`, if it can be a job's id and so a folder's name; ValueError with what to write instead."""
    if text in (".", ".."):
        raise ValueError(f"{text} names a folder, not a job")
    if re.fullmatch(ID_PATTERN, text):
        return text
    if not text:
        raise ValueError("must not be empty")
    if len(text) > _MAX_ID:
        raise ValueError(f"is {len(text)} characters long; an id has at most {_MAX_ID}")
    near = _valid_words(_slug(redact_patterns(text))[0])
    hint = f"; try {near}" if near else ""
    if not re.fullmatch("[A-Za-z0-9._-]+", text):
        raise ValueError(f"'{text}' may hold only A-Z a-z 0-9 . _ - (it becomes a folder's name){hint}")
    if re.match(_DEVICE, text):
        raise ValueError(f"{text} is the name of a device on Windows and cannot be a folder there{hint}")
    if text.startswith("."):
        raise ValueError(f"{text} begins with a dot, as hidden files and files that are being written do{hint}")
    raise ValueError(f"{text} ends with a dot, which Windows drops from a folder's name{hint}")


def matrix_ids(references: Sequence[str], videos: Sequence[str]) -> dict[tuple[str, str], str]:
    """(reference, video) -> id, for every pair of distinct names.

    `refs/anna.png` × `dances/samba.mp4` is `anna-samba`. A short hash of both names as written is added where letters
    were lost (贝拉, spaces, too long, a presigned name's secret), where two pairs would share an id, upper and lower
    case alike, and where `check_id` would refuse the plain id.
    """
    stems = {name: posixpath.splitext(_file_name(redact_patterns(name)))[0] for name in {*references, *videos}}
    slugs = {name: _slug(stem) for name, stem in stems.items()}
    pairs = sorted({(reference, video) for reference in references for video in videos})
    level = {}  # pair -> how much hash its id carries: 0 none, else _HASH_LENGTHS[level - 1]
    for pair in pairs:
        faithful = all(slugs[name][1] for name in pair)
        level[pair] = 0 if faithful and re.fullmatch(ID_PATTERN, _pair_id(pair, slugs, 0)) else 1
    ids = {pair: _pair_id(pair, slugs, level[pair]) for pair in pairs}
    while clashing := _clashing(ids):
        raised = [pair for pair in clashing if level[pair] < len(_HASH_LENGTHS)]
        if not raised:  # equal SHA-256 of different names
            raise ValueError("two pairs of the matrix cannot be told apart")
        for pair in raised:
            level[pair] += 1
            ids[pair] = _pair_id(pair, slugs, level[pair])
    return ids


def same_file(name: str) -> str:
    """`name` without `./` and doubled slashes: equal for two spellings of one relative path."""
    scheme, separator, rest = name.partition("://")
    return name if separator else posixpath.normpath(scheme + rest)


def _file_name(name: str) -> str:
    return name.rstrip("/").rpartition("/")[2]


def _slug(text: str) -> tuple[str, bool]:
    """`text` in the letters of an id, and whether nothing was lost."""
    if re.fullmatch(r"[A-Za-z0-9._-]+", text):
        return text, True
    return re.sub(r"[^A-Za-z0-9._]+", "-", text).strip("-._"), False


def _valid_words(words: str) -> str:
    """Words of an id without dots at their ends, and not a device's name."""
    words = words.strip("-._")
    return f"job-{words}" if re.match(_DEVICE, words) else words


def _pair_id(pair: tuple[str, str], slugs: dict[str, tuple[str, bool]], level: int) -> str:
    words = "-".join(slugs[name][0] for name in pair if slugs[name][0])
    if level == 0:
        return words
    length = _HASH_LENGTHS[level - 1]
    digest = hashlib.sha256("\0".join(same_file(name) for name in pair).encode()).hexdigest()[:length]
    room = _MAX_ID - 1 - length
    words = _valid_words(words[:room])[:room].strip("-._")
    return f"{words or 'job'}-{digest}"


def _clashing(ids: dict[tuple[str, str], str]) -> Iterable[tuple[str, str]]:
    """The pairs whose ids differ from another's in case at most: one folder, on many disks."""
    groups = defaultdict(list)
    for pair, name in ids.items():
        groups[name.lower()].append(pair)
    return [pair for group in groups.values() if len(group) > 1 for pair in group]

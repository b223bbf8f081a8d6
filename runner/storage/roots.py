"""Roots: check that inputs are inside the folders and prefixes of `--input-root`.

In:   the roots from the command line, one input's path or URI. Out: the input's real place, or InputUnreadable.
Never: the content of an input, or whether it exists.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

from runner.errors import ConfigInvalid, InputUnreadable
from runner.storage.disk import os_errors
from runner.storage.regular_file import answer_in_time
from runner.storage.uris import is_remote, local_path, split_uri

__all__ = ["check_inside", "parse_roots"]


def parse_roots(named: Sequence[str]) -> tuple[str, ...]:
    """Return the roots for `check_inside`: real paths of folders, and URIs without a slash at the end.

    Raises ConfigInvalid for a folder that does not exist; storage.* for one that cannot be reached.
    """
    roots = []
    for name in named:
        if is_remote(name):
            scheme, bucket, prefix = split_uri(name)
            if not bucket or _strays(prefix.rstrip("/")):
                todo = f"Write --input-root {scheme}://bucket/prefix"
                raise ConfigInvalid("this root does not name a bucket and prefix", where=name, todo=todo)
            roots.append(f"{scheme}://{bucket}/{prefix}".rstrip("/"))
            continue
        path = local_path(name)
        with os_errors(path, writing=True):  # a missing root is not a missing input
            if not path.is_dir():
                raise ConfigInvalid(
                    "this root is not a folder", where=name, todo="Name an existing folder with --input-root"
                )
            roots.append(os.path.realpath(path))
    return tuple(roots)


def check_inside(uri: str, roots: Sequence[str]) -> str:
    """Return the real place of `uri` (all symlinks followed) if it is below one of `roots`; without roots, `uri`.

    Read the returned place and not `uri`: a symlink that is changed afterwards then has no effect. Raises
    InputUnreadable for other places. Objects need a root such as s3://bucket/prefix.
    """
    if not roots:
        return uri
    if is_remote(uri):
        scheme, bucket, key = split_uri(uri)
        place = f"{scheme}://{bucket}/{key}"
        if not _strays(key) and any(place.startswith(f"{root}/") for root in roots if is_remote(root)):
            return place
        raise _outside(uri, roots)
    try:
        path = local_path(uri)
    except ConfigInvalid as err:
        raise InputUnreadable(err.what, where=uri, todo=err.todo) from err
    with os_errors(path, writing=False):
        real = Path(answer_in_time(lambda: os.path.realpath(path), path))
    if any(real.is_relative_to(root) for root in roots if not is_remote(root)):
        return str(real)
    raise _outside(uri, roots)


def _strays(key: str) -> bool:
    """Return whether a client or a server might resolve the key to another one."""
    return bool(key) and bool({"", ".", ".."} & set(key.split("/")))


def _outside(uri: str, roots: Sequence[str]) -> InputUnreadable:
    return InputUnreadable(
        f"the input lies outside --input-root {', '.join(roots)}", where=uri, todo="Move it there, or add its folder"
    )

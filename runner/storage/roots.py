"""Roots: the folders and prefixes that inputs may come from (`--input-root`), and whether one input lies in them.

In:   the roots as they were named, one input's path or URI. Out: where the input really lies, or InputUnreadable.
Never: what an input holds, or whether it exists.
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
    """The roots as `check_inside` takes them: real paths of folders, and URIs without a slash at the end.

    Raises ConfigInvalid for a folder that is not there, storage.* for one that cannot be reached.
    """
    roots = []
    for name in named:
        if is_remote(name):
            scheme, bucket, prefix = split_uri(name)
            if not bucket or _strays(prefix.rstrip("/")):
                todo = f"Write --input-root {scheme}://bucket/prefix"
                raise ConfigInvalid("names no place in a bucket", where=name, todo=todo)
            roots.append(f"{scheme}://{bucket}/{prefix}".rstrip("/"))
            continue
        path = local_path(name)
        with os_errors(path, writing=True):  # a root that is not there is no missing input
            if not path.is_dir():
                raise ConfigInvalid("is not a folder", where=name, todo="Name an existing folder with --input-root")
            roots.append(os.path.realpath(path))
    return tuple(roots)


def check_inside(uri: str, roots: Sequence[str]) -> str:
    """Where `uri` really lies, all symlinks followed, if that is below one of `roots`; `uri` itself without roots.

    Read what is returned, not `uri`: a symlink that is changed afterwards then leads nowhere else. Raises
    InputUnreadable for what lies elsewhere; objects need a root of their own, such as s3://bucket/prefix.
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
    """Whether a client or a server might read the key as another one."""
    return bool(key) and bool({"", ".", ".."} & set(key.split("/")))


def _outside(uri: str, roots: Sequence[str]) -> InputUnreadable:
    return InputUnreadable(
        f"lies outside --input-root {', '.join(roots)}", where=uri, todo="Move it there, or allow its folder"
    )

"""Scratch: one run's folder for temporary files, and an end to those of processes that were killed.

In:   a cache folder that several runs may share, containers included. Out: a folder of this run's own.
Never: what lies in it. Whoever lives holds a lock in its folder; the system frees it when its holder dies.
"""

from __future__ import annotations

import fcntl
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

__all__ = ["scratch_folder"]

PREFIX, LOCK = "run-", ".lock"


@contextmanager
def scratch_folder(cache: Path) -> Iterator[Path]:
    """A new folder below `cache`, removed at the end. What killed runs have left there is removed first.

    Raises OSError where `cache` cannot be made or written.
    """
    cache.mkdir(parents=True, exist_ok=True)
    for folder in cache.glob(f"{PREFIX}*"):
        _remove_if_left(folder)
    # Locked before it has its name: else another run that starts now could take it for one that was left.
    made = Path(tempfile.mkdtemp(prefix="new-", dir=cache))
    with (made / LOCK).open("w") as lock:
        _try_lock(lock.fileno())
        folder = made.with_name(PREFIX + made.name.removeprefix("new-"))
        made.rename(folder)
        try:
            yield folder
        finally:
            shutil.rmtree(folder, ignore_errors=True)


def _remove_if_left(folder: Path) -> None:
    try:
        with (folder / LOCK).open("r+") as lock:
            if _try_lock(lock.fileno()):
                shutil.rmtree(folder, ignore_errors=True)
    except OSError:  # no lock in it, or another user's: not ours to judge
        return


def _try_lock(descriptor: int) -> bool:
    """Whether nobody else holds it; a file system that knows no locks counts as held."""
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        return False
    return True

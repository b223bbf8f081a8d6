"""Scratch: make one run's folder for temporary files, and remove folders of processes that were killed.

In:   a cache folder that several runs and containers may share. Out: a new folder for this run.
Never: the content of the folder.

Each running process holds a lock in its folder; folders without a lock are leftovers. The system releases the lock
when the process dies.
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
    """Make a new folder below `cache`, and remove it at the end. Folders of killed runs are removed first.

    Raises OSError if `cache` cannot be made or written.
    """
    cache.mkdir(parents=True, exist_ok=True)
    for folder in cache.glob(f"{PREFIX}*"):
        _remove_if_unlocked(folder)
    # Lock the folder before it gets its name, so that another run that starts now does not remove it as a leftover.
    made = Path(tempfile.mkdtemp(prefix="new-", dir=cache))
    with (made / LOCK).open("w") as lock:
        _try_lock(lock.fileno())
        folder = made.with_name(PREFIX + made.name.removeprefix("new-"))
        made.rename(folder)
        try:
            yield folder
        finally:
            shutil.rmtree(folder, ignore_errors=True)


def _remove_if_unlocked(folder: Path) -> None:
    try:
        with (folder / LOCK).open("r+") as lock:
            if _try_lock(lock.fileno()):
                shutil.rmtree(folder, ignore_errors=True)
    except OSError:  # it has no lock file, or belongs to another user: leave it
        return


def _try_lock(descriptor: int) -> bool:
    """Lock the file. Return False if another process holds the lock, or if the file system has no locks."""
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        return False
    return True

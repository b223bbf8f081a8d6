"""Unfinished: a media file that is written beside its place and gets its name when it is whole.

In:   where the file is to be, its container format. Out: an open container to write to. Never: what is in it.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from runner.errors import RunnerError, as_runner_error

__all__ = ["open_unfinished"]


@contextmanager
def open_unfinished(dest: Path, format: str, options: Mapping[str, str]) -> Iterator[Any]:
    """A container of FFmpeg's `format` as `NAME.part`. It becomes `dest` at the end; after an error nothing is left.

    Raises StorageFull and StorageDenied as the disk does, and what is raised inside; an error of FFmpeg gets a code.
    """
    import av

    unfinished = dest.with_name(dest.name + ".part")
    container: Any = None
    try:
        unfinished.parent.mkdir(parents=True, exist_ok=True)
        container = av.open(f"file:{unfinished.absolute()}", "w", format=format, options=dict(options))
        yield container
        container.close()
        container = None
        os.replace(unfinished, dest)
    except BaseException as error:
        if container is not None:
            with suppress(av.error.FFmpegError, OSError):  # a full disk refuses the tail as well
                container.close()
        with suppress(OSError):
            unfinished.unlink(missing_ok=True)
        if isinstance(error, (av.error.FFmpegError, OSError)) and not isinstance(error, RunnerError):
            raise as_runner_error(error, where=dest) from error
        raise

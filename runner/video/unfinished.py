"""Unfinished: write a media file under a temporary name, and rename it when it is complete.

In:   the path of the file, its container format. Out: an open container to write to. Never: the content.
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
    """Open a container of FFmpeg's `format` as `NAME.part`. It becomes `dest` at the end; after an error it is removed.

    Raises StorageFull and StorageDenied for errors of the disk, and whatever is raised inside the `with` block; errors
    of FFmpeg become RunnerErrors.
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
            with suppress(av.error.FFmpegError, OSError):  # on a full disk closing fails as well
                container.close()
        with suppress(OSError):
            unfinished.unlink(missing_ok=True)
        if isinstance(error, (av.error.FFmpegError, OSError)) and not isinstance(error, RunnerError):
            raise as_runner_error(error, where=dest) from error
        raise

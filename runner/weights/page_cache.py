"""Page cache: model files read once, so that several processes that load them do not wait for the disk in turn.

In:   files, a number of bytes. Out: the files' pages in the system's cache. Never: what the files hold.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterable
from pathlib import Path

import structlog

__all__ = ["read_into_page_cache"]

BLOCK_BYTES = 8 * 2**20


def read_into_page_cache(files: Iterable[Path], free_bytes: int, go_on: Callable[[], bool] = lambda: True) -> int:
    """Read `files` from their beginning to their end, in their order; the bytes that were read.

    A file that does not fit into what is left of `free_bytes` is left out, as its pages would drive out those that were
    read before. Ends early where `go_on` returns False. A file that cannot be read is left to the loader, which names
    the error. The event `model_files_read` says what was done.
    """
    begin, total, read, left_out = time.monotonic(), 0, 0, []
    block = memoryview(bytearray(BLOCK_BYTES))
    for path in dict.fromkeys(files):
        try:
            with path.open("rb", buffering=0) as file:
                size = os.fstat(file.fileno()).st_size
                if total + size > free_bytes:
                    left_out.append(path.name)
                    continue
                os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_SEQUENTIAL)
                while go_on() and (count := file.readinto(block)):
                    total += count
        except OSError:
            left_out.append(path.name)
            continue
        if not go_on():
            break
        read += 1
    structlog.get_logger().debug(
        "model_files_read",
        files=read,
        gb=round(total / 1e9, 3),
        seconds=round(time.monotonic() - begin, 3),
        **({"left_out": left_out, "free_gb": round(free_bytes / 1e9, 3)} if left_out else {}),
    )
    return total

"""Page cache: read model files once, so that several processes load them without waiting for the disk in turn.

In:   files, a number of bytes. Out: the files' pages in the system's cache. Never: the files' content.
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
    """Read `files` from beginning to end, in their order. Returns the number of bytes read.

    A file larger than the rest of `free_bytes` is left out: its pages would evict those read before. Reading stops when
    `go_on` returns False. A file that cannot be read is skipped; the loader raises its error later. The event
    `model_files_read` reports the result.
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

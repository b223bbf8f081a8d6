"""Row blocks: process a matrix in blocks of rows, on all cores.

In:   a function of a slice of rows. Out: nothing; the function writes its results, each block to its own place.
Never: the rows' content.
"""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import torch

__all__ = ["on_all_cores", "row_blocks"]


def row_blocks(shape: tuple[int, ...], limit: int) -> list[slice]:
    """Split a matrix [rows, columns] into blocks of whole rows, each of at most `limit` elements, or of one row."""
    total, columns = shape
    rows = max(1, limit // columns)
    return [slice(start, min(start + rows, total)) for start in range(0, total, rows)]


def on_all_cores(work: Callable[[slice], None], blocks: list[slice]) -> None:
    """Run `work` on every block. One thread does all operations of a block; errors are raised to the caller.

    torch's own threads synchronise after every operation; on blocks that fit a cache this costs as much as the
    operation. Uses as many threads as torch is set to; with one thread or one block, the caller's thread.
    """
    threads = min(torch.get_num_threads(), len(blocks))
    if threads <= 1:
        for block in blocks:
            work(block)
        return
    before, inference = torch.get_num_threads(), torch.is_inference_mode_enabled()

    def work_in_mode(block: slice) -> None:
        with torch.inference_mode(inference):  # each thread has its own mode, which restricts writes to tensors
            work(block)

    try:
        with ThreadPoolExecutor(threads, initializer=torch.set_num_threads, initargs=(1,)) as pool:
            for _ in pool.map(work_in_mode, blocks):
                pass
    finally:
        torch.set_num_threads(before)  # else the workers' 1 would apply to every thread that starts later

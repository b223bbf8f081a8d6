"""Work on a matrix block by block of rows, on all cores.

In: a function of a slice of rows. Out: nothing; the function writes where it likes, each block somewhere else.
It will never know: what the rows hold.
"""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import torch

__all__ = ["on_all_cores", "row_blocks"]


def row_blocks(shape: tuple[int, ...], limit: int) -> list[slice]:
    """Blocks of whole rows of a matrix [rows, columns], each of at most `limit` elements, or of one row."""
    total, columns = shape
    rows = max(1, limit // columns)
    return [slice(start, min(start + rows, total)) for start in range(0, total, rows)]


def on_all_cores(work: Callable[[slice], None], blocks: list[slice]) -> None:
    """Runs `work` on every block, each on one thread from its first operation to its last; errors come out here.

    torch's own threads meet after every operation, which on blocks that fit a cache costs as much as the operation.
    As many threads as torch is set to use; with one, or with one block, the caller's own.
    """
    threads = min(torch.get_num_threads(), len(blocks))
    if threads <= 1:
        for block in blocks:
            work(block)
        return
    before, inference = torch.get_num_threads(), torch.is_inference_mode_enabled()

    def in_the_callers_mode(block: slice) -> None:
        with torch.inference_mode(inference):  # the mode belongs to a thread, and decides who may write a tensor
            work(block)

    try:
        with ThreadPoolExecutor(threads, initializer=torch.set_num_threads, initargs=(1,)) as pool:
            for _ in pool.map(in_the_callers_mode, blocks):
                pass
    finally:
        torch.set_num_threads(before)  # the workers' 1 would otherwise hold for every thread that starts later

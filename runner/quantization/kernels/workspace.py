"""Workspace: memory for a weight during one matrix product, shared by all layers.

In:   a shape, a dtype, a device, the name of a use. Out: a matrix of unspecified values.
Never: the content of the matrix, the end of its use.
"""

from __future__ import annotations

import threading
from typing import Final

import torch
from torch import Tensor

__all__ = ["release_workspace", "workspace", "workspace_bytes"]


class _Workspaces(threading.local):
    """One flat buffer per use, device, dtype and CUDA stream, as large as the largest weight so far.

    Threads and streams do not share buffers, so that work at the same time writes to different memory. On one thread
    and stream, a layer's product is enqueued before the next layer's weight, which can then use the buffer.
    """

    def __init__(self) -> None:
        self.buffers: dict[tuple[str, torch.device, torch.dtype, int], Tensor] = {}

    def matrix(self, use: str, shape: tuple[int, int], dtype: torch.dtype, device: torch.device) -> Tensor:
        stream = torch.cuda.current_stream(device).cuda_stream if device.type == "cuda" else 0
        key, count = (use, device, dtype, stream), shape[0] * shape[1]
        if key not in self.buffers or self.buffers[key].numel() < count:
            self.buffers.pop(key, None)  # first, so that the old and the new buffer are never in memory together
            with torch.inference_mode(False):  # else code outside inference mode could not write to it later
                self.buffers[key] = torch.empty(count, dtype=dtype, device=device)
        return self.buffers[key][:count].view(shape)


_workspaces: Final = _Workspaces()


def workspace(use: str, shape: tuple[int, int], dtype: torch.dtype, device: torch.device) -> Tensor:
    """A contiguous matrix of the calling thread and stream, valid until the next call of this use, dtype and device."""
    return _workspaces.matrix(use, shape, dtype, device)


def workspace_bytes() -> int:
    """Bytes of the calling thread's workspaces."""
    return sum(buffer.nbytes for buffer in _workspaces.buffers.values())


def release_workspace() -> None:
    """Free the workspaces of the calling thread; the next product allocates one again."""
    _workspaces.buffers.clear()

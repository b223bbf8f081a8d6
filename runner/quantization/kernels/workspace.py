"""Workspace: memory for a weight while one matrix product needs it, shared by all layers.

In:   a shape, a dtype, a device, and which of several uses. Out: a matrix of unspecified values.
Never: what is written there, or when it is done with.
"""

from __future__ import annotations

import threading
from typing import Final

import torch
from torch import Tensor

__all__ = ["release_workspace", "workspace", "workspace_bytes"]


class _Workspaces(threading.local):
    """One flat buffer a use, device, dtype and CUDA stream, as large as the largest weight that was written into it.

    Each thread has its own, and streams do not share: whatever runs at the same time writes to different memory. On one
    thread and stream, one layer's product is enqueued before the next layer's weight, which may then have the buffer.
    """

    def __init__(self) -> None:
        self.buffers: dict[tuple[str, torch.device, torch.dtype, int], Tensor] = {}

    def matrix(self, use: str, shape: tuple[int, int], dtype: torch.dtype, device: torch.device) -> Tensor:
        stream = torch.cuda.current_stream(device).cuda_stream if device.type == "cuda" else 0
        key, wanted = (use, device, dtype, stream), shape[0] * shape[1]
        if key not in self.buffers or self.buffers[key].numel() < wanted:
            self.buffers.pop(key, None)  # first, so that the old and the new one are never there together
            with torch.inference_mode(False):  # else nothing outside inference mode could write to it later
                self.buffers[key] = torch.empty(wanted, dtype=dtype, device=device)
        return self.buffers[key][:wanted].view(shape)


_workspaces: Final = _Workspaces()


def workspace(use: str, shape: tuple[int, int], dtype: torch.dtype, device: torch.device) -> Tensor:
    """A contiguous matrix of the calling thread and stream, until the next call for the same use, dtype and device."""
    return _workspaces.matrix(use, shape, dtype, device)


def workspace_bytes() -> int:
    """What the workspaces of the calling thread take."""
    return sum(buffer.nbytes for buffer in _workspaces.buffers.values())


def release_workspace() -> None:
    """Gives back the workspaces of the calling thread; the next product makes one anew."""
    _workspaces.buffers.clear()

"""Activations: what each linear of the transformer is fed while jobs render, for scales that matter where it counts.

In:   a loaded generator and jobs. Out: layer → mean square of each input channel, float32 on the host.
Never: quantisation itself. Run it with the LoRA active that will be in the file: activations are the distilled model's.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

__all__ = ["ChannelMoments", "watching"]


class ChannelMoments:
    """Sums of squares by layer and input channel, in float64: a clip has 10^10 activations."""

    def __init__(self) -> None:
        self._sums: dict[str, Tensor] = {}
        self._rows: dict[str, int] = {}

    def see(self, layer: str, x: Tensor) -> None:
        """Add activations [..., in]."""
        flat = x.detach().reshape(-1, x.shape[-1])
        total = torch.zeros(flat.shape[1], dtype=torch.float64, device=flat.device)
        for rows in flat.split(4096):
            total += rows.double().square_().sum(0)
        self._sums[layer] = self._sums[layer] + total if layer in self._sums else total
        self._rows[layer] = self._rows.get(layer, 0) + len(flat)

    def means(self) -> dict[str, Tensor]:
        """Layer → float32 [in] on the host."""
        return {name: (total / self._rows[name]).float().cpu() for name, total in self._sums.items()}


@contextmanager
def watching(model: nn.Module) -> Iterator[ChannelMoments]:
    """Collect from every nn.Linear of `model` inside the block."""
    moments = ChannelMoments()

    def hook(name: str) -> Callable[[nn.Module, tuple[Any, ...]], None]:
        return lambda module, args: moments.see(name, args[0])

    handles = [
        module.register_forward_pre_hook(hook(name))
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear)
    ]
    try:
        yield moments
    finally:
        for handle in handles:
            handle.remove()

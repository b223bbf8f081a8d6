"""Activations: record statistics of the inputs of the transformer's linears while jobs render, for calibration.

In:   a loaded generator and jobs. Out: layer → mean square of each input channel, its largest magnitude, sampled rows;
      on the host.
Never: quantisation itself. The LoRA that the file will contain must be active, since activations depend on it.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Final, Protocol, TypeVar

import torch
from torch import Tensor, nn

__all__ = ["SAMPLED_ROWS", "ChannelMoments", "InputSamples", "LayerInputs", "Watcher", "watching"]

SAMPLED_ROWS: Final = 128  # of each linear, in bfloat16: 0.78 GB of host memory for the 521 of the 14B model
BLOCK: Final = 4096  # rows that are processed at once


class Watcher(Protocol):
    """Receives every input of a linear."""

    def see(self, layer: str, x: Tensor) -> None:
        """Process activations [..., in], the input of `layer`."""


W = TypeVar("W", bound=Watcher)


class ChannelMoments:
    """Sums of squares by layer and input channel, in float64: a clip has 10^10 activations."""

    def __init__(self) -> None:
        self._sums: dict[str, Tensor] = {}
        self._rows: dict[str, int] = {}

    def see(self, layer: str, x: Tensor) -> None:
        """Add activations [..., in]."""
        flat = x.detach().reshape(-1, x.shape[-1])
        total = torch.zeros(flat.shape[1], dtype=torch.float64, device=flat.device)
        for rows in flat.split(BLOCK):
            total += rows.double().square_().sum(0)
        self._sums[layer] = self._sums[layer] + total if layer in self._sums else total
        self._rows[layer] = self._rows.get(layer, 0) + len(flat)

    def means(self) -> dict[str, Tensor]:
        """Layer → float32 [in] on the host."""
        return {name: (total / self._rows[name]).float().cpu() for name, total in self._sums.items()}


@dataclass(frozen=True)
class LayerInputs:
    """Statistics of one linear's inputs: `spans` and `squares` are of all inputs, `rows` are a sample. On the host."""

    spans: Tensor  # float32 [in], the largest magnitude of each channel
    squares: Tensor  # float32 [in], its mean square
    rows: Tensor  # bfloat16 [n, in]


class InputSamples:
    """Collects `LayerInputs` of every layer: spans, moments, and a uniform sample of all rows.

    Each row gets a random number, and the rows with the largest numbers are kept, so that all rows of all steps are
    equally likely. The random numbers of a layer depend only on its name.
    """

    def __init__(self, rows: int = SAMPLED_ROWS) -> None:
        self.rows = rows
        self._moments = ChannelMoments()
        self._spans: dict[str, Tensor] = {}
        self._generators: dict[str, torch.Generator] = {}
        self._keys: dict[str, Tensor] = {}
        self._kept: dict[str, Tensor] = {}

    def see(self, layer: str, x: Tensor) -> None:
        """Add activations [..., in]."""
        self._moments.see(layer, x)
        flat = x.detach().reshape(-1, x.shape[-1])
        if not len(flat):
            return
        low, high = torch.aminmax(flat, dim=0)
        spans = torch.maximum(-low, high).float()
        self._spans[layer] = torch.maximum(self._spans[layer], spans) if layer in self._spans else spans
        self._draw(layer, flat)

    def inputs(self) -> dict[str, LayerInputs]:
        """Layer → its statistics so far."""
        means = self._moments.means()
        return {name: LayerInputs(spans.cpu(), means[name], self._kept[name]) for name, spans in self._spans.items()}

    def _draw(self, layer: str, flat: Tensor) -> None:
        generator = self._generators.get(layer)
        if generator is None:
            generator = self._generators[layer] = torch.Generator().manual_seed(zlib.crc32(layer.encode()))
        drawn = torch.rand(len(flat), generator=generator, dtype=torch.float64)
        keys, places = torch.topk(drawn, min(self.rows, len(drawn)))
        before = self._keys.get(layer)
        if before is not None:
            if len(before) == self.rows:
                better = keys > before.min()
                keys, places = keys[better], places[better]
            if not len(keys):
                return
        rows = flat[places.to(flat.device)].to(torch.bfloat16).cpu()
        if before is not None:
            keys, rows = torch.cat([before, keys]), torch.cat([self._kept[layer], rows])
        self._keys[layer], chosen = torch.topk(keys, min(self.rows, len(keys)))
        self._kept[layer] = rows[chosen]


@contextmanager
def watching(model: nn.Module, watcher: W) -> Iterator[W]:
    """Pass the inputs of every nn.Linear of `model` to `watcher` inside the block."""

    def hook(name: str) -> Callable[[nn.Module, tuple[Any, ...]], None]:
        return lambda module, args: watcher.see(name, args[0])

    handles = [
        module.register_forward_pre_hook(hook(name))
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear)
    ]
    try:
        yield watcher
    finally:
        for handle in handles:
            handle.remove()

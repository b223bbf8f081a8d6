"""The autoencoder's speed: two changes that leave its arithmetic alone, each a switch.

In:   the loaded autoencoder, the switches. Out: the same module, changed in place; what was done, for the record.
Never: tiles, which double the work at the seams: `memory.py` decides on them where memory forces it.

Convolutions get weights with the channels innermost (`channels_last_3d` and, for pictures, `channels_last`), the layout
of cuDNN's tensor-core kernels. Norms, which are five passes over full-size pictures in eager mode, become one kernel.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import structlog
import torch
from torch import Tensor, nn

from runner.generation.device import as_out_of_memory

if TYPE_CHECKING:
    from runner.generation.switches import Switches

__all__ = ["FusedNorm", "fuse_norms", "prepare_vae", "with_channels_last"]


def prepare_vae(vae: Any, switches: Switches) -> dict[str, Any]:
    """What the switches ask for, to an autoencoder that is on its device; how many layers were changed."""
    said: dict[str, Any] = {}
    if switches.channels_last:
        said["vae_channels_last"] = with_channels_last(vae)
    if switches.fuse_vae_norms:
        said["vae_fused_norms"] = fuse_norms(vae)
    if said:
        structlog.get_logger().info("vae_prepared", **said)
    return said


@torch.no_grad()
def with_channels_last(vae: nn.Module) -> int:
    """Lays out the weights of all convolutions anew; how many. Values and shapes stay."""
    count = 0
    for layer in vae.modules():
        if isinstance(layer, nn.Conv3d | nn.Conv2d):
            layout = torch.channels_last_3d if isinstance(layer, nn.Conv3d) else torch.channels_last
            layer.weight.data = layer.weight.data.contiguous(memory_format=layout)
            count += 1
    return count


def fuse_norms(vae: nn.Module, backend: str = "inductor") -> int:
    """Puts a FusedNorm in the place of each of its RMS norms; how many."""
    from diffusers.models.autoencoders.autoencoder_kl_wan import WanRMS_norm

    names = [name for name, layer in vae.named_modules() if isinstance(layer, WanRMS_norm)]
    for name in names:
        parent, _, attribute = name.rpartition(".")
        norm = vae.get_submodule(name)
        setattr(vae.get_submodule(parent), attribute, FusedNorm(norm, backend))
    return len(names)


class FusedNorm(nn.Module):
    """A norm compiled, any size with one graph after the second; the norm itself once that has failed."""

    def __init__(self, norm: nn.Module, backend: str) -> None:
        super().__init__()
        self.norm = norm
        self.broken = ""
        self._compiled = torch.compile(_run_norm, backend=backend)

    def forward(self, x: Tensor) -> Tensor:
        """As the norm, within the rounding of sums in another order."""
        if not self.broken:
            try:
                return self._compiled(self.norm, x)
            except Exception as err:
                if as_out_of_memory(err, x.device, doing="running the autoencoder") is not None:
                    raise
                self.broken = type(err).__name__
                structlog.get_logger().warning("compile_failed", what="a norm of the autoencoder", why=self.broken)
        return _run_norm(self.norm, x)


def _run_norm(norm: nn.Module, x: Tensor) -> Tensor:
    result: Tensor = norm(x)
    return result

"""A network of RIFE's class with few channels: milliseconds a frame, of no use to look at."""

from __future__ import annotations

from pathlib import Path

import torch
from safetensors.torch import save_file

from runner.finishing.rife import RifeNetwork
from runner.forecast.rife_shape import RifeShape
from runner.weights.store import RIFE

TINY = RifeShape(head=4, widths=(12, 8, 8, 4, 4))


def tiny_network(seed: int = 5) -> RifeNetwork:
    """With weights large enough that flows are some pixels long."""
    generator = torch.Generator().manual_seed(seed)
    network = RifeNetwork(TINY).requires_grad_(False)
    for parameter in network.parameters():
        bound = 2.0 / parameter[0].numel() ** 0.5 if parameter.dim() > 1 else 0.3
        parameter.copy_((torch.rand(parameter.shape, generator=generator) * 2 - 1) * bound)
    return network


def write_tiny_rife(store: Path, seed: int = 5) -> Path:
    """The file of a model store."""
    path = store / RIFE
    path.parent.mkdir(parents=True, exist_ok=True)
    save_file({name: tensor.contiguous() for name, tensor in tiny_network(seed).state_dict().items()}, path)
    return path

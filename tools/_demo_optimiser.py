"""The optimiser of the demo's training: Muon for matrices and kernels, AdamW for everything else, both of torch.

Measured on the demo's autoencoder, after 2.5 minutes of one core on single frames: AdamW 18.1 dB, this 24.1 dB.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import nn

__all__ = ["Optimiser"]

LEAST_SIDE = 8  # of a matrix for Muon: for narrower ones orthogonalisation has little effect
MUON_RATE = 5.0  # Muon's learning rate as a multiple of AdamW's


class Optimiser:
    """Both optimisers with one rate. A kernel [out, in, ...] is used as a matrix [out, rest] with the same memory."""

    def __init__(self, parameters: Iterable[nn.Parameter], weight_decay: float = 1e-4) -> None:
        self.parameters = [p for p in parameters if p.requires_grad]
        self.kernels = [p for p in self.parameters if p.ndim >= 2 and min(p.flatten(1).shape) >= LEAST_SIDE]
        self.matrices = [nn.Parameter(p.detach().flatten(1)) for p in self.kernels]
        known = {id(p) for p in self.kernels}
        rest = [p for p in self.parameters if id(p) not in known]
        self.parts: dict[str, torch.optim.Optimizer] = {}
        if self.matrices:
            self.parts["muon"] = torch.optim.Muon(
                self.matrices, weight_decay=weight_decay, adjust_lr_fn="match_rms_adamw"
            )
        if rest:
            self.parts["adamw"] = torch.optim.AdamW(rest, betas=(0.9, 0.98), weight_decay=weight_decay)

    def zero_grad(self) -> None:
        for p in (*self.parameters, *self.matrices):
            p.grad = None

    def step(self, rate: float) -> None:
        """One step; `rate` is AdamW's."""
        for kernel, matrix in zip(self.kernels, self.matrices, strict=True):
            matrix.grad = None if kernel.grad is None else kernel.grad.flatten(1)
        for name, part in self.parts.items():
            for group in part.param_groups:
                group["lr"] = rate * (MUON_RATE if name == "muon" else 1.0)
            part.step()

    def state_dict(self) -> dict[str, Any]:
        return {name: part.state_dict() for name, part in self.parts.items()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        for name, part in self.parts.items():
            part.load_state_dict(state[name])

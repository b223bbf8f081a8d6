"""A sampler of second order with two model evaluations a step and one in the last: what the product has none of yet."""

from __future__ import annotations

import numpy as np
import torch

from runner.spec.recipes import SamplerRow

__all__ = ["HEUN_ROW", "HeunSampler"]

HEUN_ROW = SamplerRow(("official", "diffusers"), lambda steps: 2 * steps - 1)


class HeunSampler:
    """Trapezoids: the velocity at both ends of a step; the last step, which ends at 0, is Euler's."""

    def __init__(self, sigmas: np.ndarray, device: torch.device) -> None:
        self.sigmas = torch.from_numpy(sigmas).to(device, torch.float32)
        self.steps = len(sigmas) - 1

    def evaluations_done(self, i: int) -> int:
        return min(2 * (i + 1), 2 * self.steps - 1)

    def step(self, predict, latents, i):
        level, following = self.sigmas[i], self.sigmas[i + 1]
        velocity = predict(latents, level * 1000)
        stepped = latents + (following - level) * velocity
        if i == self.steps - 1:
            return stepped
        return latents + (following - level) * (velocity + predict(stepped, following * 1000)) / 2

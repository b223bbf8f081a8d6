"""Sampling: sigma schedules, the samplers that follow them, and the loop that denoises one window.

In:   names of a sampler and a schedule, steps, the shift; then noise, and a model evaluation as a function.
Out:  sigma schedules as arrays, samplers, denoised latents.
Never: which model is evaluated, guidance, seeds, files. Schedules need neither torch nor diffusers.

The official schedule of Wan shifts n evenly spaced levels once: sigma' = shift·sigma / (1 + (shift - 1)·sigma). Six
steps at shift 5: 1, .9615, .9091, .8333, .7143, .5, 0. diffusers' FlowMatchEulerDiscreteScheduler shifts its end point
twice and counts it as a step: 1, .9527, .8832, .7714, .5616, .0244, 0, so its last step does almost nothing
(huggingface/diffusers issue 13243). The second is kept, by name, to reproduce what was rendered with it.

The arithmetic of each schedule rounds where diffusers' own does, so that all float32 bits are equal.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np

from runner.errors import ConfigInvalid
from runner.spec.recipes import SAMPLER_ROWS

if TYPE_CHECKING:
    from torch import Tensor, device

__all__ = [
    "SAMPLERS",
    "SCHEDULES",
    "EulerSampler",
    "NewSampler",
    "Predict",
    "Sampler",
    "UniPCSampler",
    "denoise",
    "diffusers_sigmas",
    "make_sampler",
    "official_sigmas",
    "unipc_sigmas",
]

TRAIN_STEPS = 1000  # the model's timestep is sigma times this

Schedule = Callable[[int, float], np.ndarray]  # (steps, shift) -> sigmas, float64 [steps + 1], falling from 1 to 0
# (latents float32, timestep: a scalar on their device) -> velocity, float32, of the latents' shape
Predict = Callable[["Tensor", "Tensor"], "Tensor"]


class Sampler(Protocol):
    """Solves one window's ODE from noise to latents. Made for one window, because it may keep a history."""

    @property
    def steps(self) -> int:
        """How many times `denoise` calls `step`."""
        ...

    def evaluations_done(self, i: int) -> int:
        """How often `predict` has been called in total after step `i`, the first being 0."""
        ...

    def step(self, predict: Predict, latents: Tensor, i: int) -> Tensor:
        """The latents after step `i`, float32. Calls `predict` as often as the step needs. Steps come in order."""
        ...


NewSampler = Callable[[int, Any], Sampler]  # (steps, torch device) -> a sampler for one window


def denoise(predict: Predict, latents: Tensor, sampler: Sampler, on_step: Callable[[int, Tensor], None]) -> Tensor:
    """float32 [1, 16, T, H/8, W/8] noise to latents. `predict` is one guided model evaluation.

    `on_step(i, latents)` runs after step `i`; what it raises ends the loop.
    """
    for i in range(sampler.steps):
        latents = sampler.step(predict, latents, i)
        on_step(i, latents)
    return latents


def official_sigmas(steps: int, shift: float) -> np.ndarray:
    """`steps` equal parts of [0, 1], shifted once: float64 [steps + 1] with float32 values."""
    return _shifted(np.linspace(1, 0, steps + 1).astype(np.float32), shift).astype(np.float64)


def diffusers_sigmas(steps: int, shift: float) -> np.ndarray:
    """`steps` points between the shifted ends 1 and 1/1000, all shifted again, then 0: float64 [steps + 1]."""
    first, last = _shifted(np.array([TRAIN_STEPS, 1], np.float32) / np.float32(TRAIN_STEPS), shift).tolist()
    points = np.linspace(first * TRAIN_STEPS, last * TRAIN_STEPS, steps) / TRAIN_STEPS
    return np.append(_shifted(points, shift), 0.0)


def unipc_sigmas(steps: int, shift: float) -> np.ndarray:
    """The official schedule as the hub's UniPC has it, `steps` equal parts of [1/1000, 1]: float64 [steps + 1]."""
    return np.append(_shifted(np.linspace(1, 1 / TRAIN_STEPS, steps + 1)[:-1], shift), 0.0)


def _shifted(levels: np.ndarray, shift: float) -> np.ndarray:
    """In the precision of `levels`."""
    return shift * levels / (1 + (shift - 1) * levels)


class EulerSampler:
    """First order, one evaluation a step: x' = x + (sigma' - sigma)·velocity. Has no history."""

    def __init__(self, sigmas: np.ndarray, device: device) -> None:
        import torch

        self._sigmas = torch.from_numpy(sigmas).to(dtype=torch.float32, device=device)
        self._timesteps = self._sigmas * TRAIN_STEPS
        self.steps = len(sigmas) - 1

    def evaluations_done(self, i: int) -> int:
        return i + 1

    def step(self, predict: Predict, latents: Tensor, i: int) -> Tensor:
        velocity = predict(latents, self._timesteps[i])
        return latents + (self._sigmas[i + 1] - self._sigmas[i]) * velocity


class UniPCSampler:
    """diffusers' UniPC, the hub's own choice for Wan2.2-Animate-14B: second order, one evaluation a step.

    It starts a millionth below sigma 1, because it takes the logarithm of 1 - sigma, and gives the model whole
    timesteps, rounded down.
    """

    def __init__(self, sigmas: np.ndarray, device: device) -> None:
        from diffusers import UniPCMultistepScheduler

        # The sigmas are shifted already: the library's own shift stays 1.
        self._scheduler: Any = UniPCMultistepScheduler(prediction_type="flow_prediction", use_flow_sigmas=True)
        self._scheduler.set_timesteps(sigmas=sigmas[:-1], device=device)
        # Else the library searches for the first timestep, and of two that are equal it takes the second.
        self._scheduler.set_begin_index(0)
        self.steps = len(sigmas) - 1

    def evaluations_done(self, i: int) -> int:
        return i + 1

    def step(self, predict: Predict, latents: Tensor, i: int) -> Tensor:
        timestep = self._scheduler.timesteps[i]
        # A float32 velocity, else the library rounds the latents to the model's type.
        stepped: Tensor = self._scheduler.step(predict(latents, timestep), timestep, latents, return_dict=False)[0]
        return stepped


@dataclass(frozen=True)
class SamplerKind:
    """How a sampler is made. `own`: schedules that it calculates in its own way, by name."""

    make: Callable[[np.ndarray, Any], Sampler]  # (sigmas float64 [steps + 1], torch device)
    own: Mapping[str, Schedule] = field(default_factory=dict)


SCHEDULES: Mapping[str, Schedule] = {"official": official_sigmas, "diffusers": diffusers_sigmas}
SAMPLERS: Mapping[str, SamplerKind] = {
    "euler": SamplerKind(EulerSampler),
    "unipc": SamplerKind(UniPCSampler, own={"official": unipc_sigmas}),
}


def make_sampler(name: str, schedule: str, shift: float, steps: int, device: device) -> Sampler:
    """A new sampler for one window of `steps` steps. Raises ConfigInvalid for a combination that does not exist."""
    if name not in SAMPLERS or schedule not in SAMPLER_ROWS[name].schedules:
        known = ", ".join(f"{row} ({', '.join(SAMPLER_ROWS[row].schedules)})" for row in SAMPLERS)
        raise ConfigInvalid(f"no sampler {name!r} on schedule {schedule!r}", todo=f"Samplers (schedules): {known}")
    kind = SAMPLERS[name]
    sigmas = kind.own.get(schedule, SCHEDULES[schedule])(steps, shift)
    return kind.make(sigmas, device)

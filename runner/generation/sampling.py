"""Sampling: make sigma schedules and samplers, and denoise one window with them.

In:   names of a sampler and a schedule, steps, the shift; then noise, and a model evaluation as a function.
Out:  sigma schedules as arrays, a sampler's count of model calls, samplers, denoised latents.
Never: the model, CFG, seeds, files. Schedules and counts need neither torch nor diffusers.

The official schedule of Wan shifts n evenly spaced levels once: sigma' = shift·sigma / (1 + (shift - 1)·sigma). Six
steps at shift 5: 1, .9615, .9091, .8333, .7143, .5, 0. diffusers' FlowMatchEulerDiscreteScheduler shifts its end point
twice and counts it as a step: 1, .9527, .8832, .7714, .5616, .0244, 0, so its last step does almost nothing
(huggingface/diffusers issue 13243). The second schedule is kept to reproduce earlier renderings.

`beta57` takes `steps` quantiles of the Beta(.5, .7) distribution and looks them up in a table of 1000 levels that is
shifted once. At the ends several steps may share a level of the table; the schedule is then shorter than requested.

The first two schedules round where diffusers rounds, so that all float32 bits are equal. `beta57` rounds where
ComfyUI's table and RES4LYF's scheduler of this name round. docs/samplers.md explains when to use which.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from itertools import pairwise
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

import numpy as np

from runner.errors import ConfigInvalid
from runner.spec.recipes import SAMPLER_ROWS

if TYPE_CHECKING:
    from torch import Tensor, device

__all__ = [
    "SAMPLERS",
    "SCHEDULES",
    "DPMSolverSampler",
    "EulerSampler",
    "NewSampler",
    "Predict",
    "Res2sSampler",
    "Sampler",
    "SamplingCost",
    "UniPCSampler",
    "beta57_sigmas",
    "count_evaluations",
    "denoise",
    "diffusers_sigmas",
    "end_at_sigma_min",
    "make_sampler",
    "official_sigmas",
    "unipc_sigmas",
]

TRAIN_STEPS = 1000  # the model's timestep is sigma times this

# (steps, shift) -> sigmas, float64 [steps + 1] or shorter, falling from 1 to 0
Schedule = Callable[[int, float], np.ndarray]
# (latents float32, timestep: a scalar on their device) -> velocity, float32, of the latents' shape
Predict = Callable[["Tensor", "Tensor"], "Tensor"]


class Sampler(Protocol):
    """Solve one window's ODE from noise to latents. It is made for one window, because it may keep a history."""

    @property
    def steps(self) -> int:
        """How many times `denoise` calls `step`."""
        ...

    def evaluations_done(self, i: int) -> int:
        """How often `predict` has been called in total after step `i`, the first being 0."""
        ...

    def step(self, predict: Predict, latents: Tensor, i: int) -> Tensor:
        """Return the latents after step `i`, float32. Calls `predict` as often as needed. Steps come in order."""
        ...


NewSampler = Callable[[Any], Sampler]  # torch device -> a sampler for one window


def denoise(predict: Predict, latents: Tensor, sampler: Sampler, on_step: Callable[[int, Tensor], None]) -> Tensor:
    """Denoise float32 [1, 16, T, H/8, W/8]: noise to latents. `predict` is one model evaluation with CFG.

    `on_step(i, latents)` runs after step `i`; an exception in it ends the loop.
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
    """The official schedule of the hub's UniPC: `steps` equal parts of [1/1000, 1], float64 [steps + 1]."""
    return np.append(_shifted(np.linspace(1, 1 / TRAIN_STEPS, steps + 1)[:-1], shift), 0.0)


def beta57_sigmas(steps: int, shift: float) -> np.ndarray:
    """`steps` quantiles of Beta(.5, .7), rounded to levels of the shifted table, then 0: float64 with float32 values.

    It is shorter than [steps + 1] if neighbours round to one level: from 97 steps on. From 57 steps on, the last level
    before 0 is the table's least one.
    """
    from scipy.special import betaincinv  # equals scipy.stats.beta.ppf, which takes a second to import

    quantiles = betaincinv(0.5, 0.7, 1 - np.arange(steps) / steps)  # float64: some are within 1e-5 of a level of a tie
    levels = np.rint(quantiles * (TRAIN_STEPS - 1)).astype(int)  # half to even
    kept = levels[np.insert(np.diff(levels) != 0, 0, True)]
    return np.append(_level_table(shift)[kept].astype(np.float64), 0.0)


def _level_table(shift: float) -> np.ndarray:
    """The levels 1/1000, 2/1000, … 1, shifted once: float32 [1000], rising."""
    return _shifted(np.arange(1, TRAIN_STEPS + 1, dtype=np.float32) / np.float32(TRAIN_STEPS), shift)


def _shifted(levels: np.ndarray, shift: float) -> np.ndarray:
    """Shift levels, in the dtype of `levels`."""
    return shift * levels / (1 + (shift - 1) * levels)


LEVELS_ALIKE = 1e-4  # sigmas this close to the least level stay as they are


def end_at_sigma_min(sigmas: np.ndarray, shift: float) -> np.ndarray:
    """`sigmas` with the least level of the shifted table, sigma_min, as the last before 0; without repetitions.

    A last level below sigma_min becomes sigma_min. One that is more than 1e-4 above it gets sigma_min as its
    successor. A schedule that does not end at 0 is not changed. RES4LYF prepares every schedule this way.
    """
    kept = sigmas[np.insert(np.diff(sigmas) != 0, 0, True)]
    if kept[-1] != 0:
        return kept
    sigma_min = float(_level_table(shift)[0])
    if kept[-2] < sigma_min:
        kept[-2] = sigma_min
    elif kept[-2] - sigma_min > LEVELS_ALIKE:
        kept = np.insert(kept, -1, sigma_min)
    return kept


class EulerSampler:
    """First order, one evaluation per step: x' = x + (sigma' - sigma)·velocity. Has no history."""

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


class LibrarySampler:
    """A sampler around one of diffusers' schedulers: one evaluation per step."""

    def __init__(self, scheduler: Any, steps: int) -> None:
        # Otherwise the library would search the first timestep, and of two equal ones take the second.
        scheduler.set_begin_index(0)
        self._scheduler, self.steps = scheduler, steps

    def evaluations_done(self, i: int) -> int:
        return i + 1

    def step(self, predict: Predict, latents: Tensor, i: int) -> Tensor:
        timestep = self._scheduler.timesteps[i]
        # The velocity must be float32, else the library rounds the latents to the model's dtype.
        stepped: Tensor = self._scheduler.step(predict(latents, timestep), timestep, latents, return_dict=False)[0]
        return stepped


class UniPCSampler(LibrarySampler):
    """diffusers' UniPC, the hub's choice for Wan2.2-Animate-14B: second order, one evaluation per step.

    It starts a millionth below sigma 1, because it takes the logarithm of 1 - sigma, and gives the model whole
    timesteps, rounded down.
    """

    def __init__(self, sigmas: np.ndarray, device: device) -> None:
        from diffusers import UniPCMultistepScheduler

        # The sigmas are shifted already: the library's own shift stays 1.
        scheduler = UniPCMultistepScheduler(prediction_type="flow_prediction", use_flow_sigmas=True)
        scheduler.set_timesteps(sigmas=sigmas[:-1], device=device)
        super().__init__(scheduler, len(sigmas) - 1)


class DPMSolverSampler(LibrarySampler):
    """diffusers' DPM-Solver++(2M): second order in log(1 - sigma) - log(sigma), one evaluation per step.

    Its first and last steps are of first order. So is its second in effect, as the step before begins at sigma 1, where
    that variable is infinite. The model gets sigma times 1000, not rounded.
    """

    def __init__(self, sigmas: np.ndarray, device: device) -> None:
        import torch
        from diffusers import DPMSolverMultistepScheduler

        scheduler: Any = DPMSolverMultistepScheduler(prediction_type="flow_prediction", use_flow_sigmas=True)
        steps = len(sigmas) - 1
        scheduler.set_timesteps(steps, device=device)
        # The library does not accept sigmas here, and its own begin at .999. Ours are shifted already. Some small
        # shifts round the first one to slightly above 1, where the library's logarithm is not a number.
        scheduler.sigmas = torch.from_numpy(sigmas).to(torch.float32).clamp(max=1)
        scheduler.timesteps = (scheduler.sigmas[:-1] * TRAIN_STEPS).to(device)
        super().__init__(scheduler, steps)


class Res2sStep(NamedTuple):
    """Coefficients of one step from `sigma` to a lower level, calculated in float64."""

    sigma: float
    middle: float  # the level of the second evaluation: the geometric mean of both ends
    h: float  # log(sigma / following)
    a21: float
    b1: float
    b2: float


def res_2s_step(sigma: float, following: float) -> Res2sStep:
    """The exponential Runge-Kutta step of two stages, the second in the middle (c2 = 1/2) of the logarithmic step."""
    h = math.log(sigma / following)
    b2 = 2 * _phi_2(h)
    return Res2sStep(sigma, sigma * math.exp(-h / 2), h, _phi_1(h / 2) / 2, _phi_1(h) - b2, b2)


SMALL_STEP = 1e-2  # below it, the closed form of the second phi function loses digits


def _phi_1(h: float) -> float:
    """(1 - exp(-h)) / h, for h > 0."""
    return -math.expm1(-h) / h


def _phi_2(h: float) -> float:
    """(exp(-h) - 1 + h) / h², for h > 0."""
    if h < SMALL_STEP:
        return sum((-h) ** k / math.factorial(k + 2) for k in range(8))
    return (math.expm1(-h) + h) / h**2


class Res2sSampler:
    """`res_2s` without noise (RES4LYF's `res_2s_ode`): second order in log(sigma), two evaluations per step.

    It follows the predicted clean latents. If the levels end at 0, the last one costs no evaluation: the step before it
    continues in its mean direction. Coefficients are float64; latents and the model's inputs are float32.
    """

    def __init__(self, sigmas: np.ndarray, device: device) -> None:
        import torch

        levels = sigmas.tolist()
        self._rest = 0.0  # the last level before 0, which the last step covers too
        if levels[-1] == 0:
            self._rest = levels[-2]
            levels.pop()
        self._coefficients = [res_2s_step(*ends) for ends in pairwise(levels)]
        levels_of_steps = [[step.sigma, step.middle] for step in self._coefficients]
        self._timesteps = torch.tensor(levels_of_steps, dtype=torch.float64).mul(TRAIN_STEPS).to(device, torch.float32)
        self.steps = len(self._coefficients)

    def evaluations_done(self, i: int) -> int:
        return 2 * (i + 1)

    def step(self, predict: Predict, latents: Tensor, i: int) -> Tensor:
        sigma, middle, h, a21, b1, b2 = self._coefficients[i]
        first, second = self._timesteps[i]
        towards = -sigma * predict(latents, first)  # predicted clean latents minus the latents
        between = latents + h * a21 * towards
        towards_later = between - middle * predict(between, second) - latents
        stepped = latents + h * (b1 * towards + b2 * towards_later)
        if i == self.steps - 1 and self._rest:
            stepped = stepped - self._rest / (sigma - self._rest) * (latents - stepped)
        return stepped


class SamplingCost(NamedTuple):
    """What one window costs."""

    steps: int  # of the sampler; fewer than requested if the schedule is shorter
    evaluations: int  # of the model; CFG doubles the model calls, not this number


def _one_a_step(sigmas: np.ndarray) -> SamplingCost:
    return SamplingCost(len(sigmas) - 1, len(sigmas) - 1)


def _two_a_step(sigmas: np.ndarray) -> SamplingCost:
    """The step to the last level, 0, costs nothing."""
    return SamplingCost(len(sigmas) - 2, 2 * (len(sigmas) - 2))


@dataclass(frozen=True)
class SamplerKind:
    """A kind of sampler: its constructor, its cost, and its schedules."""

    make: Callable[[np.ndarray, Any], Sampler]  # (its sigmas float64, torch device)
    cost: Callable[[np.ndarray], SamplingCost] = _one_a_step  # of its sigmas
    own: Mapping[str, Schedule] = field(default_factory=dict)  # schedules that it calculates differently, by name
    adapt: Callable[[np.ndarray, float], np.ndarray] | None = None  # (sigmas, shift) -> the sigmas that it uses

    def sigmas(self, schedule: str, steps: int, shift: float) -> np.ndarray:
        """Return the sampler's sigmas on a schedule that it accepts: float64, falling from 1 to 0."""
        found = self.own.get(schedule, SCHEDULES[schedule])(steps, shift)
        return self.adapt(found, shift) if self.adapt else found


SCHEDULES: Mapping[str, Schedule] = {
    "official": official_sigmas,
    "diffusers": diffusers_sigmas,
    "beta57": beta57_sigmas,
}
SAMPLERS: Mapping[str, SamplerKind] = {
    "euler": SamplerKind(EulerSampler),
    "unipc": SamplerKind(UniPCSampler, own={"official": unipc_sigmas}),
    "dpmpp": SamplerKind(DPMSolverSampler),
    "res_2s": SamplerKind(Res2sSampler, cost=_two_a_step, adapt=end_at_sigma_min),
}


def count_evaluations(name: str, schedule: str, shift: float, steps: int) -> SamplingCost:
    """Return what one window costs if `steps` steps are requested. Raises ConfigInvalid as `make_sampler` does."""
    kind = _find_sampler(name, schedule)
    return kind.cost(kind.sigmas(schedule, steps, shift))


def make_sampler(name: str, schedule: str, shift: float, steps: int, device: device) -> Sampler:
    """Return a new sampler for one window, for `steps` requested steps.

    Raises ConfigInvalid for an unknown combination of sampler and schedule.
    """
    kind = _find_sampler(name, schedule)
    return kind.make(kind.sigmas(schedule, steps, shift), device)


def _find_sampler(name: str, schedule: str) -> SamplerKind:
    if name not in SAMPLERS or schedule not in SAMPLER_ROWS[name].schedules:
        known = ", ".join(f"{row} ({', '.join(SAMPLER_ROWS[row].schedules)})" for row in SAMPLERS)
        raise ConfigInvalid(f"no sampler {name!r} on schedule {schedule!r}", todo=f"Samplers (schedules): {known}")
    return SAMPLERS[name]

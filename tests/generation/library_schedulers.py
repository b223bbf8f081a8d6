"""diffusers' own schedulers, as the unmodified pipeline takes them: what our samplers are compared with."""

from __future__ import annotations

from typing import Any

import numpy as np
from diffusers import DPMSolverMultistepScheduler, FlowMatchEulerDiscreteScheduler, UniPCMultistepScheduler
from scipy import stats

__all__ = ["beta57_indices", "library_scheduler"]


def beta57_indices(steps: int) -> np.ndarray:
    """Which of the table's levels 0..999 the schedule beta57 keeps, falling, by the distribution's own quantile."""
    indices = np.rint(stats.beta.ppf(1 - np.arange(steps) / steps, 0.5, 0.7) * 999).astype(int)
    return np.unique(indices)[::-1]


class ToldEvenLevels(FlowMatchEulerDiscreteScheduler):
    """The library's Euler, given the official schedule's levels instead of its own; it shifts them once."""

    def set_timesteps(self, num_inference_steps: int, device: Any = None) -> None:
        super().set_timesteps(sigmas=[1 - i / num_inference_steps for i in range(num_inference_steps)], device=device)


class ToldBetaLevels(FlowMatchEulerDiscreteScheduler):
    """The library's Euler, given the levels of beta57; it shifts them once."""

    def set_timesteps(self, num_inference_steps: int, device: Any = None) -> None:
        super().set_timesteps(sigmas=list((beta57_indices(num_inference_steps) + 1) / 1000), device=device)


class UniPCOnBetaLevels(UniPCMultistepScheduler):
    """The library's UniPC, given the levels of beta57 after a shift in the table's precision, float32."""

    def set_timesteps(self, num_inference_steps: int, device: Any = None) -> None:
        levels = ((beta57_indices(num_inference_steps) + 1) / 1000).astype(np.float32)
        shift, self.config.flow_shift = np.float32(self.config.flow_shift), 1.0
        super().set_timesteps(sigmas=(shift * levels / (1 + (shift - 1) * levels)).astype(np.float64), device=device)


def library_scheduler(sampler: str, schedule: str = "official", shift: float = 5.0) -> Any:
    """A new scheduler of the library for one of our combinations. Its DPM-Solver has a schedule of its own alone."""
    flow = {"prediction_type": "flow_prediction", "use_flow_sigmas": True, "flow_shift": shift}
    if sampler == "dpmpp":
        return DPMSolverMultistepScheduler(**flow)
    if sampler == "unipc":
        return (UniPCOnBetaLevels if schedule == "beta57" else UniPCMultistepScheduler)(**flow)
    euler = {"official": ToldEvenLevels, "diffusers": FlowMatchEulerDiscreteScheduler, "beta57": ToldBetaLevels}
    return euler[schedule](shift=shift)

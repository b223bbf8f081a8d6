"""diffusers' own schedulers, as the unmodified pipeline takes them: what our samplers are compared with."""

from __future__ import annotations

from typing import Any

from diffusers import FlowMatchEulerDiscreteScheduler, UniPCMultistepScheduler

__all__ = ["library_scheduler"]


class ToldEvenLevels(FlowMatchEulerDiscreteScheduler):
    """The library's Euler, given the official schedule's levels instead of its own; it shifts them once."""

    def set_timesteps(self, num_inference_steps: int, device: Any = None) -> None:
        super().set_timesteps(sigmas=[1 - i / num_inference_steps for i in range(num_inference_steps)], device=device)


def library_scheduler(sampler: str, schedule: str = "official", shift: float = 5.0) -> Any:
    """A new scheduler of the library for one of our combinations."""
    if sampler == "unipc":
        return UniPCMultistepScheduler(prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=shift)
    return (FlowMatchEulerDiscreteScheduler if schedule == "diffusers" else ToldEvenLevels)(shift=shift)

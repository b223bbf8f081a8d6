"""Sampling: the noise levels that a job walks down, as a diffusers scheduler made fresh for each job.

In:   a solver's name, a grid's name, the shift. Out: a scheduler whose `set_timesteps(n)` gives that grid.
Never: models, seeds, files.

The official grid of Wan shifts n evenly spaced levels once: sigma' = shift·sigma / (1 + (shift - 1)·sigma). Six steps
at shift 5: 1, .9615, .9091, .8333, .7143, .5, 0. diffusers' FlowMatchEulerDiscreteScheduler shifts its end point twice
and counts it as a step: 1, .9527, .8832, .7714, .5616, .0244, 0, so its last step does almost nothing
(huggingface/diffusers issue 13243). The second is kept, by name, to reproduce what was rendered with it.
"""

from __future__ import annotations

from functools import cache
from typing import Any

import numpy as np

from runner.errors import ConfigInvalid

__all__ = ["GRIDS", "SCHEDULERS", "make_scheduler", "official_sigmas"]

SCHEDULERS = ("euler", "unipc")
GRIDS = ("official", "diffusers")


def official_sigmas(steps: int, shift: float) -> np.ndarray:
    """The noise level before each step and 0 after the last: float64 [steps + 1], from 1 down."""
    even = np.linspace(1, 0, steps + 1)
    return shift * even / (1 + (shift - 1) * even)


def make_scheduler(scheduler: str, *, grid: str = "official", shift: float = 5.0) -> Any:
    """A new diffusers scheduler. `scheduler`: "euler" or "unipc"; `grid`: "official", or "diffusers" (euler only).

    unipc is the hub's own choice for Wan2.2-Animate-14B: second order, flow prediction, the official grid to 1e-3.
    Raises ConfigInvalid for a combination that does not exist.
    """
    if scheduler not in SCHEDULERS or grid not in GRIDS:
        raise ConfigInvalid(
            f"no scheduler {scheduler!r} on grid {grid!r}",
            todo=f"Schedulers: {', '.join(SCHEDULERS)}; grids: {', '.join(GRIDS)}",
        )
    if scheduler == "unipc":
        if grid != "official":
            raise ConfigInvalid("unipc has no 'diffusers' grid", todo="Use grid 'official', or scheduler 'euler'")
        from diffusers import UniPCMultistepScheduler

        return UniPCMultistepScheduler(prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=shift)
    if grid == "diffusers":
        from diffusers import FlowMatchEulerDiscreteScheduler

        return FlowMatchEulerDiscreteScheduler(shift=shift)
    return _official_euler()(shift=shift)


@cache
def _official_euler() -> type:
    """The class is made on first use, so that importing this module does not import diffusers."""
    from diffusers import FlowMatchEulerDiscreteScheduler

    class OfficialFlowEuler(FlowMatchEulerDiscreteScheduler):
        """Euler on the official grid: explicit levels are shifted once, whatever the parent does to its own."""

        def set_timesteps(self, num_inference_steps: int, device: Any = None, **kwargs: Any) -> None:
            if not any(kwargs.get(name) is not None for name in ("sigmas", "timesteps")):
                kwargs["sigmas"] = np.linspace(1, 0, num_inference_steps + 1)[:-1]
            super().set_timesteps(num_inference_steps, device=device, **kwargs)

    return OfficialFlowEuler

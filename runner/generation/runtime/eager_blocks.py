"""Eager blocks: explain in one sentence why blocks run eagerly on a GPU instead of compiled, and what that costs.

In:   a memory plan, shapes, a GPU, a window. Out: the sentence, for records, the end of a run, `plan` and `doctor`.
Never: torch, a device. The model's `compiled.py` finds out whether compiling works.
"""

from __future__ import annotations

from dataclasses import dataclass

from runner.forecast.flops import Costs
from runner.forecast.seconds import DeviceSpeed, EngineBuild, forecast_seconds
from runner.generation.runtime.memory_plan import MemoryPlan

__all__ = ["EagerCost", "eager_by_plan", "eager_cost", "eager_words"]


@dataclass(frozen=True)
class EagerCost:
    """The forecast cost of eager blocks in windows of one size, from the bytes of elementwise kernels."""

    step_s: float  # additional seconds per denoising step
    gpu: str
    size: tuple[int, int]  # width, height
    frames: int  # of a window


def eager_by_plan(plan: MemoryPlan) -> str:
    """Why blocks run eagerly under `plan`; empty if the plan allows compiled blocks."""
    return "" if plan.compiled else f"memory mode {plan.mode} is for the least memory"


def eager_cost(
    costs: Costs, device: DeviceSpeed | None, size: tuple[int, int], frames: int, *, guided: bool = False
) -> EagerCost | None:
    """Forecast the cost for windows of `frames` frames at `size` (width, height); None if `device` is None."""
    if device is None:
        return None
    eager, fused = (
        forecast_seconds(
            costs,
            device,
            EngineBuild(fused=compiled),
            size=size,
            segment_frames=frames,
            segments=1,
            evaluations=1,
            guided=guided,
        ).step_s
        for compiled in (False, True)
    )
    return EagerCost(eager - fused, device.name, size, frames)


def eager_words(why: str, cost: EagerCost | None) -> str:
    """Return the sentence. `why` has no full stop. `cost` is None if the GPU's speed is not known."""
    text = f"The transformer's blocks run eagerly on the GPU, not compiled ({why})"
    if cost is not None:
        width, height = cost.size
        text += f": {cost.step_s:.2g} s more a step on {cost.gpu} at {width}x{height}, {cost.frames} frames, a forecast"
    return f"{text}."

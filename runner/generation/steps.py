"""Steps: what the denoising steps of one window are made from, and how the branches of a guided step are joined.

In:   tensors, a job's plan. Out: the same, named. Never: models, where they lie, how a window's inputs are encoded.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch

from runner.generation.base import OnStep, SegmentPlan
from runner.generation.transformer import Context
from runner.metrics import StageTimer

__all__ = ["Branch", "Job", "Window", "guide", "no_face"]

# (latents and scene [1, 36, T, H/8, W/8], timestep [1]) -> flow [1, 16, T, H/8, W/8], all else being fixed
Branch = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]


@dataclass(frozen=True)
class Job:
    """What stays the same over a job's windows."""

    plan: SegmentPlan
    scheduler: Any
    timer: StageTimer
    on_step: OnStep | None
    guidance_scale: float
    text: torch.Tensor  # [1, 512, text_dim]
    negative: torch.Tensor | None  # as text; None where unguided
    clip: torch.Tensor  # [1, image tokens, image_dim]
    reference: torch.Tensor  # [1, 20, 1, H/8, W/8], mask and latents
    contexts: list[Context] = field(default_factory=list)  # of text and negative, where steps share work


@dataclass(frozen=True)
class Window:
    """What one window is denoised from. T latent frames, one of them the reference's."""

    noise: torch.Tensor  # float32 [1, 16, T, H/8, W/8]
    scene: torch.Tensor  # [1, 20, T, H/8, W/8], the reference in front
    pose: torch.Tensor  # [1, 16, T - 1, H/8, W/8]
    faces: torch.Tensor  # [1, 3, n, F, F] in [-1, 1]


def no_face(faces: torch.Tensor) -> torch.Tensor:
    """Black crops of the shape of `faces`, as the library makes them."""
    return faces * 0 - 1


def guide(flows: list[torch.Tensor], scale: float) -> torch.Tensor:
    """The one flow, or, of one with and one without prompt and face, the first moved away from the second."""
    if len(flows) == 1:
        return flows[0]
    flow, without = flows
    return without + scale * (flow - without)

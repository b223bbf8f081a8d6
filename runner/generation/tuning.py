"""Tuning: the engine's choices for one device, made once the weights are there: compute, attention, compiled blocks.

In:   a pipeline whose models are placed, its recipe, its device. Out: it is set up; every choice with its reason.
Never: memory, files, jobs.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from runner.generation.attention import apply_attention
from runner.generation.compiled import make_block_step
from runner.generation.compute import apply_compute
from runner.generation.lean import lean_block
from runner.generation.transformer import run_block
from runner.generation.vae_speed import prepare_vae

if TYPE_CHECKING:
    import torch

    from runner.generation.pipeline import AnimatePipeline
    from runner.generation.recipes import Recipe

__all__ = ["tune"]


def tune(pipeline: AnimatePipeline, recipe: Recipe, device: torch.device) -> dict[str, Any]:
    """Choose and set up; what was chosen, for the record. May be called again after `pipeline.switches` has changed.

    Raises ConfigInvalid where the recipe asks for what this device cannot do, or does wrongly.
    """
    import torch

    dtype = getattr(torch, recipe.dtype)
    said = apply_compute(pipeline.transformer, recipe, device)
    said |= apply_attention(pipeline.transformer, device, dtype, eight_bit=recipe.attention == "int8")
    said |= prepare_vae(pipeline.vae, pipeline.switches)
    memory = pipeline.memory
    lean = memory is not None and memory.lean
    pipeline.block_step = None
    if memory is None or memory.compiled:
        pipeline.block_step = make_block_step(pipeline.switches, device, lean_block if lean else run_block)
    return said | {"compile": "eager" if pipeline.block_step is None else pipeline.block_step.backend}

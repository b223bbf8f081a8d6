"""Plan: what a job will denoise and what that costs, before any of it is done.

In:   frames, size, options, recipe, the costs of the models, what is known of the device. Out: `SegmentPlan`. Pure.
Never: free memory. A plan depends on options and recipe alone, so that a job's frames do not depend on its machine.
"""

from __future__ import annotations

from runner.generation.base import SegmentPlan
from runner.generation.cost import PRODUCTION, Costs
from runner.generation.recipes import Recipe
from runner.generation.segments import fit_segments
from runner.generation.speed import Build, DeviceSpeed, forecast_seconds
from runner.options import JobOptions

__all__ = ["plan_job"]


def plan_job(
    frames: int,
    size: tuple[int, int],
    options: JobOptions,
    recipe: Recipe,
    costs: Costs = PRODUCTION,
    device: DeviceSpeed | None = None,
) -> SegmentPlan:
    """The segments of `frames` frames at `size` (width, height) pixels. Raises InputTooShort below two frames.

    With a `device` also the seconds there, the block compiled; none where it does not have the recipe's compute.
    """
    width, height = size
    steps = options.steps if options.steps is not None else recipe.steps
    segment_frames, segments = fit_segments(frames, options.overlap_frames, options.max_segment_frames)
    guided = options.guidance_scale > 1
    seconds = None
    if device is not None and recipe.compute in device.matmul:
        build = Build(recipe.compute, fp4=recipe.fp4, vae=recipe.vae_dtype)
        seconds = forecast_seconds(
            costs,
            device,
            build,
            size=size,
            segment_frames=segment_frames,
            segments=segments,
            steps=steps,
            guided=guided,
        ).total_s
    return SegmentPlan(
        frames=frames,
        segment_frames=segment_frames,
        overlap_frames=options.overlap_frames,
        segments=segments,
        width=width,
        height=height,
        steps=steps,
        tflop=costs.job_tflop(width, height, segment_frames, segments, steps, guided=guided),
        seconds=seconds,
    )

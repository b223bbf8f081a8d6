"""Plan: what a job will denoise and what that costs, before any of it is done.

In:   frames, size, options, recipe, the costs of the models. Out: `SegmentPlan`. Pure: it imports no model.
Never: free memory. A plan depends on options and recipe alone, so that a job's frames do not depend on its machine.
"""

from __future__ import annotations

from runner.generation.base import SegmentPlan
from runner.generation.cost import PRODUCTION, Costs
from runner.generation.recipes import Recipe
from runner.generation.segments import fit_segments
from runner.options import JobOptions

__all__ = ["plan_job"]


def plan_job(
    frames: int, size: tuple[int, int], options: JobOptions, recipe: Recipe, costs: Costs = PRODUCTION
) -> SegmentPlan:
    """The segments of `frames` frames at `size` (width, height) pixels. Raises InputTooShort below two frames."""
    width, height = size
    steps = options.steps if options.steps is not None else recipe.steps
    segment_frames, segments = fit_segments(frames, options.overlap_frames, options.max_segment_frames)
    guided = options.guidance_scale > 1
    return SegmentPlan(
        frames=frames,
        segment_frames=segment_frames,
        overlap_frames=options.overlap_frames,
        segments=segments,
        width=width,
        height=height,
        steps=steps,
        tflop=costs.job_tflop(width, height, segment_frames, segments, steps, guided=guided),
    )

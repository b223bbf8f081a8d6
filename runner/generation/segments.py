"""Segments: how a job's frames are cut into the windows that the model denoises, and what that costs.

In:   frames asked for, overlap of neighbouring windows, the longest window the model may see. All in frames.
Out:  one window length (4k+1: the video autoencoder packs four frames behind the first) and a count of windows;
      for each window, which frames fill it, reflected at the end of the job.
Never: pixels, prompts, free memory: a plan depends on options and recipe alone, so that a job's frames do not depend on
its machine. Raises InputTooShort for a job that cannot be reflected.
"""

from __future__ import annotations

import numpy as np

from runner.errors import ConfigInvalid, InputTooShort
from runner.forecast.flops import PRODUCTION, Costs
from runner.forecast.seconds import DeviceSpeed, EngineBuild, forecast_seconds
from runner.generation.protocol import SegmentPlan
from runner.generation.sampling import count_evaluations
from runner.spec.options import JobOptions
from runner.spec.recipes import Recipe

__all__ = [
    "fit_segments",
    "longest_window",
    "output_span",
    "plan_job",
    "reflect_indices",
    "requested_steps",
    "shortest_window",
    "span_of",
]

PACKED_FRAMES = 4  # frames a latent frame holds, but for the first
MIN_FRAMES = 2  # reflection needs a second frame to turn back to


def shortest_window(overlap: int) -> int:
    """The least window, frames (4k+1): more than twice `overlap`, below which upstream's segment count breaks down."""
    return round_up(2 * overlap + 1)


def fit_segments(frames: int, overlap: int, longest: int) -> tuple[int, int]:
    """(frames of every window, windows) for a job of `frames` frames; each window starts `overlap` frames back.

    The fewest windows that `longest` allows, then the shortest 4k+1 window with which that many cover the job. A
    `longest` that is not 4k+1 is rounded down. 97 frames with windows of at most 81 become two of 49, not two of 81.
    Raises InputTooShort below two frames, ConfigInvalid when `longest` leaves no room beside the overlap.
    """
    if frames < MIN_FRAMES:
        raise InputTooShort(
            f"{frames} frame{'' if frames == 1 else 's'} to render; at least {MIN_FRAMES} are needed",
            todo="Use a longer driving video, a higher fps or an earlier start_s",
        )
    least = shortest_window(overlap)
    longest -= (longest - 1) % PACKED_FRAMES
    if longest < least:
        raise ConfigInvalid(
            f"windows of {longest} frames are too short for an overlap of {overlap}",
            todo=f"Set max_segment_frames to at least {least}",
        )
    segments = max(1, -(-(frames - overlap) // (longest - overlap)))
    new_frames = max(0, -(-(frames - overlap) // segments))  # of each window, beyond its overlap
    return max(least, round_up(overlap + new_frames)), segments


def longest_window(options: JobOptions) -> int:
    """The most frames that a window of such a job has, however long its video is; see `fit_segments`."""
    if options.max_frames is None:
        return options.max_segment_frames
    longest = max(shortest_window(options.overlap_frames), round_up(options.max_frames))
    return min(options.max_segment_frames, longest)


def reflect_indices(start: int, stop: int, frames: int) -> np.ndarray:
    """Which of `frames` frames stand at positions start..stop-1 of the padded job: int64 [stop - start].

    0 1 2 3 4 3 2 1 0 1 … for five frames: the same as `WanAnimatePipeline.pad_video_frames`. Needs two frames.
    """
    if frames < MIN_FRAMES:
        raise InputTooShort(f"{frames} frame(s) cannot be reflected", todo="Use a longer driving video")
    position = np.arange(start, stop, dtype=np.int64) % (2 * (frames - 1))
    return np.where(position < frames, position, 2 * (frames - 1) - position)


def output_span(index: int, segment_frames: int, overlap: int, frames: int) -> tuple[int, int]:
    """[first, last+1) frames of the job that window `index` adds, without its overlap and without padding."""
    step = segment_frames - overlap
    first = index * step + (overlap if index else 0)
    return min(first, frames), min(index * step + segment_frames, frames)


def round_up(frames: int) -> int:
    """The least 4k+1 that is not below `frames`."""
    return frames + (1 - frames) % PACKED_FRAMES


def span_of(start: int, stop: int, frames: int) -> tuple[int, int]:
    """The source's frames that a window of start..stop-1 is made of: the first, and one beyond the last."""
    indices = reflect_indices(start, stop, frames)
    return int(indices.min()), int(indices.max()) + 1


def requested_steps(options: JobOptions, recipe: Recipe) -> int:
    """Denoising steps as they are asked for: the job's own, else the recipe's."""
    return options.steps if options.steps is not None else recipe.steps


def plan_job(
    frames: int,
    size: tuple[int, int],
    options: JobOptions,
    recipe: Recipe,
    costs: Costs = PRODUCTION,
    device: DeviceSpeed | None = None,
    *,
    codes_kept: bool = False,
) -> SegmentPlan:
    """The segments of `frames` frames at `size` (width, height) pixels. Raises InputTooShort below two frames.

    With a `device` also the seconds there, the block compiled; none where it does not have the recipe's compute. A
    recipe that leaves its choice to the device stands for itself: `fast_choice.foresee` makes that choice.
    `codes_kept`: the weights' 8-bit codes are; not known before a model is loaded, for it depends on free memory.
    """
    width, height = size
    asked = requested_steps(options, recipe)
    steps, evaluations = count_evaluations(recipe.scheduler, recipe.schedule, recipe.shift, asked)
    segment_frames, segments = fit_segments(frames, options.overlap_frames, options.max_segment_frames)
    guided = options.guidance_scale > 1
    seconds = None
    if device is not None and recipe.compute in device.matmul:
        build = EngineBuild(
            recipe.compute,
            fp4=recipe.fp4,
            attention_8bit=recipe.eight_bit_attention,
            vae=recipe.vae_dtype,
            codes_kept=codes_kept,
        )
        seconds = forecast_seconds(
            costs,
            device,
            build,
            size=size,
            segment_frames=segment_frames,
            segments=segments,
            evaluations=evaluations,
            guided=guided,
            blank_from=options.overlap_frames if options.mode == "animate" else None,
        ).total_s
    return SegmentPlan(
        frames=frames,
        segment_frames=segment_frames,
        overlap_frames=options.overlap_frames,
        segments=segments,
        width=width,
        height=height,
        steps=steps,
        evaluations=evaluations,
        tflop=costs.job_tflop(width, height, segment_frames, segments, evaluations, guided=guided),
        seconds=seconds,
    )

"""Segments: divide a job's frames into the windows that the model denoises, and forecast the cost.

In:   requested frames, overlap of neighbouring windows, the longest window. All in frames.
Out:  one window length (4k+1: the autoencoder packs each four frames after the first) and a count of windows;
      for each window the frames that fill it, reflected at the end of the job.
Never: pixels, prompts, free memory. A plan depends on options and recipe alone, so a job's frames do not depend on the
machine. Raises InputTooShort for a job that is too short to reflect.
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

PACKED_FRAMES = 4  # frames per latent frame, except for the first
MIN_FRAMES = 2  # reflection needs a second frame


def shortest_window(overlap: int) -> int:
    """Return the shortest window in frames (4k+1): longer than twice `overlap`, else the library's count is wrong."""
    return round_up(2 * overlap + 1)


def fit_segments(frames: int, overlap: int, longest: int) -> tuple[int, int]:
    """Return (frames per window, windows) for a job of `frames` frames; windows overlap by `overlap` frames.

    Takes the fewest windows that `longest` allows, then the shortest 4k+1 window with which they cover the job. A
    `longest` that is not 4k+1 is rounded down. 97 frames with windows of at most 81 become two of 49, not two of 81.
    Raises InputTooShort below two frames, ConfigInvalid if `longest` is too short for the overlap.
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
    """Return the most frames that a window of such a job can have, for any length of video; see `fit_segments`."""
    if options.max_frames is None:
        return options.max_segment_frames
    longest = max(shortest_window(options.overlap_frames), round_up(options.max_frames))
    return min(options.max_segment_frames, longest)


def reflect_indices(start: int, stop: int, frames: int) -> np.ndarray:
    """Return the indices of the frames at positions start..stop-1 of the padded job: int64 [stop - start].

    For five frames 0 1 2 3 4 3 2 1 0 1 …, as `WanAnimatePipeline.pad_video_frames`. Needs two frames.
    """
    if frames < MIN_FRAMES:
        raise InputTooShort(f"{frames} frame(s) cannot be reflected", todo="Use a longer driving video")
    position = np.arange(start, stop, dtype=np.int64) % (2 * (frames - 1))
    return np.where(position < frames, position, 2 * (frames - 1) - position)


def output_span(index: int, segment_frames: int, overlap: int, frames: int) -> tuple[int, int]:
    """Return [first, last+1) of the job's frames that window `index` adds, without overlap and padding."""
    step = segment_frames - overlap
    first = index * step + (overlap if index else 0)
    return min(first, frames), min(index * step + segment_frames, frames)


def round_up(frames: int) -> int:
    """Return the smallest 4k+1 that is at least `frames`."""
    return frames + (1 - frames) % PACKED_FRAMES


def span_of(start: int, stop: int, frames: int) -> tuple[int, int]:
    """Return the span of the source's frames for a window of start..stop-1: the first, and one after the last."""
    indices = reflect_indices(start, stop, frames)
    return int(indices.min()), int(indices.max()) + 1


def requested_steps(options: JobOptions, recipe: Recipe) -> int:
    """Return the requested denoising steps: those of the job, else the recipe's."""
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
    """Plan the segments of `frames` frames at `size` (width, height) pixels. Raises InputTooShort below two frames.

    With a `device` it forecasts seconds for compiled blocks, unless the device lacks the recipe's precision. A recipe
    that leaves its choice to the device is taken as it is: `fast_choice.foresee` makes that choice. `codes_kept`: the
    weights' 8-bit codes are kept. This depends on free memory and is not known before a model is loaded.
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

"""Resume points: store what the next window needs of the earlier ones as arrays of bytes, and restore it.

In:   the last frames of a window, a job's random generator. Out: a `ResumePoint`; from it the same frames and state.
Never: files, how frames are made.

A window starts from two things: the decoded frames that it overlaps with, before they are rounded to bytes, and the
state of the random generator that draws its noise. The frames keep their strides as well as their values: the library
concatenates them with the rest of the scene, which takes over their memory layout, and convolutions sum in another
order in another layout.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Final

import torch

from runner.errors import InternalError
from runner.generation.protocol import ResumePoint, SegmentPlan

__all__ = ["make_resume_point", "restore_state"]

PREVIOUS: Final = "previous"  # uint8 [bytes]: the frames in row-major order, in the dtype that `values` names
RANDOM: Final = "random"  # uint8 [5056]: the state of torch's CPU generator


def make_resume_point(
    segment: int, plan: SegmentPlan, previous: torch.Tensor, generator: torch.Generator
) -> ResumePoint:
    """Return the state before window `segment`. Waits for the device. After the last window the point is empty.

    `previous`: [1, 3, overlap, H, W], the last frames of the window before, in the autoencoder's dtype.
    """
    if segment >= plan.segments:
        return ResumePoint(segment, {}, {})
    raw = previous.contiguous().reshape(-1).view(torch.uint8).cpu().numpy()
    values = {
        "dtype": str(previous.dtype).removeprefix("torch."),
        "shape": list(previous.shape),
        "strides": list(previous.stride()),
    }
    return ResumePoint(segment, {PREVIOUS: raw, RANDOM: generator.get_state().numpy()}, values)


def restore_state(
    start: ResumePoint, plan: SegmentPlan, dtype: torch.dtype, device: torch.device, generator: torch.Generator
) -> torch.Tensor:
    """Return the frames of `make_resume_point` on `device`, with their strides, and set the state of `generator`.

    `dtype`: the autoencoder's. Raises InternalError if `start` is not inside this plan, or is damaged.
    """
    if not 0 < start.segment < plan.segments:
        raise _refusal(f"it is before segment {start.segment} of {plan.segments}")
    if set(start.arrays) != {PREVIOUS, RANDOM}:
        raise _refusal(f"it has the arrays {', '.join(sorted(start.arrays)) or 'none'}")
    shape = [1, 3, plan.overlap_frames, plan.height, plan.width]
    expected = {"dtype": str(dtype).removeprefix("torch."), "shape": shape}
    found = {name: start.values.get(name) for name in expected}
    if found != expected:
        raise _refusal(f"its frames are {found['dtype']} {found['shape']}, not {expected['dtype']} {expected['shape']}")
    raw, strides = start.arrays[PREVIOUS], start.values.get("strides")
    if raw.dtype.name != "uint8" or raw.shape != (math.prod(shape) * dtype.itemsize,):
        raise _refusal(f"its frames are {raw.dtype.name} {list(raw.shape)} for {expected['dtype']} {shape}")
    if not isinstance(strides, Sequence) or not _is_dense(shape, strides):
        raise _refusal(f"the strides {strides} do not fit frames of {shape}")
    try:
        generator.set_state(torch.from_numpy(start.arrays[RANDOM].copy()))
    except (RuntimeError, TypeError) as error:
        raise _refusal(f"its random state is not valid ({error})") from error
    previous = torch.empty_strided(shape, list(strides), dtype=dtype, device=device)
    return previous.copy_(torch.from_numpy(raw.copy()).view(dtype).reshape(shape))


def _is_dense(shape: Sequence[int], strides: Sequence[int]) -> bool:
    """Return whether `strides` place all elements without gaps or overlaps, in any order of the dimensions."""
    if len(strides) != len(shape) or not all(isinstance(stride, int) for stride in strides):
        return False
    expected = 1
    for stride, size in sorted((stride, size) for stride, size in zip(strides, shape, strict=True) if size > 1):
        if stride != expected:
            return False
        expected *= size
    return min(strides) >= 0


def _refusal(what: str) -> InternalError:
    return InternalError(
        f"the checkpoint does not fit this job: {what}", todo="Run again with --checkpoint off, and report this"
    )

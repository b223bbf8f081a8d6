"""Finite checks: find NaN and infinity in the results of a job's stages, without waiting for the device.

In:   tensors on the device, the stage that made each. Out: nothing, or NotFinite with the first stage and place.
Never: a repair; what the tensors mean.

Each check queues its reductions on the device and keeps a flag there. One transfer copies all flags of a segment to the
host, after the segment's frames have been copied. The device has no queued work then, so the transfer does not wait.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from runner.errors import NotFinite

__all__ = ["FiniteChecks", "not_finite"]


@dataclass(frozen=True)
class _Check:
    stage: str
    flags: Tensor  # bool [n]
    place: Callable[[int], str]  # index of a flag -> what was checked


class FiniteChecks:
    """The flags of one segment, in the order of the stages. For one thread."""

    def __init__(self) -> None:
        self._checks: list[_Check] = []

    def add(self, stage: str, place: str, values: Tensor) -> None:
        """Queue a check of floating-point `values` of any shape. `place` completes "NaN or infinity in …"."""
        self._checks.append(_Check(stage, _finite(values, list(range(values.ndim))).reshape(1), lambda _: place))

    def add_frames(self, stage: str, frames: Tensor, first: int) -> None:
        """Queue a check of each frame of [1, channels, n, H, W]; `first`: index of the first in the job's output."""
        self._checks.append(_Check(stage, _finite(frames, [0, 1, 3, 4]), lambda i: f"output frame {first + i}"))

    def read(self) -> None:
        """Read the flags with one transfer and drop them. Raises NotFinite for the first value that is not finite."""
        checks, self._checks = self._checks, []
        if not checks:
            return
        flags = torch.cat([check.flags for check in checks]).tolist()
        at = 0
        for check in checks:
            found = flags[at : at + len(check.flags)]
            at += len(found)
            if not all(found):
                raise not_finite(check.stage, check.place(found.index(False)))


def not_finite(stage: str, place: str) -> NotFinite:
    """Return the error for values that `stage` computed. `place` completes "NaN or infinity in …"."""
    return NotFinite(
        f"{stage}: NaN or infinity in {place}, the first place where it was found",
        todo="Run `video-lab weights verify`. If the weights are whole, lower the strength of the job's LoRAs, or "
        "render with recipe bf16",
    )


def _finite(values: Tensor, dims: list[int]) -> Tensor:
    """Return whether all values along `dims` are finite: bool, on the device.

    Minimum or maximum is NaN or infinite if any value is. Unlike `isfinite` of all values this makes no large copy.
    """
    low, high = values.amin(dims), values.amax(dims)
    return torch.isfinite(low) & torch.isfinite(high)

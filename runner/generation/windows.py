"""Windows: a job's conditions one window at a time, from bytes on the host to the values that the models read.

In:   uint8 frames on the host. Out: a padded window, its pixels on a device, frames back as uint8; and a digest.
Never: models, latents, prompts.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch
from PIL import Image

from runner.generation.segments import reflect_indices, span_of

__all__ = [
    "ConditionSource",
    "ConditionWindow",
    "PaddedWindow",
    "digest_frames",
    "digest_image",
    "padded_window",
    "to_pixels",
    "to_uint8",
    "to_unit",
]


class ConditionWindow(Protocol):
    """Consecutive frames of what drives the model, on the host."""

    @property
    def pose(self) -> np.ndarray:
        """uint8 [n, H, W, 3] RGB skeletons."""

    @property
    def face(self) -> np.ndarray:
        """uint8 [n, F, F, 3] RGB crops; F is the motion encoder's size."""

    @property
    def background(self) -> np.ndarray | None:
        """uint8 [n, H, W, 3] RGB; replace mode."""

    @property
    def mask(self) -> np.ndarray | None:
        """uint8 [n, H, W], 255 where the character goes; replace mode."""


class ConditionSource(Protocol):
    """A job's conditions, fetched a window at a time."""

    @property
    def frames(self) -> int:
        """How many there are."""

    @property
    def reference(self) -> Image.Image:
        """The character, RGB."""

    def window(self, start: int, stop: int) -> ConditionWindow:
        """Frames start..stop-1, within what there is."""


@dataclass(frozen=True)
class PaddedWindow:
    """A padded window; background and mask are there in replace mode only."""

    pose: np.ndarray
    face: np.ndarray
    background: np.ndarray | None
    mask: np.ndarray | None


def padded_window(source: ConditionSource, start: int, stop: int, mode: str) -> PaddedWindow:
    """Frames start..stop-1, reflected beyond the source's end. One fetch, never longer than the window itself."""
    indices = reflect_indices(start, stop, source.frames)
    low, high = span_of(start, stop, source.frames)
    window = source.window(low, high)

    def take(name: str) -> np.ndarray:
        frames = getattr(window, name)
        if frames is None or len(frames) != high - low:
            came = "none" if frames is None else str(len(frames))
            raise ValueError(f"{name}: {high - low} frames were asked for, {came} came")
        return frames[indices - low]

    replace = mode == "replace"
    return PaddedWindow(
        take("pose"), take("face"), take("background") if replace else None, take("mask") if replace else None
    )


def digest_frames(frames: np.ndarray) -> bytes:
    """sha256 of frames, their shape and type. 97 MB of a window at 480x832 take 60 ms where the CPU has instructions
    for it, against seconds of the autoencoder."""
    digest = hashlib.sha256(f"{frames.dtype} {frames.shape}".encode())
    digest.update(np.ascontiguousarray(frames).data)
    return digest.digest()


def digest_image(image: Image.Image) -> bytes:
    """sha256 of an image's pixels, its size and mode."""
    return hashlib.sha256(f"{image.mode} {image.size} ".encode() + image.tobytes()).digest()


def to_unit(frames: np.ndarray, device: torch.device) -> torch.Tensor:
    """uint8 [n, H, W, 3] or [n, H, W] to float32 [1, channels, n, H, W] in [0, 1]; bytes cross to the device."""
    planes = torch.from_numpy(frames if frames.ndim == 4 else frames[..., None]).to(device)
    # Channels stay innermost in memory, as the library's own conversion leaves them: convolutions sum in another order
    # otherwise, and the last bits differ.
    values = planes.to(torch.float32)
    # By a tensor on the device: CUDA multiplies by a rounded reciprocal when the divisor is a number.
    values /= torch.tensor(255.0, device=device)
    return values.permute(3, 0, 1, 2).unsqueeze(0)


def to_pixels(frames: np.ndarray, device: torch.device) -> torch.Tensor:
    """As `to_unit`, in [-1, 1]."""
    return to_unit(frames, device).mul_(2.0).sub_(1.0)


def to_uint8(frames: torch.Tensor) -> np.ndarray:
    """[n, 3, H, W] in [0, 1] to uint8 [n, H, W, 3] on the host, rounded to even."""
    return (frames.float() * 255).round().to(torch.uint8).permute(0, 2, 3, 1).contiguous().cpu().numpy()

"""Windows: prepare a job's conditions window by window, from uint8 frames on the host to tensors on the device.

In:   uint8 frames on the host, a job's plan. Out: windows drawn ahead in a separate thread, padded windows, their
pixels on a device, frames as uint8, digests; named tensors of a window and of a job.
Never: models, how a window's inputs are encoded, what is in the frames.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch
from PIL import Image

from runner.generation.protocol import OnStep, SegmentPlan
from runner.generation.runtime.finite import FiniteChecks
from runner.generation.sampling import NewSampler
from runner.generation.segments import reflect_indices, span_of
from runner.generation.wan_animate.transformer import Context, Strengths
from runner.timing import StageTimer

__all__ = [
    "CfgCall",
    "ConditionSource",
    "ConditionWindow",
    "DrawnAhead",
    "JobTensors",
    "PaddedWindow",
    "WindowTensors",
    "apply_cfg",
    "digest_frames",
    "digest_image",
    "no_face",
    "padded_window",
    "segment_spans",
    "to_pixels",
    "to_uint8",
    "to_unit",
]


class ConditionWindow(Protocol):
    """Consecutive frames of the conditions that drive the model, on the host."""

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
    """A job's conditions, fetched window by window."""

    @property
    def reference(self) -> Image.Image:
        """The character, RGB."""

    def window(self, start: int, stop: int) -> ConditionWindow:
        """Return frames start..stop-1 of the plan."""


@dataclass(frozen=True)
class PaddedWindow:
    """A padded window; background and mask only in replace mode."""

    pose: np.ndarray
    face: np.ndarray
    background: np.ndarray | None
    mask: np.ndarray | None


def padded_window(source: ConditionSource, frames: int, start: int, stop: int, mode: str) -> PaddedWindow:
    """Return frames start..stop-1, reflected beyond the end of the source's `frames`.

    It fetches once, at most the length of the window.
    """
    indices = reflect_indices(start, stop, frames)
    low, high = span_of(start, stop, frames)
    window = source.window(low, high)

    def take(name: str) -> np.ndarray:
        found = getattr(window, name)
        if found is None or len(found) != high - low:
            came = "none" if found is None else str(len(found))
            raise ValueError(f"{name}: {high - low} frames were requested, {came} came")
        return found[indices - low]

    replace = mode == "replace"
    return PaddedWindow(
        take("pose"), take("face"), take("background") if replace else None, take("mask") if replace else None
    )


def digest_frames(frames: np.ndarray) -> bytes:
    """Return the sha256 of frames, their shape and dtype.

    The 97 MB of a window at 480x832 take 60 ms on a CPU with SHA instructions; the autoencoder takes seconds.
    """
    digest = hashlib.sha256(f"{frames.dtype} {frames.shape}".encode())
    digest.update(np.ascontiguousarray(frames).data)
    return digest.digest()


def digest_image(image: Image.Image) -> bytes:
    """Return the sha256 of an image's pixels, size and mode."""
    return hashlib.sha256(f"{image.mode} {image.size} ".encode() + image.tobytes()).digest()


def to_unit(frames: np.ndarray, device: torch.device) -> torch.Tensor:
    """Convert uint8 [n, H, W, 3] or [n, H, W] to float32 [1, channels, n, H, W] in [0, 1], on `device`."""
    planes = torch.from_numpy(frames if frames.ndim == 4 else frames[..., None]).to(device)
    # Channels stay innermost in memory, as in the library's conversion. Otherwise convolutions would sum in another
    # order, and the last bits would differ.
    values = planes.to(torch.float32)
    # The divisor is a tensor: for a number CUDA multiplies by its rounded reciprocal.
    values /= torch.tensor(255.0, device=device)
    return values.permute(3, 0, 1, 2).unsqueeze(0)


def to_pixels(frames: np.ndarray, device: torch.device) -> torch.Tensor:
    """As `to_unit`, in [-1, 1]."""
    return to_unit(frames, device).mul_(2.0).sub_(1.0)


def to_uint8(frames: torch.Tensor) -> np.ndarray:
    """Convert [n, 3, H, W] in [0, 1] to uint8 [n, H, W, 3] on the host, rounded half to even."""
    return (frames.float() * 255).round().to(torch.uint8).permute(0, 2, 3, 1).contiguous().cpu().numpy()


Span = tuple[int, int]  # frames first..last-1


def segment_spans(plan: SegmentPlan) -> list[Span]:
    """Return the span of conditions that each of a plan's segments reads, in order."""
    step = plan.segment_frames - plan.overlap_frames
    starts = (index * step for index in range(plan.segments))
    return [span_of(start, start + plan.segment_frames, plan.frames) for start in starts]


class DrawnAhead:
    """Draw windows in a thread before they are requested. The first one starts at once, while another job may run."""

    def __init__(self, source: ConditionSource, spans: Iterable[Span]) -> None:
        self._source, self._spans = source, list(spans)
        self._expected = 0  # the number of the span after the one that is waiting
        self._pool: ThreadPoolExecutor | None = ThreadPoolExecutor(1, "draw")
        self._waiting: tuple[Span, Future[ConditionWindow]] | None = None
        self._begin()

    def window(self, start: int, stop: int) -> ConditionWindow:
        """Return frames start..stop-1; draw them now if they were not drawn ahead. Raises what drawing raised."""
        if self._pool is None:
            return self._source.window(start, stop)
        if self._waiting is None or self._waiting[0] != (start, stop):
            return self._pool.submit(self._source.window, start, stop).result()
        drawn = self._waiting[1].result()
        self._begin()
        return drawn

    def skip_to(self, index: int) -> None:
        """Draw span number `index` next, then those after it. A window that is being drawn is finished and dropped.

        Does nothing if that span or a later one is drawn already. Do not call it while another thread calls `window`.
        """
        if self._pool is None or index < self._expected:
            return
        if self._waiting is not None:
            self._waiting[1].cancel()
        self._expected = index
        self._begin()

    def close(self) -> None:
        """Wait for the window that is being drawn and drop it. Idempotent."""
        pool, self._pool, self._waiting = self._pool, None, None
        if pool is not None:
            pool.shutdown(cancel_futures=True)

    def _begin(self) -> None:
        assert self._pool is not None
        span = self._spans[self._expected] if self._expected < len(self._spans) else None
        self._expected += 1
        self._waiting = None if span is None else (span, self._pool.submit(self._source.window, *span))


# (latents and scene [1, 36, T, H/8, W/8], timestep [1]) -> velocity [1, 16, T, H/8, W/8]: one model call of CFG
CfgCall = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]


@dataclass(frozen=True)
class JobTensors:
    """What stays the same over a job's windows."""

    plan: SegmentPlan
    new_sampler: NewSampler
    timer: StageTimer
    on_step: OnStep | None
    guidance_scale: float
    strengths: Strengths
    text: torch.Tensor  # [1, 512, text_dim]
    negative: torch.Tensor | None  # as text; None without CFG
    clip: torch.Tensor  # [1, image tokens, image_dim]
    reference: torch.Tensor  # [1, 20, 1, H/8, W/8], mask and latents
    checks: FiniteChecks
    contexts: list[Context]  # of text and, with CFG, of negative


@dataclass(frozen=True)
class WindowTensors:
    """The inputs of one window's denoising: T latent frames, the first one for the reference."""

    noise: torch.Tensor  # float32 [1, 16, T, H/8, W/8]
    scene: torch.Tensor  # [1, 20, T, H/8, W/8], the reference in front
    pose: torch.Tensor  # [1, 16, T - 1, H/8, W/8]
    faces: torch.Tensor  # [1, 3, n, F, F] in [-1, 1]


def no_face(faces: torch.Tensor) -> torch.Tensor:
    """Return black crops of the shape of `faces`, as the library makes them."""
    return faces * 0 - 1


def apply_cfg(velocities: list[torch.Tensor], scale: float) -> torch.Tensor:
    """Classifier-free guidance: the one velocity, or `uncond + scale * (cond - uncond)` of [cond, uncond].

    `cond` is predicted with prompt and face, `uncond` without.
    """
    if len(velocities) == 1:
        return velocities[0]
    cond, uncond = velocities
    return uncond + scale * (cond - uncond)

"""The original scripts, as a baseline: the library's unchanged pipeline, with weights dequantised in single steps.

Everything is computed again at every step and for every job. Models stay on the host until they are called. The
autoencoder is in float32. The sigma schedule is that of the library's scheduler.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from diffusers import FlowMatchEulerDiscreteScheduler, WanAnimatePipeline
from PIL import Image
from torch import Tensor, nn

from runner.quantization.formats.e2m1 import VALUES
from runner.quantization.kernels.dequantize import dequantize_fp4
from runner.quantization.linear import FP4Linear


class StepwiseLinear(nn.Module):
    """An FP4Linear that is dequantised to 16 bits as in the original scripts: by 64-bit indices into a table."""

    def __init__(self, layer: FP4Linear) -> None:
        super().__init__()
        self.group = layer.fmt.group
        self.register_buffer("packed", layer.weight_packed.data)
        self.register_buffer("factors", layer.fmt.group_scales(layer.stored).to(torch.bfloat16))
        self.bias = layer.bias

    @property
    def weight(self) -> Tensor:
        """The tensor from which the library reads device and dtype; it skips tensors that are not floating point."""
        return self.packed

    def forward(self, x: Tensor) -> Tensor:
        table = torch.tensor(VALUES, dtype=x.dtype, device=x.device)
        codes = torch.stack([self.packed & 0xF, self.packed >> 4], dim=-1).flatten(1).long()
        values = table[codes].view(codes.shape[0], -1, self.group) * self.factors.to(x.dtype).unsqueeze(-1)
        return F.linear(x, values.view(codes.shape), None if self.bias is None else self.bias.to(x.dtype))


def dequantise_stepwise(transformer: nn.Module) -> None:
    """Replace every FP4Linear by a StepwiseLinear, in place."""
    for name, layer in list(transformer.named_modules()):
        if isinstance(layer, FP4Linear):
            transformer.set_submodule(name, StepwiseLinear(layer))


@contextmanager
def stepwise(transformer: nn.Module) -> Iterator[None]:
    """Do the same inside a `with` block."""
    with replaced(transformer, StepwiseLinear):
        yield


@contextmanager
def dense(transformer: nn.Module, dtype: torch.dtype) -> Iterator[None]:
    """Replace every FP4Linear by a linear with its weight in `dtype`, inside a `with` block.

    For the 14B model in 16 bits these weights have 34.5 GB, in addition to the 4-bit weights.
    """
    with replaced(transformer, lambda layer: _dense_linear(layer, dtype)):
        yield


@contextmanager
def replaced(transformer: nn.Module, by: Callable[[FP4Linear], nn.Module]) -> Iterator[None]:
    layers = {name: layer for name, layer in transformer.named_modules() if isinstance(layer, FP4Linear)}
    try:
        for name, layer in layers.items():
            transformer.set_submodule(name, by(layer))
        yield
    finally:
        for name, layer in layers.items():
            transformer.set_submodule(name, layer)


def _dense_linear(layer: FP4Linear, dtype: torch.dtype) -> nn.Linear:
    linear = nn.Linear(layer.in_features, layer.out_features, layer.bias is not None, device="meta")
    stored = (layer.weight_packed, layer.weight_scale, layer.weight_scale_2)
    linear.weight = nn.Parameter(dequantize_fp4(*stored, layer.fmt.name, dtype), requires_grad=False)
    if layer.bias is not None:
        linear.bias = nn.Parameter(layer.bias.to(dtype), requires_grad=False)
    return linear


def original_pipeline(parts: dict[str, Any], device: torch.device) -> WanAnimatePipeline:
    """Return the unmodified pipeline of these models. If `device` is a GPU, its weights are offloaded to the host."""
    pipeline = WanAnimatePipeline(scheduler=FlowMatchEulerDiscreteScheduler(shift=5.0), **parts)
    if device.type == "cuda":
        pipeline.enable_model_cpu_offload(device=device)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def original_job(
    pipeline: WanAnimatePipeline,
    source: Any,
    prompt: str,
    steps: int,
    clock: Callable[[], float],
    wait: Callable[[], None],
) -> tuple[float, list[float]]:
    """Render a clip in one window. Return the start of its first denoising step and the end of each, by `clock`."""
    began: list[float] = []
    ended: list[float] = []

    def note(_module: Any, _arguments: Any) -> None:
        wait()
        began.append(clock())

    def end(_pipeline: Any, _step: int, _timestep: Any, _kept: Any) -> dict[str, Any]:
        wait()
        ended.append(clock())
        return {}

    window = source.window(0, source.frames)
    hook = pipeline.transformer.register_forward_pre_hook(note)
    try:
        pipeline(
            image=source.reference,
            pose_video=[Image.fromarray(frame) for frame in window.pose],
            face_video=[Image.fromarray(frame) for frame in window.face],
            prompt=prompt,
            height=source.height,
            width=source.width,
            segment_frame_length=source.frames,
            num_inference_steps=steps,
            guidance_scale=1.0,
            mode="animate",
            output_type="np",
            generator=torch.Generator("cpu").manual_seed(0),
            callback_on_step_end=end,
        )
    finally:
        hook.remove()
    return began[0], ended

"""Norm and SiLU in Triton: one read and one write per number, for tensors of any strides. Importing needs triton.

In:   feature maps, gamma, bias. Out: as `norm_silu.py` defines it, computed in float32 and rounded once.
Never: slots, convolutions.

A program processes some pixels with all their channels. bfloat16 is read and written as integers and rounded in code,
because Triton's interpreter truncates where a GPU rounds. The tests run this code in the interpreter, without a GPU.
"""

from __future__ import annotations

from typing import Final

import torch
import triton
import triton.language as tl
from torch import Tensor

__all__ = ["launch"]

_NUMBERS: Final = 4096  # per program
# Numbers per thread: with channels innermost, and with pixels innermost, where addresses take more registers.
_A_THREAD, _A_THREAD_OF_PIXELS = 32, 16
_FEWEST_PIXELS: Final = 16  # per program if they are innermost: half a cache line in float32


def launch(x: Tensor, gamma: Tensor, bias: Tensor | None, smallest: float, out: Tensor) -> None:
    """Write SiLU(norm(x)) to `out`: [B, C, n, H, W] float32|bfloat16|float16; gamma, bias [C, 1, 1, 1] contiguous.

    All tensors have one dtype and one device. Raises ValueError for other tensors.
    """
    batch, channels, frames, height, width = x.shape
    vectors = [gamma] if bias is None else [gamma, bias]
    if out.shape != x.shape or any(v.numel() != channels or not v.is_contiguous() for v in vectors):
        raise ValueError("the kernel takes two tensors of one shape, and one contiguous number per channel")
    if len({tensor.dtype for tensor in (x, out, *vectors)}) != 1:
        raise ValueError("the kernel takes tensors of one dtype")
    bits = x.dtype is torch.bfloat16
    given = [
        tensor.view(torch.int16) if bits else tensor for tensor in (x, gamma, gamma if bias is None else bias, out)
    ]
    lanes = triton.next_power_of_2(channels)
    innermost = x.stride(1) == 1
    pixels = max(_NUMBERS // lanes, 1 if innermost else _FEWEST_PIXELS)
    grid = (triton.cdiv(height * width, pixels), batch * frames)
    with torch.cuda.device_of(x):  # Triton launches on the current device, wherever the tensors lie
        _norm_silu[grid](
            *given,
            channels**0.5,
            smallest,
            channels,
            frames,
            width,
            height * width,
            *x.stride(),
            *out.stride(),
            BIASED=bias is not None,
            BF16=bits,
            PIXELS=pixels,
            CHANNELS=lanes,
            num_warps=pixels * lanes // (32 * (_A_THREAD if innermost else _A_THREAD_OF_PIXELS)),
            enable_fp_fusion=False,  # torch rounds each operation; Triton's default depends on its release
        )


@triton.jit
def _bfloat16_bits(value: tl.tensor) -> tl.tensor:
    bits = value.to(tl.int32, bitcast=True)
    rounded = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16
    # A GPU's NaN has every bit of its mantissa set: rounded up as a number, it would become zero.
    unordered = value != value  # noqa: PLR0124
    return tl.where(unordered, 0x7FC0, rounded).to(tl.int16)


@triton.jit
def _as_float(stored: tl.tensor, BF16: tl.constexpr) -> tl.tensor:
    if BF16:
        return (stored.to(tl.int32) << 16).to(tl.float32, bitcast=True)
    return stored.to(tl.float32)


@triton.jit
def _norm_silu(
    x: tl.tensor,
    gamma: tl.tensor,
    bias: tl.tensor,
    out: tl.tensor,
    scale: tl.tensor,
    smallest: tl.tensor,
    channels: tl.tensor,
    frames: tl.tensor,
    width: tl.tensor,
    pixels: tl.tensor,
    x_batch: tl.tensor,
    x_channel: tl.tensor,
    x_frame: tl.tensor,
    x_row: tl.tensor,
    x_column: tl.tensor,
    out_batch: tl.tensor,
    out_channel: tl.tensor,
    out_frame: tl.tensor,
    out_row: tl.tensor,
    out_column: tl.tensor,
    BIASED: tl.constexpr,
    BF16: tl.constexpr,
    PIXELS: tl.constexpr,
    CHANNELS: tl.constexpr,
) -> None:
    pixel = tl.program_id(0) * PIXELS + tl.arange(0, PIXELS)
    row = (pixel // width).to(tl.int64)[:, None]
    column = (pixel % width).to(tl.int64)[:, None]
    batch = (tl.program_id(1) // frames).to(tl.int64)
    frame = (tl.program_id(1) % frames).to(tl.int64)
    channel = tl.arange(0, CHANNELS)
    there = channel < channels
    inside = (pixel < pixels)[:, None] & there[None, :]
    lane = channel.to(tl.int64)[None, :]
    source = batch * x_batch + frame * x_frame + row * x_row + column * x_column + lane * x_channel
    values = _as_float(tl.load(x + source, mask=inside, other=0), BF16)
    length = tl.sqrt_rn(tl.sum(values * values, axis=1))
    length = tl.where(length < smallest, smallest, length)  # NaN stays, as it does in torch's clamp
    values = values * tl.div_rn(tl.zeros_like(length) + scale, length)[:, None]
    values = values * _as_float(tl.load(gamma + channel, mask=there, other=0), BF16)[None, :]
    if BIASED:
        values = values + _as_float(tl.load(bias + channel, mask=there, other=0), BF16)[None, :]
    values = tl.div_rn(values, 1.0 + tl.exp(-values))
    target = batch * out_batch + frame * out_frame + row * out_row + column * out_column + lane * out_channel
    if BF16:
        tl.store(out + target, _bfloat16_bits(values), mask=inside)
    else:
        tl.store(out + target, values.to(out.dtype.element_ty), mask=inside)

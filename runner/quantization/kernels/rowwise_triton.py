"""Quantising with one scale per row in Triton. One pass reads 2 and writes 1 byte a number. Importing needs triton.

In:   a float matrix. Out: 8-bit codes and one float32 scale per row, as `rowwise.quantize_rows` defines them.
Never: rotations, products, the meaning of the matrix.

The codes of float8_e4m3fn are computed as integers, without a conversion instruction. The conversion of Triton 3.7
(part of torch 2.13's CUDA build) is wrong for compute capability 8.9: it converts float32 to float16 rounded towards
zero (`cvt.rz.f16.f32`), then to e4m3 rounded to nearest, so that values just above a tie are rounded towards zero.
"""

from __future__ import annotations

from typing import Final

import torch
import triton
import triton.language as tl
from torch import Tensor

__all__ = ["e4m3_bits", "launch", "round_to_code"]

_LONGEST: Final = 1 << 15  # columns: a row stays in the registers of one program
# Adding 1.5 * 2**23 rounds a float32 below 2**22 to an integer, ties to even.
_TO_INTEGER: Final = tl.constexpr(12582912.0)
# The exponent of 2**-6, e4m3's smallest normal number, as float32 has it: 127 - 6.
_E4M3_LOWEST: Final = tl.constexpr(121)
_E4M3_MANTISSA: Final = tl.constexpr(3)


def launch(x: Tensor, largest: float, smallest_scale: float, codes: Tensor, scale: Tensor) -> None:
    """Quantise each row of `x` [M, K] float32|bfloat16|float16 by its largest magnitude: codes [M, K], scale [M, 1].

    codes int8 or float8_e4m3fn. All contiguous, on one device. Raises ValueError for other matrices.
    """
    rows, columns = x.shape
    if columns > _LONGEST:
        raise ValueError(f"rows of {columns} columns; the kernel holds {_LONGEST}")
    for tensor in (x, codes, scale):
        if not tensor.is_contiguous():
            raise ValueError("the kernel reads and writes contiguous tensors only")
    block = triton.next_power_of_2(columns)
    with torch.cuda.device_of(x):  # Triton launches on the current device, wherever the tensors lie
        _quantize[(rows,)](
            x,
            codes.view(torch.int8),
            scale,
            columns,
            largest,
            smallest_scale,
            INTEGER=codes.dtype is torch.int8,
            BLOCK=block,
            num_warps=min(max(block // 1024, 1), 16),
            enable_fp_fusion=False,  # torch rounds each operation; Triton's default depends on its release
        )


@triton.jit
def round_to_code(magnitude: tl.tensor, LOWEST: tl.constexpr, MANTISSA: tl.constexpr) -> tl.tensor:
    """Round each magnitude (bits of float32, int32) to the nearest number, ties to even: its code without sign, int32.

    For a format with `MANTISSA` bits of mantissa; `LOWEST`: the biased float32 exponent of its smallest normal number.
    A magnitude above the format's largest number gets a code above the largest.
    """
    # Between powers of two there are 2**MANTISSA even steps, and as many below the smallest normal number. Adding
    # 1.5 * 2**(23 - MANTISSA) times the power of two, a number whose last bit is one step, rounds the sum to whole
    # steps; its last bits count them.
    exponent = tl.maximum(magnitude >> 23, LOWEST)
    zero_steps = (exponent << 23) + (((23 - MANTISSA) << 23) | (1 << 22))
    steps = magnitude.to(tl.float32, bitcast=True) + zero_steps.to(tl.float32, bitcast=True)
    return ((exponent - LOWEST) << MANTISSA) + (steps.to(tl.int32, bitcast=True) - zero_steps)


@triton.jit
def e4m3_bits(value: tl.tensor) -> tl.tensor:
    """The nearest float8_e4m3fn of |value| < 464, ties to even, or NaN; with the sign of `value`, as torch converts."""
    bits = value.to(tl.int32, bitcast=True)
    magnitude = bits & 0x7FFFFFFF
    code = tl.where(magnitude > 0x7F800000, 0x7F, round_to_code(magnitude, _E4M3_LOWEST, _E4M3_MANTISSA))
    return code | ((bits >> 24) & 0x80)


@triton.jit
def _quantize(
    x: tl.tensor,
    codes: tl.tensor,
    scales: tl.tensor,
    columns: tl.tensor,
    largest: tl.tensor,
    smallest_scale: tl.tensor,
    INTEGER: tl.constexpr,
    BLOCK: tl.constexpr,
) -> None:
    row = tl.program_id(0).to(tl.int64)
    column = tl.arange(0, BLOCK)
    inside = column < columns
    values = tl.load(x + row * columns + column, mask=inside, other=0.0).to(tl.float32)
    # Correctly rounded division, as in torch: ties between codes must be rounded to the same side.
    scale = tl.maximum(tl.div_rn(tl.max(tl.abs(values), axis=0), largest), smallest_scale)
    # A maximum ignores NaN, but a row with NaN must not give plausible numbers. Only NaN differs from itself.
    unordered = values != values  # noqa: PLR0124
    scale = tl.where(tl.sum(unordered.to(tl.int32), axis=0) > 0, float("nan"), scale)
    values = tl.div_rn(values, tl.zeros_like(values) + scale)
    if INTEGER:
        values = tl.minimum(tl.maximum(values, -largest), largest)
        narrowed = ((values + _TO_INTEGER) - _TO_INTEGER).to(tl.int8)
    else:  # a quotient may be a bit above 448, and is then rounded to 448
        narrowed = e4m3_bits(values).to(tl.int8)
    tl.store(codes + row * columns + column, narrowed, mask=inside)
    tl.store(scales + row, scale)

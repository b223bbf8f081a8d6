"""Smoothing and quantising groups of 16 to E2M1 in one Triton kernel. Importing this needs triton.

In:   a matrix in bfloat16, a factor per column. Out: codes, two a byte, and e4m3 scales in cuBLAS's order, as
      `e2m1_codes.quantize_to_e2m1` and `nvfp4.to_blocked` make them. One pass reads 2 and writes .56 bytes a number.
Never: products, layers.

A program takes 128 rows by 64 columns: their scales are one tile of cuBLAS's order, 512 contiguous bytes. Rows after
the last are read as zeros, and their scales are written as zeros.
"""

from __future__ import annotations

from typing import Final

import torch
import triton
import triton.language as tl
from torch import Tensor

from runner.quantization.kernels.rowwise_triton import e4m3_bits, round_to_code

__all__ = ["launch"]

_TILE_ROWS: Final = 128
_TILE_GROUPS: Final = 4
_GROUP: Final = 16
# The exponent of 1, E2M1's smallest normal number, as float32 has it.
_E2M1_LOWEST: Final = tl.constexpr(127)
_E2M1_MANTISSA: Final = tl.constexpr(1)
_INFINITY: Final = tl.constexpr(0x7F800000)  # its bits; those of NaN are larger


def launch(
    x: Tensor,
    smooth: Tensor,
    largest_code: float,
    largest_scale: float,
    smallest_scale: float,
    codes: Tensor,
    scales: Tensor,
) -> None:
    """x [M, K] / smooth [K], both bfloat16, K a multiple of 64, into codes uint8 [M, K/2] and scales uint8, flat.

    `scales`: bits of e4m3, ceil(M / 128) * 128 * K / 16 of them; those of rows after M are zeros. `smallest_scale`: the
    smallest divisor of a group. All contiguous, on one device. Raises ValueError for other matrices.
    """
    rows, columns = x.shape
    tile_columns = _TILE_GROUPS * _GROUP
    if columns % tile_columns or x.dtype is not torch.bfloat16 or smooth.dtype is not torch.bfloat16:
        raise ValueError(f"{columns} columns in {x.dtype} and {smooth.dtype}; the kernel takes tiles of {tile_columns}")
    for tensor in (x, smooth, codes, scales):
        if not tensor.is_contiguous():
            raise ValueError("the kernel reads and writes contiguous tensors only")
    across = columns // tile_columns
    with torch.cuda.device_of(x):  # Triton launches on the current device, wherever the tensors lie
        _quantize_groups[(triton.cdiv(rows, _TILE_ROWS) * across,)](
            x.view(torch.int32),
            smooth.view(torch.int32),
            codes,
            scales,
            rows,
            across,
            largest_code,
            largest_scale,
            smallest_scale,
            ROWS=_TILE_ROWS,
            GROUPS=_TILE_GROUPS,
            WORDS=_GROUP // 2,
            num_warps=8,
            enable_fp_fusion=False,  # torch rounds each operation; Triton's default depends on its release
        )


@triton.jit
def _smoothed(x_bits: tl.tensor, smooth_bits: tl.tensor) -> tl.tensor:
    # Bits of bfloat16 are the upper half of float32's. Division and rounding are those of torch.
    quotient = tl.div_rn(x_bits.to(tl.float32, bitcast=True), smooth_bits.to(tl.float32, bitcast=True))
    return quotient.to(tl.bfloat16).to(tl.float32).to(tl.int32, bitcast=True)


@triton.jit
def _e2m1_bits(bits: tl.tensor, scale: tl.tensor, largest: tl.tensor) -> tl.tensor:
    # The sign changes neither division nor rounding; ties must be rounded to the same side as in torch.
    magnitude = (bits & 0x7FFFFFFF).to(tl.float32, bitcast=True)
    quotient = tl.minimum(tl.div_rn(magnitude, scale), largest).to(tl.int32, bitcast=True)
    return round_to_code(quotient, _E2M1_LOWEST, _E2M1_MANTISSA) | ((bits >> 28) & 8)


@triton.jit
def _quantize_groups(
    x: tl.tensor,
    smooth: tl.tensor,
    codes: tl.tensor,
    scales: tl.tensor,
    rows: tl.tensor,
    across: tl.tensor,
    largest_code: tl.tensor,
    largest_scale: tl.tensor,
    smallest_scale: tl.tensor,
    ROWS: tl.constexpr,
    GROUPS: tl.constexpr,
    WORDS: tl.constexpr,
) -> None:
    tile = tl.program_id(0)
    in_tile = tl.arange(0, ROWS)
    row = (tile // across) * ROWS + in_tile
    inside = (row < rows)[:, None, None]
    group = (tile % across) * GROUPS + tl.arange(0, GROUPS)
    word = group[None, :, None] * WORDS + tl.arange(0, WORDS)[None, None, :]
    place = row.to(tl.int64)[:, None, None] * (across * GROUPS * WORDS) + word
    # A word is two columns, the even one in the lower half.
    pairs, factors = tl.load(x + place, mask=inside, other=0), tl.load(smooth + word)
    even = _smoothed(pairs << 16, factors << 16)
    odd = _smoothed(pairs & -65536, factors & -65536)
    # As integers, the bits of magnitudes have the magnitudes' order, and NaN is the largest.
    peak = tl.max(tl.maximum(even & 0x7FFFFFFF, odd & 0x7FFFFFFF), axis=2)
    finite = peak < _INFINITY
    exact = tl.minimum(tl.div_rn(peak.to(tl.float32, bitcast=True), largest_code), largest_scale)
    divisor = tl.maximum(exact, smallest_scale)[:, :, None]
    pair = _e2m1_bits(even, divisor, largest_code) | (_e2m1_bits(odd, divisor, largest_code) << 4)
    pair = tl.where(finite[:, :, None], pair, 0)
    tl.store(codes + place, pair.to(tl.uint8), mask=inside)
    scale = tl.where((row < rows)[:, None], e4m3_bits(tl.where(finite, exact, float("nan"))), 0)
    in_blocks = (in_tile % 32) * (4 * GROUPS) + in_tile // 32 * GROUPS
    start = tl.cast(tile, tl.int64) * (ROWS * GROUPS)
    tl.store(scales + start + in_blocks[:, None] + tl.arange(0, GROUPS)[None, :], scale.to(tl.uint8))

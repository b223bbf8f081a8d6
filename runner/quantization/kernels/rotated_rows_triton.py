"""Rotating and quantising rows in one Triton kernel, after GELU if requested. Importing this needs triton.

In:   a matrix in 16 bits. Out: int8 codes and one float32 scale per row. One pass reads 2 and writes 1 byte a number.
Never: products, the meaning of the matrix, rotations other than `ROTATION` wide.

A program takes some rows, one after the other. A row is in its registers as [blocks, 128] and is multiplied by the
Hadamard matrix on the tensor cores. The matrix is exact in 16 bits; sums are in float32 and rounded to the matrix's
dtype, like those of `rowwise.rotate_rows`. Two orders of summing 128 numbers may end on two sides of a tie.
"""

from __future__ import annotations

from typing import Final

import torch
import triton
import triton.language as tl
from torch import Tensor

__all__ = ["launch"]

_LONGEST: Final = 1 << 14  # columns: a row stays in the registers of one program
_ROWS: Final = 8  # of a program, which reads the Hadamard matrix (32 KB) once for all of its rows
_LEAST_BLOCKS: Final = 16  # rows of the smallest product on the tensor cores
# Adding 1.5 * 2**23 rounds a float32 below 2**22 to an integer, ties to even.
_TO_INTEGER: Final = tl.constexpr(12582912.0)
# GELU by tanh, of u = sqrt(2 / pi) * (x + 0.044715 x^3), is x / (1 + exp(-2 u)).
_MINUS_TWO_ROOTS: Final = tl.constexpr(-1.5957691216057308)
_CUBE: Final = tl.constexpr(0.044715)


def launch(
    x: Tensor, matrix: Tensor, gelu: bool, largest: float, smallest_scale: float, codes: Tensor, scale: Tensor
) -> None:
    """Every row of `x` [M, K] bfloat16|float16, K a multiple of 128, into int8 codes [M, K] and scale [M, 1] float32.

    `matrix`: Hadamard's, [128, 128] in x's dtype. All contiguous, on one device. ValueError for other matrices.
    """
    rows, columns = x.shape
    width = matrix.shape[0]
    if columns > _LONGEST or columns % width or x.dtype not in (torch.bfloat16, torch.float16):
        raise ValueError(f"rows of {columns} columns in {x.dtype}; the kernel holds {_LONGEST}, in blocks of {width}")
    for tensor in (x, matrix, codes, scale):
        if not tensor.is_contiguous():
            raise ValueError("the kernel reads and writes contiguous tensors only")
    blocks = max(triton.next_power_of_2(columns // width), _LEAST_BLOCKS)
    with torch.cuda.device_of(x):  # Triton launches on the current device, wherever the tensors lie
        _rotate_and_quantize[(triton.cdiv(rows, _ROWS),)](
            x,
            matrix,
            codes,
            scale,
            rows,
            columns,
            largest,
            smallest_scale,
            GELU=gelu,
            BLOCKS=blocks,
            WIDTH=width,
            ROWS=_ROWS,
            num_warps=16 if gelu or blocks > 64 else 8,
            num_stages=1,
            enable_fp_fusion=False,  # torch rounds each operation; Triton's default depends on its release
        )


@triton.jit
def _gelu(x: tl.tensor) -> tl.tensor:
    return x / (tl.exp((x + x * x * x * _CUBE) * _MINUS_TWO_ROOTS) + 1.0)


@triton.jit
def _rotate_and_quantize(
    x: tl.tensor,
    matrix: tl.tensor,
    codes: tl.tensor,
    scales: tl.tensor,
    rows: tl.tensor,
    columns: tl.tensor,
    largest: tl.tensor,
    smallest_scale: tl.tensor,
    GELU: tl.constexpr,
    BLOCKS: tl.constexpr,
    WIDTH: tl.constexpr,
    ROWS: tl.constexpr,
) -> None:
    column = tl.arange(0, WIDTH)[None, :]
    place = tl.arange(0, BLOCKS)[:, None] * WIDTH + column
    hadamard = tl.load(matrix + tl.arange(0, WIDTH)[:, None] * WIDTH + column)
    first = tl.program_id(0) * ROWS
    for row in range(first, tl.minimum(first + ROWS, rows)):
        start = tl.cast(columns, tl.int64) * row
        given = tl.load(x + start + place, mask=place < columns, other=0.0)
        if GELU:
            given = tl.max(_gelu(given.to(tl.float32))[None, :, :], axis=0).to(given.dtype)
        values = tl.dot(given, hadamard).to(given.dtype).to(tl.float32)
        # Correctly rounded division, as in torch: ties between codes must be rounded to the same side.
        scale = tl.maximum(tl.div_rn(tl.max(tl.max(tl.abs(values), axis=1), axis=0), largest), smallest_scale)
        # A maximum ignores NaN, but a row with NaN must not give plausible numbers. Only NaN differs from itself.
        unordered = (values != values).to(tl.int32)  # noqa: PLR0124
        scale = tl.where(tl.sum(tl.sum(unordered, axis=1), axis=0) > 0, float("nan"), scale)
        values = tl.div_rn(values, tl.zeros_like(values) + scale)
        values = tl.minimum(tl.maximum(values, -largest), largest)
        narrowed = ((values + _TO_INTEGER) - _TO_INTEGER).to(tl.int8)
        tl.store(codes + start + place, narrowed, mask=place < columns)
        tl.store(scales + row, scale)

"""Quantising rows in Triton: one pass, two bytes read and one written a number. Importing this needs triton.

In:   a float matrix. Out: 8-bit codes and a float32 scale a row, as `rowwise.quantize_rows` defines them.
It will never know: rotations, products, what the matrix is.
"""

from __future__ import annotations

from typing import Final

import torch
import triton
import triton.language as tl
from torch import Tensor

__all__ = ["launch"]

_LONGEST: Final = 1 << 15  # columns: a row stays in the registers of one program
# Adding 1.5 * 2**23 to a float32 of less than 2**22 leaves it rounded to an integer, ties to even.
_TO_INTEGER: Final = tl.constexpr(12582912.0)


def launch(x: Tensor, largest: float, smallest_scale: float, codes: Tensor, scale: Tensor) -> None:
    """Every row of `x` [M, K] float32|bfloat16|float16 by its own largest magnitude, into codes [M, K], scale [M, 1].

    codes int8, or float8_e4m3fn (compute capability 8.9 and later). All contiguous, on one device.
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
            codes,
            scale,
            columns,
            largest,
            smallest_scale,
            INTEGER=codes.dtype is torch.int8,
            BLOCK=block,
            num_warps=min(max(block // 1024, 1), 16),
        )


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
    # Divided as torch divides, correctly rounded: codes that lie on a tie must fall to the same side.
    scale = tl.maximum(tl.div_rn(tl.max(tl.abs(values), axis=0), largest), smallest_scale)
    # A maximum passes over NaN; the row must not come out as plausible numbers. A NaN alone differs from itself.
    unordered = values != values  # noqa: PLR0124
    scale = tl.where(tl.sum(unordered.to(tl.int32), axis=0) > 0, float("nan"), scale)
    values = tl.div_rn(values, tl.zeros_like(values) + scale)
    values = tl.minimum(tl.maximum(values, -largest), largest)
    if INTEGER:
        values = (values + _TO_INTEGER) - _TO_INTEGER
    tl.store(codes + row * columns + column, values.to(codes.dtype.element_ty), mask=inside)
    tl.store(scales + row, scale)

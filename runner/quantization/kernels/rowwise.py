"""Products of 8-bit rows: the precisions `fp8` and `int8`, the rotation that int8 needs, and the kernels for both.

In:   two matrices that share their inner dimension, one row an output channel or a token. Out: x w^T + bias.
Never: where a weight comes from, layers, names.

    fp8     float8_e4m3fn, a float32 scale a row: largest magnitude / 448         any channels
    int8    integers of -127..127, a float32 scale a row: largest magnitude / 127, after a rotation of both operands

A row of int8 has even steps, so that one channel thirty times as large as the rest leaves them no more than three bits.
Multiplying both operands by one orthogonal matrix leaves the product as it is and spreads such a channel over its
block: Sylvester's Hadamard matrix of up to 128, entries 1 and -1, whose factor is divided out of the weight's scales.
Every entry is exact in any dtype, and sums are made in float32.

`reference` defines both products: float32 sums of codes, times the scales, rounded once. The kernels are compared with
it before one is used (`low_bit.pick_gemm_backend`).
"""

from __future__ import annotations

from functools import cache
from importlib import import_module
from typing import Final, NamedTuple

import torch
from torch import Tensor

from runner.forecast.precisions import PRECISIONS

__all__ = [
    "ROTATION",
    "SMALLEST_SCALE",
    "Rows",
    "code_dtype",
    "comfy_kitchen",
    "hadamard",
    "int_mm",
    "quantize_rows",
    "reference",
    "rotate_rows",
    "rotation_size",
    "round_to_e4m3",
    "rowwise",
]

ROTATION: Final = 128
SMALLEST_SCALE: Final = 1e-30  # of a row of zeros: any scale will do that does not divide by zero
_INT_MM_ROWS: Final = 4096  # of a chunk: its int32 sums are 226 MB at 13,824 columns, the whole would be 1.9 GB
_INT_MM_LEAST_ROWS: Final = 32  # cuBLAS wants more than 16


class Rows(NamedTuple):
    """A matrix as codes [M, K] and one float32 scale a row [M, 1]: value = code * scale."""

    codes: Tensor
    scale: Tensor


def code_dtype(compute: str) -> torch.dtype:
    """Of the codes of `compute`, a row of `PRECISIONS`."""
    dtype: torch.dtype = getattr(torch, PRECISIONS[compute].dtype)
    return dtype


def quantize_rows(x: Tensor, compute: str) -> Rows:
    """`x` [M, K] floating, each row by its own largest magnitude; not rotated. Arithmetic that a compiler fuses.

    A row with a NaN gets a NaN scale: what comes of it is NaN, never a plausible number.
    """
    precision, dtype = PRECISIONS[compute], code_dtype(compute)
    # By a tensor on the device: CUDA multiplies by a rounded reciprocal when the divisor is a number, and no kernel
    # that divides would agree with that to the bit.
    largest = torch.full((), precision.largest, dtype=torch.float32, device=x.device)
    scale = (x.abs().amax(dim=-1, keepdim=True).float() / largest).clamp(min=SMALLEST_SCALE)
    # A float32 division may end a bit above the largest, which e4m3 would turn into NaN.
    values = (x.float() / scale).clamp(-precision.largest, precision.largest)
    if dtype is not torch.float8_e4m3fn:
        values = values.round()
    elif torch.compiler.is_compiling():
        # Triton 3.7 converts to e4m3 with a bias for compute capability 8.9 (see `rowwise_triton`), and a compiler uses
        # that conversion. It keeps values that e4m3 has.
        values = round_to_e4m3(values)
    return Rows(values.to(dtype), scale)


def round_to_e4m3(values: Tensor) -> Tensor:
    """The float8_e4m3fn numbers nearest to `values` (float32, at most 448 in magnitude, or NaN), ties to even: float32.

    Bit for bit what a conversion to float8_e4m3fn and back gives, by arithmetic that a compiler fuses.
    """
    # The exponents that e4m3 has for normal numbers, -6 to 8. Added to their bits: 1.5 * 2**20 times that power of two,
    # a number whose last bit is e4m3's step there. A sum with it is rounded to whole steps.
    exponent = (values.view(torch.int32) & 0x7F800000).clamp(121 << 23, 135 << 23)
    steps = (exponent + ((20 << 23) | (1 << 22))).view(torch.float32)
    return torch.copysign((values.abs() + steps) - steps, values)


@cache
def hadamard(size: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """Sylvester's matrix H [size, size] of 1 and -1, symmetric, H H = size I. ValueError where there is none."""
    if size < 1 or size & (size - 1):
        raise ValueError(f"no Hadamard matrix of Sylvester's has {size} rows")
    with torch.inference_mode(False):  # it outlives the call
        matrix = torch.ones(1, 1)
        while matrix.shape[0] < size:
            matrix = torch.cat([torch.cat([matrix, matrix], 1), torch.cat([matrix, -matrix], 1)], 0)
        return matrix.to(device, dtype)


def rotation_size(columns: int) -> int:
    """Size of the blocks in which `columns` are rotated: the largest power of two that divides them, 128 at most."""
    return min(columns & -columns, ROTATION)


def rotate_rows(x: Tensor) -> Tensor:
    """`x` [M, K] with each block of `rotation_size(K)` columns times H, summed in float32, rounded to its dtype.

    Larger than `x` by the root of the block; the product of two rotated operands is the block's size too large.
    """
    block = rotation_size(x.shape[-1])
    rotated = torch.mm(x.reshape(-1, block), hadamard(block, x.dtype, x.device))
    return rotated.view(x.shape)


def reference(x: Rows, w: Rows, bias: Tensor | None, dtype: torch.dtype) -> Tensor:
    """The definition: [M, N] = sum of codes in float32, times both scales, plus bias, rounded to `dtype`. Any device.

    It computes in float32 whatever the codes are: slower than a product in 16 bits.
    """
    result = (x.codes.float() @ w.codes.float().T) * x.scale * w.scale.T
    return (result if bias is None else result + bias.float()).to(dtype)


def rowwise(x: Rows, w: Rows, bias: Tensor | None, dtype: torch.dtype) -> Tensor:
    """`torch._scaled_mm` with a scale a row on both sides (CUTLASS or cuBLASLt): e4m3 alone, result in bfloat16.

    K and N multiples of 16. Fast accumulation on Hopper alone, where sums are otherwise promoted every few steps at a
    cost of about a third of the speed; its rounding lies far below that of the codes.
    """
    hopper = x.codes.is_cuda and torch.cuda.get_device_capability(x.codes.device)[0] == 9
    result = torch._scaled_mm(
        x.codes,
        w.codes.t(),
        scale_a=x.scale,
        scale_b=w.scale.t(),
        bias=None if bias is None else bias.to(torch.bfloat16),
        out_dtype=torch.bfloat16,
        use_fast_accum=hopper,
    )
    return result.to(dtype)


def int_mm(x: Rows, w: Rows, bias: Tensor | None, dtype: torch.dtype) -> Tensor:
    """`torch._int_mm` (cuBLAS), exact sums in int32, a chunk of tokens at a time; K and N multiples of 8.

    The sums go through memory once: 4 bytes written and read for an output of 2.
    """
    tokens, outputs = x.codes.shape[0], w.codes.shape[0]
    result = torch.empty(tokens, outputs, dtype=dtype, device=x.codes.device)
    for start in range(0, tokens, _INT_MM_ROWS):
        codes = x.codes[start : start + _INT_MM_ROWS]
        count = codes.shape[0]
        if count < _INT_MM_LEAST_ROWS:
            codes = torch.cat([codes, codes.new_zeros(_INT_MM_LEAST_ROWS - count, codes.shape[1])])
        # Each pass over the sums goes through memory: 22 bytes an output, where one operation at a time takes 38.
        scaled = torch.mul(torch._int_mm(codes, w.codes.t())[:count], x.scale[start : start + count])
        part = result[start : start + count]
        if bias is None:
            torch.mul(scaled, w.scale.t(), out=part)
        else:
            torch.add(scaled.mul_(w.scale.t()), bias.float(), out=part)
    return result


def comfy_kitchen(x: Rows, w: Rows, bias: Tensor | None, dtype: torch.dtype) -> Tensor:
    """comfy-kitchen's int8 product, which scales its sums and adds the bias before it writes them.

    Its public `int8_linear` takes no codes: it quantises activations in each call, dividing in bfloat16. This is the
    kernel that it calls then, by a function of the package's own that its INT4 layer uses. ImportError or
    AttributeError where the installed release has none (0.2.40 has).
    """
    multiply = import_module("comfy_kitchen.backends.cuda")._int4_linear_via_int8_values
    bias = None if bias is None else bias.to(dtype)
    result: Tensor = multiply(x.codes, w.codes, x.scale, w.scale, bias, dtype)
    return result

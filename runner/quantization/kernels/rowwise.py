"""Rowwise products: the 8-bit precisions `fp8` and `int8` with one scale per row, and their GEMM backends.

In:   two matrices that share their inner dimension. A row of activations is a token, a row of a weight an output
      channel: scaling is per token and per channel. Out: x w^T + bias.
Never: the source of a weight, layers, names.

    fp8     float8_e4m3fn, one float32 scale per row: largest magnitude / 448     any channels
    int8    integers of -127..127, one float32 scale per row: largest magnitude / 127, after rotating both operands

Int8 has even steps: one channel thirty times as large as the others leaves them only three bits. Multiplying both
operands by one orthogonal matrix does not change the product and spreads such a channel over its block. The matrix is
Sylvester's Hadamard matrix of up to 128, entries 1 and -1; its factor is divided out of the weight's scales. Every
entry is exact in any dtype, and sums are in float32.

`reference` defines both products: float32 sums of codes, times the scales, rounded once. A backend is compared with it
before use (`low_bit.pick_gemm_backend`).
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
SMALLEST_SCALE: Final = 1e-30  # of a row of zeros, for which any scale above zero is right
_INT_MM_ROWS: Final = 4096  # of a chunk: its int32 sums are 226 MB at 13,824 columns; for all rows they are 1.9 GB
_INT_MM_LEAST_ROWS: Final = 32  # cuBLAS needs more than 16


class Rows(NamedTuple):
    """A matrix as codes [M, K] and one float32 scale per row (per token or output channel) [M, 1].

    value = code * scale
    """

    codes: Tensor
    scale: Tensor


def code_dtype(compute: str) -> torch.dtype:
    """The dtype of codes of `compute`, a row of `PRECISIONS`."""
    dtype: torch.dtype = getattr(torch, PRECISIONS[compute].dtype)
    return dtype


def quantize_rows(x: Tensor, compute: str) -> Rows:
    """Quantise a floating `x` [M, K], each row by its own largest magnitude, without rotation. A compiler can fuse it.

    A row with a NaN gets a NaN scale, so that its results are NaN, never plausible numbers.
    """
    precision, dtype = PRECISIONS[compute], code_dtype(compute)
    # Divide by a tensor on the device: for a Python number CUDA multiplies by a rounded reciprocal, which gives other
    # bits than a kernel that divides.
    largest = torch.full((), precision.largest, dtype=torch.float32, device=x.device)
    scale = (x.abs().amax(dim=-1, keepdim=True).float() / largest).clamp(min=SMALLEST_SCALE)
    # A float32 division may give a bit more than the largest, which e4m3 would convert to NaN.
    values = (x.float() / scale).clamp(-precision.largest, precision.largest)
    if dtype is not torch.float8_e4m3fn:
        values = values.round()
    elif torch.compiler.is_compiling():
        # A compiler uses Triton's conversion to e4m3, which in Triton 3.7 is biased for compute capability 8.9 (see
        # `rowwise_triton`). It does not change values that e4m3 has.
        values = round_to_e4m3(values)
    return Rows(values.to(dtype), scale)


def round_to_e4m3(values: Tensor) -> Tensor:
    """The float8_e4m3fn numbers nearest to `values` (float32, at most 448 in magnitude, or NaN), ties to even: float32.

    Gives the bits of a conversion to float8_e4m3fn and back, by arithmetic that a compiler can fuse.
    """
    # e4m3's normal numbers have exponents -6 to 8. `steps` is 1.5 * 2**20 times the power of two of a value; its last
    # bit is e4m3's step there, so that a sum with it is rounded to whole steps.
    exponent = (values.view(torch.int32) & 0x7F800000).clamp(121 << 23, 135 << 23)
    steps = (exponent + ((20 << 23) | (1 << 22))).view(torch.float32)
    return torch.copysign((values.abs() + steps) - steps, values)


@cache
def hadamard(size: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """Sylvester's matrix H [size, size] of 1 and -1, symmetric, H H = size I. ValueError unless a power of two."""
    if size < 1 or size & (size - 1):
        raise ValueError(f"no Hadamard matrix of Sylvester's has {size} rows")
    with torch.inference_mode(False):  # the cached matrix may later be used outside inference mode
        matrix = torch.ones(1, 1)
        while matrix.shape[0] < size:
            matrix = torch.cat([torch.cat([matrix, matrix], 1), torch.cat([matrix, -matrix], 1)], 0)
        return matrix.to(device, dtype)


def rotation_size(columns: int) -> int:
    """Size of the blocks in which `columns` are rotated: the largest power of two that divides them, 128 at most."""
    return min(columns & -columns, ROTATION)


def rotate_rows(x: Tensor) -> Tensor:
    """`x` [M, K] with each block of `rotation_size(K)` columns times H, summed in float32, rounded to its dtype.

    The result is larger than `x` by the square root of the block size; a product of two rotated operands is larger by
    the block size.
    """
    block = rotation_size(x.shape[-1])
    rotated = torch.mm(x.reshape(-1, block), hadamard(block, x.dtype, x.device))
    return rotated.view(x.shape)


def reference(x: Rows, w: Rows, bias: Tensor | None, dtype: torch.dtype) -> Tensor:
    """The definition: [M, N] = sum of codes in float32, times both scales, plus bias, rounded to `dtype`. Any device.

    It computes in float32, and is slower than a product in 16 bits.
    """
    result = (x.codes.float() @ w.codes.float().T) * x.scale * w.scale.T
    return (result if bias is None else result + bias.float()).to(dtype)


def rowwise(x: Rows, w: Rows, bias: Tensor | None, dtype: torch.dtype) -> Tensor:
    """`torch._scaled_mm` with per-token and per-channel scales (CUTLASS or cuBLASLt): only e4m3, result in bfloat16.

    K and N multiples of 16. Fast accumulation only on Hopper, where sums are otherwise promoted every few steps, which
    costs about a third of the speed. Its rounding error is far smaller than that of the codes.
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
        # Each pass over the sums goes through memory: 22 bytes an output; separate operations would take 38.
        scaled = torch.mul(torch._int_mm(codes, w.codes.t())[:count], x.scale[start : start + count])
        part = result[start : start + count]
        if bias is None:
            torch.mul(scaled, w.scale.t(), out=part)
        else:
            torch.add(scaled.mul_(w.scale.t()), bias.float(), out=part)
    return result


def comfy_kitchen(x: Rows, w: Rows, bias: Tensor | None, dtype: torch.dtype) -> Tensor:
    """comfy-kitchen's int8 product, which scales its sums and adds the bias before it writes them.

    Its public `int8_linear` takes no codes: it quantises activations in each call, dividing in bfloat16. So this calls
    the kernel behind it, by a private function of the package's INT4 layer. Raises ImportError or AttributeError where
    the installed release lacks it (0.2.40 has it).
    """
    multiply = import_module("comfy_kitchen.backends.cuda")._int4_linear_via_int8_values
    bias = None if bias is None else bias.to(dtype)
    result: Tensor = multiply(x.codes, w.codes, x.scale, w.scale, bias, dtype)
    return result

"""Linear layers that compute in 8 or 4 bits: the choice of a GEMM backend for a device, and the operators.

In:   activations, a weight in 16 bits or its stored tensors, the name of a precision and of one of its GEMM backends.
Out:  x W^T + b. Never: layers' names, recipes, whether an error is small enough for frames (`generation.compute`).

`forecast/precisions.py` lists the precisions and their backends. The backend `reference` is the definition of a
precision in plain arithmetic, for any device, and slow.

An activation is quantised before the operators, once for all layers that read it alike (`prepared.py`).
The 8-bit codes of a weight are made again for each product, unless they are kept (`kept_codes.py`). Bytes a weight:
dequantising reads .56 and writes 2; rotating (int8) and quantising, in one pass, reads 2 and writes 1; the product
reads 1. The 12.4 billion weights of token-wise linears take 81 GB of memory traffic a step, 12.4 GB where codes are
kept: .02 s on an H200, .05 s on an RTX 5090, where the step itself takes seconds. NVFP4 takes .13 byte a weight, for
its scales.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import cache
from importlib import import_module
from typing import Any, Final

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from runner.forecast.precisions import PRECISIONS, REFERENCE
from runner.quantization.formats.svdq import pad
from runner.quantization.formats.svdq_layout import SVDQ_LAYOUTS
from runner.quantization.kernels import nvfp4, svdq_products
from runner.quantization.kernels.kept_codes import KeepsCodes
from runner.quantization.kernels.prepared import Prepared, prepared_for
from runner.quantization.kernels.row_codes import error_text, fast_rotated_rows, fast_rows, prepare_rows, probe_matrix
from runner.quantization.kernels.rowwise import Rows, code_dtype, rotation_size
from runner.quantization.kernels.svdq_order import TILES, join_factors, reorder
from runner.quantization.kernels.workspace import workspace

__all__ = [
    "EXACT",
    "LowBitLinear",
    "add_biases",
    "kept_rows_linear",
    "multiply_blocks",
    "multiply_rows",
    "multiply_svdq",
    "pick_gemm_backend",
    "relative_error",
    "weight_rows",
]

EXACT: Final = "exact"  # the weight in 16 bits, or in the dtype of the activations


def run_backend(compute: str, backend: str, *operands: Any) -> Tensor:
    """Multiply `operands` by the GEMM backend of this name.

    Raises ValueError where the precision has no such backend; ImportError or AttributeError where its function is
    missing.
    """
    row = PRECISIONS[compute].find_backend(backend)
    if row is None:
        raise ValueError(f"no backend {backend!r} for {compute!r}")
    module, _, name = row.function.partition(":")
    result: Tensor = getattr(import_module(module), name)(*operands)
    return result


def weight_rows(weight: Tensor, compute: str, codes: Tensor | None = None) -> Rows:
    """Quantise a floating weight [N, K] with one scale per row (per output channel), rotated where the precision is.

    Codes are written into `codes` where given, else into memory shared between layers.
    """
    if codes is None:
        codes = workspace("codes", (weight.shape[0], weight.shape[1]), code_dtype(compute), weight.device)
    if not PRECISIONS[compute].rotated:
        return fast_rows(weight, compute, codes)
    rows = fast_rotated_rows(weight, compute, codes)
    return Rows(rows.codes, rows.scale / rotation_size(weight.shape[1]))


def multiply_rows(
    x: Tensor,
    x_scale: Tensor,
    weight: Tensor,
    compute: str,
    backend: str,
    bias: Tensor | None,
    dtype: torch.dtype,
) -> Tensor:
    """Multiply [M, K] of `prepare_rows` by a weight [N, K] in 16 or 32 bits: [M, N] in `dtype`."""
    return multiply_codes(x, x_scale, weight_rows(weight, compute), compute, backend, bias, dtype)


def multiply_codes(
    x: Tensor, x_scale: Tensor, w: Rows, compute: str, backend: str, bias: Tensor | None, dtype: torch.dtype
) -> Tensor:
    """Multiply [M, K] of `prepare_rows` by the codes of `weight_rows`: [M, N] in `dtype`."""
    return run_backend(compute, backend, Rows(x, x_scale), w, bias, dtype)


def add_biases(bias: Tensor | None, delta: Tensor | None) -> Tensor | None:
    """The sum of a layer's bias and its delta, in float32 where both exist; None where neither exists."""
    if bias is not None and delta is not None:
        return bias.float() + delta
    return delta if bias is None else bias


def multiply_blocks(
    x: nvfp4.Blocks, w: nvfp4.Blocks, compute: str, backend: str, bias: Tensor | None, dtype: torch.dtype
) -> Tensor:
    """[M, N] in `dtype`. The bias is added after the product is rounded, as the kernel with two scales takes none."""
    result = run_backend(compute, backend, x, w, dtype)
    return result if bias is None else result.add_(bias.to(dtype))


def multiply_svdq(
    x: Tensor,
    tensors: Mapping[str, Tensor],
    fmt: str,
    backend: str,
    out_features: int,
    bias: Tensor | None,
    lora_down: Tensor | None = None,
    lora_up: Tensor | None = None,
) -> Tensor:
    """Multiply [M, in] by stored tensors in SVDQ `fmt`, in the order of `backend`: [M, out_features] in x's dtype.

    A LoRA's factors, [R, in] and [out, R] in plain order, are joined to the layer's factors. Where the sum of ranks is
    more than kernels take, two separate products compute the LoRA.
    """
    wide = pad(x, (x.shape[0], tensors["qweight"].shape[1] * 2))
    beside = None
    if lora_down is not None and lora_up is not None:
        if lora_down.shape[0] + tensors["proj_down"].shape[1] > svdq_products.MOST_JOINED:
            beside = F.linear(F.linear(x, lora_down.to(x.dtype)), lora_up.to(x.dtype))
        else:
            tensors = join_factors(tensors, svdq_products.ORDERS[backend], lora_down, lora_up)
    result = run_backend(fmt, backend, wide, tensors, SVDQ_LAYOUTS[fmt], out_features, bias)
    return result.contiguous() if beside is None else result + beside


@cache
def pick_gemm_backend(device: torch.device, compute: str) -> tuple[str | None, str]:
    """Return (a GEMM backend of `compute` that is right on `device`, why this one), or (None, the problem of each).

    Each backend multiplies [80, 256] by [256, 128] and is compared with the reference on the same operands.
    """
    if device.type == "cpu":
        problem = _check_backend(REFERENCE, compute, device)
        if problem is None:
            return REFERENCE, "a CPU runs the format's definition, which is slower than 16 bits"
        return None, f"{REFERENCE} refused: {problem}"
    refused: list[str] = []
    for row in PRECISIONS[compute].backends:
        problem = _check_backend(row.name, compute, device)
        if problem is None:
            return row.name, "; ".join([f"{row.name} agrees with the definition on {device}", *refused])
        refused.append(f"{row.name} refused: {problem}")
    return None, "; ".join(refused)


def _check_backend(name: str, compute: str, device: torch.device) -> str | None:
    x, weight = probe_matrix(80, 256, device), probe_matrix(128, 256, device, seed=1)
    bias, allowed = weight[:, 0].contiguous(), PRECISIONS[compute].agreement
    try:
        found = _try_backend(name, compute, x, weight, bias)
    # A driver, a missing package or an unsupported device may raise anything: the next backend is tried.
    except Exception as err:
        return error_text(err)
    defined = _try_backend(REFERENCE, compute, x, weight, bias)
    off = relative_error(found, defined)
    return None if off <= allowed else f"off by {off:.3g} of the definition's result, {allowed} allowed"


def _try_backend(name: str, compute: str, x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    if PRECISIONS[compute].layout == "svdq":
        layout, order = SVDQ_LAYOUTS[compute], svdq_products.ORDERS[name]
        stored = svdq_products.probe_tensors(layout, x.device)
        if order != TILES:
            stored = {suffix: reorder(suffix, tensor, layout.precision, order) for suffix, tensor in stored.items()}
        return multiply_svdq(x, stored, compute, name, weight.shape[0], bias)
    if PRECISIONS[compute].layout == "blocks":
        blocks = nvfp4.quantize_blocks
        return multiply_blocks(blocks(x), blocks(weight), compute, name, bias, x.dtype)
    return multiply_rows(*prepare_rows(x, compute), weight, compute, name, bias, x.dtype)


def relative_error(found: Tensor, expected: Tensor) -> float:
    """||found - expected|| / ||expected||; infinite where anything is not finite."""
    off = (found.double() - expected.double()).norm() / expected.double().norm()
    return float(off) if bool(torch.isfinite(off)) else float("inf")


@torch.library.custom_op("video_lab::rowwise_linear", mutates_args=())
def rowwise_linear(
    x: Tensor,
    x_scale: Tensor,
    weight: Tensor,
    compute: str,
    backend: str,
    bias: Tensor | None,
    dtype: torch.dtype,
) -> Tensor:
    """`multiply_rows` as one operator: the weight's codes are in shared memory only until the product is enqueued."""
    return multiply_rows(x, x_scale, weight, compute, backend, bias, dtype)


@rowwise_linear.register_fake
def _(
    x: Tensor,
    x_scale: Tensor,
    weight: Tensor,
    compute: str,
    backend: str,
    bias: Tensor | None,
    dtype: torch.dtype,
) -> Tensor:
    return x.new_empty(x.shape[0], weight.shape[0], dtype=dtype)


@torch.library.custom_op("video_lab::kept_rows_linear", mutates_args=())
def kept_rows_linear(
    x: Tensor,
    x_scale: Tensor,
    codes: Tensor,
    scale: Tensor,
    compute: str,
    backend: str,
    bias: Tensor | None,
    bias_delta: Tensor | None,
    dtype: torch.dtype,
) -> Tensor:
    """Multiply x, x_scale of `prepare_rows` by a weight's kept codes [N, K] and scales [N, 1]: [M, N] in `dtype`."""
    bias = add_biases(bias, bias_delta)
    return multiply_codes(x, x_scale, Rows(codes, scale), compute, backend, bias, dtype)


@kept_rows_linear.register_fake
def _(
    x: Tensor,
    x_scale: Tensor,
    codes: Tensor,
    scale: Tensor,
    compute: str,
    backend: str,
    bias: Tensor | None,
    bias_delta: Tensor | None,
    dtype: torch.dtype,
) -> Tensor:
    return x.new_empty(x.shape[0], codes.shape[0], dtype=dtype)


class LowBitLinear(KeepsCodes, nn.Linear):
    """A linear layer that keeps its weight in 16 or 32 bits and multiplies in 8 bits. For inference.

    weight [out, in], bias [out] or None: the parameters of the replaced layer themselves, so that changes in place (a
    LoRA) take effect. `compute`: a precision with one scale per row; `backend`: one of its GEMM backends.
    """

    def __init__(self, linear: nn.Linear, compute: str, backend: str) -> None:
        KeepsCodes.__init__(self)
        self.in_features, self.out_features = linear.in_features, linear.out_features
        self.weight, self.bias = linear.weight, linear.bias
        self.compute = EXACT
        self.set_compute(compute, backend)
        self.train(linear.training)

    def set_compute(self, compute: str, backend: str = "") -> None:
        """As `FP4Linear.set_compute`; a precision in blocks is refused, as it needs a weight stored in blocks."""
        precision = PRECISIONS.get(compute)
        rows = precision is not None and precision.layout == "rows" and precision.find_backend(backend) is not None
        if compute != EXACT and not rows:
            raise ValueError(f"a weight in 16 bits has no backend {backend!r} for {compute!r}")
        if compute != self.compute:
            self.drop_codes()
        self.compute, self.backend = compute, backend

    @property
    def computes_in_rows(self) -> bool:
        return self.compute != EXACT

    def _code_sources(self) -> Sequence[Tensor | None]:
        return (self.weight,)

    def _make_codes(self, dtype: torch.dtype, codes: Tensor) -> Rows:
        return weight_rows(self.weight, self.compute, codes)

    def forward(self, x: Tensor | Prepared) -> Tensor:
        """x [..., in], or what `prepare` made of it → [..., out] of the same dtype."""
        if self.compute == EXACT and isinstance(x, Tensor):
            return nn.Linear.forward(self, x)
        given = prepared_for(self, x)
        codes, scale = given.operands
        kept, how = self.codes_for(given.dtype), (self.compute, self.backend)
        result: Any
        if kept is None:
            result = rowwise_linear(codes, scale, self.weight, *how, self.bias, given.dtype)
        else:
            result = kept_rows_linear(codes, scale, *kept, *how, self.bias, None, given.dtype)
        return result.view(*given.sizes, self.out_features)

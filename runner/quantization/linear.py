"""A linear layer whose weight stays in four bits.

In:   activations. Out: activations in their dtype. The weight exists in 16 bits only during one matrix product, in a
      workspace that all layers share. LoRAs are kept beside the weight, and added to its 16-bit copy and to the bias.
      The layer multiplies in 16 bits, or in fewer after `set_compute` (`kernels/low_bit.py`). In 8 bits it may keep its
      weight's codes (`kernels/kept_codes.py`).
Never: names of layers (the caller's rule reads them), files, LoRA file formats.

For inference: the operator has no gradient, since the 16-bit weight no longer exists in a backward pass.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Self

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from runner.forecast.precisions import PRECISIONS
from runner.quantization.added_deltas import LowRankDelta, check_bias_delta, frozen, join_deltas
from runner.quantization.formats.e2m1 import Format
from runner.quantization.formats.scales import Method, quantize
from runner.quantization.kernels.dequantize import dequantize_into
from runner.quantization.kernels.kept_codes import KeepsCodes
from runner.quantization.kernels.low_bit import (
    EXACT,
    add_biases,
    kept_rows_linear,
    multiply_blocks,
    multiply_rows,
    weight_rows,
)
from runner.quantization.kernels.nvfp4 import Blocks
from runner.quantization.kernels.prepared import Prepared, prepared_for
from runner.quantization.kernels.rowwise import Rows
from runner.quantization.kernels.workspace import release_workspace, workspace, workspace_bytes

__all__ = ["FP4Linear", "fp4_linear", "release_workspace", "workspace_bytes"]


@torch.library.custom_op("video_lab::fp4_linear", mutates_args=())
def fp4_linear(
    x: Tensor,
    packed: Tensor,
    scale: Tensor,
    tensor_scale: Tensor | None,
    fmt: str,
    bias: Tensor | None,
    bias_delta: Tensor | None,
    lora_down: Tensor | None,
    lora_up: Tensor | None,
    lora_scale: Tensor | None,
) -> Tensor:
    """x [..., in] → [..., out] in x's dtype, by the weight in `packed` and its scales, a format in FORMATS.

    One operator makes the weight and multiplies: a compiler may move two operators apart, and two weights would then
    need the workspace at once. lora_up [out, R] * lora_scale [R] @ lora_down [R, in] is added to the weight.
    """
    weight = _dense(packed, scale, tensor_scale, fmt, lora_down, lora_up, lora_scale, x.dtype)
    bias = add_biases(bias, bias_delta)
    return F.linear(x, weight, None if bias is None else bias.to(x.dtype))


@fp4_linear.register_fake
def _(
    x: Tensor,
    packed: Tensor,
    scale: Tensor,
    tensor_scale: Tensor | None,
    fmt: str,
    bias: Tensor | None,
    bias_delta: Tensor | None,
    lora_down: Tensor | None,
    lora_up: Tensor | None,
    lora_scale: Tensor | None,
) -> Tensor:
    torch._check(x.shape[-1] == packed.shape[1] * 2)
    return x.new_empty(*x.shape[:-1], packed.shape[0])


def _dense(
    packed: Tensor,
    scale: Tensor,
    tensor_scale: Tensor | None,
    fmt: str,
    lora_down: Tensor | None,
    lora_up: Tensor | None,
    lora_scale: Tensor | None,
    dtype: torch.dtype,
) -> Tensor:
    """Write the weight [out, in] in `dtype` with its LoRAs into the workspace."""
    weight = workspace("weight", (packed.shape[0], packed.shape[1] * 2), dtype, packed.device)
    dequantize_into(packed, scale, tensor_scale, fmt, weight)
    if lora_down is not None and lora_up is not None and lora_scale is not None:
        weight.addmm_((lora_up.float() * lora_scale).to(dtype), lora_down.to(dtype))
    return weight


@torch.library.custom_op("video_lab::fp4_rowwise_linear", mutates_args=())
def fp4_rowwise_linear(
    x: Tensor,
    x_scale: Tensor,
    packed: Tensor,
    scale: Tensor,
    tensor_scale: Tensor | None,
    fmt: str,
    bias: Tensor | None,
    bias_delta: Tensor | None,
    lora_down: Tensor | None,
    lora_up: Tensor | None,
    lora_scale: Tensor | None,
    compute: str,
    backend: str,
    dtype: torch.dtype,
) -> Tensor:
    """As `fp4_linear`, in 8 bits: x, x_scale of `row_codes.prepare_rows` → [M, out] in `dtype`.

    The weight and its LoRAs are summed in 16 bits, and the sum is rounded to 8.
    """
    weight = _dense(packed, scale, tensor_scale, fmt, lora_down, lora_up, lora_scale, dtype)
    return multiply_rows(x, x_scale, weight, compute, backend, add_biases(bias, bias_delta), dtype)


@fp4_rowwise_linear.register_fake
def _(
    x: Tensor,
    x_scale: Tensor,
    packed: Tensor,
    scale: Tensor,
    tensor_scale: Tensor | None,
    fmt: str,
    bias: Tensor | None,
    bias_delta: Tensor | None,
    lora_down: Tensor | None,
    lora_up: Tensor | None,
    lora_scale: Tensor | None,
    compute: str,
    backend: str,
    dtype: torch.dtype,
) -> Tensor:
    return x.new_empty(x.shape[0], packed.shape[0], dtype=dtype)


@torch.library.custom_op("video_lab::nvfp4_linear", mutates_args=())
def nvfp4_linear(
    x_packed: Tensor,
    x_scale: Tensor,
    x_tensor_scale: Tensor,
    packed: Tensor,
    scale: Tensor,
    tensor_scale: Tensor,
    bias: Tensor | None,
    bias_delta: Tensor | None,
    compute: str,
    backend: str,
    dtype: torch.dtype,
) -> Tensor:
    """Multiply two operands in NVFP4's blocks, the weight as stored: [M, out] in `dtype`."""
    x, w = Blocks(x_packed, x_scale, x_tensor_scale), Blocks(packed, scale, tensor_scale)
    return multiply_blocks(x, w, compute, backend, add_biases(bias, bias_delta), dtype)


@nvfp4_linear.register_fake
def _(
    x_packed: Tensor,
    x_scale: Tensor,
    x_tensor_scale: Tensor,
    packed: Tensor,
    scale: Tensor,
    tensor_scale: Tensor,
    bias: Tensor | None,
    bias_delta: Tensor | None,
    compute: str,
    backend: str,
    dtype: torch.dtype,
) -> Tensor:
    return x_packed.new_empty(x_packed.shape[0], packed.shape[0], dtype=dtype)


class FP4Linear(KeepsCodes):
    """y = x W^T + b with W in `fmt`. Its parameters take no gradient:

    weight_packed, weight_scale, weight_scale_2    as `Format.tensors` lists them; their dtypes survive `.to(dtype)`
    bias                                           float [out], or None
    bias_delta                                     float [out], or None: `set_bias_delta`
    lora_down, lora_up, lora_scale                 [R, in], [out, R], float32 [R], or None: `set_lora`; R sums the ranks

    Parameters and not buffers, because streamed offload brings only parameters back to the host.
    """

    weight_packed: nn.Parameter
    weight_scale: nn.Parameter
    weight_scale_2: nn.Parameter | None
    bias: nn.Parameter | None
    bias_delta: nn.Parameter | None
    lora_down: nn.Parameter | None
    lora_up: nn.Parameter | None
    lora_scale: nn.Parameter | None

    def __init__(self, tensors: dict[str, Tensor], bias: Tensor | None, fmt: Format) -> None:
        """Keep stored tensors, without a copy. Raises ValueError where they do not fit the format."""
        super().__init__()
        self.fmt = fmt
        self.compute, self.backend = EXACT, ""
        self.lora_rank = 0
        self.out_features, self.in_features = fmt.weight_shape(tensors)
        # Floating ones first: models use the dtype of a module's first parameter for arithmetic.
        self.register_parameter("bias", None if bias is None else frozen(bias))
        for name in sorted(tensors, key=lambda name: not tensors[name].is_floating_point()):
            self.register_parameter(name, frozen(tensors[name]))
        for name in ("weight_scale_2", "bias_delta", "lora_down", "lora_up", "lora_scale"):
            if name not in tensors:
                self.register_parameter(name, None)

    @classmethod
    def from_linear(
        cls, linear: nn.Linear, fmt: Format, method: Method = "mse", importance: Tensor | None = None
    ) -> Self:
        """Quantise `linear` on its device; see `scales.quantize`. The bias is copied unchanged."""
        bias = None if linear.bias is None else linear.bias.detach().clone()
        return cls(quantize(linear.weight, fmt, method, importance), bias, fmt)

    @classmethod
    def empty(
        cls,
        in_features: int,
        out_features: int,
        bias: bool,
        fmt: Format,
        device: torch.device | str = "meta",
        bias_dtype: torch.dtype = torch.bfloat16,
    ) -> Self:
        """An empty layer for `load_state_dict(..., assign=True)`: shapes and dtypes, no values."""
        tensors = {
            name: torch.empty(shape, dtype=dtype, device=device)
            for name, (shape, dtype) in fmt.tensors(out_features, in_features).items()
        }
        return cls(tensors, torch.empty(out_features, dtype=bias_dtype, device=device) if bias else None, fmt)

    @property
    def weight(self) -> nn.Parameter:
        """The packed weight, for code that reads the device of a linear's weight, or whether it is floating."""
        return self.weight_packed

    @property
    def stored(self) -> dict[str, Tensor]:
        """The stored tensors by their names in the format; no copies."""
        return {name: self.get_parameter(name) for name in self.fmt.tensors(self.out_features, self.in_features)}

    def forward(self, x: Tensor | Prepared) -> Tensor:
        """x [..., in], float32|bfloat16|float16, or the result of `prepare` → [..., out] of the same dtype.

        Raises ValueError for an input that was prepared for another compute than the layer's.
        """
        if self.compute != EXACT or isinstance(x, Prepared):
            prepared = prepared_for(self, x)
            in_blocks = PRECISIONS[self.compute].layout == "blocks"
            low = self._multiply_blocks(prepared) if in_blocks else self._multiply_rows(prepared)
            return low.view(*prepared.sizes, self.out_features)
        result: Tensor = fp4_linear(
            x,
            self.weight_packed,
            self.weight_scale,
            self.weight_scale_2,
            self.fmt.name,
            self.bias,
            self.bias_delta,
            self.lora_down,
            self.lora_up,
            self.lora_scale,
        )
        return result

    def _multiply_rows(self, x: Prepared) -> Tensor:
        """Multiply in 8 bits, with one scale per row (per token and per output channel)."""
        codes, scale = x.operands
        kept, how = self.codes_for(x.dtype), (self.compute, self.backend)
        result: Tensor
        if kept is not None:
            result = kept_rows_linear(codes, scale, *kept, *how, self.bias, self.bias_delta, x.dtype)
            return result
        result = fp4_rowwise_linear(
            codes,
            scale,
            self.weight_packed,
            self.weight_scale,
            self.weight_scale_2,
            self.fmt.name,
            self.bias,
            self.bias_delta,
            self.lora_down,
            self.lora_up,
            self.lora_scale,
            *how,
            x.dtype,
        )
        return result

    def _multiply_blocks(self, x: Prepared) -> Tensor:
        """Multiply in NVFP4. LoRAs are computed apart, in the dtype of `x`: added to four bits they would be lost."""
        result: Tensor = nvfp4_linear(
            *x.operands,
            self.weight_packed,
            self.weight_scale,
            self.weight_scale_2,
            self.bias,
            self.bias_delta,
            self.compute,
            self.backend,
            x.dtype,
        )
        if x.x is None or self.lora_down is None or self.lora_up is None or self.lora_scale is None:
            return result
        up = (self.lora_up.float() * self.lora_scale).to(x.dtype)
        return result + F.linear(F.linear(x.x, self.lora_down.to(x.dtype)), up)

    def set_compute(self, compute: str, backend: str = "") -> None:
        """Compute in `compute` (a row of `PRECISIONS`) by `backend` (one of its GEMM backends); EXACT: in 16 bits.

        The stored weight does not change. Raises ValueError for unknown names, and for nvfp4 where it is stored in g32.
        """
        if compute != EXACT:
            precision = PRECISIONS.get(compute)
            if precision is None or precision.find_backend(backend) is None:
                raise ValueError(f"no backend {backend!r} for {compute!r}")
            if precision.stored_format not in (None, self.fmt.name):
                raise ValueError(f"a weight in {self.fmt.name} cannot compute as {compute}")
        if compute != self.compute:
            self.drop_codes()
        self.compute, self.backend = compute, backend

    @property
    def computes_in_rows(self) -> bool:
        return self.compute != EXACT and PRECISIONS[self.compute].layout == "rows"

    def _code_sources(self) -> Sequence[Tensor | None]:
        lora = self.lora_down, self.lora_up, self.lora_scale
        return (self.weight_packed, self.weight_scale, self.weight_scale_2, *lora)

    def _make_codes(self, dtype: torch.dtype, codes: Tensor) -> Rows:
        stored = self.weight_packed, self.weight_scale, self.weight_scale_2
        weight = _dense(*stored, self.fmt.name, self.lora_down, self.lora_up, self.lora_scale, dtype)
        return weight_rows(weight, self.compute, codes)

    def set_lora(self, deltas: Sequence[LowRankDelta] | None) -> None:
        """Add every scale * up @ down to the weight, instead of those set before; None removes them.

        The stored weight does not change: without LoRAs the layer gives the same bits as before. The factors keep their
        dtype and move to the layer's device. Raises ValueError for shapes that do not fit.
        """
        self.drop_codes()
        if not deltas:
            self.lora_down = self.lora_up = self.lora_scale = None
            self.lora_rank = 0
            return
        down, up, scale = join_deltas(deltas, self.in_features, self.out_features, self.weight_packed.device)
        self.lora_down, self.lora_up, self.lora_scale = frozen(down), frozen(up), frozen(scale)
        self.lora_rank = len(scale)

    def set_bias_delta(self, delta: Tensor | None) -> None:
        """Add `delta` [out] to the bias (also in a layer without a bias); None removes it."""
        check_bias_delta(delta, self.out_features)
        self.bias_delta = None if delta is None else frozen(delta.to(self.weight_packed.device))

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        # `.to(dtype)` is meant for the dtype of arithmetic. A scale cast to float16 would overflow, and a tensor scale
        # cast to bfloat16 would change: tensors of the format keep their dtype on the new device.
        fixed = [*self.fmt.tensors(self.out_features, self.in_features), "lora_scale"]
        before = {name: parameter.data for name in fixed if (parameter := self._parameters[name]) is not None}
        super()._apply(fn, recurse)
        for name, data in before.items():
            parameter = self.get_parameter(name)
            if parameter.dtype is not data.dtype:
                parameter.data = data.to(parameter.device)
        return self

    def extra_repr(self) -> str:
        lora = "" if self.lora_scale is None else f", lora_rank={self.lora_scale.numel()}"
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, bias={self.bias is not None}, "
            f"format={self.fmt.name}{lora}" + ("" if self.compute == EXACT else f", compute={self.compute}")
        )

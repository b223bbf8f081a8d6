"""A linear layer in SVDQuant W4A4: a residual in four bits, a low-rank part in 16, activations in four bits.

In:   activations. Out: activations in their dtype. LoRAs are added to the low-rank factors, and their rank grows.
      The layer multiplies in 16 bits with its dequantised weight, or in four bits after `set_compute`.
Never: names of layers (the caller's rule reads them), files, LoRA file formats.

For inference: the operator has no gradient.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Self

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from runner.forecast.precisions import PRECISIONS
from runner.quantization.added_deltas import LowRankDelta, check_bias_delta, frozen, join_deltas
from runner.quantization.formats.svdq import torch_table, unpack_vector
from runner.quantization.formats.svdq_layout import SVDQ_LAYOUTS, SvdqLayout
from runner.quantization.kernels.low_bit import EXACT, add_biases, multiply_svdq
from runner.quantization.kernels.svdq_order import TILES, Order, reorder
from runner.quantization.kernels.svdq_products import ORDERS, write_weight
from runner.quantization.kernels.workspace import workspace

__all__ = ["SvdqLinear", "svdq_linear"]


@torch.library.custom_op("video_lab::svdq_linear", mutates_args=())
def svdq_linear(
    x: Tensor,
    qweight: Tensor,
    wscales: Tensor,
    wcscales: Tensor | None,
    smooth_factor: Tensor,
    proj_down: Tensor,
    proj_up: Tensor,
    fmt: str,
    backend: str,
    out_features: int,
    bias: Tensor | None,
    bias_delta: Tensor | None,
    lora_down: Tensor | None,
    lora_up: Tensor | None,
) -> Tensor:
    """x [..., in] → [..., out_features] in x's dtype, by stored tensors of a format in SVDQ_LAYOUTS.

    `backend`: a GEMM backend of the format's row of `PRECISIONS`; the tensors are in the order that it reads. Empty: in
    16 bits, with the tensors as in files. One operator makes the weight and multiplies, as `linear.fp4_linear`; it also
    pads, packs and adds the parts. So a compiler cannot fold a weight.
    """
    stored = {"qweight": qweight, "wscales": wscales, "smooth_factor": smooth_factor, "proj_down": proj_down}
    stored |= {"proj_up": proj_up} if wcscales is None else {"proj_up": proj_up, "wcscales": wcscales}
    bias = add_biases(bias, bias_delta)
    if backend:
        flat = x.reshape(-1, x.shape[-1])
        result = multiply_svdq(flat, stored, fmt, backend, out_features, bias, lora_down, lora_up)
        return result.view(*x.shape[:-1], out_features)
    weight = workspace("weight", (out_features, x.shape[-1]), x.dtype, x.device)
    write_weight(stored, SVDQ_LAYOUTS[fmt], lora_down, lora_up, weight)
    return F.linear(x, weight, None if bias is None else bias.to(x.dtype))


@svdq_linear.register_fake
def _(
    x: Tensor,
    qweight: Tensor,
    wscales: Tensor,
    wcscales: Tensor | None,
    smooth_factor: Tensor,
    proj_down: Tensor,
    proj_up: Tensor,
    fmt: str,
    backend: str,
    out_features: int,
    bias: Tensor | None,
    bias_delta: Tensor | None,
    lora_down: Tensor | None,
    lora_up: Tensor | None,
) -> Tensor:
    torch._check(x.shape[-1] <= qweight.shape[1] * 2)
    return x.new_empty(*x.shape[:-1], out_features)


class SvdqLinear(nn.Module):
    """y = x W^T + b. Its parameters take no gradient:

    smooth_factor, proj_down, proj_up, qweight, wscales, wcscales
                   as `SvdqLayout.tensor_table` lists them; their dtypes survive `.to(dtype)`
    bias           float [out] in plain order, or None
    bias_delta     float [out], or None: `set_bias_delta`
    lora_down, lora_up   [R, in], [out, R] in plain order, or None: `set_lora`; R sums the ranks

    Parameters and not buffers, because streamed offload brings only parameters back to the host.

    The stored tensors are in the files' order (`tiles`), also in the state dict. While the layer computes by a backend
    that reads another order, they are in that order, in the same memory. Read and load state dicts only while the layer
    computes EXACT.
    """

    qweight: nn.Parameter
    wscales: nn.Parameter
    wcscales: nn.Parameter | None
    smooth_factor: nn.Parameter
    proj_down: nn.Parameter
    proj_up: nn.Parameter
    bias: nn.Parameter | None
    bias_delta: nn.Parameter | None
    lora_down: nn.Parameter | None
    lora_up: nn.Parameter | None

    def __init__(
        self, tensors: dict[str, Tensor], bias: Tensor | None, layout: SvdqLayout, in_features: int, out_features: int
    ) -> None:
        """Keep stored tensors, without a copy. Raises ValueError where they do not fit the layout."""
        super().__init__()
        self.layout, self.in_features, self.out_features = layout, in_features, out_features
        self.compute, self.backend = EXACT, ""
        self.order: Order = TILES
        self.lora_rank = 0
        expected = torch_table(layout, out_features, in_features)
        found = {name: (tuple(tensor.shape), tensor.dtype) for name, tensor in tensors.items()}
        if found != expected:
            raise ValueError(f"{layout.name} [{out_features}, {in_features}]: {found} instead of {expected}")
        # Floating ones first: models use the dtype of a module's first parameter for arithmetic.
        self.register_parameter("bias", None if bias is None else frozen(bias))
        for name in ("smooth_factor", "proj_down", "proj_up", "qweight", "wscales", "wcscales"):
            self.register_parameter(name, frozen(tensors[name]) if name in tensors else None)
        for name in ("bias_delta", "lora_down", "lora_up"):
            self.register_parameter(name, None)

    @classmethod
    def empty(
        cls,
        in_features: int,
        out_features: int,
        bias: bool,
        layout: SvdqLayout,
        device: torch.device | str = "meta",
        bias_dtype: torch.dtype = torch.bfloat16,
    ) -> Self:
        """An empty layer for `load_state_dict(..., assign=True)`: shapes and dtypes, no values."""
        tensors = {
            name: torch.empty(shape, dtype=dtype, device=device)
            for name, (shape, dtype) in torch_table(layout, out_features, in_features).items()
        }
        given = torch.empty(out_features, dtype=bias_dtype, device=device) if bias else None
        return cls(tensors, given, layout, in_features, out_features)

    @property
    def weight(self) -> nn.Parameter:
        """The packed weight, for code that reads the device of a linear's weight."""
        return self.qweight

    @property
    def stored(self) -> dict[str, Tensor]:
        """The stored tensors by their names in the layout; no copies."""
        return {name: self.get_parameter(name) for name in self.layout.tensor_table(1, 1)}

    @property
    def smoothing(self) -> Tensor:
        """The factor that inputs are divided by, float32 [in] in plain order."""
        factor = unpack_vector(self.smooth_factor) if self.order == TILES else self.smooth_factor
        return factor[: self.in_features].float()

    def forward(self, x: Tensor) -> Tensor:
        """x [..., in] → [..., out] of the same dtype."""
        if x.shape[-1] != self.in_features:  # the operator would pad a narrower input with zeros
            raise ValueError(f"an input of {x.shape[-1]} channels for a layer of {self.in_features}")
        result: Tensor = svdq_linear(
            x,
            self.qweight,
            self.wscales,
            self.wcscales,
            self.smooth_factor,
            self.proj_down,
            self.proj_up,
            self.layout.name,
            self.backend,
            self.out_features,
            self.bias,
            self.bias_delta,
            self.lora_down,
            self.lora_up,
        )
        return result

    def set_compute(self, compute: str, backend: str = "") -> None:
        """Compute in `compute` (a row of `PRECISIONS`) by `backend` (one of its GEMM backends); EXACT: in 16 bits.

        Stored tensors are permuted in place into the order that the backend reads, which takes the layer's memory once
        more for a moment. Raises ValueError, before anything changes, for unknown names, and for a compute of another
        format than the weight's.
        """
        if compute != EXACT:
            precision = PRECISIONS.get(compute)
            if precision is None or precision.find_backend(backend) is None:
                raise ValueError(f"no backend {backend!r} for {compute!r}")
            if precision.stored_format != self.layout.name:
                raise ValueError(f"a weight in {self.layout.name} cannot compute as {compute}")
        self.compute, self.backend = compute, backend if compute != EXACT else ""
        self._put_in(ORDERS[self.backend] if self.backend else TILES)

    @torch.no_grad()
    def _put_in(self, order: Order) -> None:
        if order == self.order:
            return
        for name, tensor in self.stored.items():
            tensor.copy_(reorder(name, tensor, self.layout.precision, order))  # in place: streaming holds this memory
        self.order = order

    def set_lora(self, deltas: Sequence[LowRankDelta] | None) -> None:
        """Add every scale * up @ down to the weight, instead of those set before; None removes them.

        The stored tensors do not change: without LoRAs the layer gives the same bits as before. The factors keep their
        dtype; `scale` is multiplied into `up`. Raises ValueError for shapes that do not fit.
        """
        if not deltas:
            self.lora_down = self.lora_up = None
            self.lora_rank = 0
            return
        down, up, scale = join_deltas(deltas, self.in_features, self.out_features, self.qweight.device)
        self.lora_down, self.lora_up = frozen(down), frozen((up.float() * scale).to(up.dtype))
        self.lora_rank = len(scale)

    def set_bias_delta(self, delta: Tensor | None) -> None:
        """Add `delta` [out] to the bias (also in a layer without a bias); None removes it."""
        check_bias_delta(delta, self.out_features)
        self.bias_delta = None if delta is None else frozen(delta.to(self.qweight.device))

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        # `.to(dtype)` is meant for the dtype of arithmetic: tensors of the layout keep their dtype on the new device.
        before = {name: tensor.data for name, tensor in self.stored.items()}
        super()._apply(fn, recurse)
        for name, data in before.items():
            parameter = self.get_parameter(name)
            if parameter.dtype is not data.dtype:
                parameter.data = data.to(parameter.device)
        return self

    def extra_repr(self) -> str:
        lora = f", lora_rank={self.lora_rank}" if self.lora_rank else ""
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, bias={self.bias is not None}, "
            f"format={self.layout.name}, rank={self.layout.rank}{lora}"
            + ("" if self.compute == EXACT else f", compute={self.compute}")
        )

"""A linear layer in SVDQuant W4A4: a residual in four bits, a low-rank part in 16, activations in four bits.

In:   activations. Out: activations in their dtype. LoRAs are added to the low-rank factors, and their rank grows.
The product is one of 16 bits with the weight that the tensors stand for, unless `set_compute` asks for four bits.
It will never know: names of layers (the caller's rule does), files, LoRA file formats.

For inference: the operator has no gradient.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Self

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from runner.forecast.precisions import PRECISIONS
from runner.quantization.formats.svdq import effective_weight, svdq_linear, torch_table
from runner.quantization.formats.svdq_layout import SvdqLayout
from runner.quantization.kernels.low_bit import EXACT, sum_of_biases

__all__ = ["SvdqLinear"]

LowRankDelta = tuple[Tensor, Tensor, float]  # (down [rank, in], up [out, rank], scale): scale * up @ down on the weight


class SvdqLinear(nn.Module):
    """y = x W^T + b. Parameters, none of which takes a gradient:

    smooth_factor, proj_down, proj_up, qweight, wscales, wcscales
                   as `SvdqLayout.tensor_table` lists them; their dtypes survive `.to(dtype)`
    bias           float [out] in plain order, or None
    bias_delta     float [out], or None: `set_bias_delta`
    lora_down, lora_up   [R, in], [out, R] in plain order, or None: `set_lora`; R sums the ranks

    Parameters and not buffers, because streamed offload brings only parameters back to the host.
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
        """From stored tensors, which are kept and not copied. ValueError where they do not fit the layout."""
        super().__init__()
        self.layout, self.in_features, self.out_features = layout, in_features, out_features
        self.compute, self.product = EXACT, ""
        self.lora_rank = 0
        expected = torch_table(layout, out_features, in_features)
        found = {name: (tuple(tensor.shape), tensor.dtype) for name, tensor in tensors.items()}
        if found != expected:
            raise ValueError(f"{layout.name} [{out_features}, {in_features}]: {found} instead of {expected}")
        # Floating ones first: models take the dtype of a module's first parameter for that of its arithmetic.
        self.register_parameter("bias", None if bias is None else _frozen(bias))
        for name in ("smooth_factor", "proj_down", "proj_up", "qweight", "wscales", "wcscales"):
            self.register_parameter(name, _frozen(tensors[name]) if name in tensors else None)
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
        """A shell to load into, `load_state_dict(..., assign=True)`: shapes and dtypes, no values."""
        tensors = {
            name: torch.empty(shape, dtype=dtype, device=device)
            for name, (shape, dtype) in torch_table(layout, out_features, in_features).items()
        }
        given = torch.empty(out_features, dtype=bias_dtype, device=device) if bias else None
        return cls(tensors, given, layout, in_features, out_features)

    @property
    def weight(self) -> nn.Parameter:
        """The packed weight: what code reads that asks a linear's weight for its device."""
        return self.qweight

    @property
    def stored(self) -> dict[str, Tensor]:
        """The stored tensors by their names in the layout; no copies."""
        return {name: self.get_parameter(name) for name in self.layout.tensor_table(1, 1)}

    def forward(self, x: Tensor) -> Tensor:
        """x [..., in] → [..., out] of the same dtype."""
        bias = sum_of_biases(self.bias, self.bias_delta)
        if self.compute != EXACT:
            result = svdq_linear(x, self.stored, self.layout, self.out_features, bias)
            if self.lora_down is None or self.lora_up is None:
                return result
            return result + F.linear(F.linear(x, self.lora_down.to(x.dtype)), self.lora_up.to(x.dtype))
        weight = effective_weight(self.stored, self.layout)[: self.out_features, : self.in_features]
        if self.lora_down is not None and self.lora_up is not None:
            weight = torch.addmm(weight, self.lora_up.float(), self.lora_down.float())
        return F.linear(x, weight.to(x.dtype), None if bias is None else bias.to(x.dtype))

    def set_compute(self, compute: str, product: str = "") -> None:
        """From now on `compute` (a row of `PRECISIONS`) by `product` (one of its backends); EXACT: in 16 bits again.

        ValueError for names that are none, and for a compute of another format than the weight's.
        """
        if compute != EXACT:
            precision = PRECISIONS.get(compute)
            if precision is None or precision.find_backend(product) is None:
                raise ValueError(f"no product {product!r} of {compute!r}")
            if precision.stored_format != self.layout.name:
                raise ValueError(f"a weight in {self.layout.name} cannot compute as {compute}")
        self.compute, self.product = compute, product

    def set_lora(self, deltas: Sequence[LowRankDelta] | None) -> None:
        """Adds every scale * up @ down to the weight from now on, in place of any that were set before; None ends it.

        ValueError for shapes that do not fit.
        """
        if not deltas:
            self.lora_down = self.lora_up = None
            self.lora_rank = 0
            return
        for down, up, _ in deltas:
            rank = down.shape[0]
            if tuple(down.shape) != (rank, self.in_features) or tuple(up.shape) != (self.out_features, rank):
                raise ValueError(
                    f"LoRA factors {tuple(down.shape)} and {tuple(up.shape)} do not fit a weight of "
                    f"[{self.out_features}, {self.in_features}]"
                )
        device, dtype = self.qweight.device, self.proj_up.dtype
        self.lora_down = _frozen(torch.cat([down for down, _, _ in deltas], dim=0).to(device, dtype))
        self.lora_up = _frozen(torch.cat([up.float() * scale for _, up, scale in deltas], dim=1).to(device, dtype))
        self.lora_rank = sum(down.shape[0] for down, _, _ in deltas)

    def set_bias_delta(self, delta: Tensor | None) -> None:
        """Adds `delta` [out] to the bias (a layer without one gains it) from now on; None ends it."""
        if delta is not None and tuple(delta.shape) != (self.out_features,):
            raise ValueError(f"a bias delta of {tuple(delta.shape)} does not fit {self.out_features} outputs")
        self.bias_delta = None if delta is None else _frozen(delta.to(self.qweight.device))

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        # `.to(dtype)` is for arithmetic: what the layout fixes goes back to its dtype, on the new device.
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


def _frozen(tensor: Tensor) -> nn.Parameter:
    return nn.Parameter(tensor.detach(), requires_grad=False)

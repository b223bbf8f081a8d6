"""A linear layer whose weight stays in four bits, and the swap of a model's linears for it.

In: activations. Out: activations in their dtype; the weight exists in 16 bits for the length of one matrix product,
in a workspace that all layers share. LoRAs kept beside the weight are added there, and to the bias, and nowhere else.
It will never know: names of layers (the caller's rule does), files, LoRA file formats.

For inference: the operator has no gradient, since the weight that a backward pass would need is gone by then.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from typing import Final, Self

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from runner.quantization.e2m1 import Format
from runner.quantization.kernels import dequantize_into
from runner.quantization.scales import Method, quantize

__all__ = ["FP4Linear", "LowRankDelta", "fp4_linear", "release_workspace", "swap_linears", "workspace_bytes"]

LowRankDelta = tuple[Tensor, Tensor, float]  # (down [rank, in], up [out, rank], scale): scale * up @ down on the weight


class _Workspaces(threading.local):
    """One flat buffer a device, dtype and CUDA stream, as large as the largest weight that was written into it.

    Each thread has its own, and streams do not share: whatever runs at the same time writes to different memory. On one
    thread and stream, one layer's product is enqueued before the next layer's weight, which may then have the buffer.
    """

    def __init__(self) -> None:
        self.buffers: dict[tuple[torch.device, torch.dtype, int], Tensor] = {}

    def matrix(self, shape: tuple[int, int], dtype: torch.dtype, device: torch.device) -> Tensor:
        stream = torch.cuda.current_stream(device).cuda_stream if device.type == "cuda" else 0
        key, wanted = (device, dtype, stream), shape[0] * shape[1]
        if key not in self.buffers or self.buffers[key].numel() < wanted:
            self.buffers.pop(key, None)  # first, so that the old and the new one are never there together
            with torch.inference_mode(False):  # else nothing outside inference mode could write to it later
                self.buffers[key] = torch.empty(wanted, dtype=dtype, device=device)
        return self.buffers[key][:wanted].view(shape)


_workspaces: Final = _Workspaces()


def workspace_bytes() -> int:
    """What the workspaces of the calling thread take."""
    return sum(buffer.nbytes for buffer in _workspaces.buffers.values())


def release_workspace() -> None:
    """Gives back the workspaces of the calling thread; the next product makes one anew."""
    _workspaces.buffers.clear()


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

    One operator for the weight and its product: a compiler may move two operators apart, and two weights that want the
    workspace at once would meet there. lora_up [out, R] * lora_scale [R] @ lora_down [R, in] is added to the weight.
    """
    weight = _workspaces.matrix((packed.shape[0], packed.shape[1] * 2), x.dtype, x.device)
    dequantize_into(packed, scale, tensor_scale, fmt, weight)
    if lora_down is not None and lora_up is not None and lora_scale is not None:
        weight.addmm_((lora_up.float() * lora_scale).to(x.dtype), lora_down.to(x.dtype))
    if bias is not None and bias_delta is not None:
        bias = bias.float() + bias_delta
    elif bias is None:
        bias = bias_delta
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


class FP4Linear(nn.Module):
    """y = x W^T + b with W in `fmt`. Parameters, none of which takes a gradient:

    weight_packed, weight_scale, weight_scale_2    as `Format.tensors` lists them; their dtypes survive `.to(dtype)`
    bias                                           float [out], or None
    bias_delta                                     float [out], or None: `set_bias_delta`
    lora_down, lora_up, lora_scale                 [R, in], [out, R], float32 [R], or None: `set_lora`; R sums the ranks

    Parameters and not buffers, because streamed offload brings only parameters back to the host.
    """

    weight_packed: nn.Parameter
    weight_scale: nn.Parameter
    bias: nn.Parameter | None
    bias_delta: nn.Parameter | None
    lora_down: nn.Parameter | None
    lora_up: nn.Parameter | None
    lora_scale: nn.Parameter | None

    def __init__(self, tensors: dict[str, Tensor], bias: Tensor | None, fmt: Format) -> None:
        """From stored tensors, which are kept and not copied. ValueError where they do not fit the format."""
        super().__init__()
        self.fmt = fmt
        self.out_features, self.in_features = fmt.shape_of(tensors)
        # Floating ones first: models take the dtype of a module's first parameter for that of its arithmetic.
        self.register_parameter("bias", None if bias is None else _frozen(bias))
        for name in sorted(tensors, key=lambda name: not tensors[name].is_floating_point()):
            self.register_parameter(name, _frozen(tensors[name]))
        for name in ("weight_scale_2", "bias_delta", "lora_down", "lora_up", "lora_scale"):
            if name not in tensors:
                self.register_parameter(name, None)

    @classmethod
    def from_linear(
        cls, linear: nn.Linear, fmt: Format, method: Method = "mse", importance: Tensor | None = None
    ) -> Self:
        """`linear` quantised, on its device; see `scales.quantize`. The bias is copied as it is."""
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
        """A shell to load into, `load_state_dict(..., assign=True)`: shapes and dtypes, no values."""
        tensors = {
            name: torch.empty(shape, dtype=dtype, device=device)
            for name, (shape, dtype) in fmt.tensors(out_features, in_features).items()
        }
        return cls(tensors, torch.empty(out_features, dtype=bias_dtype, device=device) if bias else None, fmt)

    @property
    def weight(self) -> nn.Parameter:
        """The packed weight: what code reads that asks a linear's weight for its device, or whether it is floating."""
        return self.weight_packed

    @property
    def stored(self) -> dict[str, Tensor]:
        """The stored tensors by their names in the format; no copies."""
        return {name: self.get_parameter(name) for name in self.fmt.tensors(self.out_features, self.in_features)}

    def forward(self, x: Tensor) -> Tensor:
        """x [..., in], float32|bfloat16|float16 → [..., out] of the same dtype."""
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

    def set_lora(self, deltas: Sequence[LowRankDelta] | None) -> None:
        """Adds every scale * up @ down to the weight from now on, in place of any that were set before; None ends it.

        The stored weight is not touched: without LoRAs the layer computes the very bits that it did before. ValueError
        for shapes that do not fit; the factors are kept in their dtype, on the layer's device.
        """
        if not deltas:
            self.lora_down = self.lora_up = self.lora_scale = None
            return
        for down, up, _ in deltas:
            rank = down.shape[0]
            if tuple(down.shape) != (rank, self.in_features) or tuple(up.shape) != (self.out_features, rank):
                raise ValueError(
                    f"LoRA factors {tuple(down.shape)} and {tuple(up.shape)} do not fit a weight of "
                    f"[{self.out_features}, {self.in_features}]"
                )
        device = self.weight_packed.device
        scales = [torch.full((down.shape[0],), float(scale)) for down, _, scale in deltas]
        self.lora_down = _frozen(torch.cat([down for down, _, _ in deltas], dim=0).to(device))
        self.lora_up = _frozen(torch.cat([up for _, up, _ in deltas], dim=1).to(device))
        self.lora_scale = _frozen(torch.cat(scales).to(device))

    def set_bias_delta(self, delta: Tensor | None) -> None:
        """Adds `delta` [out] to the bias (a layer without one gains it) from now on; None ends it."""
        if delta is not None and tuple(delta.shape) != (self.out_features,):
            raise ValueError(f"a bias delta of {tuple(delta.shape)} does not fit {self.out_features} outputs")
        self.bias_delta = None if delta is None else _frozen(delta.to(self.weight_packed.device))

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        # `.to(dtype)` is for arithmetic. A scale cast to float16 would overflow, a tensor scale cast to bfloat16 is
        # another scale: what the format fixes goes back to what it was, on the new device.
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
            f"format={self.fmt.name}{lora}"
        )


def swap_linears(model: nn.Module, fmt: Format, keep: Callable[[str], bool]) -> list[str]:
    """Puts empty FP4 shells in the place of `model`'s linears, in place; their names, in the model's order.

    Every module that is an `nn.Linear` and no subclass of it (a subclass may compute something else), unless `keep`
    says of its dotted name that it stays. Shells lie on the meta device and have a bias where the linear had one.
    ValueError, before anything is changed, for an input width that the format cannot hold.
    """
    chosen = {name: module for name, module in model.named_modules() if type(module) is nn.Linear and not keep(name)}
    for name, module in chosen.items():
        if not fmt.fits(module.in_features):
            raise ValueError(
                f"{name} has {module.in_features} inputs, no multiple of {fmt.name}'s group of {fmt.group}; "
                "the recipe must keep it in 16 bits"
            )
    for name, module in chosen.items():
        bias = module.bias is not None
        dtype = module.weight.dtype
        shell = FP4Linear.empty(module.in_features, module.out_features, bias, fmt, bias_dtype=dtype)
        parent, _, attribute = name.rpartition(".")
        setattr(model.get_submodule(parent), attribute, shell.train(module.training))
    return list(chosen)


def _frozen(tensor: Tensor) -> nn.Parameter:
    return nn.Parameter(tensor.detach(), requires_grad=False)

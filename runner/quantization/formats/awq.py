"""AWQ: INT4 in groups of 128, in the layout that TinyChat and nunchaku read, and a linear layer with such a weight.

In:   float weights [out, in]. Out: packed codes, scales and offsets; float weights again; `W4Linear`.
Never: models, files, prompts, jobs (text_encoder.py puts these layers into a model and into a file).

A code is unsigned, 0..15, and a weight is `code * scale + scaled_zero`, both of its row and its group of 128 columns.
The layout of codes, for the kernels that read them on a GPU: 4 rows share one row of int16, which holds 64 columns of
each in turn; a run of 32 columns makes 8 words, and word m holds columns m, m + 8, m + 16, m + 24 in its nibbles,
lowest first. In closed form, with r, i = divmod(row, 4); b, c = divmod(column, 64); h, d = divmod(c, 32);
j, m = divmod(d, 8):  word [r, 64 b + 16 i + 8 h + m], bits 4 j to 4 j + 3.
"""

from __future__ import annotations

from math import ceil
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional

__all__ = ["GROUP", "Method", "W4Linear", "Workspace", "dequantize", "fits", "pack", "quantize", "tensors", "unpack"]

Method = Literal["absmax", "mse"]
Tensors = dict[str, tuple[tuple[int, ...], torch.dtype]]

GROUP = 128  # columns under one scale; the published kernels for 8 tokens and more take no other
# Ends of a group's range to try, as (lower, upper, step, count) in parts of that range. Each move starts from the best
# range so far. 27 tries come within 1 % of the error that an 81-point grid over both ends leaves.
MOVES = (
    *((1, 1, 0.04, 5), (1, 0, 0.03, 5), (0, 1, 0.03, 5)),  # inwards at both ends, at the lower, at the upper
    *((1, 1, 0.01, 3), (-1, -1, 0.01, 3), (1, -1, 0.01, 3), (-1, 1, 0.01, 3)),  # finer: in, out, up, down
)
SEARCH_WEIGHTS = {"cpu": 1 << 19, "cuda": 1 << 24}  # weights searched at once: several fp32 temporaries of that size
UNPACK_WEIGHTS = {"cpu": 1 << 20, "cuda": 1 << 25}  # dequantised at once: fits a core's cache; few launches on CUDA


# The layout


def fits(out_features: int, in_features: int) -> bool:
    """Can the layout hold such a layer? It needs whole groups of 128 columns (so runs of 64) and rows by fours."""
    return out_features > 0 and in_features > 0 and out_features % 4 == 0 and in_features % GROUP == 0


def tensors(
    out_features: int, in_features: int, scale_dtype: torch.dtype = torch.bfloat16, *, bias: bool = False
) -> Tensors:
    """Suffix -> shape and dtype of a layer's tensors. Rows of scales are padded to a multiple of eight with zeros.

    Raises ValueError where the layout cannot hold such a layer.
    """
    if not fits(out_features, in_features):
        raise ValueError(f"INT4 needs rows by 4 and columns by {GROUP}, not {out_features} x {in_features}")
    if scale_dtype not in (torch.float16, torch.bfloat16):
        raise ValueError(f"scales are float16 or bfloat16, not {scale_dtype}")
    scales = (ceil(in_features // GROUP / 8) * 8, out_features)
    table: Tensors = {
        "qweight": ((out_features // 4, in_features), torch.int16),
        "scales": (scales, scale_dtype),
        "scaled_zeros": (scales, scale_dtype),
    }
    return table | ({"bias": ((out_features,), scale_dtype)} if bias else {})


def pack(codes: Tensor) -> Tensor:
    """uint8 [out, in], each 0..15 → int16 [out/4, in], in the order of the module's docstring."""
    rows, columns = codes.shape
    tensors(rows, columns)
    # row / 4, run of 64, row % 4, half of the run, word, nibble
    nibbles = codes.to(torch.int32).view(rows // 4, 4, columns // 64, 2, 4, 8).permute(0, 2, 1, 3, 5, 4)
    words = nibbles[..., 0] | nibbles[..., 1] << 4 | nibbles[..., 2] << 8 | nibbles[..., 3] << 12
    return words.to(torch.int16).reshape(rows // 4, columns)  # wraps on purpose where the top bit is set


def unpack(qweight: Tensor) -> Tensor:
    """int16 [out/4, in] → codes uint8 [out, in]."""
    codes = torch.empty(4 * qweight.shape[0], qweight.shape[1], dtype=torch.uint8, device=qweight.device)
    unpack_into(qweight, codes)
    return codes


def unpack_into(qweight: Tensor, out: Tensor) -> None:
    """As `unpack`, into [out, in] of any dtype: 0..15 is exact in every one."""
    fours, columns = qweight.shape
    words = qweight.view(fours, columns // 64, 4, 2, 8).transpose(1, 2)
    codes = out.view(fours, 4, columns // 64, 2, 4, 8)
    for nibble in range(4):
        codes[..., nibble, :] = (words >> 4 * nibble) & 15


def quantize(weight: Tensor, method: Method = "mse", scale_dtype: torch.dtype = torch.bfloat16) -> dict[str, Tensor]:
    """Float [out, in] → `qweight`, `scales`, `scaled_zeros` on its device. Temporaries do not grow with its size.

    "absmax": the range of each group is that of its weights. "mse" also tries narrower and shifted ranges and keeps the
    one with the smallest squared error. Codes are chosen for the scales as stored, so that the rounding of scales costs
    almost nothing. The offset need not be a multiple of the scale: no kernel needs that.
    Raises ValueError for shapes that do not fit, for NaN and infinity, and for weights too large for `scale_dtype`.
    """
    rows, columns = weight.shape
    groups = columns // GROUP
    made = {
        name: torch.zeros(shape, dtype=dtype, device=weight.device)
        for name, (shape, dtype) in tensors(rows, columns, scale_dtype).items()
    }
    step = max(4, SEARCH_WEIGHTS.get(weight.device.type, 1 << 19) // columns // 4 * 4)
    for first in range(0, rows, step):
        values = weight[first : first + step].to(torch.float32).reshape(-1, groups, GROUP)
        if not torch.isfinite(values).all():
            raise ValueError("NaN or infinity among the weights")
        codes, scale, zero = _quantize_groups(values, method, scale_dtype)
        some = slice(first, first + len(values))
        made["scales"][:groups, some] = scale.squeeze(-1).t()
        made["scaled_zeros"][:groups, some] = zero.squeeze(-1).t()
        made["qweight"][first // 4 : (first + len(values)) // 4] = pack(codes.view(-1, columns))
    if not all(bool(torch.isfinite(made[name]).all()) for name in ("scales", "scaled_zeros")):
        raise ValueError(f"weights too large for scales in {scale_dtype}")
    return made


def _quantize_groups(values: Tensor, method: Method, scale_dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    """[rows, groups, 128] → codes uint8, and float32 scale and zero [rows, groups, 1] that are exact in scale_dtype."""

    def coded(low: Tensor, high: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        scale = ((high - low) / 15).to(scale_dtype).float()
        scale = torch.where(scale > 0, scale, 1.0)  # in a constant group all codes are 0: the offset is the value
        zero = low.to(scale_dtype).float()
        return ((values - zero) / scale).round_().clamp_(0, 15), scale, zero

    def error(low: Tensor, high: Tensor) -> Tensor:
        codes, scale, zero = coded(low, high)
        return codes.mul_(scale).add_(zero).sub_(values).square_().sum(-1, keepdim=True)

    low, high = values.aminmax(dim=-1, keepdim=True)
    if method == "mse":
        span, least = high - low, error(low, high)
        for up, down, part, count in MOVES:
            low_0, high_0 = low, high
            for i in range(1, count + 1):
                tried = low_0 + up * i * part * span, high_0 - down * i * part * span
                left = error(*tried)
                better = left < least
                low, high = torch.where(better, tried[0], low), torch.where(better, tried[1], high)
                least = torch.where(better, left, least)
    codes, scale, zero = coded(low, high)
    return codes.to(torch.uint8), scale, zero


def dequantize(
    qweight: Tensor,
    scales: Tensor,
    scaled_zeros: Tensor,
    dtype: torch.dtype = torch.float32,
    out: Tensor | None = None,
) -> Tensor:
    """`code * scale + scaled_zero` in float32, rounded once to `dtype`; [out, in], into `out` where it is given."""
    fours, columns = qweight.shape
    groups = columns // GROUP
    if out is None:
        out = torch.empty(4 * fours, columns, dtype=dtype, device=qweight.device)
    scale, zero = (t[:groups].t().float().unsqueeze(-1) for t in (scales, scaled_zeros))
    step = max(1, UNPACK_WEIGHTS.get(qweight.device.type, 1 << 20) // (4 * columns))
    buffer = torch.empty(min(4 * step, 4 * fours), columns, dtype=torch.float32, device=qweight.device)
    for first in range(0, fours, step):
        words = qweight[first : first + step]
        rows = slice(4 * first, 4 * (first + len(words)))
        weights = buffer[: 4 * len(words)]
        unpack_into(words, weights)
        weights.view(-1, groups, GROUP).mul_(scale[rows]).add_(zero[rows])
        out[rows] = weights
    return out


# The layer


class Workspace:
    """One flat buffer for the dequantised weights of a model's layers, one after the other, as large as the largest.

    The result of `take` is valid until the next `take`: one model, one thread, no gradients.
    """

    def __init__(self) -> None:
        self.buffer: Tensor | None = None

    def take(self, rows: int, columns: int, dtype: torch.dtype, device: torch.device) -> Tensor:
        """[rows, columns], uninitialised, in the same memory as the last result."""
        buffer = self.buffer
        if buffer is None or buffer.dtype != dtype or buffer.device != device or buffer.numel() < rows * columns:
            self.buffer = buffer = None  # free the old buffer before the new one is allocated
            self.buffer = buffer = torch.empty(rows * columns, dtype=dtype, device=device)
        return buffer[: rows * columns].view(rows, columns)


class W4Linear(nn.Module):
    """A linear layer in INT4. It has no buffers; its parameters take no gradient:

    qweight       int16             [out_features / 4, in_features]                  codes, see the module's docstring
    scales        float16/bfloat16  [in_features / 128 rounded up to 8s, out_features]
    scaled_zeros  float16/bfloat16  as scales                                        w = code * scale + scaled_zero
    bias          any float         [out_features], or None
    weight        None: UMT5 reads the dtype of `wo.weight` before it calls the layer, and accepts None
    """

    qweight: nn.Parameter
    scales: nn.Parameter
    scaled_zeros: nn.Parameter
    bias: nn.Parameter | None

    def __init__(
        self,
        in_features: int,
        out_features: int,
        *,
        bias: bool = False,
        scale_dtype: torch.dtype = torch.bfloat16,
        device: torch.device | str = "cpu",
        workspace: Workspace | None = None,
    ) -> None:
        super().__init__()
        self.in_features, self.out_features = in_features, out_features
        self.workspace = workspace or Workspace()
        self.register_parameter("weight", None)
        self.register_parameter("bias", None)
        for name, (shape, dtype) in tensors(out_features, in_features, scale_dtype, bias=bias).items():
            empty = torch.zeros(shape, dtype=dtype, device=device)
            self.register_parameter(name, nn.Parameter(empty, requires_grad=False))

    @classmethod
    def from_linear(
        cls,
        linear: nn.Linear,
        method: Method = "mse",
        scale_dtype: torch.dtype = torch.bfloat16,
        workspace: Workspace | None = None,
    ) -> W4Linear:
        """Quantise `linear` on its device; the bias stays as it is. Raises ValueError as `quantize` does."""
        layer = cls(
            linear.in_features, linear.out_features, scale_dtype=scale_dtype, device="meta", workspace=workspace
        )
        for name, tensor in quantize(linear.weight.detach(), method, scale_dtype).items():
            layer.register_parameter(name, nn.Parameter(tensor, requires_grad=False))
        if linear.bias is not None:
            layer.bias = nn.Parameter(linear.bias.detach().clone(), requires_grad=False)
        return layer

    def forward(self, x: Tensor) -> Tensor:
        """[..., in] → [..., out], in the dtype of `x`. The weight exists in that dtype only while this runs."""
        weight = self.workspace.take(self.out_features, self.in_features, x.dtype, x.device)
        dequantize(self.qweight, self.scales, self.scaled_zeros, out=weight)
        return functional.linear(x, weight, None if self.bias is None else self.bias.to(x.dtype))

    def extra_repr(self) -> str:
        return f"{self.in_features}, {self.out_features}, bias={self.bias is not None}, int4 by {GROUP}"

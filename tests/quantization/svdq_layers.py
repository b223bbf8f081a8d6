"""Small linears in SVDQuant, split and quantised in a few lines: for tests of what runs them, not of quality.

In:   a weight, a layout, activations for the smoothing or none. Out: stored tensors, a layer.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from runner.quantization.formats.e2m1 import encode
from runner.quantization.formats.svdq import pack_lowrank, pack_scales, pack_vector, pack_weight, pad
from runner.quantization.formats.svdq_layout import SvdqLayout
from runner.quantization.svdq_linear import SvdqLinear

__all__ = ["quantize_linear", "quantize_weight"]


@torch.no_grad()
def quantize_weight(weight: Tensor, layout: SvdqLayout, x: Tensor | None = None) -> dict[str, Tensor]:
    """Stored tensors of `weight` [out, in]: scales by the largest magnitude, the low-rank part by one SVD.

    Smoothed by the spans of weight and `x` [M, in], or of the weight alone; so that x / s lies around 1.
    """
    spans = weight.abs().amax(dim=0).clamp(min=1e-5).float()
    seen = torch.ones_like(spans) if x is None else x.abs().amax(dim=0).clamp(min=1e-5).float()
    smooth = (seen**0.5 / spans**0.5) if x is not None else spans**-0.5
    smooth = (smooth / smooth.median()).bfloat16()
    smoothed = weight.float() * smooth.float()
    rank = min(layout.rank, *weight.shape)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)  # it starts from noise
        u, s, v = torch.svd_lowrank(smoothed, q=min(rank + 8, *weight.shape))
    up, down = (u[:, :rank] * s[:rank]).bfloat16(), (v.T[:rank] / smooth.float()).bfloat16()
    residual = smoothed - up.float() @ (down.float() * smooth.float())
    rows, columns = layout.padded(*weight.shape)
    groups = pad(residual, (rows, columns)).view(rows, -1, layout.group)
    peaks = groups.abs().amax(dim=-1)
    tensors = {
        "smooth_factor": pack_vector(pad(smooth, (columns,), 1)),
        "proj_down": pack_lowrank(pad(down, (layout.rank, columns)), down=True),
        "proj_up": pack_lowrank(pad(up, (rows, layout.rank)), down=False),
    }
    if layout.precision == "int4":
        scales = (peaks / 7).clamp(min=1e-5).bfloat16()
        codes = (groups / scales.float().unsqueeze(-1)).round().clamp(-7, 7).to(torch.int8)
    else:
        channels = (peaks.amax(dim=-1) / 2688).clamp(min=1e-5).bfloat16()
        tensors["wcscales"] = pack_vector(channels)
        scales = (peaks / 6 / channels.float().unsqueeze(1)).to(torch.float8_e4m3fn)
        factors = (scales.float() * channels.float().unsqueeze(1)).clamp(min=1e-20)
        codes = encode(groups / factors.unsqueeze(-1))
    tensors["qweight"] = pack_weight(codes.view(rows, columns), layout.precision)
    tensors["wscales"] = pack_scales(scales, layout.precision)
    return tensors


def quantize_linear(linear: nn.Linear, layout: SvdqLayout, x: Tensor | None = None) -> SvdqLinear:
    """`linear` as a layer of `layout`; its bias copied."""
    bias = None if linear.bias is None else linear.bias.detach().clone()
    tensors = quantize_weight(linear.weight.detach(), layout, x)
    return SvdqLinear(tensors, bias, layout, linear.in_features, linear.out_features)

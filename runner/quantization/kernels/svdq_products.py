"""Matrix products of a linear in SVDQuant W4A4, a function for each GEMM backend, and its weight in 16 bits.

In:   activations [M, K], the layer's stored tensors in the order that the backend reads (`ORDERS`). Out: [M, out].
Never: names of layers, the choice of a backend, LoRAs: their factors are already among the tensors.

    reference      the definition, any device
    cache_dit      nunchaku's kernels as the package cache-dit-cu13 has them: sm_80, 86, 89, 120, 121
    comfy_kitchen  int4: the package's own kernels, sm_80 and later
    scaled_mm      nvfp4: torch's block-scaled product, behind a quantiser of ours (`e2m1_codes.py`); the low-rank part
                   as two products of 16 bits

Kernels compute in bfloat16, the dtype of stored factors and scales: float32 activations are rounded to it. A missing
package, or one that does not fit this torch, raises only when its function is called.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from functools import cache
from importlib import import_module
from types import MappingProxyType
from typing import Any, Final

import torch
from torch import Tensor

from runner.quantization.formats.e2m1 import VALUES
from runner.quantization.formats.row_blocks import on_all_cores, row_blocks
from runner.quantization.formats.svdq import (
    pack_vector,
    pad,
    svdq_linear,
    torch_table,
    unpack_lowrank,
    unpack_scales,
    unpack_vector,
    untile_bytes,
)
from runner.quantization.formats.svdq_layout import TILE, SvdqLayout, SvdqPrecision
from runner.quantization.kernels.e2m1_codes import blocked_codes, pick_codes
from runner.quantization.kernels.nvfp4 import Blocks, multiply_blocked
from runner.quantization.kernels.svdq_order import ROWS, TILES, Order

__all__ = [
    "MOST_JOINED",
    "ORDERS",
    "cache_dit",
    "comfy_kitchen",
    "name_code_kernel",
    "probe_tensors",
    "reference",
    "scaled_mm",
    "write_weight",
]

ORDERS: Final[Mapping[str, Order]] = MappingProxyType(
    {"reference": TILES, "cache_dit": TILES, "comfy_kitchen": ROWS, "scaled_mm": ROWS}
)
"""Backend → the order in which it reads the stored tensors."""
MOST_JOINED: Final = 1024  # rank of a layer's and its LoRAs' factors together: nunchaku's kernels take no more
_PAD_TOKENS: Final = 256  # of both packages' kernels
_WEIGHTS_A_BLOCK: Final = 1 << 20  # on a core
_WEIGHTS_A_BLOCK_ON_CUDA: Final = 1 << 24


def reference(
    x: Tensor, tensors: Mapping[str, Tensor], layout: SvdqLayout, out_features: int, bias: Tensor | None
) -> Tensor:
    """The definition, `formats.svdq.svdq_linear`: [M, out_features] in the dtype of x [M, K]; bias in plain order."""
    return svdq_linear(x, tensors, layout, out_features, bias)


def cache_dit(
    x: Tensor, tensors: Mapping[str, Tensor], layout: SvdqLayout, out_features: int, bias: Tensor | None
) -> Tensor:
    """As `reference`, by the extension of cache-dit-cu13. Raises ImportError with the loader's message."""
    kernels: Any = import_module("cache_dit.kernels")
    # Without this check the package's error explains a build from source and leaves out the loader's message.
    problem = kernels.svdq_get_load_error()
    if problem is not None:
        raise ImportError(f"cache-dit's kernels do not load with torch {torch.__version__}: {problem}")
    fp4 = layout.precision != "int4"
    codes, scales, low = kernels.svdq_quantize_w4a4_act_fuse_lora(
        input=x.to(torch.bfloat16).contiguous(),
        lora_down=tensors["proj_down"],
        smooth=tensors["smooth_factor"],
        fuse_glu=False,
        fp4=fp4,
        pad_size=_PAD_TOKENS,
    )
    result: Tensor = kernels.svdq_gemm_w4a4(
        act=codes,
        wgt=tensors["qweight"],
        ascales=scales,
        wscales=tensors["wscales"],
        lora_act_in=low,
        lora_up=tensors["proj_up"],
        bias=None if bias is None else pack_vector(_padded_bias(bias, tensors)),
        fp4=fp4,
        alpha=1.0,
        wcscales=tensors.get("wcscales"),
        act_unsigned=False,
        output_dtype=torch.bfloat16,
    )
    return result[: x.shape[0], :out_features].to(x.dtype)


def comfy_kitchen(
    x: Tensor, tensors: Mapping[str, Tensor], layout: SvdqLayout, out_features: int, bias: Tensor | None
) -> Tensor:
    """As `reference`, int4, by comfy-kitchen: its CUDA backend on a GPU, its plain arithmetic elsewhere.

    On a GPU that its kernels refuse, the package's dispatcher would run the plain arithmetic, which unpacks the weight
    in each product. So the package's backend is named here, and its refusal is raised.
    """
    if layout.precision != "int4":
        raise ValueError(f"comfy-kitchen has no SVDQuant product of {layout.precision}")
    # By default the package keeps the codes of activations for each number of tokens it has met, and never frees them.
    os.environ.setdefault("COMFY_KITCHEN_SVDQUANT_REUSE_WORKSPACE", "0")
    backend: Any = import_module(f"comfy_kitchen.backends.{'cuda' if x.is_cuda else 'eager.svdquant'}")
    codes, scales, low = backend.quantize_svdquant_w4a4(
        x.to(torch.bfloat16).contiguous(), tensors["smooth_factor"], tensors["proj_down"], pad_size=_PAD_TOKENS
    )
    added = None if bias is None else _padded_bias(bias, tensors)
    result: Tensor = backend.scaled_mm_svdquant_w4a4(
        codes, tensors["qweight"], scales, tensors["wscales"], low, tensors["proj_up"], added
    )
    return result[: x.shape[0], :out_features].to(x.dtype)


def scaled_mm(
    x: Tensor, tensors: Mapping[str, Tensor], layout: SvdqLayout, out_features: int, bias: Tensor | None
) -> Tensor:
    """As `reference`, nvfp4, by `nvfp4.multiply_blocked`: compute capability 10.0 and 12.0."""
    if layout.precision == "int4":
        raise ValueError(f"torch has no block-scaled product of {layout.precision}")
    x16 = x.to(torch.bfloat16)
    one = torch.ones((), device=x.device)
    weight = Blocks(tensors["qweight"].view(torch.uint8), tensors["wscales"].flatten(), one)
    codes, scales = blocked_codes(x16, tensors["smooth_factor"])
    result = multiply_blocked(Blocks(codes, scales, one), weight).mul_(tensors["wcscales"])
    result.addmm_(x16 @ tensors["proj_down"], tensors["proj_up"].T)
    if bias is not None:
        result += _padded_bias(bias, tensors)
    return result[:, :out_features].to(x.dtype)


def name_code_kernel(device: torch.device, backend: str) -> str:
    """For the record: the kernel that makes activations' codes for `backend` on `device`, and why.

    Empty for a backend that makes them itself.
    """
    return ": ".join(pick_codes(device)) if backend == "scaled_mm" else ""


def _padded_bias(bias: Tensor, tensors: Mapping[str, Tensor]) -> Tensor:
    return pad(bias.to(torch.bfloat16), (tensors["qweight"].shape[0],))


# The weight in 16 bits


def write_weight(
    tensors: Mapping[str, Tensor],
    layout: SvdqLayout,
    lora_down: Tensor | None,
    lora_up: Tensor | None,
    out: Tensor,
) -> None:
    """Write the dequantised weight of stored tensors (`tiles`) into `out` [out_features, in_features], a float dtype.

    lora_up @ lora_down is added. Sums are in float32 and rounded once; on a CPU all cores work on blocks of rows.
    """
    columns, groups = tensors["qweight"].shape[1] * 2, tensors["wscales"].shape[0]
    smooth = unpack_vector(tensors["smooth_factor"]).float()
    down = unpack_lowrank(tensors["proj_down"], down=True).float()
    lora = None if lora_down is None or lora_up is None else (lora_down.float(), lora_up)
    pairs = _value_table(layout.precision, out.device)
    scales = tensors["wscales"].flatten()

    def work(tiles: slice) -> None:
        first, last = tiles.start * TILE, tiles.stop * TILE
        # A tile of 128 outputs is contiguous in every tensor.
        index = untile_bytes(tensors["qweight"][first:last]).view(torch.uint8).flatten().int()
        factors = unpack_scales(scales[first * groups : last * groups].view(groups, -1), layout.precision).float()
        if "wcscales" in tensors:
            factors *= unpack_vector(tensors["wcscales"][first:last]).float().unsqueeze(1)
        values = pairs.index_select(0, index).view(torch.float32).view(last - first, groups, -1)
        weight = values.mul_(factors.unsqueeze(-1)).view(last - first, columns).div_(smooth)
        weight.addmm_(unpack_lowrank(tensors["proj_up"][first:last], down=False).float(), down)
        target = out[first:last]
        weight = weight[: target.shape[0], : target.shape[1]]
        if lora is not None:
            weight.addmm_(lora[1][first:last].float(), lora[0])
        target.copy_(weight)

    shape = (tensors["qweight"].shape[0] // TILE, columns * TILE)
    if out.device.type == "cpu":
        on_all_cores(work, row_blocks(shape, _WEIGHTS_A_BLOCK))
    else:
        for tiles in row_blocks(shape, _WEIGHTS_A_BLOCK_ON_CUDA):
            work(tiles)


@cache
def _value_table(precision: SvdqPrecision, device: torch.device) -> Tensor:
    """[256] int64: entry b has the bits of two float32, the values of b's low and high nibble."""
    values = tuple(float(code - 16 * (code > 7)) for code in range(16)) if precision == "int4" else VALUES
    with torch.inference_mode(False):  # it outlives the call, perhaps into code that is not in inference mode
        low, high = torch.tensor(values).repeat(16), torch.tensor(values).repeat_interleave(16)
        return torch.stack([low, high], dim=-1).view(torch.int64).flatten().to(device)


def probe_tensors(layout: SvdqLayout, device: torch.device) -> dict[str, Tensor]:
    """Stored tensors of a layer of 256 inputs and 128 outputs, in the order `tiles`, for trying backends.

    They have every code. Scales, smoothing factors and low-rank factors differ from channel to channel, and each has a
    large part in the result: a backend that reads one of them in another order, or not at all, is far off.
    """
    generator = torch.Generator().manual_seed(1)
    tensors: dict[str, Tensor] = {}
    for name, (shape, dtype) in torch_table(layout, 128, 256).items():
        if name == "qweight":
            nibbles = torch.randint(1, 16, (2, *shape), generator=generator)
            nibbles = torch.where(nibbles == 8, 7, nibbles)
            tensors[name] = (nibbles[0] | nibbles[1] << 4).to(torch.uint8).view(torch.int8)
            continue
        noise = torch.randn(shape, generator=generator)
        size = {"wscales": 0.01, "smooth_factor": 1.0, "wcscales": 1.0, "proj_down": 0.1, "proj_up": 0.1}[name]
        # Vectors and scales must be positive; factors may have any sign.
        tensors[name] = (size * (noise if name.startswith("proj") else (0.7 * noise).exp())).to(dtype)
    return {name: tensor.to(device) for name, tensor in tensors.items()}

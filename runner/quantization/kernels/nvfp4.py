"""Products of two NVFP4 matrices, weights and activations in four bits: quantise activations and multiply.

In:   activations, and a stored NVFP4 weight as `e2m1.NVFP4` lists it. Out: x w^T, without a bias.
Never: layers, names, LoRAs.

An activation is quantised when it is used: E2M1 codes, an e4m3 scale for every 16 columns, one float32 scale for all.
The scale of a group maps its largest magnitude to 6, or to 4 where that gives a smaller error ("four over six"): E2M1
has no value between 4 and 6, so that values just below the largest are rounded by up to a sixth of it. The error is
.087 instead of .095.

cuBLAS reads scales in tiles of 128 rows and 4 columns (`to_blocked`), and codes with the even column in the low nibble,
as stored here.
"""

from __future__ import annotations

from typing import Final, NamedTuple

import torch
from torch import Tensor

from runner.quantization.formats.e2m1 import LARGEST, NVFP4, dequantize

__all__ = [
    "Blocks",
    "block_scaled",
    "dequantize_blocks",
    "from_blocked",
    "multiply_blocked",
    "quantize_blocks",
    "reference",
    "to_blocked",
]

_GROUP: Final = NVFP4.group
_E4M3: Final = 448.0
# Where 4 is the better target, scales grow by a half; the largest must still fit e4m3.
_SCALE_HEADROOM: Final = 256.0
_SMALLEST_SCALE: Final = 1e-30
_TILE_ROWS, _TILE_COLUMNS = 128, 4


class Blocks(NamedTuple):
    """A matrix in NVFP4: value = code * scale * tensor_scale.

    packed uint8 [M, K/2], scale uint8 (bits of e4m3fn) [M, K/16] row-major, tensor_scale float32 [].
    """

    packed: Tensor
    scale: Tensor
    tensor_scale: Tensor


def quantize_blocks(x: Tensor) -> Blocks:
    """Quantise a floating `x` [M, K], K a multiple of 16. It has no branches on values, so a compiler can fuse it."""
    rows, columns = x.shape
    groups = x.reshape(rows, columns // _GROUP, _GROUP).float()
    largest = groups.abs().amax(dim=-1, keepdim=True)
    tensor_scale = (largest.amax() / (LARGEST * _SCALE_HEADROOM)).clamp(min=_SMALLEST_SCALE)
    six_scale, six, six_loss = _quantize_groups(groups, largest / LARGEST, tensor_scale)
    four_scale, four, four_loss = _quantize_groups(groups, largest / 4.0, tensor_scale)
    better = four_loss < six_loss
    codes = torch.where(better, four, six).view(rows, columns)
    scale = torch.where(better, four_scale.view(torch.uint8), six_scale.view(torch.uint8)).squeeze(-1)
    pairs = codes.view(rows, columns // 2, 2)
    return Blocks(pairs[..., 0] | (pairs[..., 1] << 4), scale, tensor_scale)


def _quantize_groups(groups: Tensor, exact: Tensor, tensor_scale: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """(e4m3 scale [M, G, 1], codes [M, G, 16], squared error [M, G, 1]) with the e4m3 scale nearest to `exact`."""
    scale = (exact / tensor_scale).clamp(max=_E4M3).to(torch.float8_e4m3fn)
    factor = scale.float() * tensor_scale
    # A group far below the tensor's largest gets scale 0, and all its values become 0.
    quotient = torch.where(factor > 0, groups / factor, torch.zeros_like(groups))
    codes, values = _nearest(quotient)
    return scale, codes, (groups - values * factor).square().sum(dim=-1, keepdim=True)


def _nearest(values: Tensor) -> tuple[Tensor, Tensor]:
    """The nearest E2M1 codes uint8, ties to even mantissa, and their values. Values beyond ±6 become ±6."""
    magnitude = values.abs().clamp(max=LARGEST)
    # Steps are 1/2 below 2, 1 below 4, 2 up to 6; round() rounds ties to even, like the format.
    step = torch.where(magnitude < 2.0, 0.5, torch.where(magnitude < 4.0, 1.0, 2.0))
    nearest = (magnitude / step).round() * step
    codes = torch.minimum(torch.minimum(nearest * 2, nearest + 2), nearest * 0.5 + 4)  # see `e2m1.encode_finite`
    negative = torch.signbit(values)
    return codes.to(torch.uint8) + negative.to(torch.uint8) * 8, torch.where(negative, -nearest, nearest)


def dequantize_blocks(blocks: Blocks, dtype: torch.dtype = torch.float32) -> Tensor:
    """Dequantise to values [M, K]."""
    tensors = {"weight_packed": blocks.packed, "weight_scale": blocks.scale, "weight_scale_2": blocks.tensor_scale}
    return dequantize(tensors, NVFP4, dtype)


def to_blocked(scale: Tensor) -> Tensor:
    """Put scales [rows, columns] into cuBLAS's order: flat, padded with zeros to multiples of 128 rows and 4 columns.

    The scale of (r, c) is at ((r // 128) * C / 4 + c // 4) * 512 + (r % 32) * 16 + (r % 128) // 32 * 4 + c % 4, with
    C columns after padding (cuBLAS documentation, "1D block scaling factors layout").
    """
    rows, columns = scale.shape
    down, across = -(-rows // _TILE_ROWS), -(-columns // _TILE_COLUMNS)
    padded = scale.new_zeros(down * _TILE_ROWS, across * _TILE_COLUMNS)
    padded[:rows, :columns] = scale
    # row = tile * 128 + quarter * 32 + lane
    return padded.view(down, 4, 32, across, _TILE_COLUMNS).permute(0, 3, 2, 1, 4).flatten()


def reference(x: Blocks, w: Blocks, dtype: torch.dtype) -> Tensor:
    """The definition: the product of the values in float32, rounded once to `dtype`. Any device."""
    return (dequantize_blocks(x) @ dequantize_blocks(w).T).to(dtype)


def from_blocked(blocked: Tensor, rows: int, columns: int) -> Tensor:
    """The inverse of `to_blocked` for scales that fill whole tiles: flat → [rows, columns]."""
    tiles = blocked.view(rows // _TILE_ROWS, columns // _TILE_COLUMNS, 32, 4, _TILE_COLUMNS)
    return tiles.permute(0, 3, 2, 1, 4).reshape(rows, columns)


def block_scaled(x: Blocks, w: Blocks, dtype: torch.dtype) -> Tensor:
    """cuBLASLt through `torch.nn.functional.scaled_mm` (torch 2.10 and later); compute capability 10.0 and 12.0.

    K a multiple of 32, N of 16. The weight's scales are reordered in each call: a sixteenth of a byte a weight.
    """
    x, w = (Blocks(blocks.packed, to_blocked(blocks.scale), blocks.tensor_scale) for blocks in (x, w))
    return multiply_blocked(x, w).to(dtype)


def multiply_blocked(x: Blocks, w: Blocks) -> Tensor:
    """`block_scaled` in bfloat16, for operands whose scales are in the order of `to_blocked`."""
    from torch.nn.functional import ScalingType, SwizzleType, scaled_mm

    recipe = [ScalingType.BlockWise1x16, ScalingType.TensorWise]
    swizzle = [SwizzleType.SWIZZLE_32_4_4, SwizzleType.NO_SWIZZLE]

    def scales(blocks: Blocks) -> list[Tensor]:
        return [blocks.scale.view(torch.float8_e4m3fn), blocks.tensor_scale.float().reshape(1)]

    result: Tensor = scaled_mm(
        x.packed.view(torch.float4_e2m1fn_x2),
        w.packed.view(torch.float4_e2m1fn_x2).t(),
        scale_a=scales(x),
        scale_recipe_a=recipe,
        scale_b=scales(w),
        scale_recipe_b=recipe,
        swizzle_a=swizzle,
        swizzle_b=swizzle,
        output_dtype=torch.bfloat16,
    )
    return result

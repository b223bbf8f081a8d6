"""SVDQ order: reorder the stored tensors of an SVDQ linear for a GEMM backend.

In:   stored tensors in one order. Out: the same bytes in the other, shapes and dtypes unchanged; the layer's factors
      joined with a LoRA's. Never: values, the choice of a backend.

    tiles   as in files: the order of nunchaku's kernels (`formats/svdq.py`)
    rows    qweight    [N, K/2], row-major, the even column in the low nibble
            wscales    int4: [K/64, N]; nvfp4: the order of cuBLAS (`nvfp4.to_blocked`), the same number of bytes
            proj_down  [K, r], proj_up [N, r], smooth_factor [K], wcscales [N], each in its plain order
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Final, Literal

import torch
from torch import Tensor

from runner.quantization.formats.svdq import (
    pack_lowrank,
    pack_scales,
    pack_vector,
    pad,
    tile_bytes,
    unpack_lowrank,
    unpack_scales,
    unpack_vector,
    untile_bytes,
)
from runner.quantization.formats.svdq_layout import RANK_MULTIPLE, SvdqPrecision
from runner.quantization.kernels.nvfp4 import from_blocked, to_blocked

__all__ = ["ROWS", "TILES", "Order", "join_factors", "reorder"]

Order = Literal["tiles", "rows"]
TILES: Final[Order] = "tiles"
ROWS: Final[Order] = "rows"


def reorder(name: str, tensor: Tensor, precision: SvdqPrecision, order: Order) -> Tensor:
    """Copy the stored tensor `name` of a layer from the other order into `order`; contiguous.

    Reordering there and back gives the same bytes.
    """
    match name:
        case "qweight":
            return untile_bytes(tensor) if order == ROWS else tile_bytes(tensor)
        case "wscales":
            return _scales_to_rows(tensor, precision) if order == ROWS else _scales_to_tiles(tensor, precision)
        case "proj_down":
            if order == ROWS:
                return unpack_lowrank(tensor, down=True).T.contiguous()
            return pack_lowrank(tensor.T, down=True)
        case "proj_up":
            return unpack_lowrank(tensor, down=False) if order == ROWS else pack_lowrank(tensor, down=False)
        case _:
            return unpack_vector(tensor) if order == ROWS else pack_vector(tensor)


def _scales_to_rows(packed: Tensor, precision: SvdqPrecision) -> Tensor:
    scales = unpack_scales(packed, precision)
    if precision == "int4":
        return scales.T.contiguous()
    return to_blocked(scales.view(torch.uint8)).view(packed.dtype).view(packed.shape)


def _scales_to_tiles(scales: Tensor, precision: SvdqPrecision) -> Tensor:
    groups, rows = scales.shape
    if precision == "int4":
        return pack_scales(scales.T.contiguous(), precision)
    plain = from_blocked(scales.view(torch.uint8).flatten(), rows, groups)
    return pack_scales(plain.view(scales.dtype), precision)


def join_factors(tensors: Mapping[str, Tensor], order: Order, lora_down: Tensor, lora_up: Tensor) -> dict[str, Tensor]:
    """Append the factors of a LoRA to the layer's factors, which increases their rank.

    lora_down [R, in], lora_up [out, R] in plain order; rounded to the stored factors' dtype, padded with zeros to the
    stored sides and to a rank that is a multiple of 16.
    """
    down, up = tensors["proj_down"], tensors["proj_up"]
    rank = -(-lora_down.shape[0] // RANK_MULTIPLE) * RANK_MULTIPLE
    extra_down = pad(lora_down.to(down.dtype), (rank, down.shape[0]))
    extra_up = pad(lora_up.to(up.dtype), (up.shape[0], rank))
    if order == ROWS:
        down, up = torch.cat([down, extra_down.T], dim=1), torch.cat([up, extra_up], dim=1)
    else:
        down = _join_tiles(down, pack_lowrank(extra_down, down=True))
        up = _join_tiles(up, pack_lowrank(extra_up, down=False))
    return {**tensors, "proj_down": down, "proj_up": up}


def _join_tiles(factor: Tensor, extra: Tensor) -> Tensor:
    """Packed factors [channels, rank] of the same channels, side by side: tiles of 16 by 16 follow one another."""
    tiles = [packed.view(packed.shape[0] // RANK_MULTIPLE, -1, RANK_MULTIPLE**2) for packed in (factor, extra)]
    return torch.cat(tiles, dim=1).view(factor.shape[0], -1)

"""SVDQ: put codes, scales, factors and vectors of a linear in SVDQuant W4A4 into the order of the kernels, and back.

In:   codes, scales, factors, vectors in plain order. Out: the same in the order of one warp's matrix instructions
      (mma.m16n8k64), and back, byte for byte; dequantised values; the layer's product in floats.
Never: models, files, names of layers, devices: pure functions. low_rank_split.py splits and scales a weight.

The order is that of nunchaku's kernels, also used by cache-dit and Nunchaku Lite. n is an output channel, k an input
channel, K the padded inputs, R the rank:

    weight    n = 128 nt + 16 np + 8 ns + nl, k = 64 kt + 32 ks + 8 kl + kr: nibble kr, the lowest first, of the int32
              word ((((nt (K/64) + kt) 8 + np) 8 + nl) 4 + kl) 4 + 2 ns + ks
    scales, int4, and vectors (one group)
              n = 128 t + 16 a + 8 b + 2 c + d: element (((t groups + g) 8 + a) 4 + c) 4 + 2 b + d
    scales, nvfp4
              n = 128 t + 32 p + 8 q + l, group 4 kt + gi: byte ((((t (K/64) + kt) 8 + l) 4 + q) 4 + p) 4 + gi
    factors   tiles of 16 by 16: channel (`up`) or rank (`down`) 8 ns + nl, the other one 8 ks + 2 kl + kr, of the tile
              (channel // 16, rank // 16): element ((nl 4 + kl) 2 + ns) 4 + 2 ks + kr of the tile
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Final

import torch
import torch.nn.functional as F
from torch import Tensor

from runner.quantization.formats.e2m1 import LARGEST, VALUES, encode_finite
from runner.quantization.formats.svdq_layout import RANK_MULTIPLE, TILE, SvdqLayout, SvdqPrecision

__all__ = [
    "INT4_LARGEST",
    "check_values",
    "dequantize_activations",
    "dequantize_residual",
    "effective_weight",
    "pack_lowrank",
    "pack_scales",
    "pack_vector",
    "pack_weight",
    "pad",
    "quantize_activations",
    "svdq_linear",
    "tile_bytes",
    "torch_table",
    "unpack_lowrank",
    "unpack_scales",
    "unpack_vector",
    "unpack_weight",
    "untile_bytes",
]

INT4_LARGEST: Final = 7  # of activations; weights have the code -8 too
_SIXTEEN_BITS: Final = (torch.bfloat16, torch.float16)
_E4M3_LARGEST: Final = 448.0
_SMALLEST: Final = 1e-30


def torch_table(
    layout: SvdqLayout, out_features: int, in_features: int
) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
    """`layout.tensor_table` with torch's dtypes."""
    table = layout.tensor_table(out_features, in_features)
    return {suffix: (shape, getattr(torch, dtype)) for suffix, (shape, dtype) in table.items()}


def pad(values: Tensor, sizes: tuple[int, ...], fill: float = 0) -> Tensor:
    """Pad `values` with `fill` at the end of each dimension up to `sizes`; return `values` itself if they match.

    Codes, factors, biases and scales are padded with zeros; a smoothing factor with ones, since x is divided by it.
    """
    if tuple(values.shape) == sizes:
        return values
    result = values.new_full(sizes, fill)
    result[tuple(slice(0, size) for size in values.shape)] = values
    return result


# The order of the kernels


def pack_weight(codes: Tensor, precision: SvdqPrecision) -> Tensor:
    """Codes [N, K] → int8 [N, K/2]. int4: signed integers of -8..7; nvfp4: E2M1 codes of 0..15.

    Raises ValueError for sides that are no multiples of 128 and for numbers that are no codes.
    """
    if codes.ndim != 2 or codes.dtype is torch.bool or codes.is_floating_point() or codes.is_complex():
        raise ValueError(f"codes are integers [N, K], not {codes.dtype} {list(codes.shape)}")
    rows, columns = codes.shape
    codes = codes.contiguous()
    _check_sides(rows, columns)
    low, high = (-8, 7) if precision == "int4" else (0, 15)
    if codes.numel() and (int(codes.min()) < low or int(codes.max()) > high):
        raise ValueError(f"{precision} has codes of {low} to {high}, not {int(codes.min())} to {int(codes.max())}")
    nibbles = codes.to(torch.uint8).bitwise_and(15).view(rows, columns // 2, 2)
    return tile_bytes((nibbles[..., 0] | nibbles[..., 1] << 4).view(torch.int8))


def unpack_weight(packed: Tensor, precision: SvdqPrecision) -> Tensor:
    """int8 [N, K/2] → codes [N, K]: int8 of -8..7 (int4), uint8 of 0..15 (nvfp4). The inverse of `pack_weight`."""
    pairs = untile_bytes(packed).view(torch.uint8)
    codes = torch.stack([pairs & 15, pairs >> 4], dim=-1).flatten(1)
    return codes if precision == "nvfp4" else (codes.view(torch.int8) << 4) >> 4


def tile_bytes(pairs: Tensor) -> Tensor:
    """Two codes a byte, int8 [N, K/2], row-major, the even column in the low nibble → a packed weight.

    A word of the kernels holds eight consecutive columns, so only whole bytes change their places.
    """
    rows, half = pairs.shape
    _check_sides(rows, half * 2)
    # (nt, np, ns, nl, kt, ks, kl, byte) → (nt, kt, np, nl, kl, ns, ks, byte)
    tiles = pairs.view(rows // 128, 8, 2, 8, half // 32, 2, 4, 4).permute(0, 4, 1, 3, 6, 2, 5, 7)
    return tiles.reshape(rows, half)


def untile_bytes(packed: Tensor) -> Tensor:
    """The inverse of `tile_bytes`. Raises ValueError for tensors that are no packed weight."""
    if packed.ndim != 2 or packed.dtype is not torch.int8:
        raise ValueError(f"a packed weight is int8 [N, K/2], not {packed.dtype} {list(packed.shape)}")
    rows, half = packed.shape
    _check_sides(rows, half * 2)
    # (nt, kt, np, nl, kl, ns, ks, byte) → (nt, np, ns, nl, kt, ks, kl, byte)
    tiles = packed.view(rows // 128, half // 32, 8, 8, 4, 2, 2, 4).permute(0, 2, 5, 3, 1, 6, 4, 7)
    return tiles.reshape(rows, half)


def pack_scales(scales: Tensor, precision: SvdqPrecision) -> Tensor:
    """Scales [N, groups] → [groups, N] in the same dtype: 16 bits (int4), float8_e4m3fn (nvfp4).

    Raises ValueError where N is no multiple of 128, groups no multiple of 2 (int4) or 8 (nvfp4), or for another dtype.
    """
    _check_scales(scales, precision)
    rows, groups = scales.shape
    _check_groups(rows, groups, precision)
    if precision == "int4":
        return scales.reshape(rows // 128, 8, 2, 4, 2, groups).permute(0, 5, 1, 3, 2, 4).reshape(groups, rows)
    plain = scales.view(torch.uint8).reshape(rows // 128, 4, 4, 8, groups // 4, 4)
    return plain.permute(0, 4, 3, 2, 1, 5).reshape(groups, rows).view(scales.dtype)


def unpack_scales(packed: Tensor, precision: SvdqPrecision) -> Tensor:
    """[groups, N] → scales [N, groups] in the same dtype: the inverse of `pack_scales`."""
    _check_scales(packed, precision)
    groups, rows = packed.shape
    _check_groups(rows, groups, precision)
    if precision == "int4":
        return packed.reshape(rows // 128, groups, 8, 4, 2, 2).permute(0, 2, 4, 3, 5, 1).reshape(rows, groups)
    tiles = packed.view(torch.uint8).reshape(rows // 128, groups // 4, 8, 4, 4, 4)
    return tiles.permute(0, 4, 3, 2, 1, 5).reshape(rows, groups).view(packed.dtype)


def pack_vector(vector: Tensor) -> Tensor:
    """A bias, a smoothing factor or channel scales, [N] in 16 bits → [N]. Raises ValueError unless 128 divides N."""
    _check_vector(vector)
    return vector.reshape(-1, 8, 2, 4, 2).permute(0, 1, 3, 2, 4).reshape(-1)


def unpack_vector(packed: Tensor) -> Tensor:
    """The inverse of `pack_vector`."""
    _check_vector(packed)
    return packed.reshape(-1, 8, 4, 2, 2).permute(0, 1, 3, 2, 4).reshape(-1)


def pack_lowrank(factor: Tensor, *, down: bool) -> Tensor:
    """A factor in 16 bits: `down` [R, K] → [K, R], else `up` [N, R] → [N, R].

    Raises ValueError where rank or channels are no multiple of 16.
    """
    if factor.ndim != 2:
        raise ValueError(f"a factor is a matrix, not {list(factor.shape)}")
    channels, rank = factor.shape[::-1] if down else factor.shape
    _check_lowrank(channels, rank, factor.dtype)
    first, second = factor.shape
    # (tile, ns, nl, tile, ks, kl, kr), the tiles of the channels first
    tiles = factor.reshape(first // 16, 2, 8, second // 16, 2, 4, 2)
    order = (3, 0, 2, 5, 1, 4, 6) if down else (0, 3, 2, 5, 1, 4, 6)
    return tiles.permute(order).reshape(channels, rank)


def unpack_lowrank(packed: Tensor, *, down: bool) -> Tensor:
    """[K, R] → `down` [R, K], or [N, R] → `up` [N, R]: the inverse of `pack_lowrank`."""
    if packed.ndim != 2:
        raise ValueError(f"a packed factor is a matrix, not {list(packed.shape)}")
    channels, rank = packed.shape
    _check_lowrank(channels, rank, packed.dtype)
    # (tile of channels, tile of ranks, nl, kl, ns, ks, kr)
    tiles = packed.reshape(channels // 16, rank // 16, 8, 4, 2, 2, 2)
    if down:
        return tiles.permute(1, 4, 2, 0, 5, 3, 6).reshape(rank, channels)
    return tiles.permute(0, 4, 2, 1, 5, 3, 6).reshape(channels, rank)


def _check_sides(rows: int, columns: int) -> None:
    if rows < 1 or columns < 1 or rows % TILE or columns % TILE:
        raise ValueError(f"[{rows}, {columns}]: both sides must be multiples of {TILE}; pad them")


def _check_scales(scales: Tensor, precision: SvdqPrecision) -> None:
    allowed = _SIXTEEN_BITS if precision == "int4" else (torch.float8_e4m3fn,)
    if scales.ndim != 2 or scales.dtype not in allowed:
        dtypes = " or ".join(str(dtype) for dtype in allowed)
        raise ValueError(f"scales of {precision} are a matrix of {dtypes}, not {scales.dtype} {list(scales.shape)}")


def _check_groups(rows: int, groups: int, precision: SvdqPrecision) -> None:
    multiple = 2 if precision == "int4" else 8  # of 128 input channels
    if rows < 1 or groups < 1 or rows % TILE or groups % multiple:
        raise ValueError(
            f"scales of {rows} outputs and {groups} groups: {precision} needs multiples of {TILE} and {multiple}; pad "
            "them"
        )


def _check_vector(vector: Tensor) -> None:
    if vector.ndim != 1 or vector.dtype not in _SIXTEEN_BITS or not vector.numel() or vector.numel() % TILE:
        raise ValueError(
            f"a vector has 16 bits and a multiple of {TILE} channels, not {vector.dtype} {list(vector.shape)}"
        )


def _check_lowrank(channels: int, rank: int, dtype: torch.dtype) -> None:
    if dtype not in _SIXTEEN_BITS:
        raise ValueError(f"factors have 16 bits, not {dtype}")
    if rank < 1 or rank % RANK_MULTIPLE or channels < 1 or channels % RANK_MULTIPLE:
        raise ValueError(f"factors of {channels} channels and rank {rank}: both must be multiples of {RANK_MULTIPLE}")


# Values of stored tensors


def dequantize_residual(tensors: Mapping[str, Tensor], layout: SvdqLayout) -> Tensor:
    """Dequantise the residual of the smoothed weight: float32 [N, K] as padded."""
    codes = unpack_weight(tensors["qweight"], layout.precision)
    scales = unpack_scales(tensors["wscales"], layout.precision).float()
    values = _values(codes, layout.precision)
    rows, columns = values.shape
    values = (values.view(rows, -1, layout.group) * scales.unsqueeze(-1)).view(rows, columns)
    if layout.precision == "nvfp4":
        values = values * unpack_vector(tensors["wcscales"]).float().unsqueeze(1)
    return values


def check_values(tensors: Mapping[str, Tensor]) -> None:
    """Check a layer's stored values. Raises ValueError with the suffix of the wrong tensor.

    Scales and channel scales must be finite and not negative, smoothing factors finite and above zero, factors finite.
    Any code is valid. The order of the tensors, the kernels' or a plain one, does not matter here.
    """
    for suffix, tensor in tensors.items():
        if not tensor.is_floating_point():
            continue
        if (
            tensor.dtype is torch.float8_e4m3fn
        ):  # by its bits: the dtype has no infinity, and torch few operations on it
            bits = tensor.view(torch.uint8)
            infinite, negative = (bits & 127) == 127, bits > 128
        else:
            infinite, negative = ~torch.isfinite(tensor), tensor < 0
        if bool(infinite.any()):
            raise ValueError(f"{suffix} holds NaN or infinity, {int(infinite.sum())} of {infinite.numel()} numbers")
        if suffix == "smooth_factor" and not bool((tensor > 0).all()):
            raise ValueError(f"{suffix} holds numbers of zero or below, {int((tensor <= 0).sum())}; x is divided by it")
        if suffix in ("wscales", "wcscales") and bool(negative.any()):
            raise ValueError(f"{suffix} holds negative scales, {int(negative.sum())}")


def effective_weight(tensors: Mapping[str, Tensor], layout: SvdqLayout) -> Tensor:
    """Dequantise the whole weight, float32 [N, K] as padded: residual / s + up down."""
    smooth = unpack_vector(tensors["smooth_factor"]).float()
    up, down = unpack_lowrank(tensors["proj_up"], down=False), unpack_lowrank(tensors["proj_down"], down=True)
    return torch.addmm(dequantize_residual(tensors, layout) / smooth, up.float(), down.float())


def quantize_activations(x: Tensor, precision: SvdqPrecision) -> tuple[Tensor, Tensor]:
    """Quantise smoothed activations [M, K] by groups: codes [M, K] and scales [M, groups].

    int4: int8 codes of -7..7, scales of x's dtype, largest magnitude / 7 in 64 columns. nvfp4: E2M1 codes, e4m3 scales,
    largest magnitude / 6 in 16 columns, 448 at most. A group of zeros has codes 0. As in nunchaku's kernels, codes are
    chosen for the scale before it is rounded. e4m3 loses bits below 1/64 and all bits below 1/1024. A smoothing factor
    that leaves x / s near 1 and above keeps the scales in the range where they are exact to 1/16.

    A group with NaN or an infinity has no finite scale, so that its row is not finite and a check of the model's output
    finds it. Raises ValueError where x is no matrix of floats with whole groups.
    """
    group = 64 if precision == "int4" else 16
    if x.ndim != 2 or not x.is_floating_point() or x.shape[1] % group:
        raise ValueError(f"activations are floats [M, K], K in groups of {group}, not {x.dtype} {list(x.shape)}")
    groups = x.reshape(x.shape[0], x.shape[1] // group, group).float()
    peaks = groups.abs().amax(dim=-1)
    exact = peaks / INT4_LARGEST if precision == "int4" else (peaks / LARGEST).clamp(max=_E4M3_LARGEST)
    exact = torch.where(peaks.isfinite(), exact, torch.nan)
    quotients = (groups / exact.clamp(min=_SMALLEST).unsqueeze(-1)).nan_to_num(nan=0)
    if precision == "int4":
        codes = quotients.round().clamp(-INT4_LARGEST, INT4_LARGEST).to(torch.int8)
        scales = exact.to(x.dtype)
    else:
        codes, scales = encode_finite(quotients.clamp(-LARGEST, LARGEST)), exact.to(torch.float8_e4m3fn)
    return codes.reshape(x.shape), scales


def dequantize_activations(codes: Tensor, scales: Tensor, precision: SvdqPrecision) -> Tensor:
    """The inverse of `quantize_activations`: float32 [M, K]."""
    (rows, columns), groups = codes.shape, scales.shape[1]
    values = _values(codes, precision).reshape(rows, groups, columns // groups)
    return (values * scales.float().unsqueeze(-1)).reshape(rows, columns)


def _values(codes: Tensor, precision: SvdqPrecision) -> Tensor:
    # E2M1 by the table: `e2m1.decode` reads the largest code, which waits for the device
    return codes.float() if precision == "int4" else torch.tensor(VALUES, device=codes.device)[codes.long()]


def svdq_linear(
    x: Tensor, tensors: Mapping[str, Tensor], layout: SvdqLayout, out_features: int, bias: Tensor | None = None
) -> Tensor:
    """The definition of the layer's product: x [..., in] → [..., out_features] in x's dtype; any device.

    x / s is rounded to x's dtype, quantised by groups, and multiplied with the residual in float32; the low-rank part
    multiplies x itself. `bias` [out_features] in plain order. x and the result are not padded. Raises ValueError where
    x is wider than the weight, or the outputs or the bias do not fit it. Where x / s or the result leaves the range of
    x's dtype (65504 in float16), the result is not finite.
    """
    rows, columns = tensors["qweight"].shape[0], tensors["qweight"].shape[1] * 2
    if not x.is_floating_point() or not x.ndim or x.shape[-1] > columns or not 0 < out_features <= rows:
        raise ValueError(
            f"{x.dtype} {list(x.shape)} → {out_features} outputs: the weight has [{rows}, {columns}], as padded"
        )
    if bias is not None and tuple(bias.shape) != (out_features,):
        raise ValueError(f"a bias of {list(bias.shape)} does not fit {out_features} outputs")
    flat = F.pad(x.reshape(-1, x.shape[-1]), (0, columns - x.shape[-1]))
    smoothed = flat / unpack_vector(tensors["smooth_factor"]).to(flat.dtype)
    codes, scales = quantize_activations(smoothed, layout.precision)
    result = dequantize_activations(codes, scales, layout.precision) @ dequantize_residual(tensors, layout).T
    down, up = unpack_lowrank(tensors["proj_down"], down=True), unpack_lowrank(tensors["proj_up"], down=False)
    result = result.addmm_(flat.float() @ down.float().T, up.float().T)[:, :out_features]
    if bias is not None:
        result = result + bias.float()
    return result.to(x.dtype).view(*x.shape[:-1], out_features)

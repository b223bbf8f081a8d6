"""The 4-bit number format E2M1, the two layouts built on it, and the one table of what a stored weight consists of.

In: float tensors, or codes, or the stored tensors of one weight. Out: codes, bytes, or the weight's values.
Which scale a group gets is chosen in `scales`; files, layers and kernels are written elsewhere, by this table.
It will never know: names of layers, files, devices' favourite layouts.

A code has four bits: bit 3 is the sign, bits 2-1 the exponent, bit 0 the mantissa; codes 0..7 are
0, 0.5, 1, 1.5, 2, 3, 4, 6 and code 8 is -0 (OCP Microscaling Formats, version 1.0, section 5.3.3).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Final, Literal

import torch
from torch import Tensor

__all__ = ["FORMATS", "G32", "LARGEST", "NVFP4", "VALUES", "Format", "decode", "dequantize", "encode", "pack", "unpack"]

VALUES: Final = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0, -0.0, -0.5, -1.0, -1.5, -2.0, -3.0, -4.0, -6.0)
LARGEST: Final = 6.0
# Adding 2**22 * 2**e to a float32 x of [2**e, 2**(e+1)) leaves exactly one mantissa bit of x, rounded to even.
_ONE_MANTISSA_BIT: Final = float(2**22)
_EXPONENT_BITS: Final = 0x7F800000


@dataclass(frozen=True)
class Format:
    """How one weight [out_features, in_features] is stored: E2M1 codes, and a scale for every `group` input columns."""

    name: str
    group: int
    scale: Literal["bf16", "e4m3"]
    tensor_scale: bool  # one more float32 scale for the whole weight

    def fits(self, in_features: int) -> bool:
        return in_features > 0 and in_features % self.group == 0

    def tensors(self, out_features: int, in_features: int) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
        """Suffix → (shape, dtype) of each tensor: the names in a file, the parameters of a layer.

        weight_packed   uint8 [out, in/2]: two codes a byte, the even input column in the low nibble
        weight_scale    bfloat16 [out, in/group] (g32), or the bits of float8_e4m3fn as uint8 (nvfp4); row-major
        weight_scale_2  float32 [] (nvfp4): w = code * weight_scale * weight_scale_2

        Raises ValueError where `in_features` is no multiple of the group. Padding instead would need a width stored
        beside the shapes, and no GEMM that reads the format takes such a width; every linear of the models here has one
        that fits, and a layer that does not stays in 16 bits by the recipe's rule.
        """
        if out_features < 1 or not self.fits(in_features):
            raise ValueError(
                f"a weight of [{out_features}, {in_features}] cannot be stored as {self.name}: the input width must be "
                f"a positive multiple of its group, {self.group}; keep this layer in 16 bits"
            )
        scale_dtype = torch.bfloat16 if self.scale == "bf16" else torch.uint8
        table: dict[str, tuple[tuple[int, ...], torch.dtype]] = {
            "weight_packed": ((out_features, in_features // 2), torch.uint8),
            "weight_scale": ((out_features, in_features // self.group), scale_dtype),
        }
        if self.tensor_scale:
            table["weight_scale_2"] = ((), torch.float32)
        return table

    def bytes(self, out_features: int, in_features: int) -> int:
        """Stored bytes of one weight."""
        total = 0
        for shape, dtype in self.tensors(out_features, in_features).values():
            total += torch.Size(shape).numel() * dtype.itemsize
        return total

    @property
    def bits_per_weight(self) -> float:
        """Codes and group scales; the 32 bits of a tensor scale vanish in any real weight."""
        return 4 + (16 if self.scale == "bf16" else 8) / self.group

    def shape_of(self, tensors: Mapping[str, Tensor]) -> tuple[int, int]:
        """(out_features, in_features) of a stored weight; ValueError where names, shapes or dtypes do not add up."""
        packed = tensors.get("weight_packed")
        if packed is None or packed.ndim != 2:
            raise ValueError(f"{self.name}: no two-dimensional weight_packed among {sorted(tensors)}")
        out_features, in_features = packed.shape[0], packed.shape[1] * 2
        expected = self.tensors(out_features, in_features)
        found = {name: (tuple(tensor.shape), tensor.dtype) for name, tensor in tensors.items()}
        if found != expected:
            wrong = sorted(name for name in expected.keys() | found.keys() if expected.get(name) != found.get(name))
            raise ValueError(
                f"{self.name} [{out_features}, {in_features}] does not add up: "
                + "; ".join(f"{name} is {found.get(name)}, should be {expected.get(name)}" for name in wrong)
            )
        return out_features, in_features

    def group_scales(self, tensors: Mapping[str, Tensor]) -> Tensor:
        """The scale of every group, float32 [out, in/group], tensor scale included: the factor of a code."""
        scale = tensors["weight_scale"]
        factors = scale.float() if self.scale == "bf16" else scale.view(torch.float8_e4m3fn).float()
        return factors * tensors["weight_scale_2"] if self.tensor_scale else factors

    def check(self, tensors: Mapping[str, Tensor]) -> tuple[int, int]:
        """`shape_of`, and every scale finite and not negative; ValueError otherwise. Any code is a valid one."""
        shape = self.shape_of(tensors)
        factors = self.group_scales(tensors)
        if not bool(torch.isfinite(factors).all()):
            raise ValueError(f"{self.name}: {int((~torch.isfinite(factors)).sum())} scales are NaN or infinite")
        if bool((factors < 0).any()):
            raise ValueError(f"{self.name}: {int((factors < 0).sum())} scales are negative")
        return shape


G32: Final = Format("g32", group=32, scale="bf16", tensor_scale=False)
NVFP4: Final = Format("nvfp4", group=16, scale="e4m3", tensor_scale=True)
FORMATS: Final[Mapping[str, Format]] = {fmt.name: fmt for fmt in (G32, NVFP4)}


def encode(values: Tensor) -> Tensor:
    """The nearest code of every value, uint8 of the same shape.

    Ties go to the code with mantissa bit 0 (0.75 → 1, 2.5 → 2, 5 → 4), values beyond ±6 to ±6, signs of zeros are kept.
    Raises ValueError for NaN and infinities: no code stands for either.
    """
    if not bool(torch.isfinite(values).all()):
        raise ValueError("E2M1 has no code for NaN or infinity")
    return encode_finite(values.float().clamp(-LARGEST, LARGEST))


def encode_finite(values: Tensor) -> Tensor:
    """`encode` of float32 values that are known to be finite and smaller than 2**22."""
    magnitudes = values.abs()
    rounded = round_magnitudes(magnitudes, torch.empty_like(values), magnitudes.clone())
    # 0, .5, 1, 1.5, 2 are 2v; 2, 3, 4 are v + 2; 4, 6 are v/2 + 4: three lines, and the lowest one is the code.
    codes = torch.minimum(rounded * 2, rounded + 2)
    torch.minimum(codes, rounded.mul_(0.5).add_(4), out=codes)
    return codes.to(torch.uint8).add_(torch.signbit(values), alpha=8)


def round_magnitudes(magnitudes: Tensor, out: Tensor, scratch: Tensor) -> Tensor:
    """float32 in [0, 2**22) to the nearest of 0, .5, 1, 1.5, 2, 3, 4, 6, ties to even, into `out`; beyond 5 it is 6.

    `scratch` is overwritten. Both are the caller's, who may use them again: fresh ones cost more than the arithmetic.
    """
    torch.clamp(magnitudes, min=1, max=LARGEST, out=scratch)  # below 1 the grid keeps the step it has in [1, 2)
    scratch.view(torch.int32).bitwise_and_(_EXPONENT_BITS)
    torch.add(magnitudes, scratch, alpha=_ONE_MANTISSA_BIT, out=out)
    return out.sub_(scratch, alpha=_ONE_MANTISSA_BIT).clamp_(max=LARGEST)


def decode(codes: Tensor) -> Tensor:
    """Codes 0..15 (uint8, any shape) to their values, float32 of the same shape. ValueError for other numbers."""
    if codes.numel() and int(codes.max()) > 15:
        raise ValueError(f"{int(codes.max())} is no E2M1 code; packed bytes want `unpack` first")
    return torch.tensor(VALUES, device=codes.device)[codes.long()]


def pack(codes: Tensor) -> Tensor:
    """Codes uint8 [..., in] to bytes [..., in/2], the even column in the low nibble. `in` must be even."""
    if codes.shape[-1] % 2:
        raise ValueError(f"an odd number of columns, {codes.shape[-1]}, does not fill whole bytes")
    return codes[..., 0::2] | (codes[..., 1::2] << 4)


def unpack(packed: Tensor) -> Tensor:
    """Bytes uint8 [..., in/2] to codes [..., in]: the inverse of `pack`."""
    return torch.stack([packed & 0xF, packed >> 4], dim=-1).flatten(-2)


def dequantize(tensors: Mapping[str, Tensor], fmt: Format, dtype: torch.dtype = torch.float32) -> Tensor:
    """The weight [out, in] that stored tensors stand for: the reference that every kernel is compared with.

    One product in float32, code * (weight_scale * weight_scale_2), then one rounding to `dtype`. ValueError where the
    tensors do not fit the format. It takes about 16 bytes a weight on the way; `kernels` has those that take none.
    """
    out_features, in_features = fmt.shape_of(tensors)
    codes = decode(unpack(tensors["weight_packed"])).view(out_features, in_features // fmt.group, fmt.group)
    values = codes * fmt.group_scales(tensors).unsqueeze(-1)
    return values.view(out_features, in_features).to(dtype)

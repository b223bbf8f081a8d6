"""The 4-bit number format E2M1 and the two formats of weights built on it.

In:   float tensors, or codes, or the stored tensors of one weight. Out: codes, bytes, or the weight's values.
      `fp4_layout` lists the stored tensors of a weight; `scales` chooses the scale of a group.
Never: names of layers, files, layouts of single devices.

A code has four bits: bit 3 is the sign, bits 2-1 the exponent, bit 0 the mantissa; codes 0..7 are
0, 0.5, 1, 1.5, 2, 3, 4, 6 and code 8 is -0 (OCP Microscaling Formats, version 1.0, section 5.3.3).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Final

import torch
from torch import Tensor

from runner.quantization.formats.fp4_layout import LAYOUTS, Layout

__all__ = ["FORMATS", "G32", "LARGEST", "NVFP4", "VALUES", "Format", "decode", "dequantize", "encode", "pack", "unpack"]

VALUES: Final = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0, -0.0, -0.5, -1.0, -1.5, -2.0, -3.0, -4.0, -6.0)
LARGEST: Final = 6.0
# Adding 2**22 * 2**e to a float32 x of [2**e, 2**(e+1)) leaves exactly one mantissa bit of x, rounded to even.
_ONE_MANTISSA_BIT: Final = float(2**22)
_EXPONENT_BITS: Final = 0x7F800000


@dataclass(frozen=True)
class Format(Layout):
    """A `Layout` with torch's dtypes, and checks of a stored weight's tensors."""

    def tensors(self, out_features: int, in_features: int) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
        """`tensor_table` with torch's dtypes. Raises ValueError where `in_features` is no multiple of the group."""
        table = self.tensor_table(out_features, in_features)
        return {suffix: (shape, getattr(torch, dtype)) for suffix, (shape, dtype) in table.items()}

    def weight_shape(self, tensors: Mapping[str, Tensor]) -> tuple[int, int]:
        """(out_features, in_features) of a stored weight. Raises ValueError for wrong names, shapes or dtypes."""
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
        """The factor of each group's codes, float32 [out, in/group]: its scale times the tensor scale."""
        scale = tensors["weight_scale"]
        factors = scale.float() if self.scale == "bf16" else scale.view(torch.float8_e4m3fn).float()
        return factors * tensors["weight_scale_2"] if self.tensor_scale else factors

    def check(self, tensors: Mapping[str, Tensor]) -> tuple[int, int]:
        """Check names, shapes, dtypes and that every scale is finite and not negative; any code is valid.

        Returns (out_features, in_features). Raises ValueError.
        """
        shape = self.weight_shape(tensors)
        factors = self.group_scales(tensors)
        if not bool(torch.isfinite(factors).all()):
            raise ValueError(f"{self.name}: {int((~torch.isfinite(factors)).sum())} scales are NaN or infinite")
        if bool((factors < 0).any()):
            raise ValueError(f"{self.name}: {int((factors < 0).sum())} scales are negative")
        return shape


FORMATS: Final[Mapping[str, Format]] = {name: Format(**vars(layout)) for name, layout in LAYOUTS.items()}
G32: Final = FORMATS["g32"]
NVFP4: Final = FORMATS["nvfp4"]


def encode(values: Tensor) -> Tensor:
    """The nearest code of every value, uint8 of the same shape.

    Ties go to the code with mantissa bit 0 (0.75 → 1, 2.5 → 2, 5 → 4), values beyond ±6 to ±6, signs of zeros are kept.
    Raises ValueError for NaN and infinities, which have no code.
    """
    if not bool(torch.isfinite(values).all()):
        raise ValueError("E2M1 has no code for NaN or infinity")
    return encode_finite(values.float().clamp(-LARGEST, LARGEST))


def encode_finite(values: Tensor) -> Tensor:
    """`encode` of float32 values that are known to be finite and smaller than 2**22."""
    magnitudes = values.abs()
    rounded = round_magnitudes(magnitudes, torch.empty_like(values), magnitudes.clone())
    # The code is 2v for 0, .5, 1, 1.5, 2; v + 2 for 2, 3, 4; v/2 + 4 for 4, 6: the smallest of the three lines.
    codes = torch.minimum(rounded * 2, rounded + 2)
    torch.minimum(codes, rounded.mul_(0.5).add_(4), out=codes)
    return codes.to(torch.uint8).add_(torch.signbit(values), alpha=8)


def round_magnitudes(magnitudes: Tensor, out: Tensor, scratch: Tensor) -> Tensor:
    """float32 in [0, 2**22) to the nearest of 0, .5, 1, 1.5, 2, 3, 4, 6, ties to even, into `out`; beyond 5 it is 6.

    `scratch` is overwritten. The caller can use both again: new ones cost more than the arithmetic.
    """
    torch.clamp(magnitudes, min=1, max=LARGEST, out=scratch)  # below 1 the step is the same as in [1, 2)
    scratch.view(torch.int32).bitwise_and_(_EXPONENT_BITS)
    torch.add(magnitudes, scratch, alpha=_ONE_MANTISSA_BIT, out=out)
    return out.sub_(scratch, alpha=_ONE_MANTISSA_BIT).clamp_(max=LARGEST)


def decode(codes: Tensor) -> Tensor:
    """Codes 0..15 (uint8, any shape) to their values, float32 of the same shape. ValueError for other numbers."""
    if codes.numel() and int(codes.max()) > 15:
        raise ValueError(f"{int(codes.max())} is no E2M1 code; use `unpack` on packed bytes first")
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
    """Dequantise stored tensors to the weight [out, in]: the reference for every kernel.

    One product in float32, code * (weight_scale * weight_scale_2), then one rounding to `dtype`. Raises ValueError
    where the tensors do not fit the format. It needs about 16 bytes of temporary memory a weight; `kernels` has faster
    ones that need none.
    """
    out_features, in_features = fmt.weight_shape(tensors)
    codes = decode(unpack(tensors["weight_packed"])).view(out_features, in_features // fmt.group, fmt.group)
    values = codes * fmt.group_scales(tensors).unsqueeze(-1)
    return values.view(out_features, in_features).to(dtype)

"""FP4 layout: the table of a stored 4-bit weight's tensors. Needs no torch.

In:   the name of a number format, the shape of a weight. Out: names, shapes and dtypes of tensors, bytes.
Never: values of tensors; e2m1.py encodes and decodes them.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Final, Literal

from runner.quantization.formats.stored_dtypes import DTYPE_BYTES

__all__ = ["LAYOUTS", "Layout"]


@dataclass(frozen=True)
class Layout:
    """The storage of one weight [out_features, in_features]: E2M1 codes, a scale for every `group` input columns."""

    name: str
    group: int
    scale: Literal["bf16", "e4m3"]
    tensor_scale: bool  # one more float32 scale for the whole weight
    packed: str = "weight_packed"  # the tensor whose name marks a stored layer

    def fits(self, in_features: int) -> bool:
        return in_features > 0 and in_features % self.group == 0

    def padded(self, out_features: int, in_features: int) -> tuple[int, int]:
        """The stored shape, which is the weight's: nothing is padded."""
        return out_features, in_features

    def unpacked_shape(self, shape: tuple[int, int]) -> tuple[int, int]:
        """(out_features, in_features) of a weight whose packed codes have this shape."""
        return shape[0], shape[1] * 2

    def tensor_table(self, out_features: int, in_features: int) -> dict[str, tuple[tuple[int, ...], str]]:
        """Suffix → (shape, torch's name of the dtype) of each tensor: the names in a file, the parameters of a layer.

        weight_packed   uint8 [out, in/2]: two codes a byte, the even input column in the low nibble
        weight_scale    bfloat16 [out, in/group] (g32), or the bits of float8_e4m3fn as uint8 (nvfp4); row-major
        weight_scale_2  float32 [] (nvfp4): w = code * weight_scale * weight_scale_2

        Raises ValueError where `in_features` is no multiple of the group. Padding would need a width stored beside the
        shapes, and no GEMM that reads the format takes such a width. The widths of all linears of the models here fit;
        a rule keeps a layer that does not fit in 16 bits.
        """
        if out_features < 1 or not self.fits(in_features):
            raise ValueError(
                f"a weight of [{out_features}, {in_features}] cannot be stored as {self.name}: the input width must be "
                f"a positive multiple of its group, {self.group}; keep this layer in 16 bits"
            )
        table: dict[str, tuple[tuple[int, ...], str]] = {
            "weight_packed": ((out_features, in_features // 2), "uint8"),
            "weight_scale": (
                (out_features, in_features // self.group),
                "bfloat16" if self.scale == "bf16" else "uint8",
            ),
        }
        if self.tensor_scale:
            table["weight_scale_2"] = ((), "float32")
        return table

    def bytes(self, out_features: int, in_features: int) -> int:
        """Stored bytes of one weight."""
        table = self.tensor_table(out_features, in_features)
        return sum(math.prod(shape) * DTYPE_BYTES[dtype] for shape, dtype in table.values())

    @property
    def bits_per_weight(self) -> float:
        """Bits of codes and group scales; the 32 bits of the tensor scale are negligible."""
        return 4 + (16 if self.scale == "bf16" else 8) / self.group


LAYOUTS: Final[Mapping[str, Layout]] = {
    layout.name: layout
    for layout in (
        Layout("g32", group=32, scale="bf16", tensor_scale=False),
        Layout("nvfp4", group=16, scale="e4m3", tensor_scale=True),
    )
}

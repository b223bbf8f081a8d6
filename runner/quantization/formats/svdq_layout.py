"""SVDQ layout: the table of a stored linear's tensors in SVDQuant W4A4. Needs no torch.

In:   the name of a number format, the shape of a weight, a rank. Out: names, shapes and dtypes of tensors, bytes.
Never: values of tensors; svdq.py packs and unpacks them.

A weight W [out, in] is a low-rank part and a residual in four bits, R, both of the smoothed weight W * s:

    y = Q(x / s) R^T + (x down^T) up^T + bias        s [in]: the smoothing factor; down [r, in], up [out, r]

`down` is stored divided by s, so that it multiplies x itself. Names are those of `SVDQW4A4Linear`, nunchaku's linear
layer (version 1); diffusers' Nunchaku Lite and cache-dit use them, too.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from types import MappingProxyType
from typing import Final, Literal

from runner.quantization.formats.stored_dtypes import DTYPE_BYTES

__all__ = ["MOST_RANK", "RANK_MULTIPLE", "SVDQ_LAYOUTS", "TILE", "SvdqLayout", "SvdqPrecision"]

SvdqPrecision = Literal["int4", "nvfp4"]
TILE: Final = 128  # side of the kernels' tiles; outputs and inputs of a weight are padded to multiples of it
RANK_MULTIPLE: Final = 16  # side of a tile of the low-rank factors
MOST_RANK: Final = 512


@dataclass(frozen=True)
class SvdqLayout:
    """The storage of one linear: four-bit codes, a scale for every `group` input columns, factors of `rank`."""

    name: str  # in files and recipes
    precision: SvdqPrecision  # of weights and activations
    group: int
    rank: int = 32
    packed: str = "qweight"  # the tensor whose name marks a stored layer

    def with_rank(self, rank: int) -> SvdqLayout:
        """The same layout with factors of another rank. Raises ValueError for a rank that no kernel takes."""
        if rank % RANK_MULTIPLE or not RANK_MULTIPLE <= rank <= MOST_RANK:
            raise ValueError(f"a rank of {rank}: multiples of {RANK_MULTIPLE} up to {MOST_RANK} are taken")
        return replace(self, rank=rank)

    def fits(self, in_features: int) -> bool:
        """True for every width: inputs are padded."""
        return in_features > 0

    def padded(self, out_features: int, in_features: int) -> tuple[int, int]:
        """The stored shape: both sides rounded up to whole tiles."""
        return -(-out_features // TILE) * TILE, -(-in_features // TILE) * TILE

    def unpacked_shape(self, shape: tuple[int, int]) -> tuple[int, int]:
        """(out_features, in_features), as padded, of a weight whose packed codes have this shape."""
        return shape[0], shape[1] * 2

    def tensor_table(self, out_features: int, in_features: int) -> dict[str, tuple[tuple[int, ...], str]]:
        """Suffix → (shape, torch's name of the dtype) of each tensor; N and K are the padded outputs and inputs.

        qweight        int8 [N, K/2]: two codes a byte
        wscales        bfloat16 [K/64, N] (int4) or float8_e4m3fn [K/16, N] (nvfp4)
        wcscales       bfloat16 [N] (nvfp4): a factor per output channel, which includes the tensor's scale
        smooth_factor  bfloat16 [K]: x is divided by it
        proj_down      bfloat16 [K, r]: multiplies x itself
        proj_up        bfloat16 [N, r]

        The bias is not in the table: it has the layer's width and a plain order. ValueError for a side below one.
        """
        if out_features < 1 or in_features < 1:
            raise ValueError(f"a weight of [{out_features}, {in_features}] cannot be stored as {self.name}")
        rows, columns = self.padded(out_features, in_features)
        scales = "bfloat16" if self.precision == "int4" else "float8_e4m3fn"
        table: dict[str, tuple[tuple[int, ...], str]] = {
            "qweight": ((rows, columns // 2), "int8"),
            "wscales": ((columns // self.group, rows), scales),
            "smooth_factor": ((columns,), "bfloat16"),
            "proj_down": ((columns, self.rank), "bfloat16"),
            "proj_up": ((rows, self.rank), "bfloat16"),
        }
        if self.precision == "nvfp4":
            table["wcscales"] = ((rows,), "bfloat16")
        return table

    def bytes(self, out_features: int, in_features: int) -> int:
        """Stored bytes of one linear without its bias."""
        table = self.tensor_table(out_features, in_features)
        return sum(math.prod(shape) * DTYPE_BYTES[dtype] for shape, dtype in table.values())

    @property
    def bits_per_weight(self) -> float:
        """Bits of codes and group scales, without factors and vectors, whose share depends on the shape."""
        return 4 + (16 if self.precision == "int4" else 8) / self.group


SVDQ_LAYOUTS: Final[Mapping[str, SvdqLayout]] = MappingProxyType(
    {
        layout.name: layout
        for layout in (
            SvdqLayout("svdq-int4", "int4", group=64),
            SvdqLayout("svdq-nvfp4", "nvfp4", group=16),
        )
    }
)

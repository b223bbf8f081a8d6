"""SVDQ residual: codes and scales of a smoothed weight minus its low-rank part, in plain order.

In:   float rows [n, K] as padded, a layout, column weights. Out: codes, scales as stored, dequantised values.
Never: smoothing, factors, the order of the kernels.

    int4      codes of -8..7, a bfloat16 scale for 64 columns
    nvfp4     E2M1 codes, an e4m3 scale for 16 columns, a bfloat16 factor per row that maps its largest value to 224 * 6

Scales are searched for the smallest squared error, like those of FP4 (see `scales`). Codes are chosen for the scales as
stored.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

import torch
from torch import Tensor

from runner.quantization.formats.e2m1 import decode, encode_finite
from runner.quantization.formats.scales import E2M1, INT4, Method, choose_scales, e4m3_factor
from runner.quantization.formats.svdq_layout import SvdqLayout

__all__ = ["Residual"]

# The best scale of a group is often 1.5 times that of its largest value, see `scales`. In a row, unlike in a whole
# tensor, many groups come near the largest value. If that were mapped to 448, they could not have the larger scale.
# Measured on gaussian weights, 1024 x 5120: relative error .0813 with 2, .0817 with 1.
HEADROOM: Final = 2.0


@dataclass(frozen=True)
class Residual:
    """Codes [rows, K] (int8 or uint8 as `unpack_weight` gives them), scales [rows, groups], channels [rows] or None."""

    codes: Tensor
    scales: Tensor
    channels: Tensor | None

    @classmethod
    def empty(cls, rows: int, columns: int, layout: SvdqLayout, device: torch.device) -> Residual:
        """A residual of zeros, to be filled block by block of rows. Its channels are 1."""
        int4 = layout.precision == "int4"
        scales = torch.zeros(rows, columns // layout.group, dtype=torch.bfloat16, device=device)
        return cls(
            torch.zeros(rows, columns, dtype=torch.int8 if int4 else torch.uint8, device=device),
            scales if int4 else scales.to(torch.float8_e4m3fn),
            None if int4 else torch.ones(rows, dtype=torch.bfloat16, device=device),
        )

    def quantize_rows(
        self, rows: slice, values: Tensor, layout: SvdqLayout, method: Method, per_column: Tensor | None
    ) -> None:
        """Quantise float32 `values` [n, K] into these rows. Raises ValueError for NaN and infinite values."""
        groups = values.view(len(values), -1, layout.group)
        if layout.precision == "int4":
            stored, factors = choose_scales(groups, INT4, method, per_column, None)
            self.scales[rows] = stored
            scaled = groups / torch.where(factors > 0, factors, 1).unsqueeze(-1)
            self.codes[rows] = INT4.round_values(scaled, scaled, scaled).view(values.shape).to(torch.int8)
            return
        channels = e4m3_factor(HEADROOM * values.abs().amax(dim=1, keepdim=True))
        stored, factors = choose_scales(groups, E2M1, method, per_column, channels)
        assert self.channels is not None
        self.channels[rows] = channels[:, 0].to(torch.bfloat16)
        self.scales[rows] = stored.view(torch.float8_e4m3fn)
        scaled = groups / torch.where(factors > 0, factors, 1).unsqueeze(-1)
        self.codes[rows] = encode_finite(scaled).view(values.shape)

    def dequantize_rows(self, rows: slice) -> Tensor:
        """Dequantise these rows: float32 [n, K]."""
        codes = self.codes[rows]
        values = codes.float() if self.channels is None else decode(codes)
        factors = self.scales[rows].float()
        if self.channels is not None:
            factors = factors * self.channels[rows].float().unsqueeze(1)
        return values.view(*factors.shape, -1).mul_(factors.unsqueeze(-1)).view(codes.shape)

"""E2M1 codes of activations for a block-scaled product, by one kernel if it agrees with the definition.

In:   activations [M, K], the smoothing factor of each column. Out: packed codes, and e4m3 scales in cuBLAS's order.
Never: products, layers.

`quantize_to_e2m1` defines codes and scales. In plain operations their operands are about 190 bytes a number, counted
operation by operation. On CUDA one kernel (`e2m1_codes_triton.py`) takes 2.56 bytes a number, and permutes the scales,
too.
"""

from __future__ import annotations

from functools import cache
from typing import Final

import torch
from torch import Tensor

from runner.quantization.formats.e2m1 import LARGEST, encode_finite, pack, unpack
from runner.quantization.formats.row_blocks import row_blocks
from runner.quantization.kernels.nvfp4 import to_blocked
from runner.quantization.kernels.row_codes import MOST_OTHER_CODES, error_text, probe_matrix

__all__ = ["blocked_codes", "pick_codes", "quantize_to_e2m1"]

_E4M3_LARGEST: Final = 448.0
_SMALLEST: Final = 1e-30
_NUMBERS_A_BLOCK: Final = 1 << 24


def blocked_codes(x: Tensor, smooth: Tensor) -> tuple[Tensor, Tensor]:
    """x [M, K] / smooth [K], bfloat16, K a multiple of 64: bytes uint8 [M, K/2], and bits of e4m3, flat.

    As `quantize_to_e2m1`, with scales in the order of `nvfp4.to_blocked`; in one pass where a kernel was chosen, whose
    codes may differ by MOST_OTHER_CODES.
    """
    if x.device.type == "cuda" and pick_codes(x.device)[0] == "triton":
        return _launch(x, smooth)
    codes, scales = quantize_to_e2m1(x, smooth)
    return codes, to_blocked(scales)


def _launch(x: Tensor, smooth: Tensor) -> tuple[Tensor, Tensor]:
    from runner.quantization.kernels.e2m1_codes_triton import launch

    rows, columns = x.shape
    codes = torch.empty(rows, columns // 2, dtype=torch.uint8, device=x.device)
    scales = torch.empty(-(-rows // 128) * 128 * columns // 16, dtype=torch.uint8, device=x.device)
    launch(x.contiguous(), smooth.contiguous(), LARGEST, _E4M3_LARGEST, _SMALLEST, codes, scales)
    return codes, scales


def quantize_to_e2m1(x: Tensor, smooth: Tensor) -> tuple[Tensor, Tensor]:
    """x [M, K] / smooth [K] as `svdq.quantize_activations` defines: bytes [M, K/2], bits of e4m3 [M, K/16], uint8.

    Works on blocks of rows, so that float32 copies stay small. It reads no values on the host, as a GPU would wait.
    """
    rows, columns = x.shape
    codes = torch.empty(rows, columns // 2, dtype=torch.uint8, device=x.device)
    scales = torch.empty(rows, columns // 16, dtype=torch.float8_e4m3fn, device=x.device)
    # Divide by a tensor on the device, as in `rowwise.quantize_rows`: for a number CUDA multiplies by its reciprocal.
    largest = torch.full((), LARGEST, dtype=torch.float32, device=x.device)
    for block in row_blocks((rows, columns), _NUMBERS_A_BLOCK):
        groups = (x[block] / smooth).float().view(-1, columns // 16, 16)
        peaks = groups.abs().amax(dim=-1)
        exact = torch.where(peaks.isfinite(), (peaks / largest).clamp_(max=_E4M3_LARGEST), torch.nan)
        groups /= exact.clamp(min=_SMALLEST).unsqueeze(-1)
        groups.nan_to_num_(nan=0).clamp_(-LARGEST, LARGEST)
        codes[block] = pack(encode_finite(groups).view(-1, columns))
        scales[block] = exact.to(torch.float8_e4m3fn)
    return codes, scales.view(torch.uint8)


@cache
def pick_codes(device: torch.device) -> tuple[str, str]:
    """Choose ("triton" or "torch", why). The kernel needs the scales of `quantize_to_e2m1`, and its codes except for a
    share of MOST_OTHER_CODES."""
    if device.type != "cuda":
        return "torch", "no CUDA device"
    x = probe_matrix(161, 5120, device)
    x[3, 9], x[4, 9] = torch.nan, torch.inf
    smooth = probe_matrix(2, 5120, device, seed=1)[0].abs() + 0.25
    codes, scales = quantize_to_e2m1(x, smooth)
    try:
        found, found_scales = _launch(x, smooth)
    # As in `row_codes`: a compiler, a driver or a missing package may raise anything, and torch is used.
    except Exception as err:
        return "torch", f"triton refused: {error_text(err)}"
    if not torch.equal(found_scales, to_blocked(scales)):
        return "torch", "triton refused: its scales differ from the definition's"
    share = float((unpack(found) != unpack(codes)).double().mean())
    if share > MOST_OTHER_CODES:
        return "torch", f"triton refused: {share:.2g} of its codes differ from the definition's"
    return "triton", f"one pass; share of codes that differ from the definition's on {device}: {share:.2g}"

"""Norm and SiLU: compute both for the autoencoder's residual blocks in one operation, into a convolution's input.

In:   feature maps [B, C, n, H, W] of any strides, a norm's gamma and bias. Out: SiLU(norm(x)) in the caller's tensor of
the same shape and dtype, of any strides. Never: caches, the convolution that follows.

The definition is the library's `WanRMS_norm`, then SiLU: x / max(|x|, 1e-12) over channels, times the square
root of their number, times gamma, plus bias. In 16 bits the quotient is computed in float32. On the CPU this runs step
by step with the library's bits. On CUDA it is one kernel (`norm_silu_triton.py`) that computes in float32 and rounds
once at the end, if that agrees with the definition on the device.
"""

from __future__ import annotations

from functools import cache
from typing import Final

import torch
import torch.nn.functional as F
from torch import Tensor

__all__ = ["SMALLEST_LENGTH", "define_norm_silu", "norm_silu_into", "pick_norm"]

SMALLEST_LENGTH: Final = 1e-12  # as `torch.nn.functional.normalize` has it
# The largest relative difference of the kernel from the definition in float32. In float32: the difference of another
# order of sums and of the hardware's exp. In 16 bits: one unit in the last place, half of which is rounding.
_AGREEMENT: Final = {torch.float32: 1e-5, torch.bfloat16: 2.0**-8, torch.float16: 2.0**-11}
_SMALLEST: Final = 1e-6  # least value for relative errors: subnormal numbers of float16 are 6e-8 apart


@torch.library.custom_op("video_lab::norm_silu_into", mutates_args=("out",))
def norm_silu_into(x: Tensor, gamma: Tensor, bias: Tensor | None, out: Tensor) -> None:
    """Write SiLU(norm(x)) to `out`; both [B, C, n, H, W] of one dtype, gamma and bias [C, 1, 1, 1]. For inference."""
    if x.device.type == "cuda" and pick_norm(x.device, x.dtype)[0] == "triton":
        from runner.generation.wan_animate.norm_silu_triton import launch

        launch(x, gamma, bias, SMALLEST_LENGTH, out)
    else:
        define_norm_silu(x, gamma, bias, out)


@norm_silu_into.register_fake
def _(x: Tensor, gamma: Tensor, bias: Tensor | None, out: Tensor) -> None:
    return None


def define_norm_silu(x: Tensor, gamma: Tensor, bias: Tensor | None, out: Tensor) -> None:
    """Compute `norm_silu_into` by the library's operations in their order, each after the first in place."""
    result = F.normalize(x.float() if x.dtype in (torch.float16, torch.bfloat16) else x, dim=1).to(x.dtype)
    result.mul_(x.shape[1] ** 0.5).mul_(gamma)
    if bias is not None:
        result.add_(bias)
    # Not in `out`: on a CPU, exp has other last bits in rows of a padded tensor, where vectors end early.
    out.copy_(F.silu(result, inplace=True))


@cache
def pick_norm(device: torch.device, dtype: torch.dtype) -> tuple[str, str]:
    """Return ("triton" or "torch", why): "triton" if the kernel agrees with the definition in `dtype` on `device`."""
    if device.type != "cuda":
        return "torch", "no CUDA device"
    try:
        off = _disagreement(device, dtype)
    # A compiler, a driver or a missing package may raise anything: then torch is used, as in `kernels.low_bit`.
    except Exception as err:
        text = str(err).strip()
        return "torch", f"triton refused: {type(err).__name__}: {text.splitlines()[0] if text else 'no message'}"
    if not off <= _AGREEMENT[dtype]:
        return (
            "torch",
            f"triton refused: it differs by {off:.3g} from the definition, {_AGREEMENT[dtype]:.3g} is allowed",
        )
    return "triton", f"norm and SiLU in one pass, within {off:.3g} of the definition on {device}"


def _disagreement(device: torch.device, dtype: torch.dtype) -> float:
    """Return the largest relative error of the kernel in both memory layouts; infinite if a result is not finite."""
    from runner.generation.wan_animate.norm_silu_triton import launch

    generator = torch.Generator().manual_seed(0)
    x = torch.randn(1, 40, 2, 9, 13, generator=generator) * torch.logspace(-3, 2, 13)
    x[:, :, 1, 4, 5] = 0
    gamma, bias = (torch.randn(40, 1, 1, 1, generator=generator) for _ in range(2))
    x, gamma, bias = (tensor.to(device, dtype) for tensor in (x, gamma, bias))
    wanted = torch.empty_like(x, dtype=torch.float32)
    worst = 0.0
    for offset in (None, bias):
        define_norm_silu(x.float(), gamma.float(), None if offset is None else offset.float(), wanted)
        for layout in (torch.contiguous_format, torch.channels_last_3d):
            given, out = (x.contiguous(memory_format=layout), torch.empty_like(x, memory_format=layout))
            launch(given, gamma, offset, SMALLEST_LENGTH, out)
            off = ((out.float() - wanted).abs() / wanted.abs().clamp_min(_SMALLEST / _AGREEMENT[dtype])).max()
            worst = max(worst, float(off) if bool(torch.isfinite(off)) else float("inf"))
    return worst

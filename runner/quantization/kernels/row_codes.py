"""Codes of rows: activations and weights in codes, by one kernel where the device has one that agrees with the format.

In:   a matrix, the name of a precision of codes in rows. Out: codes and scales. Never: products, layers, recipes.

Int8 rotates before it rounds. `rotated_codes` does both, and GELU before them where it is asked for, as one operator: a
compiler has no kernel for the rotation. On CUDA the operator is one kernel of ours: 2 bytes read and 1 written a
number, where GELU, rotation and rounding apart take 4, 4 and 3.
"""

from __future__ import annotations

from functools import cache
from typing import Final

import torch
import torch.nn.functional as F
from torch import Tensor

from runner.forecast.precisions import PRECISIONS
from runner.quantization.formats.row_blocks import row_blocks
from runner.quantization.kernels.rowwise import (
    ROTATION,
    SMALLEST_SCALE,
    Rows,
    code_dtype,
    hadamard,
    quantize_rows,
    rotate_rows,
    rotation_size,
)

__all__ = [
    "MOST_OTHER_CODES",
    "compare_codes",
    "error_text",
    "fast_rotated_rows",
    "fast_rows",
    "name_row_kernel",
    "pick_rotation",
    "pick_rows",
    "prepare_rows",
    "probe_matrix",
]

_NUMBERS_A_BLOCK: Final = 1 << 22
LONGEST_ROTATED: Final = 1 << 14  # columns of a row that `rotated_rows_triton` holds
# Share of codes that may differ from the definition's, by one step. The rotation's sums are made in another order, and
# GELU's tanh by another formula: what lies on a tie of the 16 bits may fall to its other side. Counted in Triton's
# interpreter against torch's CPU, of 0.6 million gaussian numbers none in bfloat16, in float16 behind GELU one in
# 100,000. An assumption for tensor cores, whose sums keep fewer bits. A thousandth adds .001 to int8's error of .009.
MOST_OTHER_CODES: Final = 0.001


def prepare_rows(x: Tensor, compute: str, *, gelu: bool = False) -> Rows:
    """`x` [M, K] floating, rotated where the compute is, in codes; `gelu`: GELU of `x`, the one by tanh."""
    if PRECISIONS[compute].rotated:
        return Rows(*rotated_codes(x, compute, gelu))
    x = F.gelu(x, approximate="tanh") if gelu else x
    # Inside a graph the plain arithmetic becomes part of the kernel before it.
    return quantize_rows(x, compute) if torch.compiler.is_compiling() else fast_rows(x, compute)


@torch.library.custom_op("video_lab::rotated_codes", mutates_args=())
def rotated_codes(x: Tensor, compute: str, gelu: bool) -> tuple[Tensor, Tensor]:
    """`fast_rotated_rows` as an operator that a compiler sees: codes [M, K], scale float32 [M, 1]."""
    rows = fast_rotated_rows(x, compute, gelu=gelu)
    return rows.codes, rows.scale


@rotated_codes.register_fake
def _(x: Tensor, compute: str, gelu: bool) -> tuple[Tensor, Tensor]:
    return x.new_empty(x.shape, dtype=code_dtype(compute)), x.new_empty(x.shape[0], 1, dtype=torch.float32)


def fast_rotated_rows(x: Tensor, compute: str, codes: Tensor | None = None, *, gelu: bool = False) -> Rows:
    """`quantize_rows(rotate_rows(x))` of `x` [M, K], or of its GELU; into `codes` where given.

    In one pass where there is a kernel for it, whose codes may differ as MOST_OTHER_CODES says, else block by block.
    """
    if codes is None:
        codes = torch.empty(x.shape, dtype=code_dtype(compute), device=x.device)
    scale = torch.empty(x.shape[0], 1, dtype=torch.float32, device=x.device)
    if x.device.type == "cuda" and _kernel_holds(x) and pick_rotation(x.device, compute, gelu)[0] == "triton":
        _launch_rotation(x.contiguous(), compute, gelu, codes, scale)
        return Rows(codes, scale)
    for some in row_blocks((x.shape[0], x.shape[1]), _NUMBERS_A_BLOCK):
        part = F.gelu(x[some], approximate="tanh") if gelu else x[some]
        scale[some] = fast_rows(rotate_rows(part), compute, codes[some]).scale
    return Rows(codes, scale)


def _kernel_holds(x: Tensor) -> bool:
    sixteen_bits = x.dtype in (torch.bfloat16, torch.float16)
    return sixteen_bits and x.shape[1] <= LONGEST_ROTATED and rotation_size(x.shape[1]) == ROTATION


def _launch_rotation(x: Tensor, compute: str, gelu: bool, codes: Tensor, scale: Tensor) -> None:
    from runner.quantization.kernels.rotated_rows_triton import launch

    matrix = hadamard(ROTATION, x.dtype, x.device)
    launch(x, matrix, gelu, PRECISIONS[compute].largest, SMALLEST_SCALE, codes, scale)


def fast_rows(x: Tensor, compute: str, codes: Tensor | None = None) -> Rows:
    """`quantize_rows` in one pass where there is a kernel for it, else block by block; into `codes` where given."""
    if codes is None:
        codes = torch.empty(x.shape, dtype=code_dtype(compute), device=x.device)
    scale = torch.empty(x.shape[0], 1, dtype=torch.float32, device=x.device)
    if x.device.type == "cuda" and pick_rows(x.device, compute)[0] == "triton":
        _launch_rows(x.contiguous(), compute, codes, scale)
        return Rows(codes, scale)
    for some in row_blocks((x.shape[0], x.shape[1]), _NUMBERS_A_BLOCK):
        codes[some], scale[some] = quantize_rows(x[some], compute)
    return Rows(codes, scale)


def _launch_rows(x: Tensor, compute: str, codes: Tensor, scale: Tensor) -> None:
    from runner.quantization.kernels.rowwise_triton import launch

    launch(x, PRECISIONS[compute].largest, SMALLEST_SCALE, codes, scale)


@cache
def pick_rows(device: torch.device, compute: str) -> tuple[str, str]:
    """("triton" or "torch", why): the kernel is taken where it agrees with `quantize_rows` code by code."""
    if device.type != "cuda":
        return "torch", "no CUDA device"
    x = probe_matrix(33, 160, device)
    wanted = quantize_rows(x, compute)
    codes, scale = torch.empty_like(wanted.codes), torch.empty_like(wanted.scale)
    try:
        _launch_rows(x, compute, codes, scale)
    # As in `kernels`: whatever a compiler, a driver or a missing package raises, the answer is the other way.
    except Exception as err:
        return "torch", f"triton refused: {error_text(err)}"
    if not torch.equal(codes.view(torch.uint8), wanted.codes.view(torch.uint8)) or not torch.equal(scale, wanted.scale):
        return "torch", "triton refused: other codes than the definition's"
    return "triton", f"one pass, equal to the definition on {device}"


@cache
def pick_rotation(device: torch.device, compute: str, gelu: bool) -> tuple[str, str]:
    """("triton" or "torch", why): the kernel is taken where its codes are those of the definition, ties aside.

    At the 14B model's two widths: each is a kernel of its own.
    """
    if device.type != "cuda":
        return "torch", "no CUDA device"
    capability = torch.cuda.get_device_capability(device)
    if not PRECISIONS[compute].runs_on(capability):  # Triton 3.7's compiler fails for compute capability 10.0
        return "torch", f"not for sm_{capability[0]}{capability[1]}"
    why = []
    for columns in (5120, 13824):
        x = probe_matrix(33, columns, device)
        rotated = rotate_rows(F.gelu(x, approximate="tanh") if gelu else x)
        wanted = quantize_rows(rotated, compute)
        found = Rows(torch.empty_like(wanted.codes), torch.empty_like(wanted.scale))
        try:
            _launch_rotation(x, compute, gelu, *found)
        # As in `pick_rows`.
        except Exception as err:
            return "torch", f"triton refused: {error_text(err)}"
        problem, other = compare_codes(found, wanted)
        if problem:
            return "torch", f"triton refused at {columns} columns: {problem}"
        why.append(f"{other:.2g} at {columns} columns")
    return "triton", f"one pass; share of codes a step off the definition's on {device}: {', '.join(why)}"


def name_row_kernel(device: torch.device, compute: str) -> str:
    """For the record: what makes the codes of `compute`, a precision in rows, on `device`, and why."""
    kinds = {"": pick_rows(device, compute)}
    if PRECISIONS[compute].rotated:
        kinds = {gelu: pick_rotation(device, compute, bool(gelu)) for gelu in ("", "behind GELU ")}
    return "; ".join(f"{kind}{name}: {why}" for kind, (name, why) in kinds.items())


def compare_codes(found: Rows, wanted: Rows) -> tuple[str, float]:
    """What is wrong with `found`, empty if nothing is, and the share of its codes that are others than `wanted`'s.

    A row's largest number may lie a step of 16 bits off, and its scale with it: 2**-7 of it in bfloat16.
    """
    off = (found.codes.int() - wanted.codes.int()).abs()
    share = float((off > 0).double().mean())
    if not bool(torch.isfinite(found.scale).all()) or float((found.scale / wanted.scale - 1).abs().max()) > 2**-7:
        return "other scales than the definition's", share
    if share > MOST_OTHER_CODES or int(off.max()) > 1:
        return f"{share:.2g} of its codes are others than the definition's, by up to {int(off.max())}", share
    return "", share


def probe_matrix(rows: int, columns: int, device: torch.device, seed: int = 0) -> Tensor:
    """bfloat16 noise with a channel that stands out, rows of other sizes, and a row of zeros."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(rows, columns, generator=generator) * torch.logspace(-2, 1, rows).unsqueeze(-1)
    x[:, columns // 3] *= 30
    x[rows // 2] = 0
    return x.to(device, torch.bfloat16)


def error_text(err: Exception) -> str:
    """Its type and the first line of its message."""
    text = str(err).strip()
    return f"{type(err).__name__}: {text.splitlines()[0] if text else 'no message'}"

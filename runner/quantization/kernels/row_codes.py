"""Row codes: quantise activations per token and weights per channel, by one kernel if it agrees with the definition.

In:   a matrix, the name of a precision with one scale per row. Out: codes and scales. Never: products, layers, recipes.

Int8 rotates before it rounds. `rotated_codes` does both, after GELU if requested, as one operator: a compiler has no
kernel for the rotation. On CUDA the operator is one Triton kernel that reads 2 and writes 1 byte a number; separate
GELU, rotation and rounding take 4, 4 and 3.
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
# Share of codes that may differ from the definition's, by one step. The rotation sums in another order, and GELU's tanh
# uses another formula, so that ties of the 16 bits may be rounded to the other side. Counted in Triton's interpreter
# against torch's CPU, of 0.6 million gaussian numbers: none in bfloat16; in float16 after GELU one in 100,000. An
# assumption for tensor cores, whose sums keep fewer bits. A thousandth adds .001 to int8's error of .009.
MOST_OTHER_CODES: Final = 0.001


def prepare_rows(x: Tensor, compute: str, *, gelu: bool = False) -> Rows:
    """Quantise a floating `x` [M, K] with one scale per row (per token), rotated where the precision is.

    `gelu`: quantise GELU (by tanh) of `x`.
    """
    if PRECISIONS[compute].rotated:
        return Rows(*rotated_codes(x, compute, gelu))
    x = F.gelu(x, approximate="tanh") if gelu else x
    # In a compiled graph the plain arithmetic becomes part of the kernel before it.
    return quantize_rows(x, compute) if torch.compiler.is_compiling() else fast_rows(x, compute)


@torch.library.custom_op("video_lab::rotated_codes", mutates_args=())
def rotated_codes(x: Tensor, compute: str, gelu: bool) -> tuple[Tensor, Tensor]:
    """`fast_rotated_rows` as one operator for a compiler: codes [M, K], scale float32 [M, 1]."""
    rows = fast_rotated_rows(x, compute, gelu=gelu)
    return rows.codes, rows.scale


@rotated_codes.register_fake
def _(x: Tensor, compute: str, gelu: bool) -> tuple[Tensor, Tensor]:
    return x.new_empty(x.shape, dtype=code_dtype(compute)), x.new_empty(x.shape[0], 1, dtype=torch.float32)


def fast_rotated_rows(x: Tensor, compute: str, codes: Tensor | None = None, *, gelu: bool = False) -> Rows:
    """`quantize_rows(rotate_rows(x))` of `x` [M, K], or of its GELU; into `codes` where given.

    In one pass where a kernel was chosen, whose codes may differ by MOST_OTHER_CODES, else block by block.
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
    """`quantize_rows` in one pass where a kernel was chosen, else block by block; into `codes` where given."""
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
    """Choose ("triton" or "torch", why). The kernel must agree with `quantize_rows` code by code."""
    if device.type != "cuda":
        return "torch", "no CUDA device"
    x = probe_matrix(33, 160, device)
    defined = quantize_rows(x, compute)
    codes, scale = torch.empty_like(defined.codes), torch.empty_like(defined.scale)
    try:
        _launch_rows(x, compute, codes, scale)
    # As in `dequantize`: a compiler, a driver or a missing package may raise anything, and torch is used.
    except Exception as err:
        return "torch", f"triton refused: {error_text(err)}"
    same_codes = torch.equal(codes.view(torch.uint8), defined.codes.view(torch.uint8))
    if not same_codes or not torch.equal(scale, defined.scale):
        return "torch", "triton refused: its codes differ from the definition's"
    return "triton", f"one pass, equal to the definition on {device}"


@cache
def pick_rotation(device: torch.device, compute: str, gelu: bool) -> tuple[str, str]:
    """Choose ("triton" or "torch", why). The kernel must give the definition's codes, except at ties.

    It is tried at the 14B model's two widths, each of which compiles to another kernel.
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
    """For the record: the kernel that makes the codes of `compute` (one scale per row) on `device`, and why."""
    kinds = {"": pick_rows(device, compute)}
    if PRECISIONS[compute].rotated:
        kinds = {gelu: pick_rotation(device, compute, bool(gelu)) for gelu in ("", "behind GELU ")}
    return "; ".join(f"{kind}{name}: {why}" for kind, (name, why) in kinds.items())


def compare_codes(found: Rows, defined: Rows) -> tuple[str, float]:
    """Return the problem of `found`, empty if there is none, and the share of its codes that differ from `defined`.

    A row's largest number may differ by a step of 16 bits, and so its scale: by 2**-7 of it in bfloat16.
    """
    off = (found.codes.int() - defined.codes.int()).abs()
    share = float((off > 0).double().mean())
    if not bool(torch.isfinite(found.scale).all()) or float((found.scale / defined.scale - 1).abs().max()) > 2**-7:
        return "its scales differ from the definition's", share
    if share > MOST_OTHER_CODES or int(off.max()) > 1:
        return f"{share:.2g} of its codes differ from the definition's, by up to {int(off.max())}", share
    return "", share


def probe_matrix(rows: int, columns: int, device: torch.device, seed: int = 0) -> Tensor:
    """bfloat16 noise with one large channel, rows of different magnitudes, and a row of zeros."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(rows, columns, generator=generator) * torch.logspace(-2, 1, rows).unsqueeze(-1)
    x[:, columns // 3] *= 30
    x[rows // 2] = 0
    return x.to(device, torch.bfloat16)


def error_text(err: Exception) -> str:
    """The error's type and the first line of its message."""
    text = str(err).strip()
    return f"{type(err).__name__}: {text.splitlines()[0] if text else 'no message'}"

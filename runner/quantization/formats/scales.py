"""Scales: quantise one weight. Chooses the scale of each group of columns, then the codes.

In:   a float weight [out, in], a format, a method. Out: the stored tensors of the format (`Format.tensors`).
Never: the source of the weight, merged LoRAs, files.

    absmax       the largest value of a group becomes 6
    mse          the scale with the smallest squared error of the weights, out of a searched set
    activation   the same, each column's error weighted by the mean square of the layer's inputs in that column: to
                 first order this is the squared error of the layer's output

Measured on gaussian weights, 5120 x 5120 (relative error): g32 .1011 absmax, .0890 mse; nvfp4 .0951, .0814. All scales
of bf16 in a fine sweep give .0886 and all neighbouring e4m3 codes .0812, so a longer search gains nothing.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Final, Literal, get_args

import torch
from torch import Tensor

from runner.quantization.formats.e2m1 import LARGEST, Format, encode_finite, pack, round_magnitudes
from runner.quantization.formats.row_blocks import on_all_cores, row_blocks

__all__ = ["E2M1", "INT4", "Grid", "Method", "choose_scales", "column_weights", "e4m3_factor", "quantize"]

Method = Literal["absmax", "mse", "activation"]

# Multiples of absmax/6. The error of a group has two minima: near 1, and near 1.5, where the largest value becomes 4
# and the coarse step from 4 to 6 is not used. 1, 1.5 and 2 are exact, so that a dequantised weight quantises to itself.
_RATIOS: Final = (
    *(1.0, 0.86, 0.88, 0.9, 0.92, 0.94, 0.96, 0.98, 1.02, 1.05, 1.08, 1.11),
    *(1.3, 1.35, 1.4, 1.45, 1.5, 1.55, 1.6, 2.0),
)
# For one important column the others may be clipped or get a coarser step: the minima are wider.
_WIDE_RATIOS: Final = (*_RATIOS, 0.5, 0.58, 0.66, 0.74, 0.78, 0.82, 1.14, 1.18, 1.22, 1.26, 1.66, 1.74, 1.84)
# For e4m3, steps from the code of absmax/6: eight steps are one octave.
_STEPS: Final = (0, -2, -1, 1, 2, 3, 4, 5, 6, 7, 8)
_WIDE_STEPS: Final = (*_STEPS, -8, -7, -6, -5, -4, -3)

# Multiples of absmax/7 for signed integers: their error has one minimum. 7/8 is exact for groups with the code -8.
_INT4_RATIOS: Final = (1.0, *(0.56, 0.6, 0.64, 0.68, 0.72, 0.76, 0.8, 0.84, 0.875, 0.92, 0.96), *(1.04, 1.08, 1.12))
_WIDE_INT4_RATIOS: Final = (*_INT4_RATIOS, 0.28, 0.33, 0.38, 0.43, 0.48, 0.52, 1.18, 1.24, 1.3)

_E4M3_LARGEST: Final = 448.0
_E4M3_LARGEST_CODE: Final = 0x7E  # 0x7F is NaN
_SMALLEST: Final = 2.0**-126  # of bf16's normal numbers: below it a scale loses bits, and GPUs flush it to zero
# 1 MB a float32 buffer: smaller blocks cost more Python, larger ones more cache misses.
_WEIGHTS_ON_A_CORE: Final = 1 << 18
_WEIGHTS_ON_CUDA: Final = 1 << 24
_NOT_FINITE: Final = "the weight holds NaN or infinite values"


@dataclass(frozen=True)
class Grid:
    """The numbers that a group's values are rounded to, and the multiples of absmax / `largest` to try as its scale."""

    largest: float
    mirrored: bool  # negative values are rounded like positive ones, so that magnitudes are enough
    round_values: Callable[[Tensor, Tensor, Tensor], Tensor]  # (values or magnitudes, out, scratch) → out, ties to even
    ratios: tuple[float, ...]
    wide_ratios: tuple[float, ...]


def _round_integers(values: Tensor, out: Tensor, scratch: Tensor) -> Tensor:
    return torch.round(values, out=out).clamp_(-8, 7)


E2M1: Final = Grid(LARGEST, True, round_magnitudes, _RATIOS, _WIDE_RATIOS)
INT4: Final = Grid(7.0, False, _round_integers, _INT4_RATIOS, _WIDE_INT4_RATIOS)


def quantize(
    weight: Tensor, fmt: Format, method: Method = "mse", importance: Tensor | None = None
) -> dict[str, Tensor]:
    """Quantise `weight` [out, in] (any float dtype, any device) to the tensors of `fmt`, on the same device.

    `importance` [in] is for `activation` only: the mean square of each input channel, ≥ 0 and finite; its unit does not
    matter. Works on blocks of rows, with as many threads as torch is set to use: about 16 MB a thread beside weight and
    result, 1 GB on CUDA. Raises ValueError for NaN and infinite weights, and where shapes do not fit.
    """
    if weight.ndim != 2 or not weight.is_floating_point():
        raise ValueError(f"a float matrix is needed, not {weight.dtype} of {tuple(weight.shape)}")
    if method not in get_args(Method):
        raise ValueError(f"no scale method {method!r}; there are {', '.join(get_args(Method))}")
    out_features, in_features = weight.shape
    weight = weight.detach()
    result = {
        name: torch.empty(shape, dtype=dtype, device=weight.device)
        for name, (shape, dtype) in fmt.tensors(out_features, in_features).items()
    }
    per_column = _column_weights(importance, method, weight, fmt)
    if fmt.tensor_scale:
        result["weight_scale_2"].copy_(_tensor_scale(weight))
    factor = result.get("weight_scale_2")

    def work(rows: slice) -> None:
        values = weight[rows].float().contiguous().view(-1, in_features // fmt.group, fmt.group)
        stored, factors = choose_scales(values, E2M1, method, per_column, factor)
        codes = encode_finite(values / torch.where(factors > 0, factors, 1).unsqueeze(-1))
        result["weight_scale"][rows] = stored
        result["weight_packed"][rows] = pack(codes.view(-1, in_features))

    if weight.is_cuda:
        for rows in row_blocks(weight.shape, _WEIGHTS_ON_CUDA):
            work(rows)
    else:
        on_all_cores(work, row_blocks(weight.shape, _WEIGHTS_ON_A_CORE))
    return result


def choose_scales(
    values: Tensor, grid: Grid, method: Method, per_column: Tensor | None, factor: Tensor | None
) -> tuple[Tensor, Tensor]:
    """float32 [rows, groups, group] → the scales to store, and their values (float32), both [rows, groups].

    `per_column` float32 [groups, group]: weights of squared errors, see `column_weights`. `factor`: None for scales in
    bfloat16; for e4m3 scales (stored as uint8) their factor, one of the whole weight or [rows, 1], see `e4m3_factor`.
    Raises ValueError for NaN and infinite values.
    """
    magnitudes = values.abs()
    peaks = magnitudes.amax(-1)
    if not bool(torch.isfinite(peaks).all()):
        raise ValueError(_NOT_FINITE)
    if factor is None:
        stored, factors = _bf16_candidates(peaks, method, grid)
    else:
        stored, factors = _e4m3_candidates(peaks, method, grid, factor)
    if method == "absmax":
        stored, factors = stored[0], factors[0]
    else:
        # In units of the squared peak, since squares of tiny weights would underflow.
        errors = _errors(magnitudes if grid.mirrored else values, 1 / factors, per_column, grid)
        errors.mul_((factors / peaks.clamp(min=_SMALLEST)).square_())
        best = errors.argmin(0, keepdim=True)
        stored, factors = stored.gather(0, best)[0], factors.gather(0, best)[0]
    empty = peaks == 0  # a group of zeros gets scale 0, visible in the file
    return stored.masked_fill(empty, 0), factors.masked_fill(empty, 0)


def _bf16_candidates(peaks: Tensor, method: Method, grid: Grid) -> tuple[Tensor, Tensor]:
    """The scales to try, as stored and as float32, [candidates, rows, groups]; the first is absmax's."""
    ratios = {"absmax": grid.ratios[:1], "mse": grid.ratios, "activation": grid.wide_ratios}[method]
    ratio = peaks.new_tensor(ratios).view(-1, 1, 1)
    stored = (peaks * (ratio / peaks.new_tensor(grid.largest))).clamp_(min=_SMALLEST).to(torch.bfloat16)
    return stored, stored.float()


def _e4m3_candidates(peaks: Tensor, method: Method, grid: Grid, factor: Tensor) -> tuple[Tensor, Tensor]:
    """The same for e4m3 with a factor: the codes around the code of absmax/6."""
    steps = {"absmax": _STEPS[:1], "mse": _STEPS, "activation": _WIDE_STEPS}[method]
    step = torch.tensor(steps, dtype=torch.int32, device=peaks.device).view(-1, 1, 1)
    nearest = (peaks / (factor * grid.largest)).clamp_(max=_E4M3_LARGEST).to(torch.float8_e4m3fn).view(torch.uint8)
    codes = (nearest.int() + step).clamp_(1, _E4M3_LARGEST_CODE)
    every = torch.arange(_E4M3_LARGEST_CODE + 1, dtype=torch.uint8, device=peaks.device)
    worth = every.view(torch.float8_e4m3fn).float().index_select(0, codes.view(-1)).view(codes.shape)
    return codes.to(torch.uint8), worth.mul_(factor)


def _errors(values: Tensor, inverses: Tensor, per_column: Tensor | None, grid: Grid) -> Tensor:
    """Squared error of every group with every candidate, in units of the squared candidate."""
    scaled, rounded, scratch = (torch.empty_like(values) for _ in range(3))
    group = values.shape[-1]
    ones = values.new_ones(group)
    errors = torch.empty_like(inverses)
    for inverse, error in zip(inverses, errors, strict=True):
        torch.mul(values, inverse.unsqueeze(-1), out=scaled)
        grid.round_values(scaled, rounded, scratch).sub_(scaled).square_()
        if per_column is not None:
            rounded.mul_(per_column)
        # A product with ones sums a short last dimension about twice as fast as sum() does.
        torch.mv(rounded.view(-1, group), ones, out=error.view(-1))
    return errors


def _tensor_scale(weight: Tensor) -> Tensor:
    """The `e4m3_factor` of the whole weight."""
    low, high = torch.aminmax(weight)
    peak = torch.maximum(low.abs(), high.abs()).float()
    if not bool(torch.isfinite(peak)):
        raise ValueError(_NOT_FINITE)
    return e4m3_factor(peak)


def e4m3_factor(peaks: Tensor) -> Tensor:
    """The factors that map `peaks` (float32, ≥ 0) to 448 * 6, rounded up to a bfloat16, in float32; 1 for zeros.

    With seven mantissa bits the product code * e4m3 * scale is exact in float32: every kernel gets the same bits,
    whatever its order of multiplication, and formats that keep this scale in 16 bits lose nothing.
    """
    # Divide by a tensor: for a Python number CUDA multiplies by the rounded reciprocal. A dequantised weight, whose
    # largest value divides without a remainder, might then get the next larger scale.
    bits = (peaks / peaks.new_tensor(_E4M3_LARGEST * LARGEST)).clamp(min=_SMALLEST).view(torch.int32)
    return ((bits + 0xFFFF) & ~0xFFFF).view(torch.float32).masked_fill_(peaks == 0, 1)


def _column_weights(importance: Tensor | None, method: Method, weight: Tensor, fmt: Format) -> Tensor | None:
    """float32 [groups, group] with mean 1, or None where all columns have the same weight."""
    if (importance is None) is (method == "activation"):
        problem = "needs the mean square of every input channel" if importance is None else "takes no importance"
        raise ValueError(f"scale method {method!r} {problem}")
    if importance is None:
        return None
    if tuple(importance.shape) != (weight.shape[1],):
        raise ValueError(f"importance is {tuple(importance.shape)}, the weight has {weight.shape[1]} input channels")
    return column_weights(importance.detach().to(device=weight.device, dtype=torch.float32), fmt.group)


def column_weights(importance: Tensor, group: int) -> Tensor:
    """float32 [in], ≥ 0 and of any unit → [groups, group] with mean 1. ValueError for other values."""
    values = importance
    if not bool(torch.isfinite(values).all()) or bool((values < 0).any()):
        raise ValueError("importance holds negative, NaN or infinite values")
    peak = values.max()
    if float(peak) == 0:
        values = torch.ones_like(values)  # calibration recorded only zeros: all channels get the same weight
    else:
        values = values / peak
        values = values / values.mean() + 1e-6  # a channel of zeros still decides between equal errors
    return values.view(-1, group).contiguous()

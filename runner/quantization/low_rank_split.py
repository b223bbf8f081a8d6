"""Low-rank split (SVDQuant): split a weight into a smoothing factor, a low-rank part and a residual in four bits.

In:   a float weight [out, in], a layout, calibration statistics of the layer's inputs. Out: the stored tensors.
Never: names of layers, files, models: pure tensors, on any device.

With s the smoothing factor, W the weight:

    s = span_x^a / span_w^(1-a)      spans: the largest magnitude of a channel, in x over all of calibration, in W over
                                     all rows; a: the one of EXPONENTS with the smallest error of the output
    up, down = the first r singular vectors of W s, up times the singular values
    R = W s - up (down / s) s        with the factors as stored, so that R contains their rounding error
    y = Q(x / s) Q(R)^T + (x (down / s)^T) up^T

Without calibration s = span_w^-.5: large channels of x are then unknown, and stay large.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Final

import torch
import torch.nn.functional as F
from torch import Tensor

from runner.quantization.activations import LayerInputs
from runner.quantization.formats.row_blocks import on_all_cores, row_blocks
from runner.quantization.formats.scales import Method, column_weights
from runner.quantization.formats.svdq import pack_lowrank, pack_scales, pack_vector, pack_weight, pad, svdq_linear
from runner.quantization.formats.svdq_layout import SvdqLayout
from runner.quantization.formats.svdq_residual import Residual

__all__ = ["EXPONENTS", "Split", "low_rank_factors", "smoothing_factor", "split_weight"]

EXPONENTS: Final = (0.5, 0.6, 0.7, 0.8)
WEIGHT_EXPONENT: Final = 0.5  # of the weight's spans, without calibration
SEARCH_ROWS: Final = 1024  # outputs, evenly spread, on which exponents are compared
OVERSAMPLING: Final = 10
POWER_ITERATIONS: Final = 4
SEED: Final = 0x5D5
# An e4m3 scale of activations has no other factor: its normal numbers are 2^-6 to 448. The largest scale of calibration
# is put near 32, so that inputs may grow 14 times and shrink 2000 times.
LARGEST_INPUT: Final = 32.0 * 6
_WEIGHTS_ON_A_CORE: Final = 1 << 18
_WEIGHTS_OF_A_SMALL_LAYER: Final = 1 << 18
_WEIGHTS_IN_A_PRODUCT: Final = 1 << 22
_WEIGHTS_ON_CUDA: Final = 1 << 24

Rows = Callable[[slice], Tensor]  # computes rows of a matrix on demand: float32 [n, columns]


@dataclass(frozen=True)
class Split:
    """`tensors`: as `SvdqLayout.tensor_table` lists them, in kernel order. `error`: of the weight, relative, L2."""

    tensors: dict[str, Tensor]
    error: float
    exponent: float | None  # None: without calibration


def split_weight(weight: Tensor, layout: SvdqLayout, refits: int = 0, inputs: LayerInputs | None = None) -> Split:
    """Quantise `weight` [out, in] (any float dtype, any device) to the tensors of `layout`, on the same device.

    `inputs`: calibration statistics; None: smoothing by the weight alone. `refits`: rounds in which the factors are
    fitted again to the weight minus the rounded residual; the best round is kept. The same weight gives the same bytes,
    whatever the state of torch's random numbers. Beside weight and result it needs a byte a weight and blocks of rows,
    with refits two bytes. Raises ValueError for NaN and infinite weights, and where shapes do not fit.
    """
    if weight.ndim != 2 or not weight.is_floating_point():
        raise ValueError(f"a float matrix is needed, not {weight.dtype} of {tuple(weight.shape)}")
    threads = torch.get_num_threads()
    if weight.numel() > _WEIGHTS_OF_A_SMALL_LAYER or threads == 1:
        return _smooth_and_split(weight.detach(), layout, refits, inputs)
    torch.set_num_threads(1)  # synchronising threads after each small product costs ten times the product
    try:
        return _smooth_and_split(weight.detach(), layout, refits, inputs)
    finally:
        torch.set_num_threads(threads)


def _smooth_and_split(weight: Tensor, layout: SvdqLayout, refits: int, inputs: LayerInputs | None) -> Split:
    span_w = _spans(weight)
    if not bool(torch.isfinite(span_w).all()):
        raise ValueError("the weight holds NaN or infinite values")
    if inputs is None:
        return _split(weight, smoothing_factor(None, span_w, WEIGHT_EXPONENT), layout, refits, None, None)
    if tuple(inputs.spans.shape) != (weight.shape[1],):
        raise ValueError(f"inputs of {tuple(inputs.spans.shape)}, the weight has {weight.shape[1]} input channels")
    spans = inputs.spans.to(weight.device, torch.float32)
    squares = inputs.squares.to(weight.device, torch.float32)
    exponent = _best_exponent(weight, spans, span_w, squares, inputs.rows.to(weight.device), layout)
    return _split(weight, smoothing_factor(spans, span_w, exponent), layout, refits, squares, exponent)


def smoothing_factor(span_x: Tensor | None, span_w: Tensor, exponent: float) -> Tensor:
    """bfloat16 [in], positive and finite: span_x^a / span_w^(1-a), times a power of two, see LARGEST_INPUT.

    Without `span_x` it is span_w^-a with a geometric mean of 1. A channel whose spans give NaN, infinity or zero gets 1
    before the power of two.
    """
    if span_x is None:
        factor = span_w.double() ** -exponent
    else:
        factor = span_x.double() ** exponent / span_w.double() ** (1 - exponent)
    usable = torch.isfinite(factor) & (factor > 0)
    factor = torch.where(usable, factor, 1)
    if span_x is None:
        if bool(usable.any()):
            factor = torch.where(usable, factor / factor[usable].log().mean().exp(), 1)
        return factor.to(torch.bfloat16)
    largest = torch.where(torch.isfinite(span_x), span_x.double() / factor, 0).max()
    if float(largest) > 0:
        factor = factor * torch.exp2(torch.ceil(torch.log2(largest / LARGEST_INPUT)))
    return factor.clamp(2.0**-100, 2.0**100).to(torch.bfloat16)


def low_rank_factors(rows: Rows, shape: tuple[int, int], rank: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Factor a matrix of `shape`: up [n, r] times the singular values, down [r, columns], float32: U S and V^T.

    A randomised SVD with power iterations (Halko, Martinsson, Tropp, 2011), with a random generator of its own. Where
    the matrix has a smaller rank, the other columns and rows are zeros.
    """
    count = min(rank + OVERSAMPLING, *shape)
    generator = torch.Generator().manual_seed(SEED)  # on the host: a GPU starts from the same numbers
    basis = torch.randn(shape[1], count, generator=generator).to(device)
    blocks = row_blocks(shape, _WEIGHTS_IN_A_PRODUCT)

    def times(right: Tensor) -> Tensor:
        return torch.cat([rows(block) @ right for block in blocks])

    def transposed_times(right: Tensor) -> Tensor:
        total = torch.zeros(shape[1], right.shape[1], device=device)
        for block in blocks:
            total.addmm_(rows(block).T, right[block])
        return total

    left = torch.linalg.qr(times(basis)).Q
    for _ in range(POWER_ITERATIONS):
        left = torch.linalg.qr(times(torch.linalg.qr(transposed_times(left)).Q)).Q
    # The small factor's SVD, of its transpose: [columns, count].
    v, values, u = torch.linalg.svd(transposed_times(left), full_matrices=False)
    kept = min(rank, count)
    up, down = (left @ u.T)[:, :kept] * values[:kept], v[:, :kept].T
    return pad(up, (shape[0], rank)), pad(down.contiguous(), (rank, shape[1]))


def _spans(weight: Tensor) -> Tensor:
    """float32 [in]: the largest magnitude of every column."""
    low, high = torch.aminmax(weight, dim=0)
    return torch.maximum(-low, high).float()


def _best_exponent(
    weight: Tensor, span_x: Tensor, span_w: Tensor, squares: Tensor, x: Tensor, layout: SvdqLayout
) -> float:
    """The exponent with the smallest error of the output in four bits, on `x` and a sample of outputs, split alone."""
    sample = torch.linspace(0, len(weight) - 1, min(len(weight), SEARCH_ROWS), device=weight.device).round().long()
    part = weight[sample].float()
    exact = x.float() @ part.T
    errors = {}
    for exponent in EXPONENTS:
        split = _split(part, smoothing_factor(span_x, span_w, exponent), layout, 0, squares, exponent)
        errors[exponent] = float((svdq_linear(x, split.tensors, layout, len(part)).float() - exact).norm())
    return min(errors, key=errors.__getitem__)


def _split(
    weight: Tensor, smooth: Tensor, layout: SvdqLayout, refits: int, squares: Tensor | None, exponent: float | None
) -> Split:
    rows = _smoothed(weight, smooth)
    best: tuple[Residual, Tensor, Tensor] | None = None
    least = float("inf")
    for _ in range(1 + refits):
        up, down = _stored_factors(rows, weight.shape, smooth, layout)
        residual = _residual(weight, smooth, up, down, layout, squares)
        error = _error(weight, smooth, up, down, residual, squares)
        if best is None or error < least:
            best, least = (residual, up, down), error
        rows = _unexplained_rows(weight, smooth, residual)
    assert best is not None
    residual, up, down = best
    plain = least if squares is None else _error(weight, smooth, up, down, residual, None)
    return Split(_packed(residual, smooth, up, down, layout), plain, exponent)


def _smoothed(weight: Tensor, smooth: Tensor) -> Rows:
    return lambda rows: weight[rows].float() * smooth.float()


def _unexplained_rows(weight: Tensor, smooth: Tensor, residual: Residual) -> Rows:
    """The smoothed weight minus its rounded residual: the target of a low-rank part that is fitted again."""
    columns = weight.shape[1]
    return lambda rows: (weight[rows].float() * smooth.float()).sub_(residual.dequantize_rows(rows)[:, :columns])


def _stored_factors(rows: Rows, shape: torch.Size, smooth: Tensor, layout: SvdqLayout) -> tuple[Tensor, Tensor]:
    """up [out, r] and down / s [r, in], in bfloat16."""
    up, down = low_rank_factors(rows, (shape[0], shape[1]), layout.rank, smooth.device)
    return up.to(torch.bfloat16), (down / smooth.float()).to(torch.bfloat16)


def _residual(
    weight: Tensor, smooth: Tensor, up: Tensor, down: Tensor, layout: SvdqLayout, squares: Tensor | None
) -> Residual:
    height, width = layout.padded(*weight.shape)
    residual = Residual.empty(height, width, layout, weight.device)
    s, factor = smooth.float(), down.float() * smooth.float()
    per_column = _column_weights(smooth, squares, width, layout.group)
    method: Method = "mse" if per_column is None else "activation"

    def work(rows: slice) -> None:
        values = (weight[rows].float() * s).addmm_(up[rows].float(), factor, alpha=-1)
        residual.quantize_rows(rows, F.pad(values, (0, width - values.shape[1])), layout, method, per_column)

    _run_blocks(work, weight)
    return residual


def _column_weights(smooth: Tensor, squares: Tensor | None, width: int, group: int) -> Tensor | None:
    """The weight of an error in a smoothed column: the mean square of x / s."""
    if squares is None:
        return None
    return column_weights(pad((squares.double() / smooth.double().square()).float(), (width,)), group)


def _error(
    weight: Tensor, smooth: Tensor, up: Tensor, down: Tensor, residual: Residual, squares: Tensor | None
) -> float:
    """Relative error of the weight, each column weighted by the mean square of its input where that is known."""
    blocks = row_blocks(weight.shape, _WEIGHTS_ON_CUDA if weight.is_cuda else _WEIGHTS_ON_A_CORE)
    sums = torch.zeros(2, len(blocks), dtype=torch.float64, device=weight.device)
    places = {block.start: number for number, block in enumerate(blocks)}
    columns = weight.shape[1]
    counts = None if squares is None else squares.sqrt()

    def work(rows: slice) -> None:
        exact = weight[rows].float()
        off = (residual.dequantize_rows(rows)[:, :columns] / smooth.float()).addmm_(up[rows].float(), down.float())
        off.sub_(exact)
        if counts is not None:
            off, exact = off * counts, exact * counts
        sums[0, places[rows.start]] = off.norm().double().square()
        sums[1, places[rows.start]] = exact.norm().double().square()

    _run_blocks(work, weight)
    off, whole = sums.sum(dim=1).tolist()
    return float((off / whole) ** 0.5) if whole > 0 else 0.0


def _run_blocks(work: Callable[[slice], None], weight: Tensor) -> None:
    if weight.is_cuda:
        for rows in row_blocks(weight.shape, _WEIGHTS_ON_CUDA):
            work(rows)
    else:
        on_all_cores(work, row_blocks(weight.shape, _WEIGHTS_ON_A_CORE))


def _packed(residual: Residual, smooth: Tensor, up: Tensor, down: Tensor, layout: SvdqLayout) -> dict[str, Tensor]:
    """The tensors of `layout`, in kernel order. Padded inputs have smoothing factor 1, as x is divided by it."""
    height, width = residual.codes.shape
    tensors = {
        "qweight": pack_weight(residual.codes, layout.precision),
        "wscales": pack_scales(residual.scales, layout.precision),
        "smooth_factor": pack_vector(pad(smooth, (width,), 1)),
        "proj_down": pack_lowrank(pad(down, (layout.rank, width)), down=True),
        "proj_up": pack_lowrank(pad(up, (height, layout.rank)), down=False),
    }
    if residual.channels is not None:
        tensors["wcscales"] = pack_vector(residual.channels)
    return tensors

"""SVDQuant W4A4 in the quantisation benchmark: its matrices, its rows, and cache-dit's quantiser beside ours."""

from __future__ import annotations

import time
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from unittest.mock import patch

import torch
from _quantization import Rows, cpu_seconds, gaussian, relative_error, show
from torch import Tensor

from runner.quantization import low_rank_split
from runner.quantization.activations import SAMPLED_ROWS, LayerInputs
from runner.quantization.formats.e2m1 import NVFP4, dequantize
from runner.quantization.formats.scales import Method, quantize
from runner.quantization.formats.svdq import (
    dequantize_activations,
    effective_weight,
    quantize_activations,
    svdq_linear,
)
from runner.quantization.formats.svdq_layout import SVDQ_LAYOUTS, SvdqLayout
from runner.quantization.formats.svdq_residual import Residual

RTN = "RTN"
PEER = "cache-dit: exponent .5, rank 32"
REFITS, HIGHER_RANK = 4, 128
TOKENS = 512  # the first half calibrates, the other half measures
LOUD_INPUTS, LOUD_COLUMNS = 15, 10  # of 1536
POWER_LAW_RANK = 64


@dataclass(frozen=True)
class Matrix:
    """A weight [size, size], and inputs for calibration and for measuring, each [TOKENS / 2, size] bfloat16."""

    name: str
    weight: Tensor
    calibration: Tensor
    inputs: Tensor


def matrices(size: int) -> list[Matrix]:
    """Return three matrices: gaussian; the same with outlier inputs and columns; the same plus a low-rank part."""
    order = torch.randperm(size, generator=torch.Generator().manual_seed(11))
    inputs, columns = order[: max(1, size * LOUD_INPUTS // 1536)], order[-max(1, size * LOUD_COLUMNS // 1536) :]
    weight, x = gaussian(size, size, seed=12), gaussian(TOKENS, size, seed=13)
    loud_weight, loud_x = weight.clone(), x.clone()
    loud_weight[:, columns] *= 4
    loud_x[:, inputs] *= 20

    def matrix(name: str, weight: Tensor, x: Tensor) -> Matrix:
        return Matrix(name, weight, *x.bfloat16().chunk(2))

    return [
        matrix("gaussian", weight, x),
        matrix("outlier", loud_weight, loud_x),
        matrix("structured", loud_weight + power_law(size), loud_x),
    ]


def power_law(size: int) -> Tensor:
    """[size, size] of rank 64 whose singular values fall as 1/i, with the norm of a gaussian matrix."""
    left, right = (torch.linalg.qr(gaussian(size, POWER_LAW_RANK, seed=seed)).Q for seed in (14, 15))
    values = 1 / torch.arange(1, POWER_LAW_RANK + 1)
    return left @ torch.diag(values * (size / values.norm())) @ right.T


@dataclass(frozen=True)
class Rounded:
    """A layer whose weight is rounded directly, and whose activations are rounded per group."""

    weight: Tensor
    layout: SvdqLayout

    def found(self) -> Tensor:
        """Return the layer's effective weight, float32."""
        return self.weight

    def output(self, x: Tensor) -> Tensor:
        """Of x [M, in] in W4A4."""
        precision = self.layout.precision
        return dequantize_activations(*quantize_activations(x, precision), precision) @ self.weight.T


@dataclass(frozen=True)
class Stored:
    """A layer of stored tensors, with the same two methods."""

    tensors: Mapping[str, Tensor]
    layout: SvdqLayout
    out_features: int

    def found(self) -> Tensor:
        return effective_weight(self.tensors, self.layout)

    def output(self, x: Tensor) -> Tensor:
        return svdq_linear(x, self.tensors, self.layout, self.out_features).float()


@dataclass(frozen=True)
class Way:
    """A row: a function that makes the layer, and its bits per weight."""

    name: str
    bits: float
    make: Callable[[], Rounded | Stored]


def rounded(weight: Tensor, layout: SvdqLayout, method: Method) -> Rounded:
    """The weight itself, rounded as SVDQ rounds a residual."""
    residual = Residual.empty(*weight.shape, layout, weight.device)
    residual.quantize_rows(slice(None), weight, layout, method, None)
    return Rounded(residual.dequantize_rows(slice(None)), layout)


def activation_aware(matrix: Matrix, layout: SvdqLayout) -> Rounded:
    """The weight in NVFP4 with scales chosen by what calibration saw, as `quantize --calibrate` makes FP4 files."""
    importance = matrix.calibration.float().square().mean(0)
    return Rounded(dequantize(quantize(matrix.weight, NVFP4, "activation", importance), NVFP4), layout)


def split_without_smoothing(matrix: Matrix, layout: SvdqLayout) -> Stored:
    with patch.object(low_rank_split, "WEIGHT_EXPONENT", 0.0):
        return split(matrix, layout, None)


def split(matrix: Matrix, layout: SvdqLayout, exponents: tuple[float, ...] | None, refits: int = 0) -> Stored:
    """By our quantiser, with the best of these exponents; None: by the weight alone."""
    x = matrix.calibration
    seen = LayerInputs(x.abs().amax(0).float(), x.float().square().mean(0), x[:SAMPLED_ROWS])
    with patch.object(low_rank_split, "EXPONENTS", exponents):
        found = low_rank_split.split_weight(matrix.weight, layout, refits, None if exponents is None else seen)
    return Stored(found.tensors, layout, matrix.weight.shape[0])


def splitting(weight: Tensor, repeats: int) -> dict[tuple[str, str], tuple[float, float]]:
    """(format, how) → (CPU, wall) seconds of splitting `weight` with rank 32, without and with calibration."""
    x = gaussian(TOKENS // 2, weight.shape[1], seed=16).bfloat16()
    matrix, found = Matrix("", weight, x, x), dict[tuple[str, str], tuple[float, float]]()
    for layout in SVDQ_LAYOUTS.values():
        found[layout.name, "data-free"] = cpu_seconds(lambda f=layout: split(matrix, f, None), repeats)
        searched = low_rank_split.EXPONENTS
        found[layout.name, "searched exponent"] = cpu_seconds(lambda f=layout, s=searched: split(matrix, f, s), repeats)
    return found


def peer_split(matrix: Matrix, layout: SvdqLayout, refits: int) -> Stored:
    """By cache-dit's quantiser with the exponent .5; its tensors have the names and the order of ours."""
    from cache_dit.quantization.svdquant.quantizer import quantize_linear_svdq_w4a4

    out_features, in_features = matrix.weight.shape
    linear = torch.nn.Linear(in_features, out_features, bias=False)
    linear.weight.data = matrix.weight
    found = quantize_linear_svdq_w4a4(
        linear,
        matrix.calibration,
        rank=layout.rank,
        alpha=0.5,
        precision=layout.precision,
        torch_dtype=torch.bfloat16,
        return_state_dict=True,
        svd_refine_iters=refits,
    )
    return Stored({name: found[name] for name in layout.tensor_table(out_features, in_features)}, layout, out_features)


def peer_missing() -> str | None:
    """Return why cache-dit's quantiser is missing; None if it is there. The import takes ten seconds."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            from cache_dit.quantization.svdquant import quantizer  # noqa: F401
    # A wheel for another torch may raise any error; the table shows it.
    except Exception as err:
        text = str(err).strip().splitlines()
        return f"not available: {type(err).__name__}: {text[0] if text else ''}"
    return None


def stored_bits(layout: SvdqLayout, weight: Tensor) -> float:
    """A weight, with factors and vectors."""
    return 8 * layout.bytes(*weight.shape) / weight.numel()


def our_ways(matrix: Matrix, layout: SvdqLayout) -> list[Way]:
    weight, searched = matrix.weight, low_rank_split.EXPONENTS
    higher = layout.with_rank(HIGHER_RANK)
    plain, whole, most = layout.bits_per_weight, stored_bits(layout, weight), stored_bits(higher, weight)
    ways = [
        Way(RTN, plain, lambda: rounded(weight, layout, "absmax")),
        Way("MSE scales", plain, lambda: rounded(weight, layout, "mse")),
    ]
    if layout.precision == "nvfp4":
        ways.append(Way("FP4 file, activation-aware", NVFP4.bits_per_weight, lambda: activation_aware(matrix, layout)))
    return [
        *ways,
        Way("rank 32, no smoothing", whole, lambda: split_without_smoothing(matrix, layout)),
        Way("data-free, rank 32", whole, lambda: split(matrix, layout, None)),
        Way("exponent .5, rank 32", whole, lambda: split(matrix, layout, (0.5,))),
        Way("searched exponent, rank 32", whole, lambda: split(matrix, layout, searched)),
        Way(f"searched, rank 32, {REFITS} refits", whole, lambda: split(matrix, layout, searched, REFITS)),
        Way(f"searched, rank {HIGHER_RANK}", most, lambda: split(matrix, higher, searched)),
    ]


def peer_ways(matrix: Matrix, layout: SvdqLayout) -> list[Way]:
    bits = stored_bits(layout, matrix.weight)
    return [
        Way(PEER, bits, lambda: peer_split(matrix, layout, 0)),
        Way(f"{PEER}, {REFITS} refits", bits, lambda: peer_split(matrix, layout, REFITS)),
    ]


def svdquant(size: int) -> Rows:
    """Every way on every matrix in both formats. Errors are relative (L2); outputs are of the measuring half."""
    missing = peer_missing()
    rows: Rows = []
    for matrix in matrices(size):
        for layout in SVDQ_LAYOUTS.values():
            ways = our_ways(matrix, layout) + ([] if missing else peer_ways(matrix, layout))
            found = {way.name: measured(way, matrix, layout) for way in ways}
            for name, row in found.items():
                for column, other in (("of RTN's", RTN), ("of cache-dit's", PEER)):
                    row[column] = ratio(row, found[other]) if other in found and other != name else None
                rows.append(row)
            if missing:
                rows.append({**dict.fromkeys(rows[-1]), "matrix": matrix.name, "format": layout.name, "how": missing})
    return rows


def show_svdquant(rows: Rows) -> None:
    """A table for each matrix and format."""
    for case in dict.fromkeys((row["matrix"], row["format"]) for row in rows):
        mine = [row for row in rows if (row["matrix"], row["format"]) == case]
        show(
            f"SVDQuant W4A4: {case[1]}, {case[0]} matrix",
            [{name: value for name, value in row.items() if name not in ("matrix", "format")} for row in mine],
        )


def measured(way: Way, matrix: Matrix, layout: SvdqLayout) -> dict[str, object]:
    cpu = time.process_time()
    layer = way.make()
    cpu = time.process_time() - cpu
    wanted, weight = matrix.inputs.float() @ matrix.weight.T, layer.found()
    return {
        "matrix": matrix.name,
        "format": layout.name,
        "how": way.name,
        "bits/weight": way.bits,
        "weight error": relative_error(weight, matrix.weight),
        "W4A4 error": relative_error(layer.output(matrix.inputs), wanted),
        "W4A16 error": relative_error(matrix.inputs.float() @ weight.T, wanted),
        "of RTN's": None,
        "of cache-dit's": None,
        "CPU s": cpu,
    }


def ratio(row: Mapping[str, object], other: Mapping[str, object]) -> float:
    return row["W4A4 error"] / other["W4A4 error"]

"""Low-rank split: output errors against plain rounding on tokens that were not seen, bytes, shapes, limits."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from runner.quantization import low_rank_split
from runner.quantization.activations import LayerInputs
from runner.quantization.formats.svdq import (
    dequantize_activations,
    effective_weight,
    quantize_activations,
    svdq_linear,
    torch_table,
    unpack_vector,
)
from runner.quantization.formats.svdq_layout import SVDQ_LAYOUTS, SvdqLayout
from runner.quantization.formats.svdq_residual import Residual
from runner.quantization.low_rank_split import EXPONENTS, low_rank_factors, smoothing_factor, split_weight
from tests.system_tests import system_test

MOST_OF_RTN = {"int4": 0.35, "nvfp4": 0.45}  # error of the output, weights and activations in four bits
layouts = pytest.mark.parametrize("layout", SVDQ_LAYOUTS.values(), ids=SVDQ_LAYOUTS)


def gaussian(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def layer(kind: str, size: int) -> tuple[Tensor, Tensor, Tensor]:
    """(weight, tokens to calibrate with, others): one input channel in a hundred is 20 times as loud, one column in 150
    four times as heavy; `structured` also has a low-rank part as large as the rest."""
    weight, x = gaussian(size, size) / size**0.5, gaussian(512, size, seed=1)
    if kind != "gaussian":
        order = torch.randperm(size, generator=torch.Generator().manual_seed(2))
        x[:, order[: max(1, size // 100)]] *= 20
        weight[:, order[-max(1, size // 150) :]] *= 4
    if kind == "structured":
        low = gaussian(size, 64, seed=3) / (torch.arange(64) + 1.0) @ gaussian(64, size, seed=4)
        weight = weight + low * (weight.norm() / low.norm())
    return weight, x[:256], x[256:]


def seen(x: Tensor) -> LayerInputs:
    return LayerInputs(x.abs().amax(0), x.square().mean(0), x[:128].bfloat16())


def off(found: Tensor, wanted: Tensor) -> float:
    return float((found.float() - wanted).norm() / wanted.norm())


def rounding_error(weight: Tensor, x: Tensor, layout: SvdqLayout) -> float:
    """Of round-to-nearest by absmax, weights and activations: no smoothing, no factors, no search."""
    residual = Residual.empty(*weight.shape, layout, weight.device)
    residual.quantize_rows(slice(None), weight.clone(), layout, "absmax", None)
    rounded = dequantize_activations(*quantize_activations(x, layout.precision), layout.precision)
    return off(rounded @ residual.dequantize_rows(slice(None)).T, x @ weight.T)


def split_error(weight: Tensor, x: Tensor, layout: SvdqLayout, inputs: LayerInputs | None, refits: int = 0) -> float:
    split = split_weight(weight, layout, refits, inputs)
    return off(svdq_linear(x, split.tensors, layout, len(weight)), x @ weight.T)


@layouts
@pytest.mark.parametrize(
    ("kind", "size"),
    [("outlier", 768), pytest.param("outlier", 1536, marks=system_test), ("structured", 768)],
)
def test_smoothing_and_factors_against_rounding_on_tokens_that_were_not_seen(layout, kind, size, record_property):
    weight, calibrate, test = layer(kind, size)
    plain = rounding_error(weight, test, layout)
    found = split_error(weight, test, layout, seen(calibrate))
    record_property("of_rtn", round(found / plain, 3))
    assert found <= MOST_OF_RTN[layout.precision] * plain
    free = split_error(weight, test, layout, None)
    assert found < 0.6 * free and free < 0.95 * plain


@layouts
def test_without_outliers_it_is_still_better_than_rounding(layout):
    weight, calibrate, test = layer("gaussian", 512)
    plain = rounding_error(weight, test, layout)
    for inputs in (None, seen(calibrate)):
        assert split_error(weight, test, layout, inputs) < 0.92 * plain


@layouts
def test_weight_error_of_a_layer_as_other_quantisers_have_it(layout):
    """cache-dit's on such a layer of 384 outputs and 256 inputs, rank 32: .080 in int4, .083 in nvfp4."""
    weight = gaussian(384, 256) / 16
    split = split_weight(weight, layout)
    assert split.error < {"int4": 0.081, "nvfp4": 0.075}[layout.precision]
    assert off(effective_weight(split.tensors, layout), weight) == pytest.approx(split.error, rel=1e-4)


@layouts
@pytest.mark.parametrize("shape", [(128, 128), (64, 32), (200, 72), (96, 320), (1, 48), (160, 1)])
@pytest.mark.parametrize("calibrated", [False, True])
def test_every_shape_is_stored_as_the_layout_says_and_read_back(layout, shape, calibrated):
    weight = gaussian(*shape)
    split = split_weight(weight, layout, inputs=seen(gaussian(40, shape[1], seed=5)) if calibrated else None)
    assert {name: (tuple(t.shape), t.dtype) for name, t in split.tensors.items()} == torch_table(layout, *shape)
    assert all(bool(torch.isfinite(t.float()).all()) for t in split.tensors.values())
    assert bool((split.tensors["smooth_factor"].float() > 0).all())
    whole = effective_weight(split.tensors, layout)
    assert off(whole[: shape[0], : shape[1]], weight) < 0.1
    assert split.exponent in (EXPONENTS if calibrated else (None,))
    for outside in (whole[shape[0] :], whole[:, shape[1] :]):
        assert not bool(outside.any())


@layouts
def test_the_same_weight_gives_the_same_bytes_and_leaves_random_numbers_alone(layout):
    weight, inputs = gaussian(300, 256), seen(gaussian(200, 256, seed=6))
    torch.manual_seed(1)
    first = split_weight(weight, layout, 1, inputs)
    drawn = torch.rand(3)
    torch.manual_seed(1)
    assert torch.equal(torch.rand(3), drawn)
    torch.manual_seed(77)
    second = split_weight(weight, layout, 1, inputs)
    assert first.tensors.keys() == second.tensors.keys()
    for name, tensor in first.tensors.items():
        assert torch.equal(tensor.view(torch.uint8), second.tensors[name].view(torch.uint8)), name


@layouts
def test_refits_lower_the_error_and_are_kept_only_where_they_do(layout, monkeypatch):
    weight, calibrate, test = layer("outlier", 512)
    once = split_error(weight, test, layout, seen(calibrate))
    assert split_error(weight, test, layout, seen(calibrate), refits=4) < once
    errors = iter((0.1, 0.3, 0.2))
    monkeypatch.setattr(low_rank_split, "_error", lambda *_: next(errors))
    kept = split_weight(weight, layout, 2)
    monkeypatch.undo()
    assert torch.equal(kept.tensors["qweight"], split_weight(weight, layout).tensors["qweight"])


@layouts
def test_what_a_weight_may_hold(layout):
    zeros = split_weight(torch.zeros(128, 128), layout)
    assert not bool(effective_weight(zeros.tensors, layout).any()) and zeros.error == 0
    sparse = gaussian(128, 128)
    sparse[:, ::3] = 0
    sparse[7] = 0
    found = split_weight(sparse, layout, inputs=seen(gaussian(64, 128, seed=2) * (torch.arange(128) % 5 > 0)))
    assert found.error < 0.1
    for scale in (1e-12, 1e12):
        assert split_weight(gaussian(128, 128) * scale, layout).error < 0.1
    assert split_weight(gaussian(128, 128).bfloat16(), layout).error < 0.1
    for value in (float("nan"), float("inf"), -float("inf")):
        spoilt = gaussian(128, 128)
        spoilt[3, 4] = value
        with pytest.raises(ValueError, match="NaN or infinite"):
            split_weight(spoilt, layout)
    with pytest.raises(ValueError, match="float matrix"):
        split_weight(torch.zeros(4, 4, dtype=torch.int8), layout)
    with pytest.raises(ValueError, match="128 input channels"):
        split_weight(gaussian(128, 128), layout, inputs=seen(gaussian(9, 64)))


def test_smoothing_factors_by_hand():
    span_x, span_w = torch.tensor([16.0, 4.0, 0.0, float("nan"), 2.0]), torch.tensor([1.0, 4.0, 1.0, 1.0, 0.0])
    found = smoothing_factor(span_x, span_w, 0.5).float()
    # 4, 1 and three that give no number: 1. The largest input, 16 / 4, is put at 128 by a power of two.
    assert torch.equal(found, torch.tensor([4.0, 1.0, 1.0, 1.0, 1.0]) / 32)
    assert float((span_x / found).nan_to_num().max()) == 128
    free = smoothing_factor(None, torch.tensor([4.0, 1.0, 0.25, 0.0]), 0.5).float()
    assert torch.equal(free, torch.tensor([0.5, 1.0, 2.0, 1.0]))
    assert torch.equal(smoothing_factor(torch.zeros(3), torch.zeros(3), 0.5), torch.ones(3, dtype=torch.bfloat16))


def test_factors_are_the_first_singular_vectors():
    weight = gaussian(90, 16) @ gaussian(16, 70, seed=1) + 0.01 * gaussian(90, 70, seed=2)
    up, down = low_rank_factors(lambda rows: weight[rows], (90, 70), 16, weight.device)
    u, values, v = torch.linalg.svd(weight)
    torch.testing.assert_close(up @ down, (u[:, :16] * values[:16]) @ v[:16], rtol=1e-3, atol=1e-3)
    torch.testing.assert_close(up.norm(dim=0), values[:16], rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(down @ down.T, torch.eye(16), rtol=1e-4, atol=1e-4)
    up, down = low_rank_factors(lambda rows: weight[rows][:, :8], (90, 8), 32, weight.device)
    assert up.shape == (90, 32) and not bool(up[:, 8:].any())
    torch.testing.assert_close(up @ down, weight[:, :8], rtol=1e-4, atol=1e-4)


@layouts
def test_blocks_do_not_show(layout, monkeypatch):
    weight = gaussian(256, 128)
    whole = split_weight(weight, layout)
    monkeypatch.setattr(low_rank_split, "_WEIGHTS_ON_A_CORE", 640)
    pieces = split_weight(weight, layout)
    for name, tensor in whole.tensors.items():
        assert torch.equal(tensor.view(torch.uint8), pieces.tensors[name].view(torch.uint8)), name


@layouts
def test_factors_multiply_raw_inputs_and_the_residual_makes_up_for_their_rounding(layout):
    """A weight of low rank whose columns differ a thousandfold: what is left is the rounding of the factors."""
    weight = gaussian(128, 4) @ gaussian(4, 128, seed=1) * torch.logspace(-1.5, 1.5, 128)
    split = split_weight(weight, layout)
    assert split.error < 0.0005 < 2**-9
    smooth = unpack_vector(split.tensors["smooth_factor"]).float()
    assert float(smooth.max() / smooth.min()) > 20

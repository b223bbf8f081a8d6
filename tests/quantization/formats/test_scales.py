"""Scale choice against the numbers to reach, against brute force, and against what a quantiser must never do."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch import Tensor

from runner.quantization.formats import scales
from runner.quantization.formats.e2m1 import FORMATS, G32, NVFP4, VALUES, Format, dequantize, unpack
from runner.quantization.formats.scales import quantize
from runner.quantization.kernels.dequantize import table
from tests.quantization.kernels.test_rowwise import Divisors

E4M3_LEAST_NORMAL = 0x08  # code of 2^-6
BOTH = pytest.mark.parametrize("fmt", FORMATS.values(), ids=FORMATS)


def gaussian(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def relative_error(found: Tensor, wanted: Tensor) -> float:
    return float((found - wanted).norm() / wanted.norm())


def test_error_on_a_full_size_gaussian():
    weight = gaussian(5120, 5120)
    error = {}
    for fmt, method in ((G32, "absmax"), (G32, "mse"), (NVFP4, "mse")):
        tensors = quantize(weight, fmt, method)
        out = torch.empty_like(weight)
        table(tensors["weight_packed"], tensors["weight_scale"], tensors.get("weight_scale_2"), fmt, out)
        error[fmt.name, method] = relative_error(out, weight)
    assert error["g32", "absmax"] == pytest.approx(0.1011, abs=0.0005)
    assert error["g32", "mse"] <= 0.0892
    assert error["nvfp4", "mse"] <= 0.0816


@BOTH
def test_activation_scales_cut_the_output_error_of_outlier_channels(fmt):
    """One channel in two hundred is twenty times as loud; the channels are known from other inputs than the test's."""
    weight, loud = gaussian(256, 5120), torch.randperm(5120, generator=torch.Generator().manual_seed(1))[:26]

    def inputs(seed: int) -> Tensor:
        x = gaussian(512, 5120, seed=seed)
        x[:, loud] *= 20
        return x

    importance = inputs(2).square().mean(0)
    x = inputs(3)
    wanted = x @ weight.T
    plain = relative_error(x @ dequantize(quantize(weight, fmt, "mse"), fmt).T, wanted)
    weighted = relative_error(x @ dequantize(quantize(weight, fmt, "activation", importance), fmt).T, wanted)
    assert weighted <= 0.70 * plain


@BOTH
def test_even_activations_change_nothing_but_the_width_of_the_search(fmt):
    weight = gaussian(64, 512)
    even = quantize(weight, fmt, "activation", torch.full((512,), 3.0))
    assert relative_error(dequantize(even, fmt), weight) <= relative_error(
        dequantize(quantize(weight, fmt), fmt), weight
    )


def best_errors(groups: Tensor, factors: Tensor) -> Tensor:
    """Squared error of each group [n, group] under the best of `factors` [m] for it, by nearest value, in float64."""
    grid = torch.tensor(VALUES, dtype=torch.float64).unique()
    best = torch.full((groups.shape[0],), math.inf, dtype=torch.float64)
    for factor in factors.double().tolist():
        distance = (groups.double().unsqueeze(-1) - grid * factor).abs().amin(-1)
        best = torch.minimum(best, distance.square().sum(-1))
    return best


def group_errors(weight: Tensor, fmt: Format, tensors: dict[str, Tensor]) -> Tensor:
    return (dequantize(tensors, fmt) - weight).double().view(-1, fmt.group).square().sum(-1)


def test_nvfp4_finds_the_best_of_all_e4m3_scales():
    weight = gaussian(16, 256)
    tensors = quantize(weight, NVFP4)
    every = torch.arange(1, 0x7F, dtype=torch.uint8).view(torch.float8_e4m3fn).float() * tensors["weight_scale_2"]
    best = best_errors(weight.view(-1, 16), every)
    found = group_errors(weight, NVFP4, tensors)
    assert float((found / best).max()) < 1.05  # beyond two octaves lies a better scale for hardly any group
    assert float(found.sum() / best.sum()) < 1.0005


def test_g32_comes_close_to_the_best_of_all_bfloat16_scales():
    weight = gaussian(16, 256)
    every = torch.logspace(-4, 1, 1500, base=2).to(torch.bfloat16).unique()  # all there are from 1/16 to 2
    best = best_errors(weight.view(-1, 32), every)
    found = group_errors(weight, G32, quantize(weight, G32))
    assert bool((found >= best * (1 - 1e-6)).all())
    assert float(found.sum() / best.sum()) < 1.02


@st.composite
def weights(draw: st.DrawFn) -> Tensor:
    """Small matrices of whole groups for either format, of very different sizes, with zeros of both signs."""
    rows, groups = draw(st.integers(1, 4)), draw(st.integers(1, 3))
    weight = gaussian(rows, 32 * groups, seed=draw(st.integers(0, 2**16)))
    weight *= 10.0 ** draw(st.integers(-30, 30))
    weight *= draw(st.sampled_from([1.0, 1e-6])) ** torch.arange(rows).unsqueeze(-1)
    if draw(st.booleans()):
        weight = weight.to(torch.bfloat16).float()
    for _ in range(draw(st.integers(0, 3))):
        column = draw(st.integers(0, 32 * groups - 1))
        weight[draw(st.integers(0, rows - 1)), column:] = draw(st.sampled_from([0.0, -0.0]))
    return weight


def quiet_group() -> Tensor:
    """The second row's e4m3 scale is the least code, a third too small for its largest value."""
    weight = torch.zeros(2, 32)
    weight[0, 0], weight[1] = 448 * 6, torch.linspace(-8.4, 8.4, 32) * 2.0**-9
    return weight


@BOTH
@settings(max_examples=60, deadline=None)
@given(weight=weights())
@example(weight=quiet_group())
def test_what_every_weight_is_promised(fmt, weight):
    found = {method: quantize(weight, fmt, method) for method in ("absmax", "mse")}
    for tensors in found.values():
        assert fmt.check(tensors) == tuple(weight.shape)
        values = dequantize(tensors, fmt)
        assert torch.equal(torch.signbit(values), torch.signbit(weight))
        # No step between codes is wider than two scales; what lies beyond six of them is cut there.
        scale = fmt.group_scales(tensors).repeat_interleave(fmt.group, dim=1)
        most = torch.maximum(scale, weight.abs() - 6 * scale)
        assert bool(((values - weight).abs() <= most * (1 + 1e-5) + 2e-45).all())
    # absmax rounds the scale to the nearest: in bf16 by 1/256, in e4m3 by 1/16, and by a half for its least code.
    stored, scale = found["absmax"]["weight_scale"], fmt.group_scales(found["absmax"])
    short = torch.full_like(scale, 1 / 256 if fmt is G32 else 1 / 16)
    if fmt is NVFP4:
        short[stored < E4M3_LEAST_NORMAL] = 0.5
    peaks = weight.view(*scale.shape, fmt.group).abs().amax(-1)
    assert bool((peaks <= 6 * scale * (1 + short) * (1 + 1e-5) + 2e-45).all())
    plain, searched = (group_errors(weight, fmt, tensors) for tensors in found.values())
    assert bool((searched <= plain * (1 + 1e-5)).all())


@settings(max_examples=60, deadline=None)
@given(weight=weights())
@pytest.mark.parametrize(("fmt", "method"), [(G32, "absmax"), (NVFP4, "absmax"), (G32, "mse")])
def test_what_was_quantised_once_comes_back_unchanged(fmt, method, weight):
    """Not so for nvfp4 under mse: a smaller largest value moves the tensor scale, and the grid of scales with it.

    Nor for groups whose e4m3 scale is subnormal: rounded by up to a third, it may leave the group without a six, and
    the next scale is smaller.
    """
    tensors = quantize(weight, fmt, method)
    once = dequantize(tensors, fmt)
    kept = torch.ones_like(once, dtype=torch.bool)
    if fmt.scale == "e4m3":
        kept = (tensors["weight_scale"] >= E4M3_LEAST_NORMAL).repeat_interleave(fmt.group, dim=1)
    assert torch.equal(dequantize(quantize(once, fmt, method), fmt)[kept], once[kept])


def test_a_group_of_a_subnormal_scale_may_change_when_quantised_again():
    """By hand, in the least e4m3 scale: 1.515 x 6 gets scale 2 and code 4, which is 8; 8 / 6 gets scale 1, code 6."""
    least = 2.0**-9
    weight = torch.zeros(1, 32)
    weight[0, 0] = 448 * 6  # the tensor scale is 1
    weight[0, 16] = 1.515 * 6 * least
    once = dequantize(quantize(weight, NVFP4, "absmax"), NVFP4)
    twice = dequantize(quantize(once, NVFP4, "absmax"), NVFP4)
    assert (once[0, 16], twice[0, 16]) == (8 * least, 6 * least)


@BOTH
@pytest.mark.parametrize("method", ["absmax", "mse", "activation"])
def test_only_tensors_divide(fmt, method):
    """CUDA multiplies by the rounded reciprocal of a number: its scales would not be the CPU's."""
    with Divisors() as divisors:
        quantize(gaussian(4, 64), fmt, method, torch.ones(64) if method == "activation" else None)
    assert divisors.seen
    assert all(isinstance(by, Tensor) for by in divisors.seen)


@BOTH
@pytest.mark.parametrize("method", ["absmax", "mse", "activation"])
def test_zeros_stay_zeros(fmt, method):
    importance = torch.ones(64) if method == "activation" else None
    weight = torch.zeros(3, 64)
    weight[1] = -0.0
    tensors = quantize(weight, fmt, method, importance)
    assert not tensors["weight_scale"].any()
    assert unpack(tensors["weight_packed"]).tolist() == [[0] * 64, [8] * 64, [0] * 64]
    assert not dequantize(tensors, fmt).any()


@BOTH
@pytest.mark.parametrize("factor", [3e38, 2.0**-120, 2.0**-130, 2.0**-149])
def test_the_ends_of_float32(fmt, factor):
    """The largest numbers are kept; of the smallest, those whose scale would lose its bits are rounded to zero."""
    weight = torch.linspace(-1, 1, 128).view(2, 64) * factor
    tensors = quantize(weight, fmt)
    values = dequantize(tensors, fmt)
    assert fmt.check(tensors) == (2, 64)
    assert bool(torch.isfinite(values).all())
    if factor >= 2.0**-120:
        assert relative_error(values / factor, weight / factor) < 0.1
    assert float(values.abs().max()) <= max(factor * 1.2, 2.0**-126)


@BOTH
@pytest.mark.parametrize("method", ["mse", "activation"])
def test_blocks_threads_and_input_types_do_not_show(fmt, method, monkeypatch):
    weight = gaussian(37, 640).to(torch.bfloat16)
    importance = gaussian(640).square() if method == "activation" else None
    whole = quantize(weight, fmt, method, importance)
    threads = torch.get_num_threads()
    monkeypatch.setattr(scales, "_WEIGHTS_ON_A_CORE", 5 * 640)
    try:
        torch.set_num_threads(3)
        for same in (weight, weight.float(), weight.double(), weight.float().t().contiguous().t()):
            parts = quantize(same, fmt, method, importance)
            assert torch.get_num_threads() == 3
            assert all(torch.equal(parts[name], whole[name]) for name in whole)
    finally:
        torch.set_num_threads(threads)


@BOTH
def test_the_tensor_scale_has_few_bits_and_reaches_the_largest_value(fmt):
    for seed in range(20):
        weight = gaussian(4, 64, seed=seed) * 10.0**seed
        tensors = quantize(weight, fmt, "absmax")
        if fmt.tensor_scale:
            factor = tensors["weight_scale_2"]
            assert factor == factor.to(torch.bfloat16).float()
        at = int(weight.abs().argmax())
        found, wanted = float(dequantize(tensors, fmt).flatten()[at]), float(weight.flatten()[at])
        assert found == pytest.approx(wanted, rel=0.04)  # half a step of e4m3


@BOTH
@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_weights_that_are_no_numbers_are_refused(fmt, bad):
    weight = gaussian(8, 64)
    weight[5, 40] = bad
    for method in ("absmax", "mse"):
        with pytest.raises(ValueError, match="NaN or infinite"):
            quantize(weight, fmt, method)


def test_what_cannot_be_quantised_is_refused():
    weight = gaussian(4, 64)
    with pytest.raises(ValueError, match="multiple of its group, 32"):
        quantize(gaussian(4, 48), G32)
    with pytest.raises(ValueError, match="float matrix"):
        quantize(weight.int(), G32)
    with pytest.raises(ValueError, match="float matrix"):
        quantize(weight[0], G32)
    with pytest.raises(ValueError, match="there are absmax, mse, activation"):
        quantize(weight, G32, "awq")
    with pytest.raises(ValueError, match="needs the mean square"):
        quantize(weight, G32, "activation")
    with pytest.raises(ValueError, match="takes no importance"):
        quantize(weight, G32, "mse", torch.ones(64))
    with pytest.raises(ValueError, match="64 input channels"):
        quantize(weight, G32, "activation", torch.ones(32))
    for bad in (-1.0, math.nan, math.inf):
        importance = torch.ones(64)
        importance[3] = bad
        with pytest.raises(ValueError, match="negative, NaN or infinite"):
            quantize(weight, G32, "activation", importance)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@BOTH
@pytest.mark.parametrize("method", ["absmax", "mse", "activation"])
def test_a_gpu_chooses_what_the_cpu_chooses(fmt, method, monkeypatch):
    weight = gaussian(301, 1056)
    importance = gaussian(1056).square() if method == "activation" else None
    monkeypatch.setattr(scales, "_WEIGHTS_ON_CUDA", 7 * 1056)  # and what is left over
    here, there = quantize(weight, fmt, method, importance), quantize(weight.cuda(), fmt, method, importance)
    assert all(tensor.is_cuda for tensor in there.values())
    differs = {name: (tensor.cpu() != here[name]).float().mean() for name, tensor in there.items()}
    # Sums in another order choose another of two scales that are equally good.
    assert max(differs.values()) <= (0 if method == "absmax" else 0.01)
    found, wanted = (group_errors(weight, fmt, {n: t.cpu() for n, t in made.items()}) for made in (there, here))
    assert float(found.sum() / wanted.sum()) == pytest.approx(1, abs=1e-3)
    if method == "absmax":
        once = dequantize(there, fmt)
        assert torch.equal(dequantize(quantize(once, fmt, method), fmt), once)


@BOTH
def test_silent_channels_are_allowed(fmt):
    weight, importance = gaussian(4, 128), torch.zeros(128)
    nothing = quantize(weight, fmt, "activation", importance)
    even = quantize(weight, fmt, "activation", torch.ones(128))
    assert all(torch.equal(nothing[name], even[name]) for name in even)
    importance[:3] = 1e30  # the others' weight is lost beside it, and they are still quantised sensibly
    assert (
        relative_error(dequantize(quantize(weight, fmt, "activation", importance), fmt)[:, 64:], weight[:, 64:]) < 0.1
    )


@BOTH
@pytest.mark.parametrize("unit", [1e-38, 1e-20, 1e38])
def test_the_unit_of_the_activations_does_not_matter(fmt, unit):
    """Not even where a sum of them leaves the range of float32."""
    weight, importance = gaussian(8, 512), 0.1 + 0.9 * torch.rand(512, generator=torch.Generator().manual_seed(3))
    plain, scaled = (quantize(weight, fmt, "activation", importance * u) for u in (1.0, unit))
    for name in plain:
        differ = (plain[name].float() != scaled[name].float()).float().mean()
        assert differ < 0.02, name  # equals that the rounding of the unit decides


def output_errors(weight: Tensor, tensors: dict[str, Tensor], fmt: Format, importance: Tensor) -> Tensor:
    """float64 [groups]: each group's part of the squared error of the outputs, summed over the rows."""
    error = (dequantize(tensors, fmt).double() - weight.double()).square() * importance.double()
    return error.view(len(weight), -1, fmt.group).sum((0, 2))


def test_a_group_is_chosen_by_its_own_channels_however_quiet_they_are():
    """The mean is 1 / 4096 of the loudest; a channel of a thousandth of that decides in its silent group."""
    weight, importance = gaussian(64, 4096, seed=5), torch.zeros(4096)
    importance[0], importance[70] = 1.0, 1e-3 / 4096
    error = {
        name: output_errors(weight, tensors, G32, importance)[2]
        for name, tensors in (
            ("plain", quantize(weight, G32, "mse")),
            ("weighted", quantize(weight, G32, "activation", importance)),
        )
    }
    assert error["weighted"] < 0.25 * error["plain"]


def test_a_silent_channel_decides_between_equals_alone():
    """A millionth of the mean channel: what is silent in calibration is never given up where it costs nothing."""
    weight = gaussian(64, 64, seed=6)
    importance = torch.ones(64)
    importance[32:] = 0
    found = quantize(weight, G32, "activation", importance)
    even = quantize(weight, G32, "activation", torch.ones(64))
    assert torch.equal(found["weight_scale"], even["weight_scale"])

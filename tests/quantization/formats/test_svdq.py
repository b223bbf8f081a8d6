"""SVDQ: the order of the kernels against its closed forms in plain loops, both ways; the layer's product in floats."""

from __future__ import annotations

import math

import ml_dtypes
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn import functional as F

from runner.quantization.formats.e2m1 import VALUES
from runner.quantization.formats.svdq import (
    dequantize_activations,
    dequantize_residual,
    effective_weight,
    pack_lowrank,
    pack_scales,
    pack_vector,
    pack_weight,
    pad,
    quantize_activations,
    svdq_linear,
    torch_table,
    unpack_lowrank,
    unpack_scales,
    unpack_vector,
    unpack_weight,
)
from runner.quantization.formats.svdq_layout import SVDQ_LAYOUTS

INT4, NVFP4 = SVDQ_LAYOUTS["svdq-int4"], SVDQ_LAYOUTS["svdq-nvfp4"]
PRECISIONS = ("int4", "nvfp4")
SIXTEEN = (torch.bfloat16, torch.float16)
LAYOUTS = pytest.mark.parametrize("layout", [INT4, NVFP4], ids=PRECISIONS)

tiles = st.integers(1, 3).map(lambda n: 128 * n)
seeds = st.integers(0, 2**32 - 1)
precisions = st.sampled_from(PRECISIONS)
sixteen = st.sampled_from(SIXTEEN)


def noise(seed, *shape):
    """Any bytes at all."""
    return torch.randint(0, 256, shape, generator=torch.Generator().manual_seed(seed), dtype=torch.uint8)


def same_bytes(one, other):
    return (
        one.dtype is other.dtype
        and one.shape == other.shape
        and torch.equal(one.contiguous().view(torch.uint8), other.contiguous().view(torch.uint8))
    )


def codes_of(seed, rows, columns, precision):
    nibbles = noise(seed, rows, columns) % 16
    return nibbles.to(torch.int8) - 8 if precision == "int4" else nibbles


# The closed forms


@pytest.mark.parametrize("precision", PRECISIONS)
def test_pack_weight_puts_each_code_in_its_nibble(precision):
    rows, columns = 256, 256
    codes = codes_of(3, rows, columns, precision)
    words = [0] * (rows * columns // 8)
    for n, row in enumerate(codes.tolist()):
        nt, np_, ns, nl = n // 128, n // 16 % 8, n // 8 % 2, n % 8
        for k, code in enumerate(row):
            kt, ks, kl, kr = k // 64, k // 32 % 2, k // 8 % 4, k % 8
            word = ((((nt * (columns // 64) + kt) * 8 + np_) * 8 + nl) * 4 + kl) * 4 + 2 * ns + ks
            words[word] |= (code & 15) << 4 * kr
    packed = pack_weight(codes, precision)
    assert packed.dtype is torch.int8
    assert packed.shape == (rows, columns // 2)
    assert packed.numpy().reshape(-1).view("<u4").tolist() == words
    assert same_bytes(unpack_weight(packed, precision), codes)


def test_pack_scales_puts_each_16_bit_scale_at_its_element():
    rows, groups = 256, 6
    scales = torch.arange(rows * groups, dtype=torch.int16).view(rows, groups).view(torch.bfloat16)
    expected = [0] * scales.numel()
    for n in range(rows):
        t, a, b, c, d = n // 128, n // 16 % 8, n // 8 % 2, n // 2 % 4, n % 2
        for g in range(groups):
            expected[(((t * groups + g) * 8 + a) * 4 + c) * 4 + 2 * b + d] = n * groups + g
    packed = pack_scales(scales, "int4")
    assert packed.shape == (groups, rows)
    assert packed.contiguous().view(torch.int16).reshape(-1).tolist() == expected


def test_pack_vector_has_order_of_scales_of_one_group():
    vector = torch.arange(384, dtype=torch.int16).view(torch.float16)
    expected = [0] * 384
    for n in range(384):
        t, a, b, c, d = n // 128, n // 16 % 8, n // 8 % 2, n // 2 % 4, n % 2
        expected[((t * 8 + a) * 4 + c) * 4 + 2 * b + d] = n
    assert pack_vector(vector).view(torch.int16).tolist() == expected


def test_pack_scales_puts_each_8_bit_scale_at_its_byte():
    rows, groups = 256, 16
    scales = noise(4, rows, groups).view(torch.float8_e4m3fn)
    expected = [0] * scales.numel()
    for n, row in enumerate(scales.view(torch.uint8).tolist()):
        t, p, q, lane = n // 128, n // 32 % 4, n // 8 % 4, n % 8
        for group, scale in enumerate(row):
            kt, gi = group // 4, group % 4
            expected[((((t * (groups // 4) + kt) * 8 + lane) * 4 + q) * 4 + p) * 4 + gi] = scale
    packed = pack_scales(scales, "nvfp4")
    assert packed.shape == (groups, rows)
    assert packed.view(torch.uint8).reshape(-1).tolist() == expected


@pytest.mark.parametrize("down", [False, True], ids=["up", "down"])
def test_pack_lowrank_puts_each_number_in_its_tile(down):
    channels, rank = 128, 48
    shape = (rank, channels) if down else (channels, rank)
    factor = torch.arange(channels * rank, dtype=torch.int16).view(shape).view(torch.bfloat16)
    plain, expected = factor.view(torch.int16).tolist(), [0] * (channels * rank)
    for channel in range(channels):
        for r in range(rank):
            n, k = (r % 16, channel % 16) if down else (channel % 16, r % 16)
            ns, nl, ks, kl, kr = n // 8, n % 8, k // 8, k // 2 % 4, k % 2
            tile = (channel // 16) * (rank // 16) + r // 16
            at = tile * 256 + ((nl * 4 + kl) * 2 + ns) * 4 + 2 * ks + kr
            expected[at] = plain[r][channel] if down else plain[channel][r]
    packed = pack_lowrank(factor, down=down)
    assert packed.shape == (channels, rank)
    assert packed.contiguous().view(torch.int16).reshape(-1).tolist() == expected


# Both ways


@given(tiles, tiles, precisions, seeds)
@settings(max_examples=25)
def test_weight_round_trips_both_ways(rows, columns, precision, seed):
    codes = codes_of(seed, rows, columns, precision)
    packed = pack_weight(codes, precision)
    assert same_bytes(unpack_weight(packed, precision), codes)
    stored = noise(seed, rows, columns // 2).view(torch.int8)
    assert same_bytes(pack_weight(unpack_weight(stored, precision), precision), stored)
    for dtype in (torch.int16, torch.int32, torch.int64):
        assert same_bytes(pack_weight(codes.to(dtype), precision), packed)


@given(tiles, st.integers(1, 4), precisions, sixteen, seeds)
@settings(max_examples=25)
def test_scales_round_trip_both_ways(rows, some, precision, dtype, seed):
    """Any bytes, NaN among them."""
    if precision == "int4":
        groups, stored = 2 * some, noise(seed, 2 * some, 2 * rows).view(dtype)
    else:
        groups, stored = 8 * some, noise(seed, 8 * some, rows).view(torch.float8_e4m3fn)
    plain = unpack_scales(stored, precision)
    assert plain.shape == (rows, groups)
    assert same_bytes(pack_scales(plain, precision), stored)
    other = stored.reshape(rows, groups)
    assert same_bytes(unpack_scales(pack_scales(other, precision), precision), other)


@given(tiles, sixteen, seeds)
@settings(max_examples=25)
def test_vector_round_trips_both_ways(size, dtype, seed):
    vector = noise(seed, 2 * size).view(dtype)
    assert same_bytes(unpack_vector(pack_vector(vector)), vector)
    assert same_bytes(pack_vector(unpack_vector(vector)), vector)


@given(tiles, st.integers(1, 5).map(lambda n: 16 * n), sixteen, st.booleans(), seeds)
@settings(max_examples=25)
def test_factor_round_trips_both_ways(channels, rank, dtype, down, seed):
    stored = noise(seed, channels, 2 * rank).view(dtype)
    plain = unpack_lowrank(stored, down=down)
    assert plain.shape == ((rank, channels) if down else (channels, rank))
    assert same_bytes(pack_lowrank(plain, down=down), stored)
    other = noise(seed, *plain.shape[:1], 2 * plain.shape[1]).view(dtype)
    assert same_bytes(unpack_lowrank(pack_lowrank(other, down=down), down=down), other)


@pytest.mark.parametrize("precision", PRECISIONS)
def test_strided_input_is_read_in_logical_order(precision):
    codes = codes_of(5, 256, 128, precision)
    assert same_bytes(pack_weight(codes.t().contiguous().t(), precision), pack_weight(codes, precision))
    vector = torch.randn(512).bfloat16()[::2]
    assert same_bytes(unpack_vector(pack_vector(vector)), vector.contiguous())
    factor = torch.randn(128, 32).half().t()
    assert same_bytes(pack_lowrank(factor, down=True), pack_lowrank(factor.contiguous(), down=True))
    scales = torch.rand(8, 128).to(torch.float8_e4m3fn).t()
    assert same_bytes(pack_scales(scales, "nvfp4"), pack_scales(scales.contiguous(), "nvfp4"))


@LAYOUTS
def test_unpacking_on_meta_device_gives_shapes(layout):
    """The fake implementations of operators do this."""
    stored = {name: torch.empty(*entry[:1][0], dtype=entry[1], device="meta") for name, entry in table_256(layout)}
    assert dequantize_residual(stored, layout).shape == (256, 256)
    assert effective_weight(stored, layout).is_meta
    x = torch.empty(2, 3, 250, device="meta", dtype=torch.bfloat16)
    assert svdq_linear(x, stored, layout, 200).shape == (2, 3, 200)


def table_256(layout):
    return torch_table(layout, 256, 256).items()


# What is refused


@pytest.mark.parametrize(
    ("codes", "precision", "complaint"),
    [
        (torch.zeros(120, 128, dtype=torch.int8), "int4", r"\[120, 128\].*multiples of 128"),
        (torch.zeros(128, 64, dtype=torch.int8), "int4", r"\[128, 64\].*multiples of 128"),
        (torch.zeros(0, 128, dtype=torch.int8), "int4", r"\[0, 128\]"),
        (torch.zeros(128, dtype=torch.int8), "int4", r"codes are integers \[N, K\], not torch.int8 \[128\]"),
        (torch.zeros(128, 128), "int4", "codes are integers.*torch.float32"),
        (torch.zeros(128, 128, dtype=torch.bool), "int4", "codes are integers.*torch.bool"),
        (torch.zeros(128, 128, dtype=torch.complex64), "nvfp4", "codes are integers.*torch.complex64"),
        (torch.full((128, 128), 8), "int4", "int4 has codes of -8 to 7, not 8 to 8"),
        (torch.full((128, 128), -9), "int4", "not -9 to -9"),
        (torch.full((128, 128), 16), "nvfp4", "nvfp4 has codes of 0 to 15, not 16 to 16"),
        (torch.full((128, 128), -1), "nvfp4", "not -1 to -1"),
    ],
)
def test_bad_codes_are_refused_by_name(codes, precision, complaint):
    with pytest.raises(ValueError, match=complaint):
        pack_weight(codes, precision)


@pytest.mark.parametrize(
    ("packed", "complaint"),
    [
        (torch.zeros(128, 64, dtype=torch.uint8), r"int8 \[N, K/2\], not torch.uint8 \[128, 64\]"),
        (torch.zeros(2, 128, 64, dtype=torch.int8), r"not torch.int8 \[2, 128, 64\]"),
        (torch.zeros(128, 32, dtype=torch.int8), r"\[128, 64\]: both sides"),
        (torch.zeros(64, 64, dtype=torch.int8), r"\[64, 128\]: both sides"),
    ],
)
def test_bad_packed_weights_are_refused_by_name(packed, complaint):
    for precision in PRECISIONS:
        with pytest.raises(ValueError, match=complaint):
            unpack_weight(packed, precision)


@pytest.mark.parametrize("function", [pack_scales, unpack_scales])
@pytest.mark.parametrize(
    ("rows", "groups", "dtype", "precision", "complaint"),
    [
        (128, 2, torch.float32, "int4", "scales of int4 are a matrix of torch.bfloat16 or torch.float16, not"),
        (128, 8, torch.bfloat16, "nvfp4", r"torch.float8_e4m3fn, not torch.bfloat16"),
        (128, 8, torch.float8_e5m2, "nvfp4", "not torch.float8_e5m2"),
        (100, 2, torch.bfloat16, "int4", "100 outputs and 2 groups: int4 needs multiples of 128 and 2"),
        (128, 3, torch.bfloat16, "int4", "128 outputs and 3 groups"),
        (128, 4, torch.float8_e4m3fn, "nvfp4", "128 outputs and 4 groups: nvfp4 needs multiples of 128 and 8"),
        (128, 0, torch.float8_e4m3fn, "nvfp4", "128 outputs and 0 groups"),
    ],
)
def test_bad_scales_are_refused_by_name(function, rows, groups, dtype, precision, complaint):
    shape = (rows, groups) if function is pack_scales else (groups, rows)
    with pytest.raises(ValueError, match=complaint):
        function(torch.zeros(shape).to(dtype), precision)


@pytest.mark.parametrize("function", [pack_vector, unpack_vector])
@pytest.mark.parametrize(
    ("vector", "complaint"),
    [
        (torch.zeros(128), r"16 bits and a multiple of 128 channels, not torch.float32 \[128\]"),
        (torch.zeros(100).bfloat16(), r"torch.bfloat16 \[100\]"),
        (torch.zeros(0).bfloat16(), r"torch.bfloat16 \[0\]"),
        (torch.zeros(1, 128).half(), r"torch.float16 \[1, 128\]"),
    ],
)
def test_bad_vectors_are_refused_by_name(function, vector, complaint):
    with pytest.raises(ValueError, match=complaint):
        function(vector)


@pytest.mark.parametrize(
    ("channels", "rank", "dtype", "complaint"),
    [
        (128, 24, torch.bfloat16, "factors of 128 channels and rank 24: both must be multiples of 16"),
        (120, 16, torch.bfloat16, "factors of 120 channels and rank 16"),
        (128, 0, torch.float16, "rank 0"),
        (128, 16, torch.float32, "factors have 16 bits, not torch.float32"),
    ],
)
def test_bad_factors_are_refused_by_name(channels, rank, dtype, complaint):
    for refused in (
        lambda: pack_lowrank(torch.zeros(rank, channels, dtype=dtype), down=True),
        lambda: pack_lowrank(torch.zeros(channels, rank, dtype=dtype), down=False),
        lambda: unpack_lowrank(torch.zeros(channels, rank, dtype=dtype), down=True),
        lambda: unpack_lowrank(torch.zeros(channels, rank, dtype=dtype), down=False),
    ):
        with pytest.raises(ValueError, match=complaint):
            refused()


def test_lowrank_factor_that_is_no_matrix_is_refused():
    for refused in (pack_lowrank, unpack_lowrank):
        with pytest.raises(ValueError, match="is a matrix, not"):
            refused(torch.zeros(16).bfloat16(), down=True)


def test_pad_adds_behind_and_returns_full_tensor_unchanged():
    assert pad(torch.ones(2, 3), (3, 4)).tolist() == [[1, 1, 1, 0], [1, 1, 1, 0], [0, 0, 0, 0]]
    assert pad(torch.zeros(1), (3,), fill=1).tolist() == [0, 1, 1]
    whole = torch.ones(2)
    assert pad(whole, (2,)) is whole


# Activations


def test_quantize_activations_in_int4_equals_hand_calculation():
    x = torch.zeros(2, 128)
    x[0, :57] = torch.arange(57) - 28.0  # a step of 4, and every tie between two
    x[0, 64], x[0, 65], x[0, 66] = 7.0, 0.5, -1.5  # ties go to the even integer
    codes, scales = quantize_activations(x, "int4")
    assert codes.dtype is torch.int8 and scales.dtype is torch.float32
    assert torch.allclose(scales, torch.tensor([[4.0, 1.0], [0.0, 0.0]]))
    assert codes[0, :57].tolist() == [round((k - 28) / 4) for k in range(57)]
    assert codes[0, 64:68].tolist() == [7, 0, -2, 0]
    assert not codes[1].any()  # a group of zeros
    assert not dequantize_activations(codes, scales, "int4")[1].any()


def test_quantize_activations_in_nvfp4_equals_hand_calculation():
    x = torch.zeros(1, 64)
    x[0, :8] = torch.tensor([6.0, 0.25, 0.75, 1.25, 1.75, 2.5, 3.5, 5.0])  # scale 1; every tie
    x[0, 16:18] = torch.tensor([4000.0, -1e6])  # a scale of 448 and no more: codes stop at 6
    x[0, 32:34] = torch.tensor([1e-6, -1e-6])  # a group below the smallest e4m3 scale is 0
    codes, scales = quantize_activations(x, "nvfp4")
    assert codes.dtype is torch.uint8 and scales.dtype is torch.float8_e4m3fn
    assert scales.float().tolist() == [[1.0, 448.0, 0.0, 0.0]]
    values = dequantize_activations(codes, scales, "nvfp4")
    assert values[0, :8].tolist() == [6.0, 0.0, 1.0, 1.0, 2.0, 2.0, 4.0, 4.0]
    assert values[0, 16:18].tolist() == [2688.0, -2688.0]
    assert not values[0, 32:].any()


@given(st.lists(st.floats(-3000, 3000, width=32), min_size=16, max_size=16))
def test_quantize_activations_in_nvfp4_agrees_with_ml_dtypes(values):
    x = torch.tensor([values])
    codes, scales = quantize_activations(x, "nvfp4")
    exact = (x.abs().amax() / 6).clamp(max=448)
    assert scales.view(torch.uint8).item() == int(np.float32(exact).astype(ml_dtypes.float8_e4m3fn).view(np.uint8))
    quotients = (x / exact.clamp(min=1e-30)).numpy()
    expected = np.clip(quotients, -6, 6).astype(ml_dtypes.float4_e2m1fn).view(np.uint8) & 15
    assert codes.numpy().tolist() == expected.tolist()


@given(seeds, precisions, st.sampled_from([torch.float32, *SIXTEEN]), st.floats(-4, 4))
@settings(max_examples=40)
def test_dequantized_activations_are_within_bound_of_input(seed, precision, dtype, power):
    x = (torch.randn(3, 128, generator=torch.Generator().manual_seed(seed)) * 10**power).to(dtype)
    codes, scales = quantize_activations(x, precision)
    assert codes.shape == x.shape
    values = dequantize_activations(codes, scales, precision)
    peaks = x.float().view(3, scales.shape[1], -1).abs().amax(-1)
    # half of the widest step, and what the scale's own rounding moves: 2^-4 of e4m3 while it is a normal number
    step, rounding = (1 / 14, 2**-8) if precision == "int4" else (1 / 6, 2**-4)
    slack = 6.1e-5 if dtype is torch.float16 else 0.0
    if precision == "nvfp4":
        slack, step = 6 * 2**-10, step + rounding
        peaks, x = peaks.clamp(max=2688), x.float().clamp(-2688, 2688)
    bound = (step + rounding) * peaks + slack
    worst = (x.float() - values).abs().view(3, scales.shape[1], -1).amax(-1)
    assert bool((worst <= bound).all())


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("precision", PRECISIONS)
def test_activation_that_is_not_finite_changes_only_its_group(precision, bad):
    x = torch.ones(2, 128)
    x[1, 5] = bad
    codes, scales = quantize_activations(x, precision)
    values = dequantize_activations(codes, scales, precision)
    group = 64 if precision == "int4" else 16
    assert not values[1, :group].isfinite().any()
    assert values[1, group:].isfinite().all()
    assert values[0].isfinite().all()


def test_bad_activations_are_refused_by_name():
    for x, complaint in (
        (torch.zeros(2, 96), r"K in groups of 64, not torch.float32 \[2, 96\]"),
        (torch.zeros(128), r"\[128\]"),
        (torch.zeros(2, 128, dtype=torch.int8), "torch.int8"),
    ):
        with pytest.raises(ValueError, match=complaint):
            quantize_activations(x, "int4")


# The layer


def random_layer(layout, rows, columns, seed=0, used=None):
    """Tensors of [rows, columns], the part beyond `used` padding: (tensors, smoothing, residual, down, up), float."""
    generator = torch.Generator().manual_seed(seed)
    used = used or (rows, columns)
    codes = codes_of(seed, rows, columns, layout.precision).long()
    codes[used[0] :] = 0
    codes[:, used[1] :] = 0
    groups = columns // layout.group
    scales = torch.rand(rows, groups, generator=generator) + 0.5
    wc = (torch.rand(rows, generator=generator) + 0.5).bfloat16()
    scales = scales.bfloat16() if layout.precision == "int4" else scales.to(torch.float8_e4m3fn)
    smooth = (torch.rand(columns, generator=generator) * 3 + 0.25).bfloat16()
    smooth[used[1] :] = 1
    down = (torch.randn(layout.rank, columns, generator=generator) / columns**0.5).bfloat16()
    up = torch.randn(rows, layout.rank, generator=generator).bfloat16()
    down[:, used[1] :] = 0
    up[used[0] :] = 0
    tensors = {
        "qweight": pack_weight(codes, layout.precision),
        "wscales": pack_scales(scales, layout.precision).contiguous(),
        "smooth_factor": pack_vector(smooth),
        "proj_down": pack_lowrank(down, down=True).contiguous(),
        "proj_up": pack_lowrank(up, down=False).contiguous(),
    }
    values = codes.float() if layout.precision == "int4" else torch.tensor(VALUES)[codes]
    residual = values * scales.float().repeat_interleave(layout.group, dim=1)
    if layout.precision == "nvfp4":
        tensors["wcscales"] = pack_vector(wc)
        residual = residual * wc.float().unsqueeze(1)
    assert {k: (tuple(t.shape), t.dtype) for k, t in tensors.items()} == torch_table(layout, rows, columns)
    return tensors, smooth.float(), residual, down.float(), up.float()


@LAYOUTS
def test_effective_weight_is_residual_plus_factors(layout):
    layout = layout.with_rank(48)
    tensors, smooth, residual, down, up = random_layer(layout, 256, 384)
    assert torch.equal(dequantize_residual(tensors, layout), residual)
    assert torch.allclose(effective_weight(tensors, layout), residual / smooth + up @ down, atol=1e-4, rtol=1e-5)


def exact_activations(layout, smooth, rows, seed=1):
    """x whose quotient by the smoothing factor has only numbers that its format holds, each group's largest among
    them."""
    generator = torch.Generator().manual_seed(seed)
    columns = smooth.numel()
    largest = 7 if layout.precision == "int4" else 6
    if layout.precision == "int4":
        values = torch.randint(-7, 8, (rows, columns), generator=generator).float()
    else:
        values = torch.tensor(VALUES)[torch.randint(0, 16, (rows, columns), generator=generator)]
    groups = values.view(rows, -1, layout.group)
    groups[..., 0] = largest
    powers = torch.randint(-2, 3, groups.shape[:2], generator=generator)
    return (groups * 2.0 ** powers.unsqueeze(-1)).view(rows, columns) * smooth


@LAYOUTS
def test_svdq_linear_of_activations_exact_in_4_bits_is_exact(layout):
    tensors, *_ = random_layer(layout, 256, 384)
    smooth = (2.0 ** torch.randint(-3, 4, (384,), generator=torch.Generator().manual_seed(2))).bfloat16()
    tensors["smooth_factor"] = pack_vector(smooth)  # powers of two, so that x / s is exact
    bias = torch.randn(256, generator=torch.Generator().manual_seed(3))
    x = exact_activations(layout, smooth.float(), 5)
    expected = F.linear(x.double(), effective_weight(tensors, layout).double(), bias.double())
    found = svdq_linear(x, tensors, layout, 256, bias)
    assert found.dtype is torch.float32
    assert float((found - expected).abs().max() / expected.abs().max()) < 2e-6


@LAYOUTS
@pytest.mark.parametrize("dtype", [torch.float32, *SIXTEEN])
def test_svdq_linear_with_padding_equals_unpadded_product(layout, dtype):
    """A padded layer of 100 outputs and 200 inputs, compared with the product of its own numbers."""
    tensors, smooth, residual, down, up = random_layer(layout, 128, 256, used=(100, 200))
    x = torch.randn(7, 200, generator=torch.Generator().manual_seed(4)).to(dtype)
    found = svdq_linear(x, tensors, layout, 100)
    assert found.shape == (7, 100) and found.dtype is dtype
    smoothed = F.pad(x / smooth[:200].to(dtype), (0, 56))
    values = dequantize_activations(*quantize_activations(smoothed, layout.precision), layout.precision)[:, :200]
    expected = values @ residual[:100, :200].T + x.float() @ down[:, :200].T @ up[:100].T
    assert torch.allclose(found.float(), expected.to(dtype).float(), rtol=2**-7, atol=1e-3 * expected.abs().max())
    # what stands in the padding of outputs does not reach them
    qweight, proj_up = unpack_weight(tensors["qweight"], layout.precision), tensors["proj_up"].clone()
    qweight[100:] = 5
    noisy = tensors | {"qweight": pack_weight(qweight, layout.precision)}
    up_noisy = unpack_lowrank(proj_up, down=False).contiguous()
    up_noisy[100:] = 9
    noisy["proj_up"] = pack_lowrank(up_noisy, down=False)
    assert torch.equal(svdq_linear(x, noisy, layout, 100), found)


@LAYOUTS
def test_svdq_linear_accepts_shapes_strides_and_bias(layout):
    tensors, *_ = random_layer(layout, 128, 256)
    bias = torch.randn(128).bfloat16()
    x = torch.randn(2, 3, 256).bfloat16()
    flat = svdq_linear(x.view(6, 256), tensors, layout, 128)
    assert torch.equal(svdq_linear(x, tensors, layout, 128), flat.view(2, 3, 128))
    assert torch.equal(svdq_linear(x[1, 2], tensors, layout, 128), flat[5])
    assert svdq_linear(x[:, :0], tensors, layout, 128, bias).shape == (2, 0, 128)
    assert torch.equal(svdq_linear(x[:0, 0], tensors, layout, 100), torch.zeros(0, 100).bfloat16())
    strided = x.transpose(0, 1).contiguous().transpose(0, 1)
    assert torch.equal(svdq_linear(strided, tensors, layout, 128), flat.view(2, 3, 128))
    columns_first = x.view(6, 256).t().contiguous().t()
    assert torch.equal(svdq_linear(columns_first, tensors, layout, 128), flat)
    wide = torch.cat([x, x], dim=-1)[..., :256]
    assert torch.equal(svdq_linear(wide, tensors, layout, 128), flat.view(2, 3, 128))
    assert torch.equal(svdq_linear(x, tensors, layout, 60), flat.view(2, 3, 128)[..., :60])
    full = svdq_linear(x.float(), tensors, layout, 128, bias)
    assert torch.allclose(
        full - svdq_linear(x.float(), tensors, layout, 128), bias.float().expand(2, 3, 128), atol=1e-3
    )


@LAYOUTS
def test_svdq_linear_with_wrong_arguments_is_refused(layout):
    tensors, *_ = random_layer(layout, 128, 128)
    x = torch.randn(2, 128)
    for call, complaint in (
        (lambda: svdq_linear(torch.randn(2, 129), tensors, layout, 128), r"\[2, 129\].*the weight has \[128, 128\]"),
        (lambda: svdq_linear(x, tensors, layout, 129), "→ 129 outputs"),
        (lambda: svdq_linear(x, tensors, layout, 0), "→ 0 outputs"),
        (lambda: svdq_linear(x.int(), tensors, layout, 128), "torch.int32"),
        (lambda: svdq_linear(torch.tensor(1.0), tensors, layout, 128), r"\[\]"),
        (lambda: svdq_linear(x, tensors, layout, 100, torch.zeros(128)), r"bias of \[128\] does not fit 100 outputs"),
        (lambda: svdq_linear(x, tensors, layout, 128, torch.zeros(1)), r"bias of \[1\]"),
        (lambda: svdq_linear(x, tensors, NVFP4 if layout is INT4 else INT4, 128), "scales of"),
    ):
        with pytest.raises(ValueError, match=complaint):
            call()


@LAYOUTS
def test_svdq_linear_of_row_that_is_not_finite_changes_only_that_row(layout):
    tensors, *_ = random_layer(layout, 128, 128)
    x = torch.randn(3, 128)
    x[1, 100] = math.inf
    found = svdq_linear(x, tensors, layout, 128)
    assert not found[1].isfinite().any()
    assert torch.equal(found[[0, 2]], svdq_linear(x[[0, 2]], tensors, layout, 128))


@LAYOUTS
def test_svdq_linear_with_float16_overflow_is_not_finite(layout):
    tensors, *_ = random_layer(layout, 128, 128)
    tensors["smooth_factor"] = pack_vector(torch.full((128,), 0.01).bfloat16())
    x = torch.full((1, 128), 1000.0).half()  # 1000 / .01 is beyond 65504
    assert not svdq_linear(x, tensors, layout, 128).isfinite().any()
    assert svdq_linear(x.bfloat16(), tensors, layout, 128).isfinite().all()

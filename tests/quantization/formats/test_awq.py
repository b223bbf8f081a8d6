"""INT4 in TinyChat's layout: the index map element by element, errors against what is known of gaussians, the layer."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from runner.quantization.formats import awq
from runner.quantization.formats.awq import (
    GROUP,
    W4Linear,
    Workspace,
    dequantize,
    fits,
    pack,
    quantize,
    tensors,
    unpack,
)


def gaussian(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def code_at(words, row: int, column: int) -> int:
    """The published map, written down for one element: quarter rows, 64-column blocks, 32-column halves, nibbles."""
    quarter, interleaved = divmod(row, 4)
    block, within = divmod(column, 64)
    half, rest = divmod(within, 32)
    nibble, word = divmod(rest, 8)
    value = int(words[quarter][block * 64 + interleaved * 16 + half * 8 + word]) & 0xFFFF
    return value >> (4 * nibble) & 0xF


@settings(max_examples=15, deadline=None)
@given(st.integers(1, 3), st.integers(1, 2), st.integers(0, 2**32 - 1))
def test_packing_follows_the_map_element_by_element(fours, groups, seed):
    rows, columns = 4 * fours, GROUP * groups
    codes = torch.randint(16, (rows, columns), generator=torch.Generator().manual_seed(seed), dtype=torch.uint8)
    words = pack(codes)
    assert (words.shape, words.dtype) == ((fours, columns), torch.int16)
    listed = words.tolist()
    assert [[code_at(listed, r, c) for c in range(columns)] for r in range(rows)] == codes.tolist()
    assert torch.equal(unpack(words), codes)


@settings(max_examples=15, deadline=None)
@given(st.integers(1, 3), st.integers(0, 2**32 - 1))
def test_any_words_survive_unpacking_and_packing(fours, seed):
    words = torch.randint(-(2**15), 2**15, (fours, 128), generator=torch.Generator().manual_seed(seed)).to(torch.int16)
    assert torch.equal(pack(unpack(words)), words)


@pytest.mark.parametrize(
    ("row", "column", "word", "nibble"),
    [
        (0, 0, (0, 0), 0),
        (0, 8, (0, 0), 1),  # word 0 of a run holds columns 0, 8, 16, 24
        (0, 24, (0, 0), 3),
        (0, 7, (0, 7), 0),
        (0, 32, (0, 8), 0),  # the second run of 32
        (1, 0, (0, 16), 0),  # the second of four rows
        (3, 63, (0, 63), 3),
        (0, 64, (0, 64), 0),
        (5, 105, (1, 89), 1),  # 105 = 64 + 32 + 9; 89 = 64 + 16 + 8 + 1
    ],
)
def test_single_codes_land_where_worked_out_by_hand(row, column, word, nibble):
    codes = torch.zeros(8, 128, dtype=torch.uint8)
    codes[row, column] = 9
    words = pack(codes)
    assert words.count_nonzero() == 1
    assert int(words[word]) & 0xFFFF == 9 << 4 * nibble


def test_scales_come_in_eights_of_groups():
    rows = {columns: tensors(4096, columns)["scales"][0][0] for columns in (128, 1024, 1152, 4096, 10240)}
    assert rows == {128: 8, 1024: 8, 1152: 16, 4096: 32, 10240: 80}  # 4096 and 10240, those of UMT5, need no padding
    made = quantize(gaussian(4, 1152))
    assert made["scales"].shape == made["scaled_zeros"].shape == (16, 4)
    assert made["scales"][:9].gt(0).all() and not made["scales"][9:].any() and not made["scaled_zeros"][9:].any()


@pytest.mark.parametrize(("rows", "columns"), [(6, 128), (4, 64), (4, 192), (0, 128), (4, 0), (4, 32)])
def test_what_the_layout_cannot_hold_is_refused(rows, columns):
    assert not fits(rows, columns)
    with pytest.raises(ValueError, match=f"not {rows} x {columns}"):
        tensors(rows, columns)
    with pytest.raises(ValueError, match="INT4 needs"):
        quantize(torch.ones(rows, columns))


@pytest.mark.parametrize("scale_dtype", [torch.bfloat16, torch.float16])
def test_a_weight_is_code_times_scale_plus_zero(scale_dtype):
    made = quantize(gaussian(8, 256), scale_dtype=scale_dtype)
    assert {name: (tuple(t.shape), t.dtype) for name, t in made.items()} == tensors(8, 256, scale_dtype)
    words, scales, zeros = (made[name].double().tolist() for name in ("qweight", "scales", "scaled_zeros"))
    by_hand = torch.tensor(
        [[code_at(words, r, c) * scales[c // 128][r] + zeros[c // 128][r] for c in range(256)] for r in range(8)]
    )
    torch.testing.assert_close(dequantize(**made), by_hand, rtol=1e-6, atol=1e-6)
    assert torch.equal(dequantize(**made, dtype=torch.bfloat16), dequantize(**made).to(torch.bfloat16))


@pytest.mark.parametrize(("method", "low", "high"), [("absmax", 0.0985, 0.1010), ("mse", 0.0900, 0.0930)])
def test_error_on_gaussian_weights(method, low, high):
    """128 gaussians span 5.19 sigma on average: a step of 0.346 sigma, and step / sqrt(12) is 0.0999. One range for all
    groups leaves 0.1074 at best (Max, 1960, 16 uniform levels): a range of one's own is worth more."""
    weight = gaussian(256, 4096)
    error = (dequantize(**quantize(weight, method)) - weight).norm() / weight.norm()
    assert low <= error <= high


@pytest.mark.parametrize("shift", [0.0, 6.0, -6.0])
def test_absmax_misses_by_half_a_step_wherever_the_group_lies(shift):
    weight = gaussian(16, 512) + shift
    made = quantize(weight, "absmax", torch.float16)
    groups = weight.view(16, 4, 128)
    step = (groups.amax(-1) - groups.amin(-1)) / 15
    off = (dequantize(**made).view(16, 4, 128) - groups).abs().amax(-1)
    # Rounding the offset to 11 bits moves all 16 levels, and the scale's own rounding adds up over 15 steps.
    slack = groups.abs().amax(-1) * 2**-11 + 15 * step * 2**-11
    assert (off <= step / 2 + slack).all()
    codes = unpack(made["qweight"]).view(16, 4, 128)
    assert (codes.amin(-1) == 0).all() and (codes.amax(-1) == 15).all()


def test_searching_never_costs_a_group_anything():
    weight = gaussian(64, 512) / gaussian(4, 64, 512, seed=1).square().mean(0).sqrt()  # Student's t, 4 degrees
    errors = {
        method: (dequantize(**quantize(weight, method)) - weight).view(64, 4, 128).square().sum(-1)
        for method in ("absmax", "mse")
    }
    assert (errors["mse"] <= errors["absmax"] * (1 + 1e-5)).all()
    assert errors["mse"].sum() < 0.9 * errors["absmax"].sum()


@pytest.mark.parametrize("value", [0.0, -0.75, 3.0e-7])
def test_constant_groups_are_their_offset(value):
    assert torch.equal(dequantize(**quantize(torch.full((4, 128), value))), torch.full((4, 128), value).bfloat16())


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_what_is_no_number_is_refused(bad):
    weight = gaussian(4, 128)
    weight[2, 5] = bad
    with pytest.raises(ValueError, match="NaN or infinity"):
        quantize(weight)


def test_weights_beyond_half_precision_are_refused_there_and_held_in_bfloat16():
    weight = gaussian(4, 128) * 1e6
    with pytest.raises(ValueError, match="too large for scales"):
        quantize(weight, scale_dtype=torch.float16)
    assert (dequantize(**quantize(weight)) - weight).norm() < 0.12 * weight.norm()
    with pytest.raises(ValueError, match="float16 or bfloat16"):
        quantize(weight, scale_dtype=torch.float32)


def test_pieces_make_no_difference(monkeypatch):
    weight = gaussian(20, 256)
    whole = quantize(weight)
    dense = dequantize(**whole)
    monkeypatch.setattr(awq, "SEARCH_WEIGHTS", {"cpu": 8 * 256})  # 8, 8 and 4 rows
    monkeypatch.setattr(awq, "UNPACK_WEIGHTS", {"cpu": 8 * 256})
    pieces = quantize(weight)
    assert all(torch.equal(whole[name], pieces[name]) for name in whole)
    assert torch.equal(dequantize(**whole), dense)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("bias", [True, False])
def test_the_layer_is_the_linear_of_its_dequantised_weight(dtype, bias):
    linear = torch.nn.Linear(256, 12, bias=bias)
    layer = W4Linear.from_linear(linear)
    assert {name: (tuple(p.shape), p.dtype) for name, p in layer.named_parameters() if name != "bias"} == tensors(
        12, 256
    )
    assert not any(p.requires_grad for p in layer.parameters()) and not list(layer.buffers())
    x = gaussian(2, 3, 256).to(dtype)
    weight = dequantize(layer.qweight, layer.scales, layer.scaled_zeros, dtype)
    expected = torch.nn.functional.linear(x, weight, linear.bias.detach().to(dtype) if bias else None)
    got = layer(x)
    assert got.dtype == dtype and torch.equal(got, expected)
    assert (got.float() - linear(x.float())).norm() < 0.15 * linear(x.float()).norm()


def test_an_empty_layer_takes_the_parameters_of_a_full_one():
    full = W4Linear.from_linear(torch.nn.Linear(128, 8), scale_dtype=torch.float16)
    empty = W4Linear(128, 8, bias=True, scale_dtype=torch.float16, device="meta")
    assert all(p.is_meta for p in empty.parameters())
    empty.load_state_dict(full.state_dict(), strict=True, assign=True)
    x = gaussian(2, 128)
    assert torch.equal(empty(x), full(x))
    assert empty.weight is None and "weight" not in full.state_dict()


def test_layers_share_one_workspace_as_large_as_the_largest():
    workspace = Workspace()
    layers = [W4Linear.from_linear(torch.nn.Linear(128, n), workspace=workspace) for n in (8, 32, 16)]
    alone = [W4Linear.from_linear(torch.nn.Linear(128, n)) for n in (8, 32, 16)]
    for layer, other in zip(layers, alone, strict=True):
        other.load_state_dict(layer.state_dict())
    x = gaussian(3, 128)
    for _ in range(2):
        for layer, other in zip(layers, alone, strict=True):
            assert torch.equal(layer(x), other(x))
    assert workspace.buffer is not None and workspace.buffer.numel() == 32 * 128
    layers[0](x.bfloat16())
    assert workspace.buffer.dtype == torch.bfloat16  # of another dtype: made anew, not reinterpreted


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_cuda_gives_what_the_cpu_gives():
    weight = gaussian(512, 1024)
    here, there = quantize(weight), {name: t.cpu() for name, t in quantize(weight.cuda()).items()}
    assert (here["qweight"] != there["qweight"]).float().mean() < 0.01  # ties of the search may fall either way
    dense = dequantize(**{name: t.cuda() for name, t in here.items()}, dtype=torch.bfloat16)
    torch.testing.assert_close(dense.cpu(), dequantize(**here, dtype=torch.bfloat16), rtol=2**-8, atol=0)
    layer = W4Linear(1024, 512)
    layer.load_state_dict(here)
    x = gaussian(16, 1024)
    torch.testing.assert_close(layer.cuda()(x.cuda()).cpu(), layer.cpu()(x), rtol=1e-3, atol=2e-2)

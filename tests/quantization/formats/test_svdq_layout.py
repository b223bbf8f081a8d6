"""SVDQ layout: the table's bytes and paddings, and every shape of the 14B model packed and unpacked byte for byte."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from runner.quantization.formats.stored_dtypes import DTYPE_BYTES
from runner.quantization.formats.svdq import (
    check_values,
    pack_lowrank,
    pack_scales,
    pack_vector,
    pack_weight,
    torch_table,
    unpack_lowrank,
    unpack_scales,
    unpack_vector,
    unpack_weight,
)
from runner.quantization.formats.svdq_layout import MOST_RANK, RANK_MULTIPLE, SVDQ_LAYOUTS, TILE, SvdqLayout
from runner.quantization.rules import RULES, WAN_ANIMATE_14B, linear_shapes, rule_for, transformer_on_meta
from tests.quantization.svdq_files import LAYOUTS, random_layer
from tests.system_tests import system_test

IDS = [layout.name for layout in LAYOUTS]
every_layout = pytest.mark.parametrize("layout", LAYOUTS, ids=IDS)
SIDES = st.integers(1, 5000)
RANKS = st.integers(1, MOST_RANK // RANK_MULTIPLE).map(lambda tiles: tiles * RANK_MULTIPLE)
layouts = st.builds(SvdqLayout.with_rank, st.sampled_from(list(SVDQ_LAYOUTS.values())), RANKS)

# What is quantised of the 14B model; the large ones take seconds each.
SHAPES = ((5120, 256), (5120, 1024), (1280, 1280), (5120, 1280), (5120, 4096), (5120, 5120))
LARGE = ((13824, 5120), (5120, 13824), (30720, 5120))


@given(layout=layouts, out=SIDES, wide=SIDES)
def test_layout_bytes_equal_bytes_of_tensors(layout, out, wide):
    table = layout.tensor_table(out, wide)
    assert layout.bytes(out, wide) == sum(math.prod(shape) * DTYPE_BYTES[dtype] for shape, dtype in table.values())
    assert {suffix: (shape, str(dtype)) for suffix, (shape, dtype) in torch_table(layout, out, wide).items()} == {
        suffix: (shape, f"torch.{dtype}") for suffix, (shape, dtype) in table.items()
    }


@given(layout=layouts, out=SIDES, wide=SIDES)
def test_padded_shape_is_next_multiple_of_tile(layout, out, wide):
    rows, columns = padded = layout.padded(out, wide)
    assert (rows % TILE, columns % TILE) == (0, 0)
    assert (0 <= rows - out < TILE) and (0 <= columns - wide < TILE)
    assert layout.padded(*padded) == padded
    table = layout.tensor_table(out, wide)
    assert layout.tensor_table(*padded) == table  # a reader has the padded shape alone
    assert layout.unpacked_shape(table[layout.packed][0]) == padded
    assert layout.fits(wide)


@given(layout=layouts, out=SIDES, wide=SIDES)
def test_tensor_table_has_shapes_that_can_be_packed(layout, out, wide):
    """The packing functions accept its shapes: each side is a multiple of the group, the tile or the rank."""
    (rows, columns), table = layout.padded(out, wide), layout.tensor_table(out, wide)
    assert table["wscales"][0] == (columns // layout.group, rows)
    assert columns % layout.group == 0
    assert table["proj_down"][0] == (columns, layout.rank) and table["proj_up"][0] == (rows, layout.rank)
    assert ("wcscales" in table) is (layout.group == 16)


@every_layout
def test_bits_per_weight_of_square_layer_equal_hand_calculation(layout):
    """Of a square layer of the 14B model at rank 32: codes and group scales, factors, vectors."""
    side = 5120
    bits = layout.with_rank(32).bytes(side, side) * 8 / side**2
    vectors = 16 * side * (2 if "wcscales" in layout.tensor_table(1, 1) else 1)
    assert bits == pytest.approx(layout.bits_per_weight + 2 * 32 * side * 16 / side**2 + vectors / side**2)


@pytest.mark.parametrize("rank", [0, -16, 8, 24, MOST_RANK + RANK_MULTIPLE])
def test_with_rank_of_unsupported_rank_is_refused(rank):
    with pytest.raises(ValueError, match=f"rank of {rank}: multiples of 16 up to 512"):
        LAYOUTS[0].with_rank(rank)


@every_layout
@pytest.mark.parametrize("shape", [(0, 64), (64, 0), (-1, 5)], ids=str)
def test_tensor_table_of_invalid_shape_is_refused(layout, shape):
    with pytest.raises(ValueError, match=layout.name):
        layout.tensor_table(*shape)


def test_tested_shapes_are_those_of_14b_model():
    keep = rule_for(LAYOUTS[0], RULES["all"]).keep
    linears = linear_shapes(transformer_on_meta(WAN_ANIMATE_14B))
    quantised = {shape for name, shape in linears.items() if not keep(name)}
    assert quantised == {*SHAPES, *LARGE}
    assert [name for name in linears if keep(name)] == ["proj_out"]
    assert linears["proj_out"][0] % TILE  # the only one that would be padded
    assert all(LAYOUTS[0].padded(*shape) == shape for shape in quantised)


def bytes_like(shape, dtype, seed) -> torch.Tensor:
    """Any bytes at all, NaN among them."""
    count = math.prod(shape) * dtype.itemsize
    return torch.randint(0, 256, (count,), dtype=torch.uint8, generator=seed).view(dtype).view(shape)


def same_bytes(one, other) -> bool:
    """Compared as bytes: NaN equals itself, and a sign of zero counts."""
    return torch.equal(one.contiguous().view(torch.uint8), other.contiguous().view(torch.uint8))


def check_both_ways(layout, shape):
    """Any stored bytes, unpacked and packed; what they stand for lies where the maps of the format put it."""
    seed = torch.Generator().manual_seed(shape[0] * shape[1])
    table = torch_table(layout, *shape)
    for suffix, (size, dtype) in table.items():
        stored = bytes_like(size, dtype, seed)
        if suffix == "qweight":
            plain = unpack_weight(stored, layout.precision)
            assert plain.shape == shape
            assert same_bytes(pack_weight(plain, layout.precision), stored)
            check_nibbles(stored, plain, seed)
        elif suffix == "wscales":
            plain = unpack_scales(stored, layout.precision)
            assert plain.shape == (shape[0], shape[1] // layout.group)
            assert same_bytes(pack_scales(plain, layout.precision), stored)
            check_scales(stored, plain, layout, seed)
        elif suffix.startswith("proj_"):
            down = suffix == "proj_down"
            plain = unpack_lowrank(stored, down=down)
            assert plain.shape == ((layout.rank, shape[1]) if down else (shape[0], layout.rank))
            assert same_bytes(pack_lowrank(plain, down=down), stored)
        else:
            assert same_bytes(pack_vector(unpack_vector(stored)), stored)


def check_nibbles(stored, plain, seed):
    """200 codes, each at the nibble that the map of 32-bit words names."""
    words = stored.contiguous().view(torch.int32).flatten().tolist() if stored.numel() < 1 << 20 else None
    flat = stored.contiguous().view(torch.uint8).flatten()
    rows, columns = plain.shape
    for n, k in zip(
        torch.randint(rows, (200,), generator=seed).tolist(),
        torch.randint(columns, (200,), generator=seed).tolist(),
        strict=True,
    ):
        nt, np, ns, nl = n // 128, n % 128 // 16, n % 16 // 8, n % 8
        kt, ks, kl, kr = k // 64, k % 64 // 32, k % 32 // 8, k % 8
        word = ((((nt * (columns // 64) + kt) * 8 + np) * 8 + nl) * 4 + kl) * 4 + ns * 2 + ks
        nibble = int(flat[4 * word + kr // 2]) >> 4 * (kr % 2) & 15
        assert nibble == int(plain[n, k]) & 15
        assert words is None or nibble == words[word] >> 4 * kr & 15


def check_scales(stored, plain, layout, seed):
    """200 scales, each at the element that the map of its precision names."""
    bits = torch.int16 if plain.element_size() == 2 else torch.uint8
    flat, plain = stored.contiguous().view(bits).flatten(), plain.contiguous().view(bits)
    rows, groups = plain.shape
    for n, g in zip(
        torch.randint(rows, (200,), generator=seed).tolist(),
        torch.randint(groups, (200,), generator=seed).tolist(),
        strict=True,
    ):
        t = n // 128
        if layout.group == 64:
            a, b, c, d = n % 128 // 16, n % 16 // 8, n % 8 // 2, n % 2
            at = (((t * groups + g) * 8 + a) * 4 + c) * 4 + b * 2 + d
        else:
            p, q, l8, kt, gi = n % 128 // 32, n % 32 // 8, n % 8, g // 4, g % 4
            at = ((((t * (groups // 4) + kt) * 8 + l8) * 4 + q) * 4 + p) * 4 + gi
        assert int(flat[at]) == int(plain[n, g])


@every_layout
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_packing_round_trip_at_shapes_of_14b_model_is_exact(layout, shape):
    check_both_ways(layout, shape)


@system_test
@every_layout
@pytest.mark.parametrize("shape", LARGE, ids=str)
def test_packing_round_trip_at_large_shapes_is_exact(layout, shape):
    check_both_ways(layout, shape)


@settings(max_examples=15, deadline=None)
@given(layout=layouts, tiles=st.tuples(st.integers(1, 4), st.integers(1, 4)))
def test_packing_round_trip_at_any_shape_is_exact(layout, tiles):
    check_both_ways(layout, (tiles[0] * TILE, tiles[1] * TILE))


# Values


@every_layout
def test_check_values_accepts_values_of_quantiser(layout):
    tensors = random_layer(layout, 200, 300, torch.Generator().manual_seed(0))
    check_values(tensors)
    tensors["wscales"].view(torch.uint8).zero_()  # of a group of zeros
    if "wcscales" in tensors:
        tensors["wcscales"].zero_()
    check_values(tensors)


BAD = {
    "wscales": (float("nan"), -1.0),
    "wcscales": (float("nan"), float("inf"), -1.0),
    "smooth_factor": (float("nan"), float("inf"), -1.0, 0.0),
    "proj_down": (float("nan"), float("inf"), -float("inf")),
    "proj_up": (float("nan"), float("inf")),
}


@every_layout
@pytest.mark.parametrize(("suffix", "value"), [(name, value) for name, row in BAD.items() for value in row])
def test_check_values_of_impossible_value_is_refused_by_name(layout, suffix, value):
    tensors = random_layer(layout, 200, 300, torch.Generator().manual_seed(0))
    if suffix not in tensors:
        return
    tensors[suffix].view(-1)[7] = value
    with pytest.raises(ValueError, match=rf"^{suffix} holds .*\b1\b"):
        check_values(tensors)

"""E2M1 against its definition and against ml_dtypes; the table of a stored weight against sizes worked by hand."""

from __future__ import annotations

import math

import ml_dtypes
import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from runner.quantization.formats.e2m1 import FORMATS, G32, NVFP4, Format, decode, dequantize, encode, pack, unpack

CODES = torch.arange(16, dtype=torch.uint8)
FLOAT32 = st.floats(width=32, allow_nan=False, allow_infinity=False)


def by_definition(code: int) -> float:
    """Sign, two bits of exponent with bias 1, one of mantissa; exponent 0 is subnormal."""
    sign, exponent, mantissa = code >> 3, code >> 1 & 3, code & 1
    magnitude = mantissa * 0.5 if exponent == 0 else (1 + mantissa / 2) * 2.0 ** (exponent - 1)
    return math.copysign(magnitude, -1.0 if sign else 1.0)


def test_codes_are_what_the_definition_says():
    values = decode(CODES)
    expected = torch.tensor([by_definition(code) for code in range(16)])
    assert values.dtype is torch.float32
    assert torch.equal(values, expected)
    assert torch.equal(torch.signbit(values), torch.signbit(expected))  # -0 is not 0


def test_every_code_comes_back():
    assert torch.equal(encode(decode(CODES)), CODES)


def test_ties_go_to_the_even_mantissa_and_signs_of_zeros_stay():
    values = [0.25, 0.75, 1.25, 1.75, 2.5, 3.5, 5.0, -0.25, -5.0, 0.0, -0.0, 6.5, 1e30, -7.0]
    nearest = [0.0, 1.0, 1.0, 2.0, 2.0, 4.0, 4.0, -0.0, -4.0, 0.0, -0.0, 6.0, 6.0, -6.0]
    found = decode(encode(torch.tensor(values)))
    assert found.tolist() == nearest
    assert torch.signbit(found).tolist() == [math.copysign(1, value) < 0 for value in nearest]


@given(st.lists(st.one_of(FLOAT32, st.floats(-8, 8, width=32), st.sampled_from([x / 8 for x in range(-56, 57)]))))
def test_encode_agrees_with_ml_dtypes(values):
    array = np.array(values, dtype=np.float32)
    expected = array.astype(ml_dtypes.float4_e2m1fn).view(np.uint8) & 0xF
    assert encode(torch.from_numpy(array)).numpy().tolist() == expected.tolist()


def test_encode_agrees_around_every_tie_and_every_value_to_the_last_bit():
    around = [np.array([0.25, 0.5, 0.75, 1, 1.25, 1.5, 1.75, 2, 2.5, 3, 3.5, 4, 5, 6, 8], dtype=np.float32)]
    for _ in range(4):
        around = [np.nextafter(around[0], np.float32(0)), *around, np.nextafter(around[-1], np.float32(99))]
    values = np.concatenate([*around, *(-part for part in around)])
    expected = values.astype(ml_dtypes.float4_e2m1fn).view(np.uint8) & 0xF
    assert encode(torch.from_numpy(values)).numpy().tolist() == expected.tolist()


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_what_is_not_finite_is_refused(bad):
    with pytest.raises(ValueError, match="NaN or infinity"):
        encode(torch.tensor([1.0, bad]))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_encode_takes_every_float(dtype):
    values = torch.linspace(-7, 7, 113).to(dtype)
    assert torch.equal(encode(values), encode(values.float()))


def test_a_byte_is_no_code():
    with pytest.raises(ValueError, match="33 is no E2M1 code"):
        decode(torch.tensor([33], dtype=torch.uint8))


@given(st.integers(1, 5), st.integers(1, 9), st.randoms(use_true_random=False))
def test_unpack_inverts_pack(rows, pairs, random):
    codes = torch.tensor([[random.randrange(16) for _ in range(2 * pairs)] for _ in range(rows)], dtype=torch.uint8)
    packed = pack(codes)
    assert packed.shape == (rows, pairs)
    assert torch.equal(unpack(packed), codes)
    assert torch.equal(pack(unpack(packed)), packed)


def test_the_even_column_lies_in_the_low_nibble():
    assert pack(torch.tensor([[0x1, 0x2, 0xF, 0x0]], dtype=torch.uint8)).tolist() == [[0x21, 0x0F]]
    with pytest.raises(ValueError, match="odd number of columns"):
        pack(torch.zeros(2, 3, dtype=torch.uint8))


def test_sizes_by_hand():
    # 5120 x 13824 is 70,778,880 weights; half a byte each, and two bytes for 32 or one for 16: an eighth of that more.
    weights = 5120 * 13824
    assert G32.bytes(5120, 13824) == weights // 2 + weights // 16
    assert NVFP4.bytes(5120, 13824) == weights // 2 + weights // 16 + 4
    assert [fmt.bits_per_weight for fmt in (G32, NVFP4)] == [4.5, 4.5]
    assert G32.tensors(7, 96) == {
        "weight_packed": ((7, 48), torch.uint8),
        "weight_scale": ((7, 3), torch.bfloat16),
    }
    assert NVFP4.tensors(7, 96) == {
        "weight_packed": ((7, 48), torch.uint8),
        "weight_scale": ((7, 6), torch.uint8),
        "weight_scale_2": ((), torch.float32),
    }
    assert list(FORMATS) == ["g32", "nvfp4"]


@pytest.mark.parametrize("fmt", FORMATS.values(), ids=FORMATS)
@pytest.mark.parametrize("width", [0, 1, 8, 40])
def test_widths_that_hold_no_whole_groups_are_refused(fmt, width):
    assert not fmt.fits(width)
    with pytest.raises(ValueError, match=f"multiple of its group, {fmt.group}"):
        fmt.tensors(4, width)


def test_dequantize_by_hand():
    codes = torch.zeros(1, 64, dtype=torch.uint8)
    codes[0, :3] = torch.tensor([7, 1, 8])  # 6, .5, -0
    codes[0, 32:35] = torch.tensor([15, 9, 0])  # -6, -.5, 0
    g32 = {"weight_packed": pack(codes), "weight_scale": torch.tensor([[0.25, 3.0]], dtype=torch.bfloat16)}
    expected = torch.zeros(1, 64)
    expected[0, :3] = torch.tensor([1.5, 0.125, -0.0])
    expected[0, 32:35] = torch.tensor([-18.0, -1.5, 0.0])
    found = dequantize(g32, G32)
    assert torch.equal(found, expected)
    assert torch.signbit(found).nonzero().tolist() == [[0, 2], [0, 32], [0, 33]]
    # e4m3: 0x38 is 1, 0x41 is 2.25, 0x01 is 2**-9, 0x7E is 448.
    bits = torch.tensor([[0x38, 0x01, 0x41, 0x7E]], dtype=torch.uint8)
    nvfp4 = {"weight_packed": pack(codes), "weight_scale": bits, "weight_scale_2": torch.tensor(0.5)}
    found = dequantize(nvfp4, NVFP4)
    assert found[0, :3].tolist() == [3.0, 0.25, 0.0]
    assert found[0, 32:35].tolist() == [-6.75, -0.5625, 0.0]
    assert dequantize(nvfp4, NVFP4, torch.bfloat16).dtype is torch.bfloat16


def stored(fmt: Format, rows: int = 3, groups: int = 2) -> dict[str, torch.Tensor]:
    return {
        name: torch.ones(shape, dtype=dtype) for name, (shape, dtype) in fmt.tensors(rows, groups * fmt.group).items()
    }


@pytest.mark.parametrize("fmt", FORMATS.values(), ids=FORMATS)
def test_tensors_that_do_not_add_up_are_refused(fmt):
    good = stored(fmt)
    assert fmt.check(good) == (3, 2 * fmt.group)
    scale = good["weight_scale"]
    wrong = {
        "no two-dimensional weight_packed": {"weight_scale": scale},
        "weight_scale is None": {name: tensor for name, tensor in good.items() if name != "weight_scale"},
        r"weight_scale is \(\(3, 3\)": {**good, "weight_scale": scale.new_ones(3, 3)},
        "torch.float16": {**good, "weight_scale": scale.to(torch.float16)},
        "weight_packed is .*torch.int8": {**good, "weight_packed": good["weight_packed"].to(torch.int8)},
        "extra": {**good, "extra": scale},
    }
    for message, tensors in wrong.items():
        with pytest.raises(ValueError, match=message):
            dequantize(tensors, fmt)


@pytest.mark.parametrize("fmt", FORMATS.values(), ids=FORMATS)
def test_scales_that_no_quantiser_writes_are_refused(fmt):
    values = {"NaN or infinite": (math.nan, 0x7F), "negative": (-0.5, 0x80 | 0x38)}
    for message, (number, bits) in values.items():
        tensors = stored(fmt)
        tensors["weight_scale"][1, 1] = number if fmt.scale == "bf16" else bits
        with pytest.raises(ValueError, match=f"1 scales are {message}"):
            fmt.check(tensors)
    if fmt.tensor_scale:
        with pytest.raises(ValueError, match="6 scales are NaN"):
            fmt.check({**stored(fmt), "weight_scale_2": torch.tensor(math.inf)})

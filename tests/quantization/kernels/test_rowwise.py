"""Rows of 8 bits: codes by hand and by ml_dtypes, errors by the published table, kernels against the definition."""

from __future__ import annotations

import os
import subprocess
import sys
from importlib.util import find_spec
from itertools import product
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from runner.forecast.precisions import PRECISIONS
from runner.quantization.kernels import rowwise as module
from runner.quantization.kernels.low_bit import relative_error
from runner.quantization.kernels.rowwise import (
    Rows,
    hadamard,
    int_mm,
    quantize_rows,
    reference,
    rotate_rows,
    rotation_size,
    round_to_e4m3,
    rowwise,
)
from tests.quantization.kernels.ahead_of_time import (
    ARCHITECTURES,
    EVERY_VARIANT,
    NEEDS_PINNED_TRITON,
    Built,
    Variant,
    build,
)

ROOT = Path(__file__).resolve().parents[3]
KINDS = [row.name for row in PRECISIONS.values() if row.layout == "rows"]
BOTH = pytest.mark.parametrize("kind", KINDS)
NUMBERS = st.floats(-1e6, 1e6, width=32)


def dequantize_rows(rows: Rows) -> Tensor:
    """The values, float32 [M, K]."""
    return rows.codes.float() * rows.scale


def gauss(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


@settings(max_examples=60, deadline=None)
@given(rows=st.lists(st.lists(NUMBERS, min_size=16, max_size=16), min_size=1, max_size=4))
def test_quantize_rows_rounds_to_nearest_code(rows):
    """int8: within half a step of the scale. fp8: exactly the codes to which ml_dtypes rounds."""
    x = torch.tensor(rows)
    eight = quantize_rows(x, "int8")
    assert eight.codes.dtype is torch.int8
    assert int(eight.codes.abs().max()) <= 127
    assert bool(((dequantize_rows(eight) - x).abs() <= eight.scale * 0.5001).all())
    rounded = quantize_rows(x, "fp8")
    quotient = (x / rounded.scale).clamp(-448, 448).numpy().astype(ml_dtypes.float8_e4m3fn)
    assert np.array_equal(rounded.codes.view(torch.uint8).numpy(), quotient.view(np.uint8))
    largest = x.abs().amax(1, keepdim=True)
    torch.testing.assert_close(rounded.scale, (largest / 448).clamp(min=1e-30))
    torch.testing.assert_close(eight.scale, (largest / 127).clamp(min=1e-30))


class Divisors(TorchDispatchMode):
    """Within it: `seen`, all that anything is divided by."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[object] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.overloadpacket is torch.ops.aten.div:
            self.seen.append(args[1])
        return func(*args, **(kwargs or {}))


@BOTH
def test_quantize_rows_divides_by_tensors(kind):
    """CUDA multiplies by the rounded reciprocal of a plain number; the kernel divides, so the bits would differ."""
    with Divisors() as divisors:
        quantize_rows(torch.empty(4, 64, device="meta"), kind)
    assert len(divisors.seen) == 2
    assert all(isinstance(by, Tensor) and by.device.type == "meta" for by in divisors.seen)


@BOTH
def test_quantize_rows_keeps_zeros_and_values_that_are_not_finite(kind):
    x = torch.zeros(3, 32)
    x[1, 5], x[2, 7] = torch.nan, torch.inf
    values = dequantize_rows(quantize_rows(x, kind))
    assert torch.equal(values[0], torch.zeros(32))
    assert not bool(torch.isfinite(values[1:]).all(dim=1).any())


@BOTH
def test_quantize_rows_equals_hand_calculation(kind):
    x = torch.tensor([[-448.0, 1.0, 0.4375, 17.0]]) if kind == "fp8" else torch.tensor([[127.0, -1.0, 2.5, 63.5]])
    rows = quantize_rows(x, kind)
    assert float(rows.scale) == 1.0
    # e4m3 has steps of 2 in [16, 32): 17 lies between 16 and 18, and goes to the even one. int8 takes ties to even too.
    assert rows.codes.float().tolist() == ([[-448, 1, 0.4375, 16]] if kind == "fp8" else [[127, -1, 2, 64]])


@pytest.mark.parametrize("size", [1, 2, 16, 128])
def test_hadamard_is_orthogonal_and_symmetric(size):
    matrix = hadamard(size, torch.float32, torch.device("cpu"))
    assert set(matrix.flatten().tolist()) <= {1.0, -1.0}
    assert torch.equal(matrix @ matrix, size * torch.eye(size))
    assert torch.equal(matrix, matrix.T)
    parity = [[(-1) ** (r & c).bit_count() for c in range(size)] for r in range(size)]  # Sylvester's entries
    assert matrix.tolist() == parity


def test_hadamard_of_size_that_is_no_power_of_two_is_refused():
    with pytest.raises(ValueError, match="96"):
        hadamard(96, torch.float32, torch.device("cpu"))


@pytest.mark.parametrize(("columns", "block"), [(5120, 128), (13824, 128), (64, 64), (96, 32), (48, 16)])
def test_rotate_rows_of_both_sides_keeps_product(columns, block):
    assert rotation_size(columns) == block
    x, w = gauss(8, columns), gauss(6, columns, seed=1)
    turned = rotate_rows(x) @ rotate_rows(w).T / block
    torch.testing.assert_close(turned, x @ w.T, rtol=1e-4, atol=1e-3)
    assert not torch.allclose(rotate_rows(x), x)


CHANNELS = 5120


@pytest.fixture(scope="module")
def inputs() -> dict[str, Tensor]:
    """As the table's: gaussian; 0.5 % of the channels thirty times as large; what a GELU leaves."""
    plain, out = gauss(192, CHANNELS), gauss(192, CHANNELS)
    out[:, torch.randperm(CHANNELS, generator=torch.Generator().manual_seed(3))[:26]] *= 30
    return {"gauss": plain, "outl": out, "gelu": torch.nn.functional.gelu(1.5 * plain)}


@pytest.mark.parametrize(
    ("kind", "rotated", "table"),
    [
        ("fp8", False, {"gauss": 0.027, "outl": 0.024, "gelu": 0.027}),
        ("int8", False, {"gauss": 0.009, "outl": 0.067, "gelu": 0.012}),
        ("int8", True, {"gauss": 0.009, "outl": 0.010, "gelu": 0.017}),
    ],
)
def test_quantize_rows_error_equals_published_table(inputs, kind, rotated, table):
    """Only activations are rounded; relative error of the output, within 10 % of the table. With rotation, the error of
    outliers depends on how many of their channels share a block of 128: within 17 %."""
    weight = gauss(384, CHANNELS, seed=7) / CHANNELS**0.5
    for name, wanted in table.items():
        x, w = inputs[name], weight
        if rotated:
            x, w = rotate_rows(x), rotate_rows(w) / 128
        error = relative_error(dequantize_rows(quantize_rows(x, kind)) @ w.T, inputs[name] @ weight.T)
        assert error == pytest.approx(wanted, rel=0.17 if rotated and name == "outl" else 0.1), name


@BOTH
@pytest.mark.parametrize("bias", [None, gauss(48, seed=5)], ids=["no bias", "bias"])
def test_rowwise_kernel_agrees_with_definition(kind, bias):
    x, w = quantize_rows(gauss(40, 64), kind), quantize_rows(gauss(48, 64, seed=1), kind)
    exact = (x.codes.double() @ w.codes.double().T) * x.scale.double() * w.scale.double().T
    exact = exact if bias is None else exact + bias.double()
    torch.testing.assert_close(reference(x, w, bias, torch.float32).double(), exact, rtol=1e-5, atol=1e-5)
    kernel = rowwise if kind == "fp8" else int_mm
    found = kernel(x, w, bias, torch.bfloat16)
    assert found.dtype is torch.bfloat16
    assert relative_error(found, exact) < 0.004


@pytest.mark.parametrize("tokens", [1, 17, 100])
def test_int_mm_in_chunks_of_tokens_equals_definition(tokens, monkeypatch):
    monkeypatch.setattr(module, "_INT_MM_ROWS", 40)
    x, w = quantize_rows(gauss(tokens, 64), "int8"), quantize_rows(gauss(24, 64, seed=1), "int8")
    torch.testing.assert_close(int_mm(x, w, None, torch.float32), reference(x, w, None, torch.float32))


TRITON = """
import contextlib, torch
from runner.forecast.precisions import PRECISIONS
from runner.quantization.kernels.rowwise import SMALLEST_SCALE, quantize_rows
from runner.quantization.kernels.rowwise_triton import launch
from tests.quantization.kernels.test_rowwise import e4m3_edges, floats_of_every_exponent, one_nan
entered = []  # Triton launches on the current device, which need not be the tensors'
torch.cuda.device_of = lambda tensor: contextlib.nullcontext(entered.append(tensor))
KINDS = [row.name for row in PRECISIONS.values() if row.layout == "rows"]

def compare(x, kind):
    wanted = quantize_rows(x, kind)
    codes, scale = torch.empty_like(wanted.codes), torch.empty_like(wanted.scale)
    launch(x, PRECISIONS[kind].largest, SMALLEST_SCALE, codes, scale)
    assert entered.pop() is x
    assert torch.equal(scale.nan_to_num(-1), wanted.scale.nan_to_num(-1)), kind
    # A scale that is no number says all of a row, whose codes of int8 mean nothing.
    rows = slice(None) if kind == "fp8" else scale.isfinite().flatten()
    assert torch.equal(one_nan(codes[rows]), one_nan(wanted.codes[rows])), kind
    return wanted

x = torch.randn(9, 200, generator=torch.Generator().manual_seed(0)) * torch.logspace(-4, 4, 9)[:, None]
x[3] = 0
x[5, 9], x[6, 10] = float("nan"), float("inf")
for kind in KINDS:
    for dtype in (torch.float32, torch.float16, torch.bfloat16):
        assert bool(compare(x.to(dtype), kind).scale[5].isnan())
# The largest of these rows is e4m3's own, so that their scale is 1 and each number meets the rounding as it is.
edges = compare(e4m3_edges().view(1, -1), "fp8")
assert edges.scale.item() == 1 and len(edges.codes.view(torch.uint8).unique()) == 254
assert bool((compare(floats_of_every_exponent(), "fp8").scale == 1).all())
print("equal")
"""


def e4m3_edges() -> Tensor:
    """Float32 [n] where e4m3's rounding changes: its finite numbers, the middle of each two neighbours, and of all of
    these the float32 numbers next to them on both sides, to ±448."""
    codes = torch.arange(256, dtype=torch.uint8).view(torch.float8_e4m3fn).float()
    numbers = codes[codes.isfinite()].unique()
    points = torch.cat([numbers, (numbers[1:] + numbers[:-1]) / 2, torch.tensor([-0.0])])
    beside = [torch.nextafter(points, torch.full_like(points, side)) for side in (torch.inf, -torch.inf)]
    values = torch.cat([points, *beside])
    return values[values.abs() <= 448]


def floats_of_every_exponent() -> Tensor:
    """Float32 [4, 32768] of random bits up to 448 in magnitude, with subnormal ones; the first of a row is 448."""
    generator = torch.Generator().manual_seed(0)
    bits = torch.randint(0, 0x43E00001, (4, 32768), generator=generator, dtype=torch.int32)
    bits[:2] = bits[:2] % (10 << 23) + (121 << 23) - (2 << 23)  # half of them where e4m3 has its steps
    values = bits.view(torch.float32) * torch.where(torch.arange(32768) % 2 == 0, 1.0, -1.0)
    values[:, 0] = 448
    return values.clamp(-448, 448)


def one_nan(codes: Tensor) -> Tensor:
    """Bits of the codes; of e4m3 the two NaN are one: the sign of what 0 / 0 gives depends on the processor."""
    bits = codes.view(torch.uint8)
    if codes.dtype is not torch.float8_e4m3fn:
        return bits
    return torch.where((bits & 0x7F) == 0x7F, torch.full_like(bits, 0x7F), bits)


@pytest.mark.skipif(find_spec("triton") is None, reason="triton is not installed")
def test_triton_kernel_in_interpreter_equals_definition():
    """Code by code: e4m3's numbers, ties and their neighbours, floats of every exponent, NaN and infinity."""
    environment = {**os.environ, "TRITON_INTERPRET": "1", "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [sys.executable, "-c", TRITON], env=environment, capture_output=True, text=True, check=False, timeout=250
    )
    assert done.stdout.strip() == "equal", done.stderr


def converted(values: Tensor) -> np.ndarray:
    """e4m3 bits of float32 values as ml_dtypes rounds them."""
    return values.numpy().astype(ml_dtypes.float8_e4m3fn).view(np.uint8)


def converted_in_two_steps(values: Tensor) -> np.ndarray:
    """e4m3 bits as Triton 3.7 makes them for compute capability 8.9: `cvt.rz.f16.f32`, `cvt.rn.satfinite.e4m3x2.f16x2`.

    For magnitudes up to 448, of which neither overflows.
    """
    exact = values.numpy()
    halves = exact.astype(np.float16)  # rounded to nearest
    too_far = np.abs(halves.astype(np.float32)) > np.abs(exact)
    halves[too_far] = np.nextafter(halves[too_far], np.float16(0))
    return halves.astype(ml_dtypes.float8_e4m3fn).view(np.uint8)


def test_round_to_e4m3_gives_same_codes_with_either_conversion():
    for values in (e4m3_edges(), floats_of_every_exponent()):
        rounded = round_to_e4m3(values)
        wanted = converted(values)
        assert np.array_equal(values.to(torch.float8_e4m3fn).view(torch.uint8).numpy(), wanted)
        for convert in (converted, converted_in_two_steps):
            assert np.array_equal(convert(rounded), wanted)
        assert torch.equal(rounded.half().float(), rounded)  # nothing is left that a rounding could take
    assert bool(round_to_e4m3(torch.tensor([torch.nan, -torch.nan])).isnan().all())


def test_conversion_to_e4m3_in_two_steps_differs_just_above_ties():
    """The reason for round_to_e4m3: just above a tie, the conversion in two steps rounds towards zero."""
    values = e4m3_edges()
    wanted, found = converted(values), converted_in_two_steps(values)
    wrong = wanted != found
    assert int(wrong.sum()) > 100
    assert bool((((wanted & 0x7F) - (found & 0x7F))[wrong] == 1).all())  # each one step too small in magnitude


@settings(max_examples=200, deadline=None)
@given(st.lists(st.floats(-448, 448, width=32), min_size=1, max_size=32))
def test_round_to_e4m3_of_any_numbers_gives_direct_conversion(numbers):
    values = torch.tensor(numbers)
    assert np.array_equal(converted_in_two_steps(round_to_e4m3(values)), converted(values))


class OtherConversion(torch.fx.Interpreter):
    """Runs a graph with e4m3 conversions as compute capability 8.9 makes them; `met` counts them."""

    met = 0

    def call_method(self, target, args, kwargs):
        if target == "to" and torch.float8_e4m3fn in args:
            self.met += 1
            return torch.from_numpy(converted_in_two_steps(args[0])).view(torch.float8_e4m3fn)
        return super().call_method(target, args, kwargs)


def test_compiled_quantize_rows_gives_same_codes_with_either_conversion():
    """The kernels of the compiler quantise activations and use the conversion of that compiler."""
    graphs = []

    def keep(graph, inputs):
        graphs.append((graph, inputs))
        return graph.forward

    x = torch.cat([e4m3_edges(), torch.tensor([448.0])]).view(1, -1)
    wanted = quantize_rows(x, "fp8")
    found = torch.compile(quantize_rows, backend=keep, fullgraph=True)(x, "fp8")
    assert torch.equal(found.codes.view(torch.uint8), wanted.codes.view(torch.uint8))
    ((graph, inputs),) = graphs
    runs = OtherConversion(graph)
    codes, scale = runs.run(*inputs)
    assert runs.met == 1
    assert torch.equal(codes.view(torch.uint8), wanted.codes.view(torch.uint8))
    assert torch.equal(scale, wanted.scale)


# Each architecture once, each form and dtype, each length; all of them in the test after.
SOME_VARIANTS = [
    Variant("rows", "int8", "bfloat16", 5120, 80),
    Variant("rows", "float8_e4m3fn", "bfloat16", 5120, 89),
    Variant("rows", "float8_e4m3fn", "float16", 13824, 90),
    Variant("rows", "int8", "float32", 160, 100),
    Variant("rows", "float8_e4m3fn", "bfloat16", 13824, 120),
]


def check_assembly(variant: Variant, built: Built) -> None:
    """What the interpreter cannot tell: that the compiler takes it, divides and rounds as torch does, and reads and
    writes at full width."""
    built.check()
    assert built.of("div") == {"div.rn.f32"}
    assert built.of("ld.global") == {"ld.global.v4.b32"}
    codes = "st.global.v2.b32" if variant.columns == 160 else "st.global.v4.b32"  # 8 of a row's 256 places a thread
    assert built.of("st.global") == {codes, "st.global.b32"}
    assert built.instructions["st.global.b32"] == 1  # the scale
    # e4m3 is made of integers: no conversion to it, whose rounding would be the architecture's.
    widening = set() if variant.dtype == "float32" else {f"cvt.f32.{variant.dtype.replace('float', 'f')}"}
    assert built.conversions() == widening | ({"cvt.rzi.s16.f32"} if variant.form == "int8" else set())


@NEEDS_PINNED_TRITON
def test_triton_kernel_compiles_for_every_gpu(tmp_path):
    for variant, built in build(SOME_VARIANTS, tmp_path).items():
        check_assembly(variant, built)


@NEEDS_PINNED_TRITON
@EVERY_VARIANT
@pytest.mark.parametrize("capability", ARCHITECTURES)
def test_every_variant_of_triton_kernel_compiles(capability, tmp_path):
    forms = ["int8"] if capability < 89 else ["int8", "float8_e4m3fn"]  # fp8 products begin there
    dtypes, lengths = ("bfloat16", "float16", "float32"), (5120, 13824, 160)
    variants = [Variant("rows", *rest, capability) for rest in product(forms, dtypes, lengths)]
    found = build(variants, tmp_path)
    assert len(found) == 9 * len(forms)
    for variant, built in found.items():
        check_assembly(variant, built)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("shape", [(1000, 5120, 5120), (64, 13824, 5120), (33, 5120, 13824)], ids=str)
@BOTH
def test_rowwise_kernel_on_gpu_agrees_with_definition(kind, shape):
    if kind == "fp8" and torch.cuda.get_device_capability() < (8, 9):
        pytest.skip("no fp8 units before sm_89")
    tokens, columns, outputs = shape
    x = quantize_rows(gauss(tokens, columns).cuda().bfloat16(), kind)
    w = quantize_rows(gauss(outputs, columns, seed=1).cuda().bfloat16(), kind)
    bias = gauss(outputs, seed=2).cuda()
    for kernel in (rowwise,) if kind == "fp8" else (int_mm, module.comfy_kitchen):
        assert relative_error(kernel(x, w, bias, torch.bfloat16), reference(x, w, bias, torch.float32)) < 0.005


def test_rows_have_fields_codes_and_scale():
    assert Rows._fields == ("codes", "scale")

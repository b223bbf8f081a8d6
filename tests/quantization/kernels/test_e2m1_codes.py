"""E2M1 codes of activations: the definition's, by its kernel in Triton's interpreter too, and when that is taken."""

from __future__ import annotations

import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
from torch import Tensor

from runner.quantization.formats.e2m1 import unpack
from runner.quantization.formats.svdq import quantize_activations
from runner.quantization.kernels import e2m1_codes as module
from runner.quantization.kernels.e2m1_codes import blocked_codes, pick_codes, quantize_to_e2m1
from runner.quantization.kernels.nvfp4 import to_blocked
from runner.quantization.kernels.row_codes import MOST_OTHER_CODES, probe_matrix
from runner.quantization.kernels.svdq_products import ORDERS, name_code_kernel
from tests.quantization.kernels.ahead_of_time import NEEDS_PINNED_TRITON, Variant, build
from tests.quantization.kernels.test_rowwise import Divisors, e4m3_edges

ROOT = Path(__file__).resolve().parents[3]
CPU, CUDA = torch.device("cpu"), torch.device("cuda", 0)
NAN_BITS = 0x7F


def smoothing(columns: int) -> Tensor:
    """Factors of .2 to 5 or so, bfloat16."""
    return (0.5 * torch.randn(columns, generator=torch.Generator().manual_seed(1))).exp().bfloat16()


def odd_numbers(columns: int) -> Tensor:
    """bfloat16 [13, columns]: rows of what has no scale, or none that e4m3 holds to four bits.

    NaN of both signs, infinities, a quotient that overflows, zeros of both signs, scales that are cut to 448, scales
    where e4m3 is subnormal, scales that e4m3 rounds to zero, and numbers that bfloat16 holds as subnormal.
    """
    x = probe_matrix(13, columns, CPU)
    x[0, 3], x[1, 20], x[2, 5], x[3, 5] = torch.nan, -torch.nan, torch.inf, -torch.inf
    x[4, ::17] = 3e38
    x[5] = 0
    x[6] = -0.0
    x[7, ::2] = -0.0
    x[8] *= 1e5
    x[9] = 1e30
    x[10] *= 2.0**-8 / x[10].abs().amax()
    x[11] *= 1e-6
    x[12] *= 1e-38
    return x


def ties() -> Tensor:
    """bfloat16 [n, 64] whose scales are 1, or next to it: every tie of E2M1, and the bfloat16 numbers beside it."""
    middles = torch.tensor([0.25, 0.75, 1.25, 1.75, 2.5, 3.5, 5.0, 6.0])
    beside = [middles * (1 + step * 2.0**-7) for step in (-1, 0, 1)]
    numbers = torch.cat([*beside, *(-row for row in beside)])
    rows = numbers.repeat(8).view(-1, 64).clone()
    rows[:, ::16] = torch.tensor([6.0, -6.0, 6.03125, 5.96875])
    return rows.bfloat16()


def scale_ties() -> Tensor:
    """bfloat16 [n, 128] of groups whose scales lie at, or next to, where e4m3's rounding changes."""
    peaks = (e4m3_edges().abs() * 6).bfloat16()
    peaks = peaks[: len(peaks) // 8 * 8].view(-1, 8, 1)
    return (peaks * torch.linspace(-1, 1, 16)).bfloat16().view(-1, 128)


def assert_definition(found: tuple[Tensor, Tensor], x: Tensor, smooth: Tensor) -> None:
    codes, scales = quantize_activations(x / smooth, "nvfp4")
    assert torch.equal(unpack(found[0]), codes)
    assert torch.equal(found[1], scales.view(torch.uint8))


def test_codes_with_any_block_size_equal_definition(monkeypatch):
    monkeypatch.setattr(module, "_NUMBERS_A_BLOCK", 256 * 10)
    for x in (probe_matrix(80, 256, CPU), odd_numbers(256), ties(), scale_ties()):
        smooth = smoothing(x.shape[1])
        for factor in (smooth, torch.ones_like(smooth)):
            assert_definition(quantize_to_e2m1(x, factor), x, factor)


def test_scale_of_nan_group_is_nan_and_scale_of_zeros_is_zero():
    codes, scales = quantize_to_e2m1(odd_numbers(64), torch.ones(64).bfloat16())
    for row, group in ((0, 0), (1, 1), (2, 0), (3, 0)):
        assert scales[row].eq(NAN_BITS).nonzero().flatten().tolist() == [group]
        assert unpack(codes[row]).view(4, 16)[group].eq(0).all()
    assert scales[5:7].eq(0).all()
    assert codes[5].eq(0).all()
    assert codes[6].eq(0x88).all()  # minus zeros


def test_quantize_to_e2m1_divides_by_tensors():
    """As for rows: divided by a plain number, CUDA multiplies by the rounded reciprocal; the kernel divides."""
    with Divisors() as divisors:
        quantize_to_e2m1(torch.empty(4, 64, device="meta"), torch.empty(64, device="meta"))
    assert len(divisors.seen) == 2  # `/=` is another operator
    assert all(isinstance(by, Tensor) and by.device.type == "meta" for by in divisors.seen)


@pytest.mark.parametrize("rows", [1, 77, 128, 200])
def test_blocked_codes_have_scales_in_order_of_product(rows):
    x, smooth = probe_matrix(rows, 192, CPU), smoothing(192)
    codes, scales = quantize_to_e2m1(x, smooth)
    found = blocked_codes(x, smooth)
    assert torch.equal(found[0], codes)
    assert torch.equal(found[1], to_blocked(scales))


def test_pick_codes_on_cpu_is_torch():
    assert pick_codes(CPU) == ("torch", "no CUDA device")
    said = {name: name_code_kernel(CPU, name) for name in ORDERS}
    assert said == dict.fromkeys(ORDERS, "") | {"scaled_mm": "torch: no CUDA device"}


@pytest.fixture
def absent_gpu(monkeypatch):
    """Matrices for a GPU lie on the CPU."""
    probe = module.probe_matrix
    monkeypatch.setattr(module, "probe_matrix", lambda rows, columns, device, **rest: probe(rows, columns, CPU, **rest))
    pick_codes.cache_clear()
    yield monkeypatch
    pick_codes.cache_clear()


def kernel_with(change):
    """In place of the kernel: plain operations, their codes and scales changed by `change`."""

    def launch(x, smooth):
        codes, scales = quantize_to_e2m1(x, smooth)
        scales = to_blocked(scales)
        change(codes, scales)
        return codes, scales

    return launch


def change_share(codes: Tensor, share: float) -> None:
    codes.view(-1)[:: int(0.5 / share)] ^= 1  # a byte is two codes


@pytest.mark.parametrize("share", [0.0, 0.8 * MOST_OTHER_CODES])
def test_pick_codes_accepts_kernel_that_agrees(absent_gpu, share):
    absent_gpu.setattr(module, "_launch", kernel_with(lambda codes, _: share and change_share(codes, share)))
    name, why = pick_codes(CUDA)
    assert name == "triton"
    assert why.startswith("one pass; share of codes that differ from the definition's on cuda:0: ")
    assert float(why.rpartition(" ")[2]) == pytest.approx(share, rel=0.05)


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        (lambda codes, _: change_share(codes, 1.2 * MOST_OTHER_CODES), "of its codes differ from the definition's"),
        (lambda _, scales: scales[7:8].add_(1), "its scales differ from the definition's"),
        (lambda _, scales: scales.copy_(scales.roll(1)), "its scales differ from the definition's"),
        (lambda _, scales: scales.masked_fill_(scales == NAN_BITS, 0x7E), "its scales differ from the definition's"),
    ],
    ids=["too many codes", "a scale", "another order", "a number for none"],
)
def test_pick_codes_refuses_kernel_that_disagrees(absent_gpu, change, problem):
    absent_gpu.setattr(module, "_launch", kernel_with(change))
    name, why = pick_codes(CUDA)
    assert name == "torch"
    assert why.startswith("triton refused: ")
    assert problem in why
    assert name_code_kernel(CUDA, "scaled_mm") == f"torch: {why}"


def test_pick_codes_refuses_kernel_that_raises(absent_gpu):
    def launch(*given):
        raise RuntimeError("no ptxas\nmore")

    absent_gpu.setattr(module, "_launch", launch)
    assert pick_codes(CUDA) == ("torch", "triton refused: RuntimeError: no ptxas")


def test_pick_codes_without_triton_gives_reason(absent_gpu):
    absent_gpu.setitem(sys.modules, "runner.quantization.kernels.e2m1_codes_triton", None)
    name, why = pick_codes(CUDA)
    assert name == "torch"
    assert why.startswith("triton refused: ModuleNotFoundError")


INTERPRETED = """
import torch
from tests.quantization.kernels.triton_interpreter import use_torch_bfloat16, without_device
from runner.quantization.kernels.e2m1_codes import _launch, quantize_to_e2m1
from runner.quantization.kernels.nvfp4 import to_blocked
from runner.quantization.kernels.row_codes import probe_matrix
from tests.quantization.kernels.test_e2m1_codes import CPU, odd_numbers, scale_ties, smoothing, ties
use_torch_bfloat16()
entered = without_device()  # Triton launches on the current device, which need not be the tensors'
empty = torch.empty

def filled(*shape, **how):  # what the kernel leaves out shows
    return empty(*shape, **how).fill_(0x5A)

torch.empty = filled
shapes = [(1, 128), (77, 128), (128, 64), (129, 384), (301, 128), (2, 5120)]
gaussian, edges = [probe_matrix(*shape, CPU) for shape in shapes], [odd_numbers(128), ties(), scale_ties()]
for x in gaussian + edges:
    smooth = smoothing(x.shape[1])
    broken = smooth.clone()
    broken[5], broken[40] = 0, torch.nan  # not of the rows that fill a tile
    for factor in (smooth,) if x.shape in shapes else (smooth, torch.ones_like(smooth), -smooth, broken):
        codes, scales = quantize_to_e2m1(x, factor)
        found = _launch(x, factor)
        assert entered.pop() is x
        assert torch.equal(found[0], codes), (x.shape, (found[0] != codes).sum())
        assert torch.equal(found[1], to_blocked(scales)), x.shape
wide = probe_matrix(70, 256, CPU)
found = _launch(wide[:, 64:192], smooth[:128])  # not contiguous: it is copied
assert torch.equal(found[0], quantize_to_e2m1(wide[:, 64:192], smooth[:128])[0])
for wrong in (wide[:, :32], wide.float()):
    try:
        _launch(wrong.contiguous(), smooth[: wrong.shape[1]])
    except ValueError as err:
        print(err)
print("equal")
"""


@pytest.mark.skipif(find_spec("triton") is None, reason="triton is not installed")
def test_triton_kernel_in_interpreter_equals_definition():
    """Code by code and scale by scale: edges of tiles, ties of both roundings, NaN and infinity."""
    environment = {**os.environ, "TRITON_INTERPRET": "1", "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-W", "ignore", "-c", INTERPRETED]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False, timeout=250)
    assert done.stdout.splitlines() == [
        "32 columns in torch.bfloat16 and torch.bfloat16; the kernel takes tiles of 64",
        "256 columns in torch.float32 and torch.bfloat16; the kernel takes tiles of 64",
        "equal",
    ], done.stderr


@NEEDS_PINNED_TRITON
def test_triton_kernel_compiles_for_gpus_with_block_scaled_products(tmp_path):
    """The interpreter does not show this: no spills, division and rounding as torch's, full width of access."""
    variants = [Variant("e2m1", "blocked", "bfloat16", columns, sm) for sm in (100, 120) for columns in (5120, 13824)]
    for built in build(variants, tmp_path).values():
        built.check()
        assert built.of("div") == {"div.rn.f32", "div.s32"}
        assert built.conversions() == {"cvt.rn.bf16.f32", "cvt.f32.bf16"}  # E2M1 and e4m3 are rounded by integers
        assert built.of("ld.global") == {"ld.global.v4.b32"}
        assert built.of("st.global") == {"st.global.v2.b32", "st.global.b16"}  # codes, scales
        assert built.shared <= 4 << 10


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("columns", [5120, 13824])
def test_triton_kernel_on_gpu_agrees_with_definition(columns):
    assert pick_codes(CUDA)[0] == "triton"
    x, smooth = probe_matrix(1003, columns, CUDA), smoothing(columns).to(CUDA)
    codes, scales = quantize_to_e2m1(x, smooth)
    found, found_scales = blocked_codes(x, smooth)
    assert torch.equal(found_scales, to_blocked(scales))
    assert float((unpack(found) != unpack(codes)).double().mean()) <= MOST_OTHER_CODES

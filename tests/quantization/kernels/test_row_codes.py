"""Codes of rows: the operator equals the definition, its kernel in Triton's interpreter, and when it is taken."""

from __future__ import annotations

import os
import subprocess
import sys
from importlib.util import find_spec
from itertools import product
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from runner.quantization.kernels import row_codes as module
from runner.quantization.kernels.row_codes import (
    MOST_OTHER_CODES,
    compare_codes,
    fast_rotated_rows,
    fast_rows,
    pick_rotation,
    pick_rows,
    prepare_rows,
)
from runner.quantization.kernels.rowwise import Rows, quantize_rows, rotate_rows
from tests.quantization.kernels.ahead_of_time import EVERY_VARIANT, NEEDS_PINNED_TRITON, Built, Variant, build

ROOT = Path(__file__).resolve().parents[3]
CPU, CUDA = torch.device("cpu"), torch.device("cuda", 0)
ROWWISE = pytest.mark.parametrize("compute", ["fp8", "int8"])
GELU = pytest.mark.parametrize("gelu", [False, True], ids=["plain", "gelu"])
DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)


def gauss(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def definition(x: Tensor, gelu: bool = False) -> Rows:
    return quantize_rows(rotate_rows(F.gelu(x, approximate="tanh") if gelu else x), "int8")


def assert_equal(found: Rows, wanted: Rows) -> None:
    assert torch.equal(found.codes.float(), wanted.codes.float())
    assert torch.equal(found.scale, wanted.scale)


@ROWWISE
def test_row_codes_with_any_block_size_equal_definition(compute, monkeypatch):
    x = gauss(37, 64)
    monkeypatch.setattr(module, "_NUMBERS_A_BLOCK", 5 * 64)
    assert_equal(fast_rows(x, compute), quantize_rows(x, compute))
    if compute == "int8":
        assert_equal(fast_rotated_rows(x, compute, gelu=True), definition(x, gelu=True))


@GELU
@DTYPES
@pytest.mark.parametrize("columns", [96, 5120])
def test_rotated_codes_equal_definition(dtype, columns, gelu):
    """Without a kernel: exactly the arithmetic of GELU, rotation and rounding, one after the other."""
    x = gauss(9, columns).to(dtype)
    x[3], x[5, 9] = 0, torch.nan
    wanted, room = definition(x, gelu), torch.empty(9, columns, dtype=torch.int8)
    rows = torch.arange(9) != 5
    for found in (prepare_rows(x, "int8", gelu=gelu), fast_rotated_rows(x, "int8", room, gelu=gelu)):
        assert bool(found.scale[5].isnan())
        assert_equal(Rows(found.codes[rows], found.scale[rows]), Rows(wanted.codes[rows], wanted.scale[rows]))
    assert torch.equal(room[rows], wanted.codes[rows])


@pytest.mark.parametrize("gelu", [False, True])
def test_prepare_rows_in_fp8_with_gelu_uses_plain_arithmetic(gelu):
    x = gauss(9, 64)
    wanted = quantize_rows(F.gelu(x, approximate="tanh") if gelu else x, "fp8")
    assert_equal(prepare_rows(x, "fp8", gelu=gelu), wanted)


def test_rotated_codes_operator_passes_opcheck():
    x = gauss(9, 64)
    torch.library.opcheck(torch.ops.video_lab.rotated_codes.default, (x, "int8", True))


def test_pick_rows_and_pick_rotation_on_cpu_are_torch():
    assert pick_rows(CPU, "fp8") == pick_rows(CPU, "int8") == ("torch", "no CUDA device")
    assert pick_rotation(CPU, "int8", True) == ("torch", "no CUDA device")


@pytest.fixture
def absent_gpu(monkeypatch):
    """Questions about CUDA get the answers of an RTX 5090; matrices for it lie on the CPU."""
    probe = module.probe_matrix
    monkeypatch.setattr(module, "probe_matrix", lambda rows, columns, device: probe(rows, columns, CPU))
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (12, 0))
    pick_rotation.cache_clear()
    yield monkeypatch
    pick_rotation.cache_clear()


def kernel_with(change):
    """In place of the kernel: the definition, its codes and scales changed by `change`."""

    def launch(x, compute, gelu, codes, scale):
        wanted = definition(x, gelu)
        codes.copy_(wanted.codes)
        scale.copy_(wanted.scale)
        change(codes, scale)

    return launch


@GELU
def test_pick_rotation_accepts_kernel_that_agrees(absent_gpu, gelu):
    seen = []
    absent_gpu.setattr(module, "_launch_rotation", kernel_with(lambda codes, scale: seen.append(codes.shape[1])))
    name, why = pick_rotation(CUDA, "int8", gelu)
    assert name == "triton"
    assert "0 at 5120 columns, 0 at 13824 columns" in why
    assert seen == [5120, 13824]


def off_by_two(codes, scale):
    codes[0, 0] += 2 if codes[0, 0] < 0 else -2


def too_many(codes, scale):
    codes[:, :: int(0.9 / MOST_OTHER_CODES)] += torch.where(codes[:, :: int(0.9 / MOST_OTHER_CODES)] < 0, 1, -1)


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        (off_by_two, "by up to 2"),
        (too_many, "of its codes differ"),
        (lambda codes, scale: scale.mul_(1.01), "scales differ"),
        (lambda codes, scale: scale[0].fill_(torch.nan), "scales differ"),
    ],
    ids=["two steps", "too many codes", "scales", "no number"],
)
def test_pick_rotation_refuses_kernel_that_disagrees(absent_gpu, change, problem):
    absent_gpu.setattr(module, "_launch_rotation", kernel_with(change))
    name, why = pick_rotation(CUDA, "int8", False)
    assert name == "torch"
    assert "refused at 5120 columns" in why
    assert problem in why


def test_pick_rotation_refuses_kernel_that_raises(absent_gpu):
    def launch(*given):
        raise RuntimeError("no ptxas\nmore")

    absent_gpu.setattr(module, "_launch_rotation", launch)
    assert pick_rotation(CUDA, "int8", True) == ("torch", "triton refused: RuntimeError: no ptxas")


def test_pick_rotation_on_gpu_without_int8_units_compiles_nothing(absent_gpu):
    """Triton 3.7 cannot compile the kernel for compute capability 10.0, and int8 does not run there."""
    absent_gpu.setattr(torch.cuda, "get_device_capability", lambda device: (10, 0))
    absent_gpu.setattr(module, "_launch_rotation", lambda *given: pytest.fail("launched"))
    assert pick_rotation(CUDA, "int8", False) == ("torch", "not for sm_100")


def test_compare_codes_accepts_few_ties_rounded_other_way():
    wanted = definition(gauss(40, 5120).bfloat16())
    found = Rows(wanted.codes.clone(), wanted.scale.clone())
    off = found.codes.view(-1)[:: int(1.1 / MOST_OTHER_CODES)]
    off += torch.where(off < 0, 1, -1).to(torch.int8)
    problem, share = compare_codes(found, wanted)
    assert problem == ""
    assert 0.8 * MOST_OTHER_CODES < share <= MOST_OTHER_CODES


INTERPRETED = """
import torch
from tests.quantization.kernels.triton_interpreter import use_torch_bfloat16, without_device
from runner.quantization.kernels.row_codes import _launch_rotation, compare_codes
from runner.quantization.kernels.rowwise import Rows
from tests.quantization.kernels.test_row_codes import definition, exact_sums, gauss
use_torch_bfloat16()
entered = without_device()  # Triton launches on the current device, which need not be the tensors'

def run(x, gelu):
    found = Rows(torch.full(x.shape, 99, dtype=torch.int8), torch.empty(x.shape[0], 1))
    _launch_rotation(x, "int8", gelu, *found)
    assert entered.pop() is x
    return found, definition(x, gelu)

for dtype in (torch.bfloat16, torch.float16):
    for columns in (128, 384, 5120, 13824):
        # Sums of these are exact in float32, in whatever order they are made: every code must be the definition's.
        x = exact_sums(9, columns, dtype)
        found, wanted = run(x, False)
        assert bool(wanted.scale[5].isnan()) and bool(found.scale[5].isnan())
        sane = torch.arange(9) != 5
        assert torch.equal(found.scale[sane], wanted.scale[sane]), (dtype, columns)
        assert torch.equal(found.codes[sane], wanted.codes[sane]), (dtype, columns)
        assert found.codes[3].eq(0).all()
        for gelu in (False, True):
            x = gauss(9, columns, seed=columns).to(dtype)
            found, wanted = run(x, gelu)
            problem, share = compare_codes(found, wanted)
            assert not problem and share < 1e-4, (dtype, columns, gelu, problem, share)
            x[2, 7] = torch.nan
            assert run(x, gelu)[0].scale.isnan().flatten().nonzero().tolist() == [[2]]
print("equal")
"""


def exact_sums(rows: int, columns: int, dtype: torch.dtype) -> Tensor:
    """Integers of -127..127 times a power of two for each row: rounded sums meet ties, and rows have other sizes.

    The fourth row is zero, the sixth has a NaN.
    """
    numbers = torch.randint(-127, 128, (rows, columns), generator=torch.Generator().manual_seed(columns)).float()
    x = (numbers * torch.logspace(-6, 2, rows, base=2).round().clamp(min=0.25).unsqueeze(-1)).to(dtype)
    x[3] = 0
    x[5, columns // 2] = torch.nan
    return x


@pytest.mark.skipif(find_spec("triton") is None, reason="triton is not installed")
def test_rotation_kernel_in_interpreter_agrees_with_definition():
    """Code by code where sums are exact; elsewhere all but the share whose rounding depends on the order of sums."""
    environment = {**os.environ, "TRITON_INTERPRET": "1", "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-W", "ignore", "-c", INTERPRETED]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False, timeout=250)
    assert done.stdout.strip() == "equal", done.stderr


# Each GPU with int8 units, each form, dtype and length; all of them in the test after.
CAPABILITIES = (80, 89, 90, 120)
SOME_VARIANTS = [
    Variant("rotated", "plain", "bfloat16", 5120, 80),
    Variant("rotated", "gelu", "bfloat16", 13824, 89),
    Variant("rotated", "gelu", "float16", 5120, 90),
    Variant("rotated", "plain", "bfloat16", 13824, 120),
    Variant("rotated", "gelu", "bfloat16", 13824, 120),
]


def check_assembly(variant: Variant, built: Built) -> None:
    """What the interpreter cannot tell: no spills, tensor cores, division as torch divides, full width of access."""
    gelu = variant.form == "gelu"
    built.check(approximate=frozenset({"div.full.f32"} if gelu else ()))
    assert built.of("div") == {"div.rn.f32"} | ({"div.full.f32"} if gelu else set())
    assert built.of("wgmma.mma_async" if variant.capability == 90 else "mma.sync")
    assert built.of("ld.global") == {"ld.global.v4.b32"}
    assert built.of("st.global") == {"st.global.v4.b32", "st.global.b32"}
    assert built.instructions["st.global.b32"] == 1  # the scale
    assert built.shared <= 64 << 10  # of the 99 KB of a GeForce card


@NEEDS_PINNED_TRITON
def test_rotation_kernel_compiles_for_every_gpu(tmp_path):
    for variant, built in build(SOME_VARIANTS, tmp_path).items():
        check_assembly(variant, built)


@NEEDS_PINNED_TRITON
@EVERY_VARIANT
@pytest.mark.parametrize("capability", CAPABILITIES)
def test_every_variant_of_rotation_kernel_compiles(capability, tmp_path):
    forms, dtypes, lengths = ("plain", "gelu"), ("bfloat16", "float16"), (5120, 13824)
    variants = [Variant("rotated", *rest, capability) for rest in product(forms, dtypes, lengths)]
    found = build(variants, tmp_path)
    assert len(found) == 8
    for variant, built in found.items():
        check_assembly(variant, built)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@GELU
@pytest.mark.parametrize("columns", [5120, 13824])
def test_rotation_kernel_on_gpu_agrees_with_definition(columns, gelu):
    if torch.cuda.get_device_capability()[0] in (10, 11):
        pytest.skip("no int8 units worth using")
    assert pick_rotation(CUDA, "int8", gelu)[0] == "triton"
    x = gauss(1003, columns).to(CUDA, torch.bfloat16)
    problem, share = compare_codes(fast_rotated_rows(x, "int8", gelu=gelu), definition(x, gelu))
    assert problem == "", (problem, share)

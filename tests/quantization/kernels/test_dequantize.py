"""Every kernel against the reference, bit for bit; Triton's in its interpreter, through its compiler, and on a GPU."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
from torch import Tensor

from runner.errors import ConfigInvalid
from runner.quantization.formats.e2m1 import FORMATS, G32, NVFP4, Format, dequantize
from runner.quantization.formats.scales import quantize
from runner.quantization.kernels import dequantize as module
from runner.quantization.kernels.dequantize import KERNELS, dequantize_fp4, pick_kernel
from tests.quantization.kernels.ahead_of_time import (
    ARCHITECTURES,
    EVERY_VARIANT,
    NEEDS_PINNED_TRITON,
    Built,
    Variant,
    build,
)

ROOT = Path(__file__).resolve().parents[3]
BOTH = pytest.mark.parametrize("fmt", FORMATS.values(), ids=FORMATS)
DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
NEEDS_TRITON = pytest.mark.skipif(find_spec("triton") is None, reason="triton is not installed")
CPU = torch.device("cpu")


def weight_of(fmt: Format, rows: int, columns: int, seed: int = 0) -> dict[str, Tensor]:
    """Quantised noise over many octaves, with zeros and a row of zeros."""
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(rows, columns, generator=generator) * torch.logspace(-3, 0, rows).unsqueeze(-1)
    weight[rows // 2] = -0.0
    weight[:, columns // 3] = 0.0
    return quantize(weight, fmt)


def arguments(tensors: dict[str, Tensor]) -> tuple[Tensor, Tensor, Tensor | None]:
    return tensors["weight_packed"], tensors["weight_scale"], tensors.get("weight_scale_2")


def same_bits(found: Tensor, wanted: Tensor) -> bool:
    return torch.equal(found, wanted) and torch.equal(torch.signbit(found), torch.signbit(wanted))


@BOTH
@DTYPES
@pytest.mark.parametrize("name", ["table", "eager"])
@pytest.mark.parametrize("shape", [(1, 32), (33, 224), (96, 1056)], ids=str)
def test_dequantize_kernel_agrees_with_reference(name, fmt, dtype, shape):
    tensors = weight_of(fmt, *shape)
    out = torch.full(shape, torch.nan, dtype=dtype)
    KERNELS[name](*arguments(tensors), fmt, out)
    assert same_bits(out, dequantize(tensors, fmt, dtype))


@BOTH
def test_table_kernel_gives_same_bits_with_any_blocks_and_threads(fmt, monkeypatch):
    tensors = weight_of(fmt, 61, 256)
    monkeypatch.setattr(module, "_WEIGHTS_A_BLOCK", 4 * 256)
    threads = torch.get_num_threads()
    try:
        for count in (1, 3):
            torch.set_num_threads(count)
            for inference in (False, True):
                with torch.inference_mode(inference):
                    out = torch.empty(61, 256, dtype=torch.bfloat16)
                    KERNELS["table"](*arguments(tensors), fmt, out)
                    assert same_bits(out, dequantize(tensors, fmt, torch.bfloat16))
    finally:
        torch.set_num_threads(threads)


def test_tensor_scale_of_any_bits_is_multiplied_in_same_order():
    """Published files have tensor scales that are not bfloat16 numbers; the order of two products then changes the last
    bit."""
    tensors = {**weight_of(NVFP4, 64, 512), "weight_scale_2": torch.tensor(0.123456789)}
    factors = tensors["weight_scale"].view(torch.float8_e4m3fn).float() * 0.123456789
    codes = dequantize({**tensors, "weight_scale": torch.full_like(tensors["weight_scale"], 0x38)}, NVFP4) / 0.123456789
    for dtype in (torch.float32, torch.bfloat16):
        out = torch.empty(64, 512, dtype=dtype)
        KERNELS["table"](*arguments(tensors), NVFP4, out)
        assert torch.equal(out, (codes.round(decimals=3) * factors.repeat_interleave(16, dim=1)).to(dtype))


def in_a_process_of_its_own(program: str, tmp_path: Path, **environment: str) -> dict[str, object]:
    """Triton decides at its import whether it interprets; so no other test may share that process."""
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", program],
        cwd=ROOT,
        env={**os.environ, "TRITON_CACHE_DIR": str(tmp_path), "OMP_NUM_THREADS": "1", **environment},
        capture_output=True,
        text=True,
        timeout=240,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout.splitlines()[-1])


INTERPRETED = """
import contextlib, json, torch
from tests.quantization.kernels.test_dequantize import DTYPES, KERNELS, arguments, dequantize, same_bits, weight_of
from runner.quantization.formats.e2m1 import FORMATS
result = {}
for fmt in FORMATS.values():
    for shape in [(1, 32), (33, 224), (24, 1056)]:
        for dtype in DTYPES.args[1]:
            tensors = weight_of(fmt, *shape)
            out = torch.full(shape, torch.nan, dtype=dtype)
            KERNELS["triton"](*arguments(tensors), fmt, out)
            result[f"{fmt.name} {shape} {dtype}"] = same_bits(out, dequantize(tensors, fmt, dtype))
    tensors = {**weight_of(fmt, 4, 96), **({"weight_scale_2": torch.tensor(0.123456789)} if fmt.tensor_scale else {})}
    out = torch.empty(4, 96)
    entered = []
    torch.cuda.device_of = lambda tensor: contextlib.nullcontext(entered.append(tensor))
    KERNELS["triton"](*arguments(tensors), fmt, out)
    result[f"{fmt.name} any tensor scale"] = same_bits(out, dequantize(tensors, fmt))
    result[f"{fmt.name} launched where its output lies"] = len(entered) == 1 and entered[0] is out
print(json.dumps(result))
"""


@NEEDS_TRITON
def test_triton_kernel_in_interpreter_agrees_with_reference(tmp_path):
    found = in_a_process_of_its_own(INTERPRETED, tmp_path, TRITON_INTERPRET="1")
    assert len(found) == 2 * (3 * 3 + 2)
    assert [case for case, agrees in found.items() if agrees is not True] == []


# Each architecture once, each format, each dtype; all of them in the test after.
SOME_VARIANTS = [
    Variant("dequantize", "g32", "bfloat16", 5120, 80),
    Variant("dequantize", "nvfp4", "float16", 5120, 89),
    Variant("dequantize", "nvfp4", "bfloat16", 5120, 90),
    Variant("dequantize", "g32", "float32", 5120, 100),
    Variant("dequantize", "g32", "float16", 5120, 120),
]


def check_assembly(variant: Variant, built: Built) -> None:
    """What the interpreter cannot tell: that the compiler takes it, rounds to nearest, and stores a thread's values at
    full width, those of 16 bits without a way through shared memory."""
    built.check()
    assert "ld.global.b32" in built.instructions  # four packed bytes
    wide = dtype_size(variant) // 2
    assert {name: built.instructions[name] for name in built.of("st.global")} == {"st.global.v4.b32": wide}
    assert built.shared == (4096 if variant.dtype == "float32" else 0)
    assert (built.of("ld.shared", "st.shared") == set()) == (variant.dtype != "float32")
    # bfloat16 is rounded by integers.
    narrowing = {"cvt.rn.f16x2.f32"} if variant.dtype == "float16" else set()
    assert built.conversions() == {"cvt.f32.f16"} | narrowing


def dtype_size(variant: Variant) -> int:
    return getattr(torch, variant.dtype).itemsize


@NEEDS_PINNED_TRITON
def test_triton_kernel_compiles_for_every_gpu(tmp_path):
    for variant, built in build(SOME_VARIANTS, tmp_path).items():
        check_assembly(variant, built)


@NEEDS_PINNED_TRITON
@EVERY_VARIANT
@pytest.mark.parametrize("capability", ARCHITECTURES)
def test_every_variant_of_triton_kernel_compiles(capability, tmp_path):
    names = [str(dtype).removeprefix("torch.") for dtype in DTYPES.args[1]]
    variants = [Variant("dequantize", fmt, dtype, 5120, capability) for fmt in FORMATS for dtype in names]
    found = build(variants, tmp_path)
    assert len(found) == 6
    for variant, built in found.items():
        check_assembly(variant, built)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@BOTH
@DTYPES
@pytest.mark.parametrize("name", ["triton", "table", "eager"])
def test_dequantize_kernel_on_gpu_agrees_with_reference(name, fmt, dtype):
    tensors = weight_of(fmt, 1000, 1056)
    out = torch.full((1000, 1056), torch.nan, dtype=dtype, device="cuda")
    on_gpu = [None if tensor is None else tensor.cuda() for tensor in arguments(tensors)]
    KERNELS[name](*on_gpu, fmt, out)
    assert same_bits(out.cpu(), dequantize(tensors, fmt, dtype))
    assert pick_kernel(torch.device("cuda"), fmt)[0] == "triton"


@pytest.mark.gpu
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="no second CUDA device")
@BOTH
def test_pick_kernel_on_other_than_current_device_is_triton(fmt):
    assert torch.cuda.current_device() == 0
    assert pick_kernel("cuda:1", fmt)[0] == "triton"
    assert torch.cuda.current_device() == 0


@BOTH
def test_pick_kernel_gives_reason(fmt):
    assert pick_kernel(CPU, fmt) == ("table", "one look-up for two weights, equal to the reference on cpu")
    assert pick_kernel("cpu", fmt) == pick_kernel(CPU, fmt)


@pytest.fixture
def fresh_choice():
    module._pick.cache_clear()
    yield module._pick
    module._pick.cache_clear()


def test_pick_kernel_refuses_kernel_with_wrong_values(fresh_choice, monkeypatch):
    monkeypatch.setitem(KERNELS, "table", lambda packed, scale, factor, fmt, out: out.fill_(1))
    assert pick_kernel(CPU, G32) == ("eager", "table refused: wrong values in float32")


def test_pick_kernel_refuses_kernel_that_raises(fresh_choice, monkeypatch):
    def no_compiler(*_args: object) -> None:
        raise RuntimeError("Failed to find C compiler.\nPlease specify one")

    monkeypatch.setitem(KERNELS, "table", no_compiler)
    assert pick_kernel(CPU, G32) == ("eager", "table refused: RuntimeError: Failed to find C compiler.")


def test_pick_kernel_on_gpu_without_triton_gives_next_kernel_and_reason(fresh_choice, monkeypatch):
    monkeypatch.setattr(module, "_check_kernel", lambda name, *_: "no compiler" if name == "triton" else None)
    name, why = fresh_choice(torch.device("cuda", 0), G32)
    assert name == "table"
    assert "triton refused: no compiler" in why


@BOTH
def test_probe_has_every_byte_and_valid_scales(fmt):
    tensors = module._probe(fmt, CPU)
    fmt.check(tensors)
    assert len(tensors["weight_packed"].unique()) == 256


@BOTH
def test_dequantize_fp4_operator_passes_opcheck(fmt):
    tensors = weight_of(fmt, 8, 96)
    torch.library.opcheck(dequantize_fp4, (*arguments(tensors), fmt.name, torch.bfloat16))
    found = dequantize_fp4(*arguments(tensors), fmt.name, torch.bfloat16)
    assert same_bits(found, dequantize(tensors, fmt, torch.bfloat16))


def test_dequantize_fp4_to_unsupported_dtype_is_refused():
    with pytest.raises(ConfigInvalid, match="float64"):
        dequantize_fp4(*arguments(weight_of(G32, 4, 64)), "g32", torch.float64)

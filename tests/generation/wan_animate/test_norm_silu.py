"""Norm and SiLU in one operation: the library's bits on the CPU, and the Triton kernel against the definition."""

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
from diffusers.models.autoencoders.autoencoder_kl_wan import WanRMS_norm

from runner.generation.wan_animate import norm_silu
from runner.generation.wan_animate.norm_silu import norm_silu_into, pick_norm
from tests.generation.operator_counts import OperatorCounts
from tests.quantization.kernels.ahead_of_time import (
    ARCHITECTURES,
    EVERY_VARIANT,
    NEEDS_PINNED_TRITON,
    Built,
    Variant,
    build,
)

ROOT = Path(__file__).resolve().parents[3]
DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def some(channels: int, dtype: torch.dtype, *, bias: bool = False) -> tuple[torch.Tensor, WanRMS_norm]:
    generator = torch.Generator().manual_seed(channels)
    x = torch.randn(1, channels, 2, 9, 7, generator=generator) * torch.logspace(-3, 2, 7)
    x[:, :, 1, 4, 3] = 0
    norm = WanRMS_norm(channels, images=False, bias=bias)
    for parameter in norm.parameters():
        parameter.data = torch.randn(parameter.shape, generator=generator)
    return x.to(dtype), norm.to(dtype)


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last_3d], ids=str)
@pytest.mark.parametrize("bias", [False, True], ids=["no bias", "bias"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_norm_silu_on_cpu_equals_library_and_keeps_padding(dtype, bias, layout):
    x, norm = some(24, dtype, bias=bias)
    x = x.contiguous(memory_format=layout)
    slots = torch.full((1, 24, 5, 11, 9), 7.0, dtype=dtype).contiguous(memory_format=layout)
    kept = x.clone()
    with torch.no_grad():
        norm_silu_into(x, norm.gamma, norm.bias if bias else None, slots[:, :, 2:4, 1:-1, 1:-1])
        wanted = F.silu(norm(x))
    assert torch.equal(slots[:, :, 2:4, 1:-1, 1:-1], wanted)
    assert torch.equal(x, kept)
    assert bool((F.pad(torch.zeros_like(x), (1, 1, 1, 1, 2, 1), value=7.0) == torch.where(slots == 7, slots, 0)).all())


def test_norm_silu_is_one_launch_that_reads_and_writes_once():
    x, norm = some(24, torch.float32)
    x, out, gamma = x.to("meta"), torch.empty(x.shape, device="meta"), norm.gamma.detach().to("meta")
    with OperatorCounts() as counts:
        norm_silu_into(x, gamma, None, out)
    assert counts.launches == {"video_lab::norm_silu_into": 1}
    assert counts.bytes.total() == 2 * x.nbytes + gamma.nbytes


def test_pick_norm_without_gpu_takes_torch():
    assert pick_norm(torch.device("cpu"), torch.float32) == ("torch", "no CUDA device")


def test_pick_norm_with_wrong_or_missing_kernel_takes_torch(monkeypatch):
    gpu = torch.device("cuda", 0)
    for off, chosen in ((0.9, "triton"), (1.1, "torch"), (float("nan"), "torch")):
        pick_norm.cache_clear()
        monkeypatch.setattr(norm_silu, "_disagreement", lambda *_, off=off: off * 2**-8)
        found, why = pick_norm(gpu, torch.bfloat16)
        assert found == chosen
        assert ("refused: it differs by" in why) == (chosen == "torch")

    def fail(*_):
        raise ImportError("no triton here\nmore")

    pick_norm.cache_clear()
    monkeypatch.setattr(norm_silu, "_disagreement", fail)
    assert pick_norm(gpu, torch.float32) == ("torch", "triton refused: ImportError: no triton here")
    pick_norm.cache_clear()


TRITON = """
import torch
from runner.generation.wan_animate import norm_silu
from runner.generation.wan_animate.norm_silu_triton import launch

cpu = torch.device("cpu")
for dtype, allowed in norm_silu._AGREEMENT.items():
    off = norm_silu._disagreement(cpu, dtype)
    assert off <= allowed, (dtype, off)
    print(dtype, f"{off:.2e}")

for dtype in norm_silu._AGREEMENT:  # more channels than a program's least, into slots, whose padding stays
    x = torch.randn(1, 200, 2, 5, 7, generator=torch.Generator().manual_seed(1)).to(dtype)
    x[0, 3, 0, 0, 0], x[0, 3, 0, 0, 1], x[0, :, 0, 0, 2] = torch.nan, torch.inf, 0
    gamma = torch.ones(200, 1, 1, 1, dtype=dtype)
    for layout in (torch.contiguous_format, torch.channels_last_3d):
        slots = torch.full((1, 200, 4, 7, 9), 7.0, dtype=dtype).contiguous(memory_format=layout)
        place = slots[:, :, 2:, 1:-1, 1:-1]
        launch(x.contiguous(memory_format=layout), gamma, None, 1e-12, place)
        outside = slots.clone()
        outside[:, :, 2:, 1:-1, 1:-1] = 7.0
        assert bool((outside == 7).all()), "wrote outside"
        bad = place.isnan()
        assert bool(bad[0, :, 0, 0, 0].all()), "NaN is lost"
        assert bool(bad[0, 3, 0, 0, 1]) and bool((place[0, :, 0, 0, 2] == 0).all())
        bad[0, :, 0, 0, 0] = bad[0, 3, 0, 0, 1] = False
        assert not bool(bad.any())

from runner.generation.wan_animate.norm_silu_triton import _bfloat16_bits
import triton, triton.language as tl

@triton.jit
def narrow(x, out, N: tl.constexpr):
    at = tl.arange(0, N)
    tl.store(out + at, _bfloat16_bits(tl.load(x + at)))

# Every NaN that hardware may make stays one: a GPU's has all bits set.
bits = torch.tensor([0x7FFFFFFF, 0x7FC00000, -1, 0x7F800001], dtype=torch.int32).view(torch.float32)
out = torch.empty(4, dtype=torch.int16)
narrow[(1,)](bits, out, N=4)
assert bool(out.view(torch.bfloat16).isnan().all()), out
print("agrees")
"""


@pytest.mark.skipif(find_spec("triton") is None, reason="triton is not installed")
def test_triton_kernel_in_interpreter_agrees_with_definition(tmp_path):
    """The self-test for a GPU, then values that are not finite, in both layouts, written into slots."""
    script = tmp_path / "interpreted.py"  # Triton reads the source of a kernel
    script.write_text(TRITON)
    environment = {**os.environ, "TRITON_INTERPRET": "1", "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [sys.executable, str(script)], env=environment, capture_output=True, text=True, check=False, timeout=250
    )
    assert done.stdout.splitlines()[-1:] == ["agrees"], done.stdout + done.stderr


def check_assembly(variant: Variant, built: Built) -> None:
    built.check()
    assert {name for name in built.of("div", "sqrt") if ".f" in name} == {"div.rn.f32", "sqrt.rn.f32"}
    if variant.form == "channels":  # as on every GPU by default: full width
        assert "ld.global.v4.b32" in built.instructions
        assert built.of("st.global") == {"st.global.v4.b32"}


# Each architecture once, each layout and dtype; all of them in the test after.
SOME_VARIANTS = [
    Variant("norm_silu", "channels", "float32", 96, 80),
    Variant("norm_silu", "channels", "bfloat16", 384, 89),
    Variant("norm_silu", "channels", "float16", 192, 90),
    Variant("norm_silu", "pixels", "float32", 384, 100),
    Variant("norm_silu", "channels", "bfloat16", 96, 120),
]


@NEEDS_PINNED_TRITON
def test_norm_silu_kernel_compiles_for_every_gpu(tmp_path):
    for variant, built in build(SOME_VARIANTS, tmp_path).items():
        check_assembly(variant, built)


@NEEDS_PINNED_TRITON
@EVERY_VARIANT
@pytest.mark.parametrize("capability", ARCHITECTURES)
def test_norm_silu_kernel_compiles_in_every_variant(capability, tmp_path):
    names = [str(dtype).removeprefix("torch.") for dtype in DTYPES]
    variants = [
        Variant("norm_silu", *rest, capability) for rest in product(("channels", "pixels"), names, (96, 192, 384))
    ]
    found = build(variants, tmp_path)
    assert len(found) == 18
    for variant, built in found.items():
        check_assembly(variant, built)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_pick_norm_on_gpu_takes_triton(dtype):
    chosen, why = pick_norm(torch.device("cuda", 0), dtype)
    assert chosen == "triton", why

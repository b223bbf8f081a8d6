"""The Triton that kernels are compiled with here is the one that users get, and its compiler is really asked."""

from __future__ import annotations

import re
from importlib.metadata import requires

import pytest

from tests.quantization.kernels.ahead_of_time import EVERY_VARIANT, NEEDS_PINNED_TRITON, Variant, build, pinned_triton


def test_the_pinned_triton_is_the_one_that_torch_brings():
    wanted = [row for row in requires("torch") or () if re.match(r"triton\b", row)]
    if not wanted:
        pytest.skip("this build of torch asks for no Triton; the CUDA build, in .venv-gpu, does")
    assert [re.split("[;\\s]", row)[0] for row in wanted] == [f"triton=={pinned_triton()}"]


@NEEDS_PINNED_TRITON
@EVERY_VARIANT
def test_variants_are_compiled_one_by_one(tmp_path):
    """Another architecture or dtype is another piece of code, also within one process."""
    variants = [
        Variant("dequantize", "g32", "bfloat16", 5120, 80),
        Variant("dequantize", "g32", "bfloat16", 5120, 90),
        Variant("dequantize", "g32", "float32", 5120, 90),
    ]
    built = build(variants, tmp_path)
    assert list(built) == variants
    assert len(list(tmp_path.rglob("*.cubin"))) == 3
    targets = {re.search(r"\.target (\w+)", path.read_text())[1] for path in tmp_path.rglob("*.ptx")}
    assert targets == {"sm_80", "sm_90a"}
    assert built[variants[1]].instructions != built[variants[2]].instructions

"""The benchmark of FP4 and SVDQuant runs, in small, and its numbers hang together."""

from __future__ import annotations

import pytest

from tests.bench.run_bench import run_bench
from tests.system_tests import system_test


@system_test
def test_quantization_benchmark_with_small_flag_gives_consistent_numbers(tmp_path):
    found, printed = run_bench("quantization", tmp_path, "--small")
    errors = {(row["format"], row["scales"]): row for row in found["errors"]}
    weight = {case: row["weight error"] for case, row in errors.items()}
    assert weight["g32", "absmax"] == pytest.approx(0.1011, abs=0.001)
    assert weight["nvfp4", "mse"] < weight["g32", "mse"] < 0.0905
    for fmt in ("g32", "nvfp4"):
        assert errors[fmt, "activation"]["output error"] < 0.75 * errors[fmt, "mse"]["output error"]
    assert {"torchao NVFP4", "torchao MXFP4", "comfy-kitchen NVFP4"} <= {row["format"] for row in found["errors"]}
    ours = [row for row in found["dequantize"] if row["how"] in ("g32, table", "nvfp4, table")]
    assert len(ours) == 4  # both formats, to bfloat16 and to float32
    for row in ours:
        assert row["of the original's"] < 1  # CPU time; a tenth, on the full size
        assert row["from the reference"] == 0
    assert all(row["CPU s"] > 0 for row in found["quantize"] if row["CPU s"] is not None)
    assert [row["compute"] for row in found["products"]] == ["fp8", "int8"]
    for row in found["products"]:
        assert row["same bits"] == "True"
        assert row["kept, of made"] < 1
    split = {(row["matrix"], row["format"], row["how"]): row for row in found["svdquant"]}
    for fmt, least in (("svdq-int4", 0.35), ("svdq-nvfp4", 0.45)):
        best = split["outlier", fmt, "searched exponent, rank 32"]
        assert best["of RTN's"] < least
        assert best["W4A16 error"] < best["W4A4 error"] < split["outlier", fmt, "data-free, rank 32"]["W4A4 error"]
        assert split["outlier", fmt, "exponent .5, rank 32"]["of cache-dit's"] < 1
    assert found["gpu"][0]["gpu"] == "not measured"
    assert "kernel on this device: table" in printed

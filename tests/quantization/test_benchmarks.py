"""The benchmarks of FP4 run, in small, and their numbers hang together: a table nobody can make is no evidence."""

from __future__ import annotations

import pytest
import torch

from tests.test_bench import run_bench


def test_quantization(tmp_path):
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
        assert row["of the seed's"] < 1  # CPU time; a tenth, on the full size
        assert row["from the reference"] == 0
    assert all(row["CPU s"] > 0 for row in found["quantize"] if row["CPU s"] is not None)
    assert found["gpu"][0]["gpu"] == "not measured"
    assert "kernel on this device: table" in printed


def test_checkpoint(tmp_path, monkeypatch):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")  # whose driver takes more of the host's memory than all this
    rows, printed = run_bench("checkpoint", tmp_path, "--gb", "0.08")
    assert [row["method"] for row in rows] == ["absmax", "mse"]
    for row in rows:
        assert row["times_reading"] == pytest.approx(row["seconds"] / row["read_s"])
        assert row["minutes_for_69_gb"] == pytest.approx(69.1 / row["source_gb"] * row["seconds"] / 60)
        assert 0 < row["rss_anon_mb"] < 600
    assert "x reading" in printed


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is something to measure")
def test_without_a_gpu_every_row_of_its_benchmark_says_so(tmp_path):
    found, _ = run_bench("quantization_gpu", tmp_path)
    assert all(row["value"] == "not measured" for row in found["ceilings"])
    assert all(row["ms"] == "not measured" for name in ("dequantize", "quantize") for row in found[name])
    cases = {(row["layer"], row["format"]) for row in found["dequantize"]}
    assert len(cases) == 6  # three shapes of the full-size model, two formats
    assert {row["how"] for row in found["dequantize"]} == {"the seed's eager look-up", "eager", "table", "triton"}

from __future__ import annotations

import pytest
import torch

from tests.bench.run_bench import run_bench


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is something to measure")
def test_quantization_gpu_benchmark_without_gpu_marks_rows_not_measured(tmp_path):
    found, _ = run_bench("quantization_gpu", tmp_path)
    assert all(row["value"] == "not measured" for row in found["ceilings"])
    assert all(row["ms"] == "not measured" for name in ("dequantize", "quantize") for row in found[name])
    cases = {(row["layer"], row["format"]) for row in found["dequantize"]}
    assert len(cases) == 6  # three shapes of the full-size model, two formats
    assert {row["how"] for row in found["dequantize"]} == {"the original eager look-up", "eager", "table", "triton"}

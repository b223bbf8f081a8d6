from __future__ import annotations

import pytest

from tests.bench.run_bench import run_bench
from tests.system_tests import system_test


@system_test
def test_segment_cost(tmp_path):
    """Small windows on this disk: every number is there, and shares are of the forecast that they name."""
    arguments = ("--segments", "2", "--frames", "6", "--stores", "local")
    found, printed = run_bench("segment_cost", tmp_path, *arguments)
    rows = found["rows"]
    assert [(row["format"], row["overlap"], row["state"]) for row in rows] == [
        (format, overlap, state) for format in ("mp4", "png") for overlap in (1, 5) for state in ("float32", "bfloat16")
    ]
    fastest = found["fastest"]
    assert fastest["quickest words"]["segment_s"] < fastest["fp4-distill"]["segment_s"]
    for recipe, row in fastest.items():
        assert row["segment_s"] == min(other["segment_s"] for other in found["forecasts"] if other["recipe"] == recipe)
    for row in rows:
        frames = 3 * row["overlap"] * 480 * 832 * (4 if row["state"] == "float32" else 2)
        assert frames < row["state_bytes"] < frames + 20_000
        assert 0 < row["part_bytes"] < 6 * 480 * 832 * 3
        recipe = "fp4-distill" if row["state"] == "float32" else "quickest words"
        assert row["percent"] == pytest.approx(100 * row["kept_s"] / fastest[recipe]["segment_s"])
        assert row["ratio"] == pytest.approx(row["kept_s"] / row["floor_s"])
        assert row["kept_s"] >= max(row[f"{name}_s"] for name in ("pack", "part", "state", "lease"))
        assert all(row[name] > 0 for name in ("main_s", "cpu_s", "encode_s"))
    assert "forecast of a segment: H200, fp4-distill" in printed

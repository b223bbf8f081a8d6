"""bench/interpolating.py runs without the network's file, on made frames, and its ratios are those of its numbers."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.bench.run_bench import run_bench
from tests.system_tests import system_test


@system_test
def test_without_the_file_seconds_alone_are_measured(tmp_path: Path) -> None:
    found, printed = run_bench("interpolating", tmp_path, "--clip", str(tmp_path / "none.mp4"))
    assert found["quality"] == {}
    assert [(row["width"], row["height"]) for row in found["times"]] == [(480, 480), (832, 480)]
    for row in found["times"]:
        assert row["of_floor"] == pytest.approx(row["rife_s"] / row["floor_s"])
        assert row["floor_s"] == pytest.approx(row["gflop"] * 1e9 / found["conv_flop_per_s"])
    assert "times its floor" in printed

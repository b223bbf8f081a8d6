from __future__ import annotations

import pytest

from tests.bench.run_bench import run_bench
from tests.system_tests import system_test


@system_test
def test_comparing(tmp_path):
    """Few frames: every number is there, ratios are those of their numbers, memory is that of each length."""
    arguments = ("--part", "5", "--frames", "10", "--memory-frames", "10")
    found, printed = run_bench("comparing", tmp_path, *arguments)
    seconds, parts = found["seconds"], found["parts"]
    assert all(value > 0 for value in (*seconds.values(), *parts.values()))
    for planes in ("RGB", "YUV"):
        peer = seconds[f"peer: PyAV's psnr and ssim, {planes}"]
        assert found[f"ratio_{planes.lower()}"] == pytest.approx(seconds["measure"] / peer)
    assert [row["frames"] for row in found["memory"]] == [10]
    assert 5 < found["memory"][0]["mb"] < 600
    assert "ratio to the peer" in printed

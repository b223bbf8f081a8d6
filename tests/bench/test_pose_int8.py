from __future__ import annotations

import pytest

from tests.bench.run_bench import run_bench
from tests.system_tests import system_test


@system_test
def test_pose_int8(tmp_path):
    found, printed = run_bench("pose_int8", tmp_path, "--blocks", "1", "--crops", "2")
    products = found["products"]
    assert products["faster"] == pytest.approx(products["fp32_ms"] / products["int8_ms"], abs=0.01)
    assert 3.5 < products["fp32_bytes"] / products["int8_bytes"] < 4.1  # a byte in place of four
    assert 0.99 < products["correlation"] < 1
    assert f"{products['faster']} times as fast" in printed

from __future__ import annotations

import pytest

from tests.bench.run_bench import run_bench
from tests.system_tests import system_test


@system_test
def test_checkpoint(tmp_path, monkeypatch):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")  # whose driver takes more of the host's memory than all this
    rows, printed = run_bench("checkpoint", tmp_path, "--gb", "0.08")
    assert [row["method"] for row in rows] == ["absmax", "mse"]
    for row in rows:
        assert row["times_reading"] == pytest.approx(row["seconds"] / row["read_s"])
        assert row["minutes_for_69_gb"] == pytest.approx(69.1 / row["source_gb"] * row["seconds"] / 60)
        assert 0 < row["rss_anon_mb"] < 600
    assert "x reading" in printed

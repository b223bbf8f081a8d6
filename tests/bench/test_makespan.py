from __future__ import annotations

import pytest

from tests.bench.run_bench import ROOT, run_bench
from tests.system_tests import system_test


def test_what_is_added_up(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "bench"))
    from makespan import draw_seconds, list_schedule

    assert list_schedule([3, 3, 2, 2, 2], 2) == 7  # the textbook's: the best is 6
    assert list_schedule([5], 3) == 5
    drawn = draw_seconds(2000, 4.0, 1)
    assert sum(drawn) / 2000 == pytest.approx(4.0, rel=0.1)
    assert drawn[:5] == draw_seconds(5, 4.0, 1)


@system_test
def test_makespan(tmp_path):
    """Real runs, few jobs: each is done once by every share (else the benchmark fails), and none is below the bound."""
    found, printed = run_bench("makespan", tmp_path, "--jobs", "6", "--workers", "2", "--mean-s", "0.5")
    assert [row["share"] for row in found["rows"]] == ["static", "any", "ray"]
    for row in found["rows"]:
        assert row["ratio"] == pytest.approx(row["seconds"] / found["bound_s"], abs=0.01)
        assert row["seconds"] >= found["bound_s"]
    assert found["static_by_addition_s"] >= found["longest_first_by_addition_s"] >= found["bound_s"]
    assert "6 jobs of" in printed and "--on ray" in printed

from __future__ import annotations

from tests.bench.run_bench import run_bench
from tests.system_tests import system_test


@system_test
def test_faults(tmp_path):
    """A few trials; that nothing is lost by them is tested in `tests/integration/test_kills.py`, with more."""
    found, printed = run_bench("faults", tmp_path, "--trials", "8", "--stores", "local", "--seed", "3")
    assert found["problems"] == []
    assert found["total"]["trials"] == sum(row["trials"] for row in found["rows"]) == 8
    assert found["total"]["landed"] >= 6
    assert found["total"]["lost"] == found["total"]["wrong"] == found["total"]["removed"] == 0
    kills = [row for row in found["rows"] if row["what"] == "kills"]
    faults = [row for row in found["rows"] if row["what"] != "kills"]
    assert sum(sum(row["when"].values()) for row in kills) == 4, kills
    assert sum(sum(row["exit_codes"].values()) for row in faults) == 4
    assert all(f"local, {row['format']}, kills, {row['scenario']}" in printed for row in kills)

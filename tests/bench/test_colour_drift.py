"""bench/colour_drift.py: every method is measured on two segments of the demo model, with drift put in and without."""

from __future__ import annotations

from itertools import product
from pathlib import Path

from tests.bench.run_bench import run_bench
from tests.system_tests import system_test


@system_test
def test_made_drift_is_seen_and_anchor_takes_it_out(tmp_path: Path) -> None:
    models = str(tmp_path / "models")
    found, printed = run_bench("colour_drift", tmp_path, "--segments", "2", "--clips", "1", "--models", models)
    rows = {(row["drifts"], row["method"]): row for row in found["rows"]}
    assert rows.keys() == set(product((False, True), ("off", "seam", "anchor", "reinhard")))
    last = {key: row["last"] for key, row in rows.items()}
    assert last[True, "anchor"] < last[True, "off"]
    assert last[False, "off"] < last[True, "off"]
    assert [row["drift"]["colour"] for row in rows.values() if row["drift"]] == ["off", "seam", "anchor"] * 2
    assert "last/off" in printed

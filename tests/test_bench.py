"""The benchmarks run, and their numbers hang together."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[1]


def run_bench(name: str, tmp_path: Path, *arguments: str) -> tuple[dict[str, Any], str]:
    """(what it wrote as JSON, what it printed)."""
    target = tmp_path / "out" / f"{name}.json"
    done = subprocess.run(
        [sys.executable, str(ROOT / "bench" / f"{name}.py"), *arguments, "--json", str(target)],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=240,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return json.loads(target.read_text()), done.stdout


def test_preprocess(tmp_path):
    found, printed = run_bench("preprocess", tmp_path, "--frames", "6")
    assert found["frames"] == 6
    ours, official = found["ours"], found["official"]
    assert ours["stages_ms"].keys() == official["stages_ms"].keys()
    # Every stage that is named was entered: a function renamed in the code measured would leave its stage at nothing.
    idle = {"other"}
    assert all(ms > 0 for name, ms in ours["stages_ms"].items() if name not in idle)
    assert all(ms > 0 for name, ms in official["stages_ms"].items() if name not in {*idle, "repair"})
    for side in (ours, official):
        networks = sum(side["stages_ms"][name] for name in ("decode", "detector network", "pose network"))
        whole = sum(side["stages_ms"].values())
        assert side["outside_ms"] == pytest.approx(whole - networks, abs=0.02)
    assert found["outside_ratio"] == pytest.approx(official["outside_ms"] / ours["outside_ms"], abs=0.01)
    assert found["decode_differs_px"] < 1e-3  # two decodings of the same heatmaps
    assert found["decoding"]["PyAV"]["cpu_ms"] > 0
    for stage, ms in ours["stages_ms"].items():
        assert f"{stage:<22}{ms:>9.2f}" in printed
    assert "what limits it now" in printed

from __future__ import annotations

import pytest

from tests.bench.run_bench import run_bench
from tests.system_tests import system_test


@system_test
def test_preprocessing(tmp_path):
    found, printed = run_bench("preprocessing", tmp_path, "--frames", "6")
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
    assert found["pose_batches"]["ms_a_crop"].keys() == {"1", "4", "16"}
    assert min(found["pose_batches"]["ms_a_crop"].values()) > 0
    assert found["pose_batches"]["differs"] == 0  # on the CPU no crop's bits depend on what is beside it
    assert "pose network, CPU ms a crop: 1 at once" in printed
    assert found["decoding"]["PyAV"]["cpu_ms"] > 0
    for stage, ms in ours["stages_ms"].items():
        assert f"{stage:<22}{ms:>9.2f}" in printed
    assert "what limits it now" in printed

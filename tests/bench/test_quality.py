from __future__ import annotations

import pytest

from tests.bench.run_bench import run_bench
from tests.system_tests import system_test


@system_test
def test_quality(tmp_path):
    """Two clips and few steps: the measures are in order, and the table holds what it should."""
    found, printed = run_bench("quality", tmp_path, "--quick", "--models", str(tmp_path / "models"))
    rows, said = found["rows"], found["verdicts"]
    assert found["clips"] == 2
    ceiling = rows["autoencoder"]
    for name, row in rows.items():
        assert row["psnr"] <= ceiling["psnr"], name  # nothing is better than what the autoencoder can say
        assert row["psnr_inside"] < row["psnr"], name  # the dancer is the hard part
        assert -1 <= row["ssim_inside"] <= 1
        assert name in printed
    floor = rows["copy the reference"]["psnr_inside"]
    for steps, above in said["above_floor_db"].items():
        assert above == pytest.approx(rows[f"bf16 {steps} official"]["psnr_inside"] - floor)
    for column in ("psnr_own", "psnr_own_inside"):
        assert said[f"fp4_{column}"]["db"] == [rows[f"fp4 {method} 2"][column] for method in ("absmax", "mse", "nvfp4")]
    assert found["identity"]["own"]["mean"] < found["identity"]["wrong reference"]["mean"]

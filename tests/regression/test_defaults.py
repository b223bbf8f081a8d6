"""Default limits: they hold for the demo's trained model on a CPU, and are those of the table."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from runner.demo.build import DETECTOR_FILE, POSE_FILE, copy_trained
from runner.records.record import ResultRecord
from runner.regression.defaults import CALIBRATED, DEMO_AUTOENCODER, is_calibrated
from runner.spec.recipes import get_recipe
from runner.weights.resolved import ResolvedRecipe
from runner.weights.store import ModelStore

RESULTS = Path(__file__).resolve().parents[2] / "bench" / "results.md"


def record_of(vae: str | None, device: str | None) -> ResultRecord:
    return ResultRecord(
        job_id="a",
        status="succeeded",
        attempt=1,
        run_id="r",
        reason="no record yet",
        started_at="2026-01-01T00:00:00+00:00",
        finished_at="2026-01-01T00:00:01+00:00",
        fingerprint="f" * 64,
        fingerprint_parts={"model.vae": vae} if vae else {},
        engine={"device": device} if device else {},
    )


@pytest.mark.parametrize("recipe", ["fp32", "bf16", "fp32+bf16-vae"])
def test_the_autoencoder_is_that_of_the_shipped_weights(tmp_path, recipe):
    """Trained anew, the limits have to be calibrated anew: bench/calibration.py."""
    copy_trained(tmp_path)
    for name in (DETECTOR_FILE, POSE_FILE):  # the digests are of all pieces of a store
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_bytes(b"no network")
    assert ResolvedRecipe(ModelStore(tmp_path), get_recipe(recipe)).digests["vae"] == DEMO_AUTOENCODER


@pytest.mark.parametrize(
    ("vae", "device", "holds"),
    [
        (DEMO_AUTOENCODER, "cpu", True),
        (DEMO_AUTOENCODER, "cuda:0", False),
        (DEMO_AUTOENCODER, None, False),
        ("0" * 64, "cpu", False),
        (None, "cpu", False),
    ],
)
def test_they_hold_for_the_demo_on_a_cpu_alone(vae, device, holds):
    assert is_calibrated(record_of(vae, device)) is holds


def test_the_limits_are_those_of_the_table():
    text = RESULTS.read_text(encoding="utf-8").partition("`bench/calibration.py`")[2].partition("\n## ")[0]
    told = dict(
        re.findall(r"`(\w+_(?:min|max|diff)): ([0-9.]+)`", text.partition("Default limits:")[2].partition("\n\n")[0])
    )
    limits = CALIBRATED.model_dump(exclude_none=True)
    assert limits.pop("same_frames") is True
    assert {name: float(value) for name, value in told.items()} == limits

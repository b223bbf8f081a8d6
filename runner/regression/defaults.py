"""Default limits: the limits of `compare` for values that the manifest does not limit, and the renders they apply to.

In:   a record. Out: `CALIBRATED`, and whether it applies to that record. Never: measuring, judging.

`bench/calibration.py` renders the demo in pairs that must pass and pairs that must fail. A limit is the middle between
both groups where the gap is clear; bench/results.md has the table. The gaps are different for another model or on a
GPU, so the defaults do not apply there.
"""

from __future__ import annotations

from runner.records.record import ResultRecord
from runner.spec.regression_limits import RegressionLimits

__all__ = ["CALIBRATED", "DEMO_AUTOENCODER", "is_calibrated"]

# The part `model.vae` of the fingerprint of all renders that the demo's trained autoencoder decoded.
DEMO_AUTOENCODER = "cb10fb0963ed35a6214f842acc0fab15888e8eb6ab0c0f4a4db64946dd987af6"

CALIBRATED = RegressionLimits(
    same_frames=True,
    psnr_min=35.0,
    ssim_min=0.85,
    max_frame_diff=54,
    joint_drift_max=0.17,
)


def is_calibrated(record: ResultRecord) -> bool:
    """Whether the demo's trained model rendered this job on a CPU."""
    return record.fingerprint_parts.get("model.vae") == DEMO_AUTOENCODER and record.engine.get("device") == "cpu"

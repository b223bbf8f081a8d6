"""Regression limits: what a manifest may write, and how a job's limits go over the manifest's."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from runner.spec.regression_limits import RegressionLimits

FACTORS = st.one_of(st.integers(1, 9999), st.integers(1_000_000, 9_999_999_999).map(lambda n: n / 1_000_000))
# As a manifest writes them.
LIMITS = st.fixed_dictionaries(
    {},
    optional={
        "same_frames": st.none() | st.booleans(),
        "psnr_min": st.none() | st.integers(0, 100) | st.floats(0, 100),
        "ssim_min": st.none() | st.floats(-1, 1),
        "max_frame_diff": st.none() | st.integers(0, 255) | st.floats(0, 255),
        "joint_drift_max": st.none() | st.floats(0, 1e6),
        "identity_min": st.none() | st.floats(-1, 1),
        "seconds_max": st.none() | FACTORS.map("{}x".format),
        "memory_max": st.none() | FACTORS.map("{}x".format),
    },
)


def said(words: dict) -> dict:
    """The keys that say something."""
    return {key: value for key, value in words.items() if value is not None}


@given(over=LIMITS, below=LIMITS)
def test_limits_of_a_job_go_over_those_of_the_manifest_key_by_key(over, below):
    found = RegressionLimits.model_validate(over).over(RegressionLimits.model_validate(below))
    assert found == RegressionLimits.model_validate(said(below) | said(over))


@given(LIMITS)
def test_limits_written_as_json_read_as_the_same_limits(words):
    limits = RegressionLimits.model_validate(words)
    assert RegressionLimits.model_validate(limits.model_dump(mode="json")) == limits
    assert RegressionLimits.model_validate_json(limits.model_dump_json()) == limits


@pytest.mark.parametrize(
    ("text", "factor"), [("1x", 1.0), ("1.2x", 1.2), ("10x", 10.0), ("1.000001x", 1.000001), ("9999.9999x", 9999.9999)]
)
def test_a_factor_is_written_with_an_x(text, factor):
    limits = RegressionLimits.model_validate({"seconds_max": text})
    assert limits.seconds_max == factor


@pytest.mark.parametrize(
    "wrong",
    [1.2, 1, True, ["1.2x"], "1.2", "0.9x", "0x", "01.2x", "-1.2x", "1,2x", "x", "", "1.2X", " 1.2x", "1.2 x", "1e3x"],
)
def test_what_is_no_factor_is_refused(wrong):
    with pytest.raises(ValidationError, match=r"1 or more, e\.g\. 1\.2x"):
        RegressionLimits.model_validate({"memory_max": wrong})


@pytest.mark.parametrize(
    "wrong",
    [{"psnr_min": -1}, {"psnr_min": 101}, {"psnr_min": "30"}, {"psnr_min": float("nan")}, {"ssim_min": 1.1},
     {"max_frame_diff": 256}, {"joint_drift_max": -0.1}, {"identity_min": -1.1}, {"same_frames": 1}, {"psnr": 30}],
)  # fmt: skip
def test_what_is_no_limit_is_refused(wrong):
    with pytest.raises(ValidationError):
        RegressionLimits.model_validate(wrong)

"""The verdict of each kind of difference, and the sentence that tells it."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from runner.generation.protocol import SegmentPlan
from runner.records.record import OutputRecord
from runner.regression.findings import (
    Drift,
    FrameValues,
    Identity,
    JobFinding,
    JointDrift,
    Measurements,
    PerformanceFinding,
)
from runner.regression.judge import (
    ORDER,
    differences,
    digests_differ,
    environment_changes,
    exit_code_of_verdicts,
    is_exact,
    joints_of,
    judge,
    same_picture,
)
from runner.spec.regression_limits import RegressionLimits
from tests.regression.night_records import ENVIRONMENT, digest_list, in_segments, rendered

NONE = RegressionLimits()
DEFAULTS = RegressionLimits(same_frames=True, psnr_min=30, ssim_min=0.9, joint_drift_max=1.0)
NIGHT = rendered(digest_list(1, 2, 3))


def series(worst: float, frame: int = 1) -> FrameValues:
    return FrameValues(mean=worst + 1, p5=worst, worst=worst, worst_frame=frame, values=[worst + 2, worst])


def measured(psnr: float = 50.0, ssim: float = 0.99, **more: object) -> Measurements:
    return Measurements(
        frames_baseline=3, frames_new=3, frames_compared=3, psnr=series(psnr), ssim=series(ssim), **more
    )


def verdict_of(finding: JobFinding, new=NIGHT, base=NIGHT, given_limits=NONE, calibrated=None) -> JobFinding:
    return judge(finding, new, base, given=given_limits, calibrated=calibrated)


def finding(**more: object) -> JobFinding:
    return JobFinding(id="a", verdict="identical", text="", frames=3, **more)


def differing(**more: object) -> JobFinding:
    return finding(first_frame=1, frames_differing=2, **more)


def test_equal_frames_are_identical_with_any_limits():
    for limits in (NONE, DEFAULTS):
        found = verdict_of(finding(exact=True), given_limits=limits)
        assert (found.verdict, found.breaches, found.text) == ("identical", [], "all 3 frames are the same")


def test_differing_frames_of_same_environment_are_broken_and_first_is_named():
    found = verdict_of(differing(exact=True, measurements=measured()), calibrated=DEFAULTS)
    assert found.verdict == "broken"
    assert [breach.metric for breach in found.breaches] == ["same_frames"] and found.breaches[0].frame == 1
    assert found.text.startswith("2 of 3 frames differ, the first is frame 1, although device, compute")


def test_differing_request_is_named_in_place_of_environment():
    found = verdict_of(differing(exact=True, differences=["options.seed: 42 → 43"]), calibrated=DEFAULTS)
    assert found.text == "2 of 3 frames differ, the first is frame 1; the request differs: options.seed: 42 → 43"


def test_frames_of_other_environment_are_judged_by_metric():
    found = verdict_of(differing(measurements=measured()), calibrated=DEFAULTS)
    assert found.verdict == "changed" and found.text == "2 of 3 frames differ, the first is frame 1, within the limits"


def test_limit_same_frames_false_allows_differing_frames():
    allow = RegressionLimits(same_frames=False)
    assert verdict_of(differing(exact=True, measurements=measured()), given_limits=allow).verdict == "changed"


def test_manifest_with_any_limit_requires_same_frames():
    some = RegressionLimits(psnr_min=20)
    found = verdict_of(differing(exact=True, measurements=measured()), given_limits=some)
    assert [breach.metric for breach in found.breaches] == ["same_frames"]


def test_verdict_without_limits_is_uncalibrated():
    found = verdict_of(differing(exact=True, measurements=measured(psnr=5)))
    assert found.verdict == "uncalibrated" and "not calibrated" in found.text


def test_breach_of_each_limit_names_metric_and_frame():
    cases = {
        "psnr_min": measured(psnr=29.9),
        "ssim_min": measured(ssim=0.5),
        "max_frame_diff": measured(largest_difference=41, largest_difference_frame=2),
        "joint_drift_max": measured(
            drift=Drift(
                joint_drift=1.5,
                joints=[
                    JointDrift(frame=1, step=0.1, excess=0.1, gain=(1, 1, 1), offset=(0, 0, 0)),
                    JointDrift(frame=2, step=1.6, excess=1.5, gain=(1.02, 1.02, 1.02), offset=(0, 0, 0)),
                ],
            )
        ),
        "identity_min": measured(identity=Identity(cosine=0.4, cosine_frame=2)),
    }
    limits = DEFAULTS.model_copy(update={"max_frame_diff": 40.0, "identity_min": 0.8})
    good = {"identity": Identity(cosine=0.9)}
    for metric, values in cases.items():
        whole = values if metric == "identity_min" else values.model_copy(update=good)
        found = verdict_of(differing(measurements=whole), given_limits=limits)
        assert [breach.metric for breach in found.breaches] == [metric]
        breach = found.breaches[0]
        assert found.verdict == "broken" and found.text == breach.text and breach.frame in (1, 2)
        assert breach.value is not None and breach.limit is not None
        passing = measured(**good)
        assert verdict_of(differing(measurements=passing), given_limits=limits).verdict == "changed"


def test_limit_with_unmeasured_metric_is_broken():
    limits = RegressionLimits(identity_min=0.8)
    for identity, why in ((None, "give --models"), (Identity(why={"cosine": "no people.json"}), "no people.json")):
        found = verdict_of(differing(measurements=measured(identity=identity)), given_limits=limits)
        assert [breach.metric for breach in found.breaches] == ["identity_min"] and why in found.text


def test_output_of_other_size_frames_or_rate_is_broken_without_limits():
    for update, metric in (
        ({"width": 80}, "size"),
        ({"frames": 4}, "frames"),
        ({"fps": "8"}, "rate"),
    ):
        new = rendered(digest_list(1, 2, 3), output=update)
        assert [breach.metric for breach in verdict_of(finding(), new=new).breaches] == [metric]


def test_slower_stage_breaks_identical_frames():
    slow = PerformanceFinding(
        name="seconds: denoise", unit="s", new=9.0, median=2.0, nights=5, ratio=4.5, verdict="slower"
    )
    found = verdict_of(finding(performance=[slow]), calibrated=DEFAULTS)
    assert found.verdict == "broken" and found.breaches[0].metric == "seconds_max"
    assert found.text == "seconds: denoise took 9 s, 4.50 times the median of 5 nights (2 s)"
    assert verdict_of(finding(performance=[slow])).verdict == "identical"  # nothing is judged without limits
    few = slow.model_copy(update={"nights": 2})
    assert verdict_of(finding(performance=[few]), calibrated=DEFAULTS).verdict == "identical"


def test_limits_of_job_override_defaults():
    loose = RegressionLimits(psnr_min=10)
    found = verdict_of(differing(measurements=measured(psnr=15, ssim=0.5)), given_limits=loose, calibrated=DEFAULTS)
    assert [breach.metric for breach in found.breaches] == ["ssim_min"]


# -- exactness ---------------------------------------------------------------------------------------------------------


def test_is_exact_only_in_same_environment():
    assert is_exact(NIGHT, NIGHT)
    for name in ENVIRONMENT:
        other = rendered(digest_list(1), computed_by=ENVIRONMENT | {name: "other"})
        assert not is_exact(other, NIGHT)
        assert environment_changes(other, NIGHT) == [f"{name}: {ENVIRONMENT[name]} → other"]


def test_is_exact_ignores_runner_version():
    other = rendered(digest_list(1), computed_by=ENVIRONMENT | {"version of video-lab-runner": "0.2.0"})
    assert is_exact(other, NIGHT)
    assert environment_changes(other, NIGHT) == ["version of video-lab-runner: none → 0.2.0"]


def test_is_exact_of_record_without_environment_is_false():
    old = rendered(digest_list(1), computed_by={})
    assert not is_exact(old, old) and not is_exact(NIGHT, old)
    assert environment_changes(NIGHT, old) == ["one of the records does not name its environment"]


def test_differences_show_settings_from_baseline_to_night():
    new = rendered(digest_list(1), fingerprint_parts={"options.seed": 43, "model.vae": "a" * 64})
    assert differences(new, NIGHT) == [f"model.vae: none → {'a' * 24}…", "options.seed: 42 → 43"]


def test_same_picture_with_other_rate_is_false():
    assert same_picture(NIGHT.output, NIGHT.output) is True
    assert same_picture(NIGHT.output.model_copy(update={"fps": "8"}), NIGHT.output) is False
    assert same_picture(NIGHT.output.model_copy(update={"frames_hash": None}), NIGHT.output) is None


@given(st.lists(st.integers(0, 2), max_size=8), st.lists(st.integers(0, 2), max_size=8))
def test_digests_differ_gives_first_and_count_of_differing_frames(new, base):
    found = digests_differ(digest_list(*new), digest_list(*base))
    longest = max(len(new), len(base))
    wrong = [i for i in range(longest) if new[i : i + 1] != base[i : i + 1]]
    assert (found is None) == (not wrong)
    if found is not None:
        assert (found.first, found.count) == (wrong[0], len(wrong))


def with_frames(frames: int, **more: object) -> OutputRecord:
    assert NIGHT.output is not None
    return NIGHT.output.model_copy(update={"frames": frames, **more})


# -- joints ------------------------------------------------------------------------------------------------------------


@given(st.integers(1, 60), st.sampled_from((5, 9, 13, 17, 41, 77, 81)), st.sampled_from((1, 5)))
def test_joints_of_record_match_segment_plan(segments, frames, overlap):
    requested = frames + (segments - 1) * (frames - overlap) if frames > overlap else frames
    if frames <= overlap:
        segments = 1
    plan = SegmentPlan(requested, frames, overlap, segments, 64, 64, 1, 1, 1.0)
    expected = [frames + k * (frames - overlap) for k in range(segments - 1)]
    found = joints_of(in_segments(segments, frames, overlap, requested), with_frames(requested))
    assert plan.padding_frames == 0 and found == expected


@pytest.mark.parametrize("frames", [49, 50])
def test_joints_of_record_with_doubled_frames_are_doubled(frames):
    """Of 25 generated frames; the ninth and the seventeenth are generated ones too."""
    efficiency = in_segments(3, 9, 1, 25)
    assert joints_of(efficiency, with_frames(frames, fps="32", generated_fps="16")) == [18, 34]
    assert joints_of(efficiency, with_frames(25, generated_fps="16")) == [9, 17]
    assert joints_of(efficiency, with_frames(25)) == [9, 17]  # as older records are


@pytest.mark.parametrize("efficiency", [None, in_segments(1, 21, 0, 21)])
def test_joints_of_record_with_one_segment_are_none(efficiency):
    assert joints_of(efficiency, with_frames(21)) == []


# -- the exit code -----------------------------------------------------------------------------------------------------


def test_exit_code_of_verdicts_is_that_of_worst_verdict():
    assert exit_code_of_verdicts([]) == 0
    assert {verdict: exit_code_of_verdicts([verdict, "identical"]) for verdict in ORDER} == {
        "broken": 4,
        "failed": 1,
        "new": 4,
        "missing": 4,
        "uncalibrated": 0,
        "changed": 0,
        "draft": 0,
        "identical": 0,
    }
    assert exit_code_of_verdicts(["failed", "new"]) == 4

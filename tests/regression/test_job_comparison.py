"""One job against its baseline: each kind of defect is found, and named by the metric that shows it."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from runner.errors import InputUnreadable
from runner.records.record import InputRecord, ResultRecord
from runner.regression.evidence import VideoLink
from runner.regression.findings import JobFinding
from runner.regression.job_comparison import BASELINE_UNREADABLE, JobComparison
from runner.spec.regression_limits import RegressionLimits
from runner.video import digest_frames
from tests.moving_scene import apply_gain, make_scene, write_mp4, write_pngs
from tests.regression.night_records import in_segments, rendered

FRAMES, JOINT, SIZE = 24, 12, {"width": 128, "height": 192}
LIMITS = RegressionLimits(same_frames=False, psnr_min=30, ssim_min=0.9, joint_drift_max=1.0)
OTHER_DANCER = ((30, 160, 60), (220, 210, 60))


@dataclass
class Side:
    """A render as files."""

    record: ResultRecord
    files: Any
    listed: list[str] | None
    boxes: bytes | None = None
    fails: Exception | None = None
    fetched: list[Path] = field(default_factory=list)
    lists_read: int = 0

    def digests(self) -> list[str] | None:
        self.lists_read += 1
        return self.listed

    def people(self) -> bytes | None:
        return self.boxes

    def fetch(self, dest: Path) -> Any:
        self.fetched.append(dest)
        if self.fails is not None:
            raise self.fails
        return self.files


@pytest.fixture(scope="module")
def scene() -> np.ndarray:
    return make_scene(FRAMES, **SIZE)


@pytest.fixture
def side(tmp_path):
    """Make a render of frames: coded as the runner codes, with true digests."""

    def make(frames: np.ndarray, name: str, *, png: bool = False, **update: Any) -> Side:
        digests = digest_frames(frames)
        output = {"width": frames.shape[2], "height": frames.shape[1]} | update.pop("output", {})
        efficiency = in_segments(2, 13, 1, 25)  # joints at 13 of 25 frames: at 12 of 24
        record = rendered(digests, efficiency=efficiency, output=output, **update)
        files = write_pngs(tmp_path / name, frames) if png else write_mp4(tmp_path / f"{name}.mp4", frames)
        return Side(record, files, digests)

    return make


def compare(new: Side, baseline: Side, scratch: Path, limits: RegressionLimits = LIMITS, **how: Any):
    finding = JobFinding(id="a", verdict="new", text="")
    return JobComparison(**how).compare(finding, new, baseline, scratch / "job", given=limits, calibrated=None)


def test_job_comparison_of_equal_frames_reads_no_video_and_no_digests(scene, side, tmp_path):
    new, baseline = side(scene, "new"), side(scene, "baseline")
    finding, evidence = compare(new, baseline, tmp_path)
    assert new.lists_read == baseline.lists_read == 0
    assert finding.verdict == "identical" and finding.exact and evidence is None
    assert new.fetched == baseline.fetched == [] and finding.joints == [JOINT]


def test_job_comparison_names_first_differing_frame_by_digest(scene, side, tmp_path):
    changed = scene.copy()
    changed[7, 0, 0, 0] ^= 1
    changed[20, 0, 0, 0] ^= 1
    finding, _ = compare(side(changed, "new"), side(scene, "baseline"), tmp_path, RegressionLimits(same_frames=True))
    assert (finding.first_frame, finding.frames_differing, finding.frames) == (7, 2, FRAMES)
    assert [breach.metric for breach in finding.breaches] == ["same_frames"]
    assert finding.text.startswith("2 of 24 frames differ, the first is frame 7, although device")


def shifted(scene: np.ndarray) -> np.ndarray:
    frames = scene.copy()
    frames[9] = np.roll(scene[9], 1, axis=1)
    return frames


def recoloured(scene: np.ndarray) -> np.ndarray:
    return make_scene(FRAMES, **SIZE, dancer=OTHER_DANCER)


def brightened(scene: np.ndarray) -> np.ndarray:
    return np.concatenate([scene[:JOINT], apply_gain(scene[JOINT:], 1.02)])


DEFECTS = {
    "a shift of one pixel": (shifted, {"psnr_min"}, "frame 9 is the baseline's frame, moved by 1 pixels to the right"),
    "one dropped": (lambda s: np.delete(s, 10, axis=0), {"frames"}, "frame 10 is dropped"),
    "one repeated": (
        lambda s: np.insert(s, 10, s[9], axis=0)[:FRAMES],
        {"psnr_min", "ssim_min"},
        "frame 10 is repeated from the frame before",
    ),
    "a gain": (brightened, {"joint_drift_max"}, "at the joint before frame 12: gain 1.0"),
    "other colours": (recoloured, {"psnr_min"}, "the mean colour of frame"),
}


@pytest.mark.parametrize("defect", DEFECTS)
@pytest.mark.parametrize("listed", [True, False], ids=["digests", "no digests"])
def test_job_comparison_finds_and_names_each_defect(scene, side, tmp_path, defect, listed):
    change, metrics, sentence = DEFECTS[defect]
    baseline = side(scene, "baseline")
    limits = LIMITS.model_copy(update={"joint_drift_max": 0.3})
    new = side(change(scene), "new", computed_by={"device": "another"})
    if not listed:
        new.listed = None
    finding, _ = compare(new, baseline, tmp_path, limits)
    assert finding.verdict == "broken"
    assert metrics <= {breach.metric for breach in finding.breaches}, finding.breaches
    assert any(sentence in note for note in finding.notes), finding.notes


def test_job_comparison_of_other_noise_is_changed_and_not_broken(scene, side, tmp_path):
    """A difference that is not visible has no note."""
    noisy = make_scene(FRAMES, **SIZE, seed=1)
    finding, _ = compare(side(noisy, "new"), side(scene, "baseline"), tmp_path)
    assert finding.verdict == "changed" and finding.notes == []
    assert finding.measurements.psnr.worst > 35


def test_record_without_digests_is_compared_as_video(scene, side, tmp_path):
    old = side(scene, "baseline", output={"frames_hash": None, "frames_sha256": "of another kind"})
    old.listed = None
    finding, _ = compare(side(scene, "new"), old, tmp_path)
    assert finding.verdict == "identical" and "too old to have per-frame digests" in finding.notes[0]


def test_png_frames_are_compared_with_mp4(scene, side, tmp_path):
    finding, _ = compare(side(shifted(scene), "new", png=True), side(scene, "baseline"), tmp_path)
    assert finding.measurements.psnr.worst_frame == 9


@pytest.mark.parametrize("mine", [True, False])
def test_unreadable_video_is_failed_if_new_and_broken_if_baseline(scene, side, tmp_path, mine):
    new, baseline = side(shifted(scene), "new"), side(scene, "baseline")
    (new if mine else baseline).fails = InputUnreadable("is damaged", where="there")
    finding, _ = compare(new, baseline, tmp_path)
    if mine:
        assert finding.verdict == "failed" and finding.error.startswith("input.unreadable: ")
    else:
        assert finding.verdict == "broken" and [b.metric for b in finding.breaches] == [BASELINE_UNREADABLE]
    assert "is damaged" in finding.text


# -- evidence ----------------------------------------------------------------------------------------------------------


def test_evidence_shows_worst_frame_with_inputs(scene, side, tmp_path):
    driver = write_mp4(tmp_path / "driver.mp4", make_scene(FRAMES, seed=5))
    from PIL import Image

    Image.fromarray(scene[0]).save(tmp_path / "reference.png")
    inputs = {
        "video": InputRecord(uri=str(driver), bytes=1, identity="x"),
        "reference": InputRecord(uri=str(tmp_path / "reference.png"), bytes=1, identity="x"),
    }
    kept: list[tuple[str, str, VideoLink]] = []

    def keep(job: str, which: str, link: VideoLink) -> VideoLink:
        kept.append((job, which, link))
        return link

    new = side(shifted(scene), "new", inputs=inputs, fingerprint_parts={"options.fps": 16.0})
    finding, evidence = compare(new, side(scene, "baseline"), tmp_path, keep_video=keep)
    assert evidence.finding == finding and evidence.picture_frame == 9 and evidence.left_out == {}
    assert set(evidence.pictures) == {"reference", "driver", "baseline", "new", "difference"}
    assert [(job, which) for job, which, _ in kept] == [("a", "baseline"), ("a", "new")]
    assert all(link.file.suffix == ".mp4" and link.frames == FRAMES for _, _, link in kept)


def test_missing_inputs_are_left_out_of_evidence_and_named(scene, side, tmp_path):
    inputs = {"reference": InputRecord(uri=str(tmp_path / "gone.png"), bytes=1, identity="x")}
    new = side(shifted(scene), "new", inputs=inputs, png=True)
    _, evidence = compare(new, side(scene, "baseline"), tmp_path, keep_video=lambda job, which, link: link)
    assert set(evidence.left_out) == {"reference", "driver"} and "gone.png" in evidence.left_out["reference"]
    assert set(evidence.pictures) == {"baseline", "new", "difference"}
    assert evidence.videos["new"].file.suffix == ".mp4"  # of the PNG frames one is made


def test_show_new_of_job_without_baseline_has_picture_and_video(scene, side, tmp_path):
    comparison = JobComparison(keep_video=lambda job, which, link: link)
    finding = JobFinding(id="a", verdict="new", text="")
    finding, evidence = comparison.show_new(finding, side(scene, "new"), tmp_path / "job")
    assert finding.verdict == "new" and set(evidence.pictures) == {"new"} and set(evidence.videos) == {"new"}

"""The verb `compare`: exit codes, limits, history, drafts, selection, and what stands in its reports."""

from __future__ import annotations

import json
import shlex
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml

from runner.cli import main, parse_command
from runner.errors import ConfigInvalid, InputUnreadable
from runner.records.people import make_people
from runner.records.record import LimitsRecord, LimitsRow
from runner.regression import judge
from runner.regression.job_comparison import JobComparison
from runner.regression.nights import last_nights
from runner.storage import open_storage
from runner.verbs.approve import approve
from runner.verbs.compare import Compared, compare
from runner.verbs.settings import ApproveSettings, CompareSettings
from tests.moving_scene import make_scene
from tests.regression.night_stores import write_video
from tests.regression.real_faces import ASTRONAUT_BOX, astronaut, face_networks, other_people  # noqa: F401

FRAMES = 8
LIMITS = {"same_frames": False, "psnr_min": 30.0}


@pytest.fixture
def lab(tmp_path):
    return Lab(tmp_path)


class Lab:
    """Nights and a baseline in a folder."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        (folder / "scratch").mkdir()
        self.baseline = str(folder / "baseline")

    def night(self, name: str, *, limits: dict[str, Any] | None = None, **jobs: np.ndarray) -> str:
        out = open_storage(self.folder / name)
        for job, frames in jobs.items():
            job_id = job.replace("_", "-")
            finished = f"2026-01-{10 + len(name):02d}T00:00:00.000+00:00"
            write_video(out, self.folder / "scratch", job_id, frames, run_id=name, finished_at=finished)
        if limits is not None:
            row = LimitsRow(limits=limits, job_ids=[job.replace("_", "-") for job in jobs])
            out.write_bytes(f"runs/{name}/regression.json", LimitsRecord(rows=[row]).to_json())
        return out.root

    def compare(self, out: str, **more: Any) -> Compared:
        report = more.pop("report", None)
        return compare(
            CompareSettings(out=out, baseline=self.baseline, report=report, cache=self.folder / "cache", **more)
        )

    def approve(self, out: str, **more: Any) -> list[Any]:
        return approve(
            ApproveSettings(out=out, baseline=self.baseline, why="seen", cache=self.folder / "cache", **more)
        )


@pytest.fixture(scope="module")
def scene() -> np.ndarray:
    return make_scene(FRAMES)


@pytest.fixture(scope="module")
def near() -> np.ndarray:
    """The scene with other noise."""
    return make_scene(FRAMES, seed=1)


@pytest.fixture(scope="module")
def far() -> np.ndarray:
    return make_scene(FRAMES, dancer=((30, 160, 60), (220, 210, 60)))


def verdicts(found: Compared) -> dict[str, str]:
    return {job.id: job.verdict for job in found.comparison.jobs}


def test_compare_without_limits_reports_difference_as_uncalibrated(lab, scene, far):
    lab.approve(lab.night("n", a=scene, b=scene))
    found = lab.compare(lab.night("nn", a=far, b=scene))
    assert verdicts(found) == {"a": "uncalibrated", "b": "identical"} and found.comparison.exit_code == 0
    assert found.comparison.jobs[0].measurements.psnr.worst < 30


def test_compare_judges_by_limits_kept_by_run(lab, scene, near, far):
    lab.approve(lab.night("n", a=scene, b=scene))
    found = lab.compare(lab.night("nn", limits=LIMITS, a=far, b=near))
    assert verdicts(found) == {"a": "broken", "b": "changed"} and found.comparison.exit_code == 4
    assert [breach.metric for breach in found.comparison.jobs[0].breaches] == ["psnr_min"]


def test_compare_with_manifest_overrides_kept_limits(lab, scene, near):
    lab.approve(lab.night("n", a=scene))
    out = lab.night("nn", limits=LIMITS, a=near)
    manifest = lab.folder / "m.yaml"
    job = {"id": "a", "reference": "r.png", "video": "v.mp4", "regression": {"psnr_min": 90}}
    manifest.write_text(yaml.safe_dump({"version": 1, "regression": {"same_frames": False}, "jobs": [job]}))
    assert lab.compare(out).comparison.exit_code == 0
    assert lab.compare(out, manifest=str(manifest)).comparison.exit_code == 4


def test_compare_with_only_compares_and_misses_chosen_jobs(lab, scene, far):
    lab.approve(lab.night("n", anna=scene, bela=scene, cato=scene))
    out = lab.night("nn", limits=LIMITS, anna=scene, bela=far)
    assert verdicts(lab.compare(out)) == {"bela": "broken", "cato": "missing", "anna": "identical"}
    assert verdicts(lab.compare(out, only=["a*"])) == {"anna": "identical"}
    assert verdicts(lab.compare(out, only=["a*", "c*"])) == {"cato": "missing", "anna": "identical"}
    with pytest.raises(ConfigInvalid, match="has no job that fits d"):
        lab.compare(out, only=["d*"])


def test_compare_of_empty_folder_or_other_baseline_is_refused(lab, scene):
    out = lab.night("n", a=scene)
    with pytest.raises(ConfigInvalid, match="is empty"):
        lab.compare(str(lab.folder / "none"))
    with pytest.raises(ConfigInvalid, match="has none of these jobs") as caught:
        lab.compare(out)
    command = caught.value.message.partition("`")[2].partition("`")[0]
    assert main([*shlex.split(command)[1:], "--cache", str(lab.folder / "cache")]) == 0  # as the message says
    assert lab.compare(out).comparison.exit_code == 0


def test_compare_with_damaged_approvals_names_file(lab, scene):
    out = lab.night("n", a=scene)
    lab.approve(out)
    (path,) = Path(lab.baseline).rglob("approved.json")
    path.write_text("{}")
    with pytest.raises(InputUnreadable, match=r"approved\.json"):
        lab.compare(out)


def test_compare_with_bootstrap_accepts_drafts_and_keeps_approvals(lab, scene, far):
    lab.approve(lab.night("n", a=scene))
    out = lab.night("nn", limits=LIMITS, a=far, b=far)
    found = lab.compare(out, bootstrap=True)
    assert verdicts(found) == {"a": "broken", "b": "draft"}
    assert "--job a" in found.comparison.approve and "--job b" not in found.comparison.approve
    again = lab.compare(out)
    assert verdicts(again) == {"a": "broken", "b": "identical"}
    assert again.comparison.jobs[1].notes == ["the baseline is a draft that was accepted unseen"]


def test_compare_writes_to_baseline_only_with_record_or_bootstrap(lab, scene, far):
    lab.approve(lab.night("n", a=scene))
    out = lab.night("nn", limits=LIMITS, a=far, b=far)
    before = {path: path.stat().st_mtime_ns for path in Path(lab.baseline).rglob("*")}
    lab.compare(out, report=str(lab.folder / "report"), suggest=True)
    assert {path: path.stat().st_mtime_ns for path in Path(lab.baseline).rglob("*")} == before
    lab.compare(out, record=True)
    (night,) = last_nights(open_storage(lab.baseline), "cpu", "fp4-distill")
    assert night.run_id == "nn" and {job: line.verdict for job, line in night.jobs.items()} == {
        "a": "broken",
        "b": "new",
    }


def test_compare_with_suggest_prints_limits_of_accepted_nights(lab, scene, near, far):
    lab.approve(lab.night("n", a=scene))
    assert "too few nights" in lab.compare(lab.night("nn", a=scene), suggest=True).suggestions[0]
    lab.compare(lab.night("nnn", a=near), record=True)
    lab.compare(lab.night("nnnn", limits=LIMITS, a=far), record=True)  # broken: no accepted night
    lines = lab.compare(lab.night("nnnnn", a=scene), suggest=True).suggestions
    said = yaml.safe_load("\n".join(lines))["regression"]
    assert 30 < said["psnr_min"] < 50 and lines[0].startswith("regression: # suggested by 2 nights")


def test_compare_breaks_slower_stage_after_3_nights(lab, scene):
    nights = [lab.night("n" * (1 + k), limits={}, a=scene) for k in range(judge.NIGHTS_NEEDED + 2)]
    records = [open_storage(night) for night in nights]
    for night, seconds in zip(records, (2.0, 2.1, 1.9, 2.0, 9.0), strict=True):
        record = json.loads(night.read_bytes("jobs/a/result.json")) | {"timings_s": {"denoise": seconds}}
        night.write_bytes("jobs/a/result.json", json.dumps(record).encode())
    lab.approve(nights[0])
    manifest = lab.folder / "m.yaml"
    job = {"id": "a", "reference": "r.png", "video": "v.mp4"}
    manifest.write_text(yaml.safe_dump({"version": 1, "regression": {"seconds_max": "1.2x"}, "jobs": [job]}))
    for night in nights[1:-1]:
        assert lab.compare(night, manifest=str(manifest), record=True).comparison.exit_code == 0
    found = lab.compare(nights[-1], manifest=str(manifest))
    assert found.comparison.exit_code == 4
    job = found.comparison.jobs[0]
    assert {breach.metric for breach in job.breaches} == {"seconds_max"} and job.seconds_median == 2.0
    assert any("seconds: denoise took 9 s" in breach.text for breach in job.breaches)


# -- reports -----------------------------------------------------------------------------------------------------------


def test_compare_report_embeds_small_videos_and_links_large_ones(lab, scene, far):
    lab.approve(lab.night("n", a=scene))
    out = lab.night("nn", limits=LIMITS, a=far, b=far)
    report = lab.folder / "report"
    lab.compare(out, report=str(report), embed_mb=0)
    names = {str(path.relative_to(report)) for path in report.rglob("*") if path.is_file()}
    assert names == {
        "comparison.json",
        "junit.xml",
        "report.html",
        "summary.md",
        "videos/a/baseline.mp4",
        "videos/a/new.mp4",
        "videos/b/new.mp4",
    }
    page = (report / "report.html").read_text(encoding="utf-8")
    assert "videos/a/new.mp4" in page and "PSNR of frame" in page

    lab.compare(out, report=str(lab.folder / "small"), embed_mb=4)
    assert not (lab.folder / "small/videos").exists()
    assert (lab.folder / "small/report.html").stat().st_size > (report / "report.html").stat().st_size


def test_compare_approve_command_accepts_differing_jobs(lab, scene, near, far, capsys):
    lab.approve(lab.night("n", a=scene, b=scene, c=scene, e=scene))
    out = lab.night("nn", limits=LIMITS, a=far, b=near, d=scene, e=scene)
    words = ["compare", out, "--baseline", lab.baseline, "--cache", str(lab.folder / "cache")]
    assert main(words) == 4
    line = next(
        line for line in capsys.readouterr().out.splitlines() if line.startswith("to accept the differences, run: ")
    )
    command = shlex.split(line.partition(": ")[2])
    verb, fields, _ = parse_command(command[1:])
    assert verb.name == "approve" and fields["job"] == ["a", "d", "c"] and fields["missing"]
    assert main([*command[1:], "--cache", str(lab.folder / "cache")]) == 0
    assert main(words) == 0
    found = lab.compare(out)
    assert verdicts(found) == {"b": "changed", "a": "identical", "d": "identical", "e": "identical"}


def test_compare_approve_command_is_refused_after_newer_approval(lab, scene, far, capsys):
    lab.approve(lab.night("n", a=scene))
    out = lab.night("nnn", limits=LIMITS, a=far)
    command = shlex.split(lab.compare(out).comparison.approve)
    other = lab.night("nn", a=make_scene(FRAMES, seed=3))
    lab.approve(other, who="another@host")
    assert main([*command[1:], "--cache", str(lab.folder / "cache")]) == 1
    assert "another@host" in capsys.readouterr().out
    assert lab.compare(out).comparison.exit_code == 4


def test_compare_json_is_one_object(lab, scene, far, capsys):
    lab.approve(lab.night("n", a=scene))
    out = lab.night("nn", limits=LIMITS, a=far)
    assert main(["compare", out, "--baseline", lab.baseline, "--json", "--cache", str(lab.folder / "cache")]) == 4
    found = json.loads(capsys.readouterr().out)
    assert found["exit_code"] == 4 and found["counts"] == {"total": 1, "broken": 1}


def test_compare_leaves_scratch_folder_empty(lab, scene, far):
    lab.approve(lab.night("n", a=scene))
    lab.compare(lab.night("nn", limits=LIMITS, a=far), report=str(lab.folder / "report"))
    assert [path for path in (lab.folder / "cache").rglob("*") if path.is_file()] == []


def test_compare_keeps_files_of_one_job_at_one_time(lab, scene, far, monkeypatch):
    lab.approve(lab.night("n", a=scene, b=scene, c=scene))
    others: list[list[str]] = []
    compare_job = JobComparison.compare

    def watch(self, finding, new, baseline, scratch, **how):
        others.append([path.name for path in scratch.parent.glob("*") if path != scratch])
        return compare_job(self, finding, new, baseline, scratch, **how)

    monkeypatch.setattr(JobComparison, "compare", watch)
    lab.compare(lab.night("nn", limits=LIMITS, a=far, b=far, c=far))
    assert others == [[], [], []]


# -- identity ----------------------------------------------------------------------------------------------------------


def portrait(picture: np.ndarray) -> np.ndarray:
    """Some frames of a still portrait, a pixel of noise in each."""
    frames = np.repeat(picture[None, :480, :480], 4, axis=0).copy()
    for index, frame in enumerate(frames):
        frame[index, index] ^= 255
    return frames


def keep_boxes(out: str, face: tuple[int, int, int, int]) -> None:
    boxes = np.array([(10, 10, 470, 470)] * 4, np.float64)
    people = make_people(boxes, np.array([face] * 4, np.float64), 480, 480, Fraction(16))
    open_storage(out).write_bytes("jobs/a/people.json", people.to_json())


def test_compare_finds_face_of_other_person(lab, face_networks):  # noqa: F811
    first, second, third = (
        lab.night(name, limits={"same_frames": False}, a=portrait(picture))
        for name, picture in (("n", astronaut()), ("nn", np.roll(astronaut(), 2, axis=1)), ("nnn", other()[0]))
    )
    for night, face in ((first, ASTRONAUT_BOX), (second, ASTRONAUT_BOX), (third, other()[1])):
        keep_boxes(night, face)
    lab.approve(first)
    store = str(face_networks.parent)
    same = lab.compare(second, models=store).comparison
    assert same.exit_code == 0 and same.jobs[0].measurements.identity.face_distance < 0.3
    found = lab.compare(third, models=store).comparison
    assert found.exit_code == 4
    (breach,) = found.jobs[0].breaches
    assert breach.metric == "face_distance" and breach.text.startswith("the face is another person's")
    assert found.jobs[0].measurements.identity.face_pixels >= 64


def other() -> tuple[np.ndarray, tuple[int, int, int, int]]:
    return other_people(1)[0]


def test_compare_with_untrained_image_encoder_measures_no_cosine(lab, scene, far, tiny_store_dir):
    lab.approve(lab.night("n", a=scene))
    out = lab.night("nn", limits={"identity_min": 0.8, "same_frames": False}, a=far)
    found = lab.compare(out, models=str(tiny_store_dir)).comparison.jobs[0]
    assert found.measurements.identity.cosine is None
    assert found.verdict == "broken" and "identity cannot be measured" in found.text

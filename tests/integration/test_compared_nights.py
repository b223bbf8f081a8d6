"""Nights of real renders: rendered, compared, approved, on a disk and on a real S3 server, by the command line."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import yaml

from runner.cli import main
from runner.storage import open_storage

OPTIONS = {"size": "64x96", "fps": 8, "max_frames": 9, "max_segment_frames": 5, "steps": 1}


def render(folder: Path, models: Path, media: Path, night: str, seeds: dict[str, int]) -> Path:
    """One night of jobs with these seeds; the output folder."""
    jobs = [
        {
            "id": job,
            "reference": f"{media}/references/anna.png",
            "video": f"{media}/dances/wave.mp4",
            "options": {"seed": seed},
        }
        for job, seed in seeds.items()
    ]
    limits = {"same_frames": True, "psnr_min": 60, "seconds_max": "100x", "memory_max": "100x"}
    manifest = folder / f"{night}.yaml"
    document = {"version": 1, "recipe": "fp32", "regression": limits, "defaults": {"options": OPTIONS}, "jobs": jobs}
    manifest.write_text(yaml.safe_dump(document), encoding="utf-8")
    words = ["run", str(manifest), "--out", str(folder / night), "--models", str(models), "--device", "cpu"]
    assert main([*words, "--cache", str(folder / "cache"), "--run-id", night]) == 0
    return folder / night


@pytest.fixture(scope="module")
def nights(tmp_path_factory, demo_models, demo_media) -> Path:
    """Three nights: `first` and `second` are asked for alike, in `third` job b has another seed."""
    folder = tmp_path_factory.mktemp("nights")
    for night, seed in (("first", 1), ("second", 1), ("third", 2)):
        render(folder, demo_models, demo_media, night, {"a": 1, "b": seed})
    return folder


class Place:
    """Where a test's nights and its baseline lie."""

    def __init__(self, root: str, nights: Path, scratch: Path) -> None:
        self.root, self.nights, self.scratch = root, nights, scratch

    def bring(self, night: str, name: str | None = None) -> str:
        """A copy of a night, as if it had been rendered there; its URI."""
        storage = open_storage(f"{self.root}/{name or night}")
        for path in sorted((self.nights / night).rglob("*")):
            if path.is_file():
                storage.publish(path, str(path.relative_to(self.nights / night)))
        return storage.root

    def compare(self, out: str, *more: str) -> tuple[int, dict]:
        """Exit code and `comparison.json`."""
        report = self.scratch / "report"
        shutil.rmtree(report, ignore_errors=True)
        words = ["compare", out, "--baseline", f"{self.root}/baseline", "--report", str(report)]
        code = main([*words, "--cache", str(self.scratch / "cache"), *more])
        found = report / "comparison.json"
        return code, json.loads(found.read_bytes()) if found.exists() else {}

    def approve(self, out: str, *more: str) -> int:
        words = ["approve", out, "--baseline", f"{self.root}/baseline", "--why", "looked at"]
        return main([*words, "--cache", str(self.scratch / "cache"), *more])


@pytest.fixture(params=["disk", pytest.param("seaweedfs_s3", marks=pytest.mark.s3)])
def place(request, nights, tmp_path) -> Place:
    if request.param == "disk":
        return Place(str(tmp_path / "lab"), nights, tmp_path)
    server = request.getfixturevalue(request.param)
    request.getfixturevalue("aws_env")(server)
    return Place(f"s3://{server.make_bucket()}/lab", nights, tmp_path)


def verdicts(found: dict) -> list[tuple[str, str]]:
    return [(job["id"], job["verdict"]) for job in found["jobs"]]


def test_compare_after_changed_seed_exits_4_until_approved(place, capsys):
    first, second, third = (place.bring(night) for night in ("first", "second", "third"))
    assert place.compare(first)[0] == 2
    assert "has none of these jobs" in capsys.readouterr().err
    assert place.approve(first) == 0

    code, found = place.compare(second)
    assert code == 0 and verdicts(found) == [("a", "identical"), ("b", "identical")]
    assert found["jobs"][0]["exact"] and found["approve"] == "" and found["environment"] == []

    capsys.readouterr()
    code, found = place.compare(third, "--record")
    assert code == 4 and verdicts(found) == [("b", "broken"), ("a", "identical")]
    job = found["jobs"][0]
    assert job["breaches"][0]["metric"] == "same_frames" and "options.seed: 1 → 2" in job["text"]
    assert job["first_frame"] == 0 and job["measurements"]["psnr"]["worst"] < 60
    page = (place.scratch / "report/report.html").read_text(encoding="utf-8")
    worst = job["measurements"]["psnr"]["worst_frame"]
    assert page.index("options.seed: 1 → 2") and f"frame {worst}" in page and "data:image/jpeg" in page
    printed = next(
        line for line in capsys.readouterr().out.splitlines() if line.startswith("to accept the differences, run: ")
    )
    assert printed.removeprefix("to accept the differences, run: ") == found["approve"]

    import shlex

    assert main([*shlex.split(found["approve"])[1:], "--cache", str(place.scratch / "cache")]) == 0
    code, found = place.compare(third)
    assert code == 0 and verdicts(found) == [("a", "identical"), ("b", "identical")]
    assert "accepted after compare" in found["jobs"][1]["approved"]

    assert place.approve(first) == 1  # rendered earlier than what stands
    assert "rendered later" in capsys.readouterr().out
    assert place.compare(third)[0] == 0


def test_compare_with_added_or_removed_job_exits_4_until_approved(place):
    first, second = place.bring("first"), place.bring("second")
    assert place.approve(first, "--job", "a") == 0
    code, found = place.compare(second)
    assert code == 4 and verdicts(found) == [("b", "new"), ("a", "identical")]
    assert place.compare(second, "--only", "a")[0] == 0
    assert place.approve(first, "--job", "b") == 0 and place.compare(second)[0] == 0

    out = open_storage(second)
    for info in list(out.list("jobs/b/")):
        out.delete(info.key)
    code, found = place.compare(second)
    assert code == 4 and verdicts(found) == [("b", "missing"), ("a", "identical")]
    assert "--missing" in found["approve"] and place.compare(second, "--only", "a")[0] == 0
    assert place.approve(second, "--missing") == 0
    assert place.compare(second)[0] == 0


def test_compare_with_baseline_of_other_device_uses_metrics(place):
    first, third = place.bring("first"), place.bring("third")
    assert place.approve(first) == 0
    out = open_storage(third)
    for job in ("a", "b"):
        record = json.loads(out.read_bytes(f"jobs/{job}/result.json"))
        record["engine"]["device"] = "cuda"
        record["computed_by"]["device"] = "NVIDIA H200"
        out.write_bytes(f"jobs/{job}/result.json", json.dumps(record).encode())
    code, found = place.compare(third)
    assert code == 4 and verdicts(found) == [("b", "broken"), ("a", "identical")]
    job = found["jobs"][0]
    assert not job["exact"] and (job["device"], job["baseline_device"]) == ("nvidia-h200", "cpu")
    assert job["breaches"][0]["metric"] == "psnr_min"
    assert any(change.startswith("device: ") for change in found["environment"])


def test_compare_bootstrap_of_first_night_accepts_draft_baseline(place):
    first, second = place.bring("first"), place.bring("second")
    code, found = place.compare(first, "--bootstrap")
    assert code == 0 and verdicts(found) == [("a", "draft"), ("b", "draft")]
    code, found = place.compare(second)
    assert code == 0 and verdicts(found) == [("a", "identical"), ("b", "identical")]
    assert any("draft" in note for note in found["jobs"][0]["notes"])


def test_compare_with_failed_job_or_missing_output_exits_1(place):
    first, second = place.bring("first"), place.bring("second")
    assert place.approve(first) == 0
    out = open_storage(second)
    out.delete("jobs/b/output.mp4")
    record = json.loads(out.read_bytes("jobs/a/result.json")) | {
        "status": "failed",
        "output": None,
        "error": {"code": "input.no_person", "message": "no person", "stage": "prepare", "retryable": False},
    }
    out.write_bytes("jobs/a/result.json", json.dumps(record).encode())
    code, found = place.compare(second)
    assert code == 1 and verdicts(found) == [("a", "failed"), ("b", "failed")]
    assert "input.no_person" in found["jobs"][0]["error"] and "the output is missing" in found["jobs"][1]["text"]


def test_compare_with_unreadable_baseline_output_exits_2(place):
    first, third = place.bring("first"), place.bring("third")
    assert place.approve(first) == 0
    baseline = open_storage(f"{place.root}/baseline")
    for info in list(baseline.list()):
        if info.key.endswith("output.mp4") and "/b/" in info.key:
            baseline.write_bytes(info.key, b"damaged")
    code, found = place.compare(third)
    assert code == 2 and verdicts(found) == [("b", "broken"), ("a", "identical")]
    assert "cannot be read" in found["jobs"][0]["text"]

"""Bad input, through the command line and the engine: each defect has its code and a remedy, and costs nobody else.

One run holds every defect that belongs to a job, between two good jobs; what stops a whole run has a test of its own.
"""

from __future__ import annotations

import json
import os
import shutil
import struct
import subprocess
import zlib
from pathlib import Path

import numpy as np
import pytest
import yaml
from PIL import Image

from runner.cli import main
from runner.verbs.sheet import cell_box
from tests.video_files import make_clip, movie_without_samples

SMALL = {"size": "64x96", "fps": 8, "max_frames": 5, "steps": 1}

# job id → (code, words that the message must hold)
DEFECTS = {
    "missing": ("input.not_found", "nothing-here.mp4"),
    "empty": ("input.unreadable", "empty"),
    "text": ("input.unreadable", "text.mp4"),
    "truncated": ("input.unreadable", "truncated"),
    "no-frame": ("input.unreadable", "no-frame"),
    "one-frame": ("input.too_short", "2"),
    "nobody": ("input.no_person", "finds only the demo's drawn dancers"),
    "late": ("input.too_short", "start_s"),
    "huge-image": ("input.too_large", "megapixels"),
    "corrupt-image": ("input.unreadable", "corrupt.png"),
    "not-an-image": ("input.unreadable", "text.png"),
    "strip": ("input.unreadable", "strip of 16000x2"),
    "upright-strip": ("input.unreadable", "strip of 2x16000"),
    "memory": ("input.unreadable", "/proc/self/mem"),
    "reference-memory": ("input.unreadable", "/proc/self/mem"),
    "kernel-log": ("input.unreadable", "/proc/kmsg"),
    "pipe": ("input.unreadable", "pipe.mp4"),
    "device": ("input.unreadable", "/dev/zero"),
    "folder": ("input.unreadable", "is a folder"),
    "loop": ("input.unreadable", "loop.mp4"),
    "no-lora": ("weights.missing", "no LoRA 'gone'"),
    "torn-lora": ("weights.corrupt", "torn.safetensors"),
    "empty-lora": ("weights.corrupt", "empty.safetensors"),
    "no-network": ("weights.missing", "yolox_l.onnx"),
}


def png_header(width: int, height: int) -> bytes:
    """A PNG that claims to be width x height and holds one short row."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    head = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + chunk(b"IDAT", zlib.compress(b"\0" * 10)) + chunk(b"IEND", b"")


@pytest.fixture(scope="module")
def bad_run(tmp_path_factory, demo_models, demo_media):
    """(exit code, output folder) of one run over all defects of jobs."""
    folder = tmp_path_factory.mktemp("bad")
    dance, reference = demo_media / "dances/wave.mp4", demo_media / "references/anna.png"
    data = dance.read_bytes()
    (folder / "empty.mp4").write_bytes(b"")
    (folder / "text.mp4").write_text("this is no video\n" * 100)
    (folder / "truncated.mp4").write_bytes(data[: len(data) // 2])
    movie_without_samples(folder / "no-frame.mp4")
    make_clip(folder / "one-frame.mp4", 1)
    make_clip(folder / "nobody.mp4", 12)
    (folder / "huge.png").write_bytes(png_header(16000, 16000))
    (folder / "corrupt.png").write_bytes(reference.read_bytes()[:2000])
    (folder / "text.png").write_text("this is no image")
    Image.new("RGB", (16000, 2)).save(folder / "strip.png")
    Image.new("RGB", (2, 16000)).save(folder / "upright.png")
    os.mkfifo(folder / "pipe.mp4")
    (folder / "loop.mp4").symlink_to(folder / "loop.mp4")
    shutil.copytree(demo_models, folder / "models")
    (folder / "models/loras").mkdir(exist_ok=True)
    (folder / "models/loras/torn.safetensors").write_bytes(b"\xff" * 100)
    (folder / "models/loras/empty.safetensors").touch()
    good = {"reference": str(reference), "video": str(dance)}
    bad = {
        "missing": {"video": "nothing-here.mp4"},
        "empty": {"video": "empty.mp4"},
        "text": {"video": "text.mp4"},
        "truncated": {"video": "truncated.mp4"},
        "no-frame": {"video": "no-frame.mp4"},
        "one-frame": {"video": "one-frame.mp4"},
        "nobody": {"video": "nobody.mp4"},
        "late": {"options": {"start_s": 999}},
        "huge-image": {"reference": "huge.png"},
        "corrupt-image": {"reference": "corrupt.png"},
        "not-an-image": {"reference": "text.png"},
        "strip": {"reference": "strip.png"},
        "upright-strip": {"reference": "upright.png", "options": {"size": "auto"}},
        "memory": {"video": "/proc/self/mem"},
        "reference-memory": {"reference": "/proc/self/mem"},
        "kernel-log": {"video": "/proc/kmsg"},
        "pipe": {"video": "pipe.mp4"},
        "device": {"video": "/dev/zero"},
        "folder": {"video": str(folder)},
        "loop": {"video": "loop.mp4"},
        "no-lora": {"options": {"loras": [{"name": "gone"}]}},
        "torn-lora": {"options": {"loras": [{"name": "torn"}]}},
        "empty-lora": {"options": {"loras": [{"name": "empty"}]}},
        "no-network": {"options": {"preprocess": {"pose": "dwpose"}}},
    }
    jobs = [
        {"id": "first", **good},
        *({"id": i, **good, **change} for i, change in bad.items()),
        {"id": "last", **good},
    ]
    manifest = folder / "manifest.yaml"
    manifest.write_text(
        yaml.safe_dump({"version": 1, "recipe": "fp32", "defaults": {"options": SMALL}, "jobs": jobs}), encoding="utf-8"
    )
    code = main(["run", str(manifest), "--out", str(folder / "out"), *models(folder / "models", folder)])
    return code, folder


def models(store: Path, folder: Path) -> list[str]:
    return ["--models", str(store), "--cache", str(folder / "cache")]


def result(folder: Path, job: str) -> dict:
    return json.loads((folder / "out/jobs" / job / "result.json").read_text("utf-8"))


def test_run_with_bad_jobs_exits_1_and_renders_good_jobs(bad_run):
    code, folder = bad_run
    assert code == 1
    for job in ("first", "last"):
        assert result(folder, job)["status"] == "succeeded"
        assert (folder / "out/jobs" / job / "output.mp4").exists()
    assert result(folder, "first")["output"]["frames_sha256"] == result(folder, "last")["output"]["frames_sha256"]


@pytest.mark.parametrize("job", DEFECTS)
def test_job_defect_has_error_code_and_remedy(bad_run, job):
    code, words = DEFECTS[job]
    error = result(bad_run[1], job)["error"]
    assert error["code"] == code, error
    assert words in error["message"]
    assert ". " in error["message"] or "is a folder, not a file" in error["message"], "the message has no remedy"
    assert not error["retryable"]
    assert not (bad_run[1] / "out/jobs" / job / "output.mp4").exists()


@pytest.mark.parametrize("how", [[], ["--deep"]], ids=["headers", "deep"])
def test_validate_finds_job_defects_without_rendering(bad_run, capsys, how):
    manifest, store = bad_run[1] / "manifest.yaml", bad_run[1] / "models"
    assert main(["validate", *how, str(manifest), "--models", str(store)]) == 1
    text = capsys.readouterr().out
    for job, (code, words) in DEFECTS.items():
        # Only looking at the frames tells that nobody is there; only decoding, that the end of a picture is missing.
        if code != "input.no_person" and (how or job != "corrupt-image"):
            assert f"{job}  {code}" in text, text
            assert words in text, text
    assert "internal" not in text
    assert main(["validate", *how, str(manifest)]) == 1
    assert "weights." not in capsys.readouterr().out  # no store was named


def test_validate_no_inputs_checks_only_loras(bad_run, demo_media, tmp_path, capsys):
    good = {"reference": str(demo_media / "references/anna.png"), "video": str(demo_media / "dances/wave.mp4")}
    jobs = [{"id": "a", **good}, {"id": "b", **good, "options": {"loras": [{"name": "gone"}]}}]
    manifest = tmp_path / "m.yaml"
    manifest.write_text(yaml.safe_dump({"version": 1, "jobs": jobs}), encoding="utf-8")
    command = ["validate", "--no-inputs", str(manifest), "--models"]
    assert main([*command, str(bad_run[1] / "models")]) == 1
    text = capsys.readouterr().out
    assert "b  weights.missing: " in text and "a  weights" not in text
    assert "2 jobs, 1 cannot be rendered, inputs not checked" in text
    assert main([*command, str(tmp_path / "none")]) == 2


def test_run_warns_at_start_of_jobs_with_bad_loras(bad_run, capsys):
    """Each of these jobs fails in its turn, and no other job fails because of it."""
    folder = bad_run[1]
    text = yaml.safe_load((folder / "manifest.yaml").read_text("utf-8"))
    text["jobs"] = [job for job in text["jobs"] if job["id"] in ("first", "no-lora", "torn-lora", "last")]
    manifest = folder / "loras.yaml"
    manifest.write_text(yaml.safe_dump(text), encoding="utf-8")
    command = ["run", str(manifest), "--out", str(folder / "out"), "--log-format", "json", "--run-id", "loras"]
    assert main([*command, *models(folder / "models", folder)]) == 1
    events = [json.loads(line) for line in capsys.readouterr().err.splitlines()]
    warned = [(event["job"], event["code"]) for event in events if event["event"] == "job_cannot_run"]
    assert warned == [("no-lora", "weights.missing"), ("torn-lora", "weights.corrupt")]
    (summary,) = (folder / "out/runs/loras").glob("*.summary.json")
    counts = json.loads(summary.read_text("utf-8"))["counts"]
    assert counts == {"total": 4, "succeeded": 0, "skipped": 2, "failed": 2, "not_run": 0}


def test_input_outside_input_roots_is_refused(demo_media, demo_models, tmp_path, capsys):
    inside = tmp_path / "inside"
    inside.mkdir()
    for name in ("references/anna.png", "dances/wave.mp4"):
        shutil.copy(demo_media / name, inside)
    (inside / "link.mp4").symlink_to(demo_media / "dances/wave.mp4")
    good = {"reference": "inside/anna.png", "video": "inside/wave.mp4"}
    jobs = [{"id": "good", **good}, {"id": "link", **good, "video": "inside/link.mp4"}]
    jobs += [{"id": "s3", **good, "video": "s3://bucket/wave.mp4"}]
    jobs += [{"id": "elsewhere", **good, "reference": str(demo_media / "references/anna.png")}]
    manifest = tmp_path / "m.yaml"
    text = {"version": 1, "recipe": "fp32", "defaults": {"options": SMALL}, "jobs": jobs}
    manifest.write_text(yaml.safe_dump(text), encoding="utf-8")
    roots = ["--input-root", str(inside), "--input-root", str(tmp_path / "inside")]
    out = ["--out", str(tmp_path / "out"), *models(demo_models, tmp_path)]
    refused = {"link", "s3", "elsewhere"}
    assert main(["validate", str(manifest), *roots]) == 1
    printed = capsys.readouterr().out
    assert all(f"{job}  input.unreadable: " in printed for job in refused)
    assert printed.count("lies outside --input-root") == 3 and "good  " not in printed
    assert main(["plan", str(manifest), "--recipe", "fp32", *roots]) == 1
    assert capsys.readouterr().out.replace("\n", " ").count("--input-root") == 3
    assert main(["run", str(manifest), *out, *roots]) == 1
    for job in refused:
        assert result(tmp_path, job)["error"]["code"] == "input.unreadable"
        assert "lies outside --input-root" in result(tmp_path, job)["error"]["message"]
    assert result(tmp_path, "good")["status"] == "succeeded"
    assert main(["run", str(manifest), *out, "--input-root", str(tmp_path / "none")]) == 2
    text["jobs"][0]["reference"] = str(demo_media / "references/anna.png")  # `good` has an output, and moves outside
    manifest.write_text(yaml.safe_dump(text), encoding="utf-8")
    capsys.readouterr()
    sheet = tmp_path / "sheet.png"
    assert main(["run", str(manifest), *out, *roots, "--sheet", str(sheet)]) == 1
    assert f"contact sheet: {sheet}" in capsys.readouterr().out
    left, top, right, bottom = cell_box(0, 0, 0, 4)
    reference = np.asarray(Image.open(sheet))[top:bottom, left:right]
    assert (reference == reference[0, 0]).all(), "the reference of `good` lies outside, and is not shown"
    assert (tmp_path / "out/jobs/good/output.mp4").exists()
    files = ["--reference", str(inside / "anna.png"), "--video", str(inside / "link.mp4")]
    assert main(["preprocess", *files, *out, *roots]) == 1
    assert "lies outside" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("jobs", "words"),
    [
        ("- {id: a, reference: r.png, video: v.mp4, options: {sed: 1}}", "did you mean"),
        ("- {id: a, reference: r.png, video: v.mp4}\n  - {id: a, reference: r.png, video: v.mp4}", "taken"),
        ("- {id: ../x, reference: r.png, video: v.mp4}", "../x"),
        ("- {id: 007, reference: r.png, video: v.mp4}", "quote"),
        ("- {id: a, reference: r.png, video: v.mp4, options: {size: 470x832}}", "464x832"),
    ],
)
def test_run_with_invalid_manifest_exits_2_and_writes_nothing(tmp_path, demo_models, capsys, jobs, words):
    manifest = tmp_path / "m.yaml"
    manifest.write_text(f"version: 1\njobs:\n  {jobs}\n")
    assert main(["run", str(manifest), "--out", str(tmp_path / "out"), *models(demo_models, tmp_path)]) == 2
    text = capsys.readouterr().err
    assert "manifest.invalid" in text
    assert "line 3" in text or "line 4" in text
    assert words in text
    assert not (tmp_path / "out").exists()


def good_manifest(folder: Path, media: Path, **more) -> Path:
    manifest = folder / "m.yaml"
    job = {"id": "a", "reference": str(media / "references/anna.png"), "video": str(media / "dances/wave.mp4")}
    manifest.write_text(
        yaml.safe_dump({"version": 1, "recipe": "fp32", "defaults": {"options": SMALL}, "jobs": [job], **more}),
        encoding="utf-8",
    )
    return manifest


def test_matrix_with_non_ascii_file_names_is_valid(tmp_path, demo_media, capsys):
    names = ["贝拉.png", "anna with spaces.png"]
    for name in names:
        shutil.copy(demo_media / "references/anna.png", tmp_path / name)
    shutil.copy(demo_media / "dances/wave.mp4", tmp_path / "舞蹈 一.mp4")
    manifest = tmp_path / "m.yaml"
    text = {"version": 1, "matrix": {"references": names, "videos": ["舞蹈 一.mp4"]}, "defaults": {"options": SMALL}}
    manifest.write_text(yaml.safe_dump(text, allow_unicode=True), encoding="utf-8")
    assert main(["validate", str(manifest)]) == 0
    assert main(["plan", str(manifest), "--recipe", "fp32"]) == 0
    assert "2 jobs" in capsys.readouterr().out


def test_run_with_missing_weights_exits_2_before_first_job(tmp_path, demo_media, capsys):
    manifest = good_manifest(tmp_path, demo_media)
    (tmp_path / "models").mkdir()
    assert main(["run", str(manifest), "--out", str(tmp_path / "out"), *models(tmp_path / "models", tmp_path)]) == 2
    text = capsys.readouterr().err
    assert "weights.missing" in text
    assert "transformer" in text
    assert "yolov10m.onnx" in text
    assert not (tmp_path / "out/jobs").exists()


def test_run_without_models_exits_2_and_names_option(tmp_path, demo_media, capsys, monkeypatch):
    monkeypatch.delenv("VIDEO_LAB_MODELS", raising=False)
    manifest = good_manifest(tmp_path, demo_media)
    assert main(["run", str(manifest), "--out", str(tmp_path / "out"), "--cache", str(tmp_path)]) == 2
    assert "--models" in capsys.readouterr().err


@pytest.mark.parametrize("harm", ["truncated", "garbage"])
def test_run_with_corrupt_weights_exits_2_before_first_job(tmp_path, demo_models, demo_media, capsys, harm):
    store = tmp_path / "models"
    shutil.copytree(demo_models, store)
    victim = next(store.rglob("transformer/*.safetensors"))
    data = victim.read_bytes()
    victim.write_bytes(data[: len(data) // 2] if harm == "truncated" else b"\xff" * 64)
    assert (
        main(["run", str(good_manifest(tmp_path, demo_media)), "--out", str(tmp_path / "o"), *models(store, tmp_path)])
        == 2
    )
    text = capsys.readouterr().err
    assert "weights.corrupt" in text
    assert victim.name in text
    assert not (tmp_path / "o/jobs").exists()


def test_run_with_unknown_recipe_or_memory_mode_exits_2(tmp_path, demo_models, demo_media, capsys):
    out = ["--out", str(tmp_path / "o"), *models(demo_models, tmp_path)]
    assert main(["run", str(good_manifest(tmp_path, demo_media)), *out, "--recipe", "bf17"]) == 2
    assert "bf16" in capsys.readouterr().err
    assert main(["run", str(good_manifest(tmp_path, demo_media, memory="strem")), *out]) == 2
    assert "did you mean stream" in capsys.readouterr().err
    assert main(["run", str(good_manifest(tmp_path, demo_media)), *out, "--memory", "least"]) == 2
    assert "--memory" in capsys.readouterr().err


@pytest.fixture
def small_disk(tmp_path):
    """A disk of one megabyte; root only."""
    if os.geteuid() != 0:
        pytest.skip("mounting a small disk needs root")
    disk = tmp_path / "disk"
    disk.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", str(disk)], capture_output=True, check=False
    )
    if mounted.returncode:
        pytest.skip(f"cannot mount a tmpfs here: {mounted.stderr.decode().strip()}")
    yield disk
    subprocess.run(["umount", str(disk)], check=True)


def test_run_with_full_output_disk_exits_3_and_keeps_done_jobs(small_disk, tmp_path, demo_models, demo_media, capsys):
    manifest = good_manifest(tmp_path, demo_media)
    command = ["run", str(manifest), "--out", str(small_disk / "out"), *models(demo_models, tmp_path)]
    assert main(command) == 0
    before = (small_disk / "out/jobs/a/output.mp4").read_bytes()
    filler = os.open(small_disk / "filler", os.O_CREAT | os.O_WRONLY)
    left = os.statvfs(small_disk)
    os.write(filler, b"x" * (left.f_bavail * left.f_frsize))
    os.close(filler)
    text = yaml.safe_load(manifest.read_text())
    text["jobs"].append(text["jobs"][0] | {"id": "b"})
    manifest.write_text(yaml.safe_dump(text))
    capsys.readouterr()
    assert main(command) == 3
    assert "storage.full" in capsys.readouterr().err
    assert (small_disk / "out/jobs/a/output.mp4").read_bytes() == before
    (small_disk / "filler").unlink()
    assert main(command) == 0
    summaries = sorted((small_disk / "out/runs").rglob("*.summary.json"), key=lambda path: path.stat().st_mtime)
    assert (
        json.loads(summaries[-1].read_text())["counts"] | {"skipped": 1, "succeeded": 1}
        == json.loads(summaries[-1].read_text())["counts"]
    )

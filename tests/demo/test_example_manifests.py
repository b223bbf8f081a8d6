"""The example manifests: they parse, they name files that the demo builds, and they show what they claim to show."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from runner.demo.build import CLIPS, DANCER_PORTRAITS, PORTRAITS
from runner.spec.manifest import Manifest, load_manifest
from runner.spec.regression_limits import RegressionLimits

FOLDER = Path(__file__).resolve().parents[2] / "manifests"
NAMES = ["demo.yaml", "batch.jsonl", "nightly.yaml"]


def load(name: str) -> Manifest:
    return load_manifest(str(FOLDER / name))


def built_files() -> set[Path]:
    media = FOLDER.parent / ".cache" / "demo-media"
    return (
        {media / "references" / f"{p.name}.png" for p in (*PORTRAITS, *DANCER_PORTRAITS)}
        | {media / "dances" / f"{c.name}.mp4" for c in CLIPS}
        | {media / "masks" / f"{c.name}.mp4" for c in CLIPS if c.mask}
    )


@pytest.mark.parametrize("name", NAMES)
def test_inputs_are_files_that_the_demo_builds(name: str) -> None:
    jobs = load(name).jobs
    assert jobs
    named = {Path(p).resolve() for job in jobs for p in (job.reference, job.video, job.mask) if p}
    assert named <= built_files()
    assert all(job.options.mode == "replace" for job in jobs if job.mask)


@pytest.mark.parametrize("name", NAMES)
def test_jobs_are_small_and_their_frames_exist(name: str) -> None:
    clips = {clip.name: clip for clip in CLIPS}
    for job in load(name).jobs:
        width, height = job.options.size_pixels or (0, 0)
        assert 0 < width * height <= 96 * 144
        assert job.options.steps is not None
        assert job.options.steps <= 4
        clip = clips[Path(job.video).stem]
        left_s = clip.seconds - job.options.start_s
        assert job.options.max_frames is not None
        assert job.options.max_frames <= int(left_s * float(job.options.fps))
        assert (width > height) == (clip.width > clip.height)


def test_demo_covers_what_it_promises() -> None:
    manifest = load("demo.yaml")
    animate = [job for job in manifest.jobs if job.options.mode == "animate"]
    crossed = {(Path(job.reference).stem, Path(job.video).stem) for job in animate}
    assert {(r, v) for r in ("mira", "otto") for v in ("wave", "twist")} <= crossed
    assert len({job.prompt for job in manifest.jobs}) == 1
    assert any(job.options.keep_audio for job in manifest.jobs)
    assert any(job.options.mode == "replace" for job in manifest.jobs)
    (long,) = [job for job in manifest.jobs if job.options.max_frames > job.options.max_segment_frames]
    assert Path(long.video).stem in {clip.name for clip in CLIPS if clip.audio}


def test_nightly_writes_down_what_could_drift() -> None:
    manifest = load("nightly.yaml")
    assert manifest.recipe
    assert all("seed" in job.options.model_fields_set for job in manifest.jobs)
    assert any((job.options.preprocess.detect_every or 1) > 1 for job in manifest.jobs)
    assert any(job.options.guidance_scale > 1 for job in manifest.jobs)
    assert any(job.options.overlap_frames == 5 for job in manifest.jobs)


def test_nightly_says_how_far_a_render_may_be() -> None:
    text = (FOLDER.parent / "bench" / "results.md").read_text(encoding="utf-8")
    found = re.search(r"Limit of `manifests/nightly\.yaml`: `psnr_min: ([0-9.]+)`", text)
    assert found
    limits = RegressionLimits(same_frames=True, psnr_min=float(found[1]), seconds_max="1.2x", memory_max="1.1x")
    assert {job.regression for job in load("nightly.yaml").jobs} == {limits}


def test_batch_uses_what_json_lines_offer() -> None:
    jobs = {job.id: job for job in load("batch.jsonl").jobs}
    assert list(jobs) == ["order-1041", "order-1042", "order-1043-preview"]
    assert jobs["order-1042"].options.seed == 7
    assert jobs["order-1043-preview"].options.output.format == "png"
    assert jobs["order-1043-preview"].options.steps == 2  # from the defaults
    assert jobs["order-1041"].prompt == "a person is dancing"

"""The `preprocess` verb writes the official script's files; `preprocess.from` renders from them, on disk and on S3."""

from __future__ import annotations

import json
import shutil
import wave
from fractions import Fraction
from pathlib import Path

import pytest
import yaml

from runner.cli import main
from runner.storage import open_storage
from runner.video import AudioSpan, join_parts
from tests.video_files import make_clip, tone

PNG = {"output": {"format": "png"}, "keep_audio": True}
OPTIONS = {"fps": 8, "size": "96x64", "mode": "replace", "max_frames": 9}


@pytest.fixture(scope="module")
def made(tmp_path_factory, demo_models, demo_media) -> Path:
    """A folder with `pre/`, the files of one dance in replace mode, its mask made by the segmenter."""
    folder = tmp_path_factory.mktemp("official")
    command = ["preprocess", "--reference", str(demo_media / "references/anna.png"), "--out", str(folder / "pre")]
    command += ["--video", str(demo_media / "dances/step.mp4"), "--options", json.dumps(OPTIONS)]
    assert main([*command, "--models", str(demo_models), "--cache", str(folder / "cache")]) == 0
    return folder


def run(folder: Path, models: Path, jobs: list[dict], out: str, where: str | None = None) -> int:
    manifest = folder / "m.yaml"
    text = {"version": 1, "recipe": "fp32", "defaults": {"options": {"steps": 1}}, "jobs": jobs}
    manifest.write_text(yaml.safe_dump(text))
    command = ["run", str(manifest), "--out", str(folder / out), "--models", str(models)]
    return main([*command, "--cache", str(folder / "cache")])


def result(folder: Path, out: str, job: str) -> dict:
    return json.loads((folder / out / "jobs" / job / "result.json").read_text())


def test_the_files_have_the_official_names(made):
    names = {path.name for path in (made / "pre").iterdir()}
    assert names == {"src_ref.png", "src_pose.mp4", "src_face.mp4", "src_bg.mp4", "src_mask.mp4"}


def test_jobs_render_from_the_files_and_a_changed_file_reruns_them(made, demo_models, capsys):
    jobs = [
        {"id": "animate", "options": {"preprocess": {"from": "pre"}}},
        {"id": "replace", "options": {"mode": "replace", "preprocess": {"from": "pre/"}}},
        *(
            {"id": folder, "options": {"preprocess": {"from": folder}, **PNG, "max_frames": 5, "start_s": 0.25}}
            for folder in ("pre", "heard")
        ),
        {"id": "gone", "options": {"preprocess": {"from": "nowhere"}}},
    ]
    shutil.copytree(made / "pre", made / "heard")
    sound = AudioSpan(make_clip(made / "tone.mp4", 2, audio=tone(2.0)), 0.0, 2.0)
    join_parts([made / "pre/src_pose.mp4"], made / "heard/src_pose.mp4", fps=Fraction(8), audio=sound)
    assert run(made, demo_models, jobs, "out") == 1
    for job in ("animate", "replace"):
        record = result(made, "out", job)
        assert record["status"] == "succeeded"
        assert (record["output"]["frames"], record["output"]["fps"]) == (9, "8")
        assert (record["output"]["width"], record["output"]["height"]) == (96, 64)
    assert set(result(made, "out", "replace")["inputs"]) == {"reference", "pose", "face", "background", "mask"}
    assert result(made, "out", "gone")["error"]["code"] == "input.not_found"
    silent, heard = result(made, "out", "pre"), result(made, "out", "heard")
    assert "the source has no sound" in silent["warnings"]
    assert (silent["output"]["files"], heard["output"]["files"]) == (5, 6)
    assert any("audio.wav" in note for note in heard["notes"])
    with wave.open(str(made / "out" / heard["output"]["key"] / "audio.wav")) as file:
        assert (file.getnframes(), file.getframerate()) == (round(5 / 8 * 44100), 44100)
    # another face video under the same name is another input
    (made / "pre/src_face.mp4").write_bytes((made / "pre/src_face.mp4").read_bytes() + b"\0" * 8)
    capsys.readouterr()
    run(made, demo_models, jobs[:1], "out")
    assert "input.face" in capsys.readouterr().err


def test_the_folder_may_lie_on_s3(made, demo_models, moto_s3, aws_env):
    aws_env(moto_s3)
    place = f"s3://{moto_s3.make_bucket()}/made"
    storage = open_storage(place)
    for path in (made / "pre").iterdir():
        storage.publish(path, path.name)
    jobs = [{"id": "far", "options": {"mode": "replace", "preprocess": {"from": place}}}]
    assert run(made, demo_models, jobs, "out-s3") == 0
    assert result(made, "out-s3", "far")["inputs"]["mask"]["identity"].startswith("etag:")


def test_a_replace_job_that_has_no_mask_and_no_segmenter_fails_alone_and_is_told_at_the_start(
    made, demo_models, demo_media, tmp_path, capsys
):
    import shutil

    store = tmp_path / "models"
    shutil.copytree(demo_models, store, ignore=shutil.ignore_patterns("sam2", ".building"))
    job = {
        "id": "a",
        "reference": str(demo_media / "references/anna.png"),
        "video": str(demo_media / "dances/step.mp4"),
        "options": OPTIONS,
    }
    assert run(made, store, [job], "out-none") == 1
    text = capsys.readouterr().err
    assert text.index("job_cannot_run") < text.index("job_failed")
    assert "weights.missing" in text
    assert "sam2/config.json" in text
    assert "mask:" in text
    assert {path.name for path in (made / "out-none/jobs/a").iterdir()} == {"result.json"}

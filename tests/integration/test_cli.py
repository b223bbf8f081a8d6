"""The command line over the demo: what a user types, and what is there afterwards."""

from __future__ import annotations

import json
import re
import shutil
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import pytest
import yaml
from PIL import Image

from runner.cli import main
from runner.records.people import People
from runner.verbs.sheet import cell_box, sheet_size
from runner.video import VideoReader

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def small_run(tmp_path_factory, demo_models, demo_media):
    """A manifest of four short jobs, rendered: (folder, manifest, command)."""
    folder = tmp_path_factory.mktemp("cli")
    refs, dances = demo_media / "references", demo_media / "dances"
    manifest = folder / "m.yaml"
    text = {
        "version": 1,
        "recipe": "fp32",
        "memory": "auto",
        "defaults": {"prompt": "a person is dancing", "options": {"size": "64x96", "fps": 8, "steps": 1}},
        "jobs": [
            {"id": "one", **pair(refs, "anna", dances, "wave"), "options": {"max_frames": 9}},
            {"id": "again", **pair(refs, "anna", dances, "wave"), "options": {"max_frames": 9}},
            {
                "id": "sound",
                **pair(refs, "bela", dances, "jacks"),
                "options": {"fps": 12, "max_frames": 19, "max_segment_frames": 9, "keep_audio": True, "start_s": 0.5},
            },
            {
                "id": "still",
                **pair(refs, "bela", dances, "jacks"),
                "options": {"max_frames": 5, "keep_audio": True, "output": {"format": "png"}},
            },
        ],
    }
    manifest.write_text(yaml.safe_dump(text), encoding="utf-8")
    command = ["run", str(manifest), "--out", str(folder / "out"), "--models", str(demo_models), "--cache"]
    command += [str(folder / "cache"), "--sheet", str(folder / "sheet.png"), "--run-id", "r1"]
    assert main(command) == 0
    (folder / "sheet.png").rename(folder / "first-sheet.png")  # later runs draw their own
    return folder, manifest, command


def pair(refs: Path, reference: str, dances: Path, dance: str) -> dict[str, str]:
    return {"reference": str(refs / f"{reference}.png"), "video": str(dances / f"{dance}.mp4")}


def result(folder: Path, job: str) -> dict:
    return json.loads((folder / "out/jobs" / job / "result.json").read_text("utf-8"))


def test_every_mp4_has_exactly_the_frames_and_rate_asked(small_run):
    folder, _, _ = small_run
    for job, frames, fps in (("one", 9, 8), ("sound", 19, 12)):
        with av.open(str(folder / "out/jobs" / job / "output.mp4")) as movie:
            stream = movie.streams.video[0]
            assert (stream.codec_context.width, stream.codec_context.height) == (64, 96)
            assert stream.average_rate == fps
            assert sum(1 for _ in movie.decode(video=0)) == frames
            assert bool(movie.streams.audio) == (job == "sound")
        assert result(folder, job)["output"]["frames"] == frames


def test_pngs_are_the_raw_frames(small_run):
    folder, _, _ = small_run
    frames = sorted((folder / "out/jobs/still/frames").glob("*/*.png"))
    assert len(frames) == 5
    assert np.asarray(Image.open(frames[0])).shape == (96, 64, 3)
    assert (frames[0].parent / "audio.wav").exists()
    assert (result(folder, "still")["output"]["files"], result(folder, "still")["output"]["frames"]) == (6, 5)


def test_people_json_holds_the_skeleton_of_every_frame(small_run):
    folder, _, _ = small_run
    for job, frames in (("one", 9), ("sound", 19), ("still", 5)):
        where = People.parse((folder / "out/jobs" / job / "people.json").read_bytes())
        assert (where.width, where.height, where.frames) == (64, 96, frames)
        with VideoReader(folder / "out/jobs" / job / "pose.mp4") as reader:
            drawn = reader.read(np.arange(frames)).max(-1) > 100  # encoding blurs the drawing's edge
        assert Fraction(where.fps) == reader.info.fps
        for i in range(frames):
            x1, y1, x2, y2 = where.person(i)
            rows, columns = np.nonzero(drawn[i])
            assert x1 - 2 <= columns.min() and columns.max() <= x2 + 1
            assert y1 - 2 <= rows.min() and rows.max() <= y2 + 1
            assert (x2 - x1) * (y2 - y1) < 4 * (np.ptp(rows) + 1) * (np.ptp(columns) + 1)


def test_equal_jobs_give_equal_frames_and_share_the_encoders(small_run):
    folder, _, _ = small_run
    one, again = result(folder, "one"), result(folder, "again")
    assert one["output"]["frames_sha256"] == again["output"]["frames_sha256"]
    assert one["caches"]["prompt_cache_misses"] == 1
    assert again["caches"]["prompt_cache_hits"] == again["caches"]["clip_cache_hits"] == 1


def test_the_record_tells_what_was_denoised(small_run):
    folder, _, _ = small_run
    efficiency = result(folder, "sound")["efficiency"]
    # one window of 9 and two more that start from its last frame: 9 + 8 + 8 = 25, the least that holds 19 in 4k+1
    assert (efficiency["segments"], efficiency["segment_frames"]) == (3, 9)
    assert efficiency["frames_denoised"] == 27
    assert efficiency["tflop"] > 0
    assert len(result(folder, "sound")["steps_s"]) == 3


def test_the_preview_follows_the_driver(small_run):
    folder, _, _ = small_run
    with VideoReader(folder / "out/jobs/one/pose.mp4") as pose:
        frames = pose.read(np.arange(pose.info.frames))
    assert len(frames) == 9
    assert all(frame.max() > 100 for frame in frames), "a frame without a skeleton"


def test_a_rerun_skips_all_and_a_changed_seed_reruns_one(small_run, capsys):
    folder, manifest, command = small_run
    assert main([*command[:-1], "r2"]) == 0
    summary = json.loads((folder / "out/runs/r2/00000-of-00001.summary.json").read_text())
    assert summary["counts"]["skipped"] == 4
    text = yaml.safe_load(manifest.read_text("utf-8"))
    text["jobs"][0]["options"]["seed"] = 7
    changed = manifest.with_name("changed.yaml")
    changed.write_text(yaml.safe_dump(text), encoding="utf-8")
    capsys.readouterr()
    assert main([command[0], str(changed), *command[2:-1], "r3"]) == 0
    assert "options.seed: 42 → 7" in capsys.readouterr().err
    summary = json.loads((folder / "out/runs/r3/00000-of-00001.summary.json").read_text())
    assert summary["counts"] == {"total": 4, "succeeded": 1, "skipped": 3, "failed": 0, "not_run": 0}


def test_shards_partition_the_jobs(small_run, capsys):
    _, _, command = small_run
    seen = []
    for index in range(3):
        capsys.readouterr()
        assert main([*command[:-1], f"s{index}", "--shard", f"{index}/3"]) == 0
        seen.append(json.loads((Path(command[3]) / f"runs/s{index}/0000{index}-of-00003.summary.json").read_text()))
    ids = [line["id"] for summary in seen for line in summary["jobs"]]
    assert sorted(ids) == ["again", "one", "sound", "still"]


def test_status_lists_what_is_there(small_run, capsys):
    folder, manifest, _ = small_run
    capsys.readouterr()
    assert main(["status", str(folder / "out")]) == 0
    assert "4 of 4 done · 0 failed" in capsys.readouterr().out
    assert main(["status", "--json", str(folder / "out")]) == 0
    found = json.loads(capsys.readouterr().out)
    assert [row["id"] for row in found["jobs"]] == [job["id"] for job in yaml.safe_load(manifest.read_text())["jobs"]]
    assert found["counts"]["succeeded"] == 4


def test_plan_says_what_run_will_do(small_run, demo_models, capsys):
    folder, manifest, _ = small_run
    capsys.readouterr()
    assert main(["plan", str(manifest), "--models", str(demo_models)]) == 0
    head, *lines = [re.split(r"\s{2,}", line.strip()) for line in capsys.readouterr().out.splitlines()]
    rows = {line[0]: dict(zip(head, line, strict=False)) for line in lines}
    for job in ("one", "again", "sound", "still"):
        efficiency, row = result(folder, job)["efficiency"], rows[job]
        assert row["frames"] == str(efficiency["frames_requested"])
        assert row["denoised"] == str(efficiency["frames_denoised"])
        assert float(row["PFLOP"]) * 1e3 == pytest.approx(efficiency["tflop"], rel=1e-3)
        assert efficiency["generation_s"] > 0


def test_the_contact_sheet_shows_every_job(small_run):
    """Of `still`, the last one, the PNG frames."""
    folder, _, _ = small_run
    sheet = Image.open(folder / "first-sheet.png")
    assert sheet.size == sheet_size(4, 4)
    left, top, right, bottom = cell_box(3, 3, 0, 4)
    shown = np.asarray(sheet)[top:bottom, left:right].astype(int)
    frame = np.asarray(Image.open(min((folder / "out/jobs/still/frames").glob("*/*.png"))), int)
    assert shown[10:-10, 20:-20].mean((0, 1)) == pytest.approx(frame[6:-6, 10:-10].mean((0, 1)), abs=12)


def test_a_sheet_that_cannot_be_drawn_takes_nothing_from_the_run(small_run, tmp_path, capsys):
    """The jobs are done, and the table says so, whatever is missing for the picture."""
    folder, _, command = small_run
    shutil.copytree(folder / "out/jobs", tmp_path / "out/jobs")
    (tmp_path / "out/jobs/one/pose.mp4").unlink()
    again = [*command[:3], str(tmp_path / "out"), *command[4:-3]]
    assert main([*again, str(tmp_path / "sheet.png")]) == 0
    assert "sheet.png, without one" in capsys.readouterr().out
    assert (tmp_path / "sheet.png").exists()
    assert main([*again, str(tmp_path / "sheet.png" / "x.png")]) == 0
    text = capsys.readouterr().out
    assert "4 skipped" in text
    assert "not drawn" in text


def test_a_run_id_that_is_no_folder_starts_nothing(small_run, tmp_path, capsys):
    _, _, command = small_run
    assert main([*command[:3], str(tmp_path / "out"), *command[4:-1], "../x"]) == 2
    assert "--run-id" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_doctor_reports_on_this_machine(demo_models, tmp_path, capsys):
    code = main(["doctor", "--models", str(demo_models), "--out", str(tmp_path), "--device", "cpu", "--recipe", "fp32"])
    text = capsys.readouterr().out
    assert code == 0, text
    assert "weights" in text


@pytest.mark.parametrize("name", ["nightly.yaml", "batch.jsonl"])
def test_the_example_manifests_render(name, demo_models, demo_media, tmp_path):
    """As they stand; the demo runs as a whole where the image is tested."""
    command = ["run", str(ROOT / "manifests" / name), "--out", str(tmp_path / "out"), "--models", str(demo_models)]
    assert main([*command, "--cache", str(tmp_path / "cache")]) == 0
    records = [json.loads(path.read_text("utf-8")) for path in (tmp_path / "out/jobs").glob("*/result.json")]
    assert len(records) >= 3
    assert all(record["status"] == "succeeded" for record in records)

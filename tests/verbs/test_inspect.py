"""The verb `inspect` from the command line: drawn people, people on film, and what cannot be looked at."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import cv2
import jsonschema
import numpy as np
import pytest
from PIL import Image

from runner.cli import main
from runner.records.inspection import inspection_schemas
from runner.verbs.inspect import inspect
from runner.verbs.settings import InspectSettings
from runner.video import VideoReader
from tests.video_files import make_clip

CODED = {"crf": "16", "preset": "veryfast"}


def frames_of(path: Path, count: int, first: int = 0) -> list[np.ndarray]:
    with VideoReader(path) as reader:
        return list(reader.read(np.arange(first, first + count)))


def film(path: Path, frames: list[np.ndarray], fps: int) -> Path:
    height, width = frames[0].shape[:2]
    return make_clip(path, len(frames), fps, size=(width, height), options=CODED, pixels=frames)


def beside(left: np.ndarray, right: np.ndarray) -> np.ndarray:
    """Two pictures on one ground; the right one is lower, its corner's colour is above it."""
    column = np.empty((left.shape[0], right.shape[1], 3), np.uint8)
    column[:] = right[2, 2]
    column[left.shape[0] - right.shape[0] :] = right
    return np.ascontiguousarray(np.concatenate([left, column], 1))


@pytest.fixture(scope="module")
def two_puppets(demo_media, tmp_path_factory) -> Path:
    """A second and a half of two puppets, the right one smaller; a cut; a second of one puppet elsewhere."""
    dances = demo_media / "dances"
    left, right = frames_of(dances / "jacks.mp4", 36), frames_of(dances / "wave.mp4", 36, 20)
    two = [beside(a, cv2.resize(b, (240, 360), interpolation=cv2.INTER_AREA)) for a, b in zip(left, right, strict=True)]
    one = []
    for frame in frames_of(dances / "step.mp4", 24):
        small = cv2.resize(frame, (560, 374), interpolation=cv2.INTER_AREA)
        one.append(cv2.copyMakeBorder(small, 53, 53, 0, 0, cv2.BORDER_REPLICATE))
    return film(tmp_path_factory.mktemp("puppets") / "two.mp4", two + one, 24)


def inspected(capsys, *words: str) -> dict:
    """What --json prints, checked against the schema."""
    assert main(["inspect", *words, "--json"]) == 0
    (line,) = capsys.readouterr().out.splitlines()
    data = json.loads(line)
    jsonschema.validate(data, inspection_schemas()["inspection.v1.schema.json"])
    return data


def test_inspect_of_two_puppets_finds_people_and_cut(two_puppets, demo_models, tmp_path, capsys):
    sheet = tmp_path / "new" / "sheet.png"
    words = [str(two_puppets), "--models", str(demo_models), "--cache", str(tmp_path / "cache")]
    found = inspected(capsys, *words, "--sheet", str(sheet))
    assert found["people_looked_for"] and [person["number"] for person in found["people"]] == [1, 2]
    first, second = found["people"]
    for look in first["looks"][:10]:
        assert look["box"][2] < 340  # on the left
    for look in second["looks"]:
        assert look["box"][0] > 300
    assert first["face_px"] > second["face_px"] > 20
    assert second["end_s"] < 1.5 and second["seconds"] == pytest.approx(1.5, abs=0.11)
    assert (first["hands_inside"], first["feet_inside"]) == (1, 1)
    assert [cut["frame"] for cut in found["video"]["cuts"]] == [36]
    codes = {(advice["code"], advice["person"]) for advice in found["advice"]}
    assert {("people.several", None), ("video.cuts", None), ("person.partly", 2)} <= codes
    with Image.open(sheet) as image:
        image.load()
        assert image.width == 1240 and 300 < image.height < 1400
    # The second time nothing is looked for anew, and what is found is equal.
    assert inspected(capsys, *words) | {"sheet": str(sheet)} == found


def test_inspect_without_models_measures_video(two_puppets, tmp_path, capsys, monkeypatch):
    monkeypatch.delenv("VIDEO_LAB_MODELS", raising=False)
    sheet = tmp_path / "sheet.png"
    found = inspected(capsys, str(two_puppets), "--cache", str(tmp_path), "--sheet", str(sheet))
    assert not found["people_looked_for"] and found["people"] == []
    assert [advice["code"] for advice in found["advice"]] == ["people.unknown", "video.cuts"]
    assert Image.open(sheet).width == 1240
    assert main(["inspect", str(two_puppets), "--cache", str(tmp_path)]) == 0
    printed = capsys.readouterr().out
    assert "560x480 · 60 frames in 2.50 s · 24 fps · 1 cut" in printed
    assert "! people were not looked for: give --models" in printed


def test_inspect_of_two_men_numbers_larger_first(real_data, tmp_path):
    """A man stands beside his mirrored picture of another time: both are numbered, the larger one first."""
    store = tmp_path / "models" / "process_checkpoint"
    for folder, name, source in (
        ("det", "yolov10m.onnx", "person_detector.onnx"),
        ("pose2d", "vitpose_h_wholebody.onnx", "wholebody_pose_full.onnx"),
    ):
        (store / folder).mkdir(parents=True)
        shutil.copy(real_data / source, store / folder / name)
    man = frames_of(real_data / "man_480x480_30fps_110f.mp4", 60)
    pairs = []
    for i in range(0, 30, 3):
        other = cv2.resize(man[i + 30][:, ::-1][:, 60:420], None, fx=0.75, fy=0.75, interpolation=cv2.INTER_AREA)
        pairs.append(beside(man[i][:, 60:400], other))
    settings = InspectSettings(
        video=str(film(tmp_path / "men.mp4", pairs, 10)),
        models=str(tmp_path / "models"),
        cache=tmp_path / "cache",
        sheet=tmp_path / "sheet.png",
        device="cpu",
    )
    found = inspect(settings)
    assert [person.number for person in found.people] == [1, 2]
    first, second = found.people
    assert all(look.box[2] < 380 for look in first.looks) and all(look.box[0] > 320 for look in second.looks)
    assert min(len(first.looks), len(second.looks)) >= 8  # of 10
    assert first.face_px is not None and second.face_px is not None
    assert 25 < first.face_px < 45  # the man's face is 33 pixels in the clip
    assert second.face_px == pytest.approx(0.75 * first.face_px, rel=0.25)
    assert (first.hands_inside, second.hands_inside, first.feet_inside, second.feet_inside) == (1, 1, 1, 1)
    assert {"people.several", "face.small"} <= {advice.code for advice in found.advice}
    assert not found.video.cuts


@pytest.mark.parametrize(
    ("words", "code", "said"),
    [
        (["gone.mp4"], 1, "input.not_found"),
        (["text.mp4"], 1, "input.unreadable"),
        (["text.mp4", "--input-root", "elsewhere"], 1, "lies outside --input-root"),
        (["short.mp4", "--models", "empty"], 2, "weights.missing"),
        (["short.mp4", "--input-root", "nowhere"], 2, "config.invalid"),
    ],
)
def test_inspect_of_unusable_input_exits_with_code_of_error(tmp_path, monkeypatch, capsys, words, code, said):
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("VIDEO_LAB_MODELS", raising=False)
    (tmp_path / "text.mp4").write_text("no video")
    for folder in ("empty", "elsewhere"):
        (tmp_path / folder).mkdir()
    make_clip(tmp_path / "short.mp4", 6, 25)
    assert main(["inspect", *words, "--cache", str(tmp_path / "cache")]) == code
    assert said in capsys.readouterr().err


def test_inspect_of_s3_video_fetches_file_and_missing_one_is_not_found(moto_s3, aws_env, tmp_path, capsys):
    bucket = aws_env(moto_s3).make_bucket()
    make_clip(tmp_path / "v.mp4", 6, 25)
    moto_s3.client.upload_file(str(tmp_path / "v.mp4"), bucket, "in/v.mp4")
    cache = tmp_path / "cache"
    settings = InspectSettings(video=f"s3://{bucket}/in/v.mp4", models=None, cache=cache)
    assert inspect(settings).video.frames == 6
    assert list(cache.iterdir()) == []
    assert main(["inspect", f"s3://{bucket}/in/gone.mp4", "--cache", str(cache)]) == 1
    assert "input.not_found" in capsys.readouterr().err

"""Validate: every file that a job names is looked at once, and what is wrong with it is every job's that uses it."""

from __future__ import annotations

import json
from collections import Counter
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from runner.errors import ManifestInvalid
from runner.spec.manifest import Job
from runner.spec.options import JobOptions
from runner.verbs import validate
from runner.verbs.settings import ValidateSettings
from runner.verbs.tables import print_problems
from runner.verbs.validate import check_inputs
from runner.video.writer import Mp4Writer


@pytest.fixture(scope="module")
def media(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("media")
    Image.new("RGB", (64, 48), "red").save(folder / "a.png")
    with Mp4Writer(folder / "v.mp4", 64, 48, Fraction(10)) as writer:
        writer.write(np.random.default_rng(0).integers(0, 255, (20, 48, 64, 3), np.uint8))
    whole = (folder / "v.mp4").read_bytes()
    (folder / "cut.mp4").write_bytes(whole[: len(whole) // 2])
    (folder / "empty.png").touch()
    (folder / "text.mp4").write_text("not a video\n" * 50)
    Image.fromarray(np.random.default_rng(0).integers(0, 255, (64, 64, 3), np.uint8)).save(folder / "torn.png")
    png = (folder / "torn.png").read_bytes()
    (folder / "torn.png").write_bytes(png[: len(png) // 2])
    Image.new("1", (16_384, 16_384)).save(folder / "huge.png")
    (folder / "folder").mkdir()
    Image.new("L", (64, 48), 255).save(folder / "white.png")
    Image.new("L", (64, 48), 0).save(folder / "black.png")
    Image.new("L", (48, 64), 255).save(folder / "upright.png")
    moving(folder / "half.mp4", frames=10)
    official(folder / "official")
    return folder


def moving(path: Path, frames: int = 20, size: tuple[int, int] = (64, 48), value: int = 255) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with Mp4Writer(path, *size, Fraction(10)) as writer:
        writer.write(np.full((frames, size[1], size[0], 3), value, np.uint8))


def official(folder: Path, **files: dict) -> Path:
    """A folder of official files; `face={"frames": 19}` makes one file otherwise, `face=None` leaves it out."""
    folder.mkdir()
    Image.new("RGB", (64, 48), "red").save(folder / "src_ref.png")
    for name in ("pose", "face", "bg", "mask"):
        if (how := files.get(name, {})) is not None:
            moving(folder / f"src_{name}.mp4", **({"size": (32, 32)} if name == "face" else {}) | how)
    return folder


def job(
    media: Path | str, name: str, reference: str = "a.png", video: str = "v.mp4", mask: str | None = None, **options
):
    place = lambda file: file if "://" in file else f"{media}/{file}"  # noqa: E731
    return Job(name, place(reference), place(video), place(mask) if mask else None, "", JobOptions(**options), None)


def official_job(folder: Path | str, name: str = "job", **options) -> Job:
    place = str(folder)
    return Job(name, f"{place}/src_ref.png", f"{place}/src_pose.mp4", None, "", JobOptions(**options), None, place)


def codes(jobs: list[Job], **how: bool) -> list[tuple[str, str]]:
    return [(name, error.code) for name, error in check_inputs(jobs, **how)]


def test_check_inputs_of_good_inputs_finds_no_problems(media):
    jobs = [
        job(media, "plain"),
        job(media, "still-mask", mask="white.png", mode="replace"),
        job(media, "moving-mask", mask="v.mp4", mode="replace"),
        official_job(media / "official", "official"),
        official_job(media / "official", "official-replace", mode="replace"),
    ]
    assert codes(jobs) == codes(jobs, deep=True) == []
    assert check_inputs([]) == []


@pytest.mark.parametrize(
    ("names", "expected"),
    [
        ({"reference": "none.png"}, "input.not_found"),
        ({"reference": "empty.png"}, "input.unreadable"),
        ({"reference": "v.mp4"}, "input.unreadable"),
        ({"reference": "folder"}, "input.unreadable"),
        ({"reference": "huge.png"}, "input.too_large"),
        ({"video": "none.mp4"}, "input.not_found"),
        ({"video": "text.mp4"}, "input.unreadable"),
        ({"video": "cut.mp4"}, "input.unreadable"),
        ({"video": "a.png"}, "input.too_short"),
        ({"mask": "text.mp4", "mode": "replace"}, "input.unreadable"),
        ({"mask": "upright.png", "mode": "replace"}, "input.unreadable"),
        ({"mask": "half.mp4", "mode": "replace"}, "input.too_short"),
        ({"start_s": 5.0}, "input.too_short"),
        ({"video": "gs://b/v.mp4"}, "input.not_found"),
    ],
)
def test_check_inputs_of_defect_gives_code_and_remedy(media, names, expected):
    ((name, error),) = check_inputs([job(media, "bad", **names), job(media, "good")])
    assert (name, error.code) == ("bad", expected)
    assert error.todo or "is a folder, not a file" in error.what
    assert error.where


def test_check_inputs_decodes_pixels_only_with_deep(media):
    jobs = [job(media, "torn", reference="torn.png")]
    assert codes(jobs) == []
    assert codes(jobs, deep=True) == [("torn", "input.unreadable")]


def test_check_inputs_examines_masks_only_with_deep(media):
    jobs = [job(media, "black", mask="black.png", mode="replace"), job(media, "ok", mask="white.png", mode="replace")]
    assert codes(jobs) == []
    ((name, error),) = check_inputs(jobs, deep=True)
    assert (name, error.code) == ("black", "input.unreadable")
    assert "empty (black)" in error.what


@pytest.mark.parametrize(
    ("files", "mode", "code", "words"),
    [
        ({"face": None}, "animate", "input.not_found", "src_face.mp4"),
        ({"bg": None, "mask": None}, "animate", None, ""),  # files of the other mode are nobody's business
        ({"bg": None}, "replace", "input.not_found", "src_bg.mp4"),
        ({"face": {"frames": 19}}, "animate", "input.unreadable", "19 frames"),
        ({"mask": {"size": (48, 48)}}, "replace", "input.unreadable", "src_mask.mp4 48x48"),
        ({"mask": {"size": (48, 48)}}, "animate", None, ""),
        ({"face": {"size": (64, 32)}}, "animate", "input.unreadable", "square"),
        ({name: {"size": (72, 40)} for name in ("pose", "bg", "mask")}, "replace", "input.unreadable", "multiples"),
    ],
)
def test_check_inputs_of_official_files_finds_missing_or_unequal_ones(tmp_path, files, mode, code, words):
    folder = official(tmp_path / "made", **files)
    found = check_inputs([official_job(folder, mode=mode)])
    assert [error.code for _, error in found] == ([code] if code else [])
    assert all(words in error.message for _, error in found)


def test_check_inputs_of_official_files_uses_span_of_each_job(media):
    """Ten of twenty frames begin at second 1; none at second 2. The files' rate counts, not fps."""
    jobs = [official_job(media / "official", f"{start:g}", start_s=start, fps=30) for start in (0.0, 1.0, 2.0)]
    assert codes(jobs) == [("2", "input.too_short")]


def test_check_inputs_names_damaged_official_file(media, tmp_path):
    folder = official(tmp_path / "made")
    (folder / "src_bg.mp4").write_bytes((media / "cut.mp4").read_bytes())
    ((_, error),) = check_inputs([official_job(folder, mode="replace")])
    assert (error.code, str(error.where)) == ("input.unreadable", f"{folder}/src_bg.mp4")
    assert codes([official_job(folder)]) == []


def test_check_inputs_keeps_job_order_and_opens_each_file_once(media, monkeypatch):
    seen: Counter[str] = Counter()
    real = validate.stat_input
    monkeypatch.setattr(validate, "stat_input", lambda uri: seen.update([uri]) or real(uri))
    jobs = [job(media, f"j{i}", reference="none.png" if i % 2 else "a.png", video="text.mp4") for i in range(6)]
    found = codes(jobs)
    assert [name for name, _ in found] == ["j0", "j1", "j1", "j2", "j3", "j3", "j4", "j5", "j5"]
    assert set(seen.values()) == {1}
    assert len(seen) == 3


def test_validate_closing_line_counts_jobs_and_not_problems(media, demo_models, tmp_path, capsys):
    """Seven jobs that share one missing video are seven; one with two bad inputs and a missing LoRA is one more."""
    files = {"reference": str(media / "a.png"), "video": str(media / "v.mp4")}
    lacking = {"options": {"loras": [{"name": "gone"}]}}
    jobs = [{"id": "c", **files, **lacking}, *({"id": f"j{i}", **files, "video": "gone.mp4"} for i in range(7))]
    jobs += [{"id": "b", "reference": "gone.png", "video": "gone.mp4", **lacking}, {"id": "d", **files}]
    path = tmp_path / "m.json"
    path.write_text(json.dumps({"version": 1, "jobs": jobs}))
    for models, problems, count in (None, 9, 8), (str(demo_models), 11, 9):
        found = validate.validate(ValidateSettings(manifest=str(path), models=models, cache=tmp_path / "cache"))
        order = [name for name, _ in found.problems]
        assert len(order) == problems and order == sorted(order, key=[job["id"] for job in jobs].index)
        print_problems(found.manifest, found.problems, checked=True)
        assert capsys.readouterr().out.splitlines()[-1] == f"{path}: 10 jobs, {count} cannot be rendered"


def test_validate_refuses_unknown_recipe_also_with_no_inputs(media, tmp_path):
    path = tmp_path / "m.yaml"
    path.write_text(
        f"version: 1\nrecipe: nonsense\njobs: [{{id: a, reference: {media}/a.png, video: {media}/v.mp4}}]\n"
    )
    for no_inputs in (False, True):
        with pytest.raises(ManifestInvalid, match="line 2: recipe: no recipe 'nonsense'") as caught:
            validate.validate(ValidateSettings(manifest=str(path), no_inputs=no_inputs))
        assert caught.value.exit_code == 2


def test_check_inputs_on_s3_finds_problems(media, tmp_path, moto_s3, aws_env):
    bucket, client = aws_env(moto_s3).make_bucket(), moto_s3.client
    store = f"s3://{bucket}"
    for name in ("a.png", "v.mp4", "text.mp4", "empty.png"):
        client.put_object(Bucket=bucket, Key=name, Body=(media / name).read_bytes())
    jobs = [
        job(store, "good", f"{store}/a.png", f"{store}/v.mp4"),
        job(store, "gone", f"{store}/none.png", f"{store}/v.mp4"),
        job(store, "empty", f"{store}/empty.png", f"{store}/v.mp4"),
        job(store, "text", f"{store}/a.png", f"{store}/text.mp4"),
    ]
    for file in official(tmp_path / "made", face={"frames": 19}).iterdir():
        client.upload_file(str(file), bucket, f"made/{file.name}")
        client.upload_file(str(media / "official" / file.name), bucket, f"good/{file.name}")
    jobs += [
        official_job(f"{store}/good", "files", mode="replace"),
        official_job(f"{store}/made", "unlike"),
        official_job(f"{store}/none", "nowhere"),
        job(store, "mask", f"{store}/a.png", f"{store}/v.mp4", f"{store}/v.mp4", mode="replace"),
    ]
    nowhere = [("nowhere", "input.not_found")] * 3
    shallow = [("gone", "input.not_found"), ("empty", "input.unreadable")]
    assert codes(jobs) == [*shallow, *nowhere]
    unlike = [("unlike", "input.unreadable")]
    found = check_inputs(jobs, deep=True)
    assert [(name, error.code) for name, error in found] == [
        *shallow,
        ("text", "input.unreadable"),
        *unlike,
        *nowhere,
    ]
    messages = {name: error.message for name, error in found}
    assert f"{store}/text.mp4" in messages["text"]
    assert f"{store}/made" in messages["unlike"] and "19 frames" in messages["unlike"]
    assert not any("video-lab-" in message for message in messages.values())

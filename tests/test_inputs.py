"""Inputs: every file that a job names is looked at once, and what is wrong with it is every job's that uses it."""

from __future__ import annotations

from collections import Counter
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from runner import inputs
from runner.inputs import check_inputs
from runner.manifest import Job
from runner.options import JobOptions
from runner.video_write import Mp4Writer


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
    return folder


def job(
    media: Path | str, name: str, reference: str = "a.png", video: str = "v.mp4", mask: str | None = None, **options
):
    place = lambda file: file if "://" in file else f"{media}/{file}"  # noqa: E731
    return Job(name, place(reference), place(video), place(mask) if mask else None, "", JobOptions(**options), None)


def codes(jobs: list[Job], **how: bool) -> list[tuple[str, str]]:
    return [(name, error.code) for name, error in check_inputs(jobs, **how)]


def test_good_inputs_have_no_problems(media):
    jobs = [
        job(media, "plain"),
        job(media, "still-mask", mask="a.png", mode="replace"),
        job(media, "moving-mask", mask="v.mp4", mode="replace"),
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
        ({"start_s": 5.0}, "input.too_short"),
        ({"video": "gs://b/v.mp4"}, "input.not_found"),
    ],
)
def test_each_defect_has_its_code_and_a_remedy(media, names, expected):
    ((name, error),) = check_inputs([job(media, "bad", **names), job(media, "good")])
    assert (name, error.code) == ("bad", expected)
    assert error.todo or "is a folder, not a file" in error.what
    assert error.where


def test_only_deep_decodes_pixels(media):
    jobs = [job(media, "torn", reference="torn.png")]
    assert codes(jobs) == []
    assert codes(jobs, deep=True) == [("torn", "input.unreadable")]


def test_problems_come_in_the_order_of_the_jobs_and_each_file_is_opened_once(media, monkeypatch):
    seen: Counter[str] = Counter()
    real = inputs.stat_input
    monkeypatch.setattr(inputs, "stat_input", lambda uri: seen.update([uri]) or real(uri))
    jobs = [job(media, f"j{i}", reference="none.png" if i % 2 else "a.png", video="text.mp4") for i in range(6)]
    found = codes(jobs)
    assert [name for name, _ in found] == ["j0", "j1", "j1", "j2", "j3", "j3", "j4", "j5", "j5"]
    assert set(seen.values()) == {1}
    assert len(seen) == 3


def test_inputs_on_s3(media, monkeypatch):
    moto = pytest.importorskip("moto")
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.setenv(name, "testing")
    monkeypatch.setenv("AWS_DEFAULT_REGION", "us-east-1")
    monkeypatch.delenv("AWS_ENDPOINT_URL_S3", raising=False)
    with moto.mock_aws():
        import boto3

        client = boto3.client("s3")
        client.create_bucket(Bucket="studio")
        for name in ("a.png", "v.mp4", "text.mp4", "empty.png"):
            client.put_object(Bucket="studio", Key=name, Body=(media / name).read_bytes())
        jobs = [
            job("s3://studio", "good", "s3://studio/a.png", "s3://studio/v.mp4"),
            job("s3://studio", "gone", "s3://studio/none.png", "s3://studio/v.mp4"),
            job("s3://studio", "empty", "s3://studio/empty.png", "s3://studio/v.mp4"),
            job("s3://studio", "text", "s3://studio/a.png", "s3://studio/text.mp4"),
        ]
        shallow = [("gone", "input.not_found"), ("empty", "input.unreadable")]
        assert codes(jobs) == shallow
        assert codes(jobs, deep=True) == [*shallow, ("text", "input.unreadable")]
        (*_, (_, error)) = check_inputs(jobs, deep=True)
        assert "s3://studio/text.mp4" in error.message
        assert "video-lab-" not in error.message

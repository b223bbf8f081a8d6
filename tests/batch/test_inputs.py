from __future__ import annotations

from pathlib import Path

import pytest

from runner.batch.inputs import fetch_request
from runner.errors import InputNotFound
from runner.spec.manifest import Job
from runner.spec.options import JobOptions
from runner.storage import open_storage


def job(base: str, **more: str | None) -> Job:
    places = {"reference": f"{base}/ref.png", "video": f"{base}/dance.mp4", "mask": f"{base}/mask.mp4", **more}
    return Job(id="a", prompt="dance", options=JobOptions(mode="replace"), line=None, **places)


def test_local_files_stay_where_they_are(tmp_path):
    for name in ("ref.png", "dance.mp4", "mask.mp4"):
        (tmp_path / name).write_text(name)
    request = fetch_request(job(str(tmp_path)), tmp_path / "scratch")
    places = (request.reference, request.video, request.mask)
    assert places == (tmp_path / "ref.png", tmp_path / "dance.mp4", tmp_path / "mask.mp4")
    assert not (tmp_path / "scratch").exists()
    official = fetch_request(job(str(tmp_path), mask=None, official=str(tmp_path)), tmp_path / "scratch")
    assert (official.mask, official.official) == (None, tmp_path)


@pytest.mark.s3
def test_objects_are_copied(moto_s3, aws_env, tmp_path):
    aws_env(moto_s3)
    base = f"s3://{moto_s3.make_bucket()}/in"
    source = open_storage(base)
    names = ("src_ref.png", "src_pose.mp4", "src_face.mp4", "src_bg.mp4", "src_mask.mp4")
    for name in ("ref.png", "dance.mp4", "mask.mp4", *names):
        source.write_bytes(name, name.encode())
    scratch = tmp_path / "scratch"
    scratch.mkdir()
    request = fetch_request(job(base, official=base), scratch)
    for path, name in ((request.reference, "ref.png"), (request.video, "dance.mp4"), (request.mask, "mask.mp4")):
        assert isinstance(path, Path) and path.is_relative_to(scratch)
        assert path.read_text() == name
    assert request.official is not None
    assert {path.name for path in request.official.iterdir()} == set(names)
    source.delete("mask.mp4")
    with pytest.raises(InputNotFound, match=r"mask\.mp4"):
        fetch_request(job(base), tmp_path / "again")

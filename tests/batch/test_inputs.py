from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from boto3.s3.transfer import TransferConfig

from runner.batch.inputs import InputIndex, fetch_request
from runner.errors import InputNotFound, InputUnreadable, StorageUnavailable
from runner.spec.manifest import Job
from runner.spec.options import JobOptions
from runner.storage import identify_input, open_storage
from runner.storage.file_hashes import FileHashes
from runner.storage.roots import parse_roots


def job(base: str, **more: str | None) -> Job:
    places = {"reference": f"{base}/ref.png", "video": f"{base}/dance.mp4", "mask": f"{base}/mask.mp4", **more}
    return Job(id="a", prompt="dance", options=JobOptions(mode="replace"), line=None, **places)


def test_local_files_stay_where_they_are(tmp_path):
    for name in ("ref.png", "dance.mp4", "mask.mp4"):
        (tmp_path / name).write_text(name)
    request, warnings = fetch_request(job(str(tmp_path)), tmp_path / "scratch", {})
    assert warnings == []
    places = (request.reference, request.video, request.mask)
    assert places == (tmp_path / "ref.png", tmp_path / "dance.mp4", tmp_path / "mask.mp4")
    assert not (tmp_path / "scratch").exists()
    official, _ = fetch_request(job(str(tmp_path), mask=None, official=str(tmp_path)), tmp_path / "scratch", {})
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
    inputs = InputIndex(FileHashes()).identify(job(base, official=base))
    request, warnings = fetch_request(job(base, official=base), scratch, inputs)
    assert warnings == []
    for path, name in ((request.reference, "ref.png"), (request.video, "dance.mp4"), (request.mask, "mask.mp4")):
        assert isinstance(path, Path) and path.is_relative_to(scratch)
        assert path.read_text() == name
    assert request.official is not None
    assert {path.name for path in request.official.iterdir()} == set(names)
    source.delete("mask.mp4")
    with pytest.raises(InputNotFound, match=r"mask\.mp4"):
        fetch_request(job(base), tmp_path / "again", {})


@pytest.mark.s3
def test_an_object_that_changed_since_it_was_identified_is_tried_again(moto_s3, aws_env, tmp_path):
    """Else the frames would be those of one version and the fingerprint that of another."""
    aws_env(moto_s3)
    base = f"s3://{moto_s3.make_bucket()}/in"
    source = open_storage(base)
    for name in ("ref.png", "dance.mp4", "mask.mp4"):
        source.write_bytes(name, name.encode())
    inputs = InputIndex(FileHashes()).identify(job(base))
    source.write_bytes("dance.mp4", b"another dance")
    with pytest.raises(StorageUnavailable, match=r"changed.*"):
        fetch_request(job(base), tmp_path / "scratch", inputs)


@pytest.mark.s3
def test_a_transfer_that_cannot_be_verified_is_noted(moto_s3, aws_env, tmp_path):
    """A multipart object that another tool has stored: its ETag is no digest of its bytes."""
    aws_env(moto_s3)
    bucket = moto_s3.make_bucket()
    for name in ("ref.png", "mask.mp4"):
        moto_s3.client.put_object(Bucket=bucket, Key=f"in/{name}", Body=b"x")
    config = TransferConfig(multipart_threshold=5 * 2**20, multipart_chunksize=5 * 2**20)
    (tmp_path / "long.mp4").write_bytes(b"v" * (6 * 2**20))
    moto_s3.client.upload_file(str(tmp_path / "long.mp4"), bucket, "in/dance.mp4", Config=config)
    _, warnings = fetch_request(job(f"s3://{bucket}/in"), tmp_path / "scratch", {})
    assert [text.split(" (")[0] for text in warnings] == [f"unverified transfer: s3://{bucket}/in/dance.mp4"]


def test_each_input_is_looked_at_once(tmp_path, monkeypatch):
    for name in ("ref.png", "dance.mp4", "mask.mp4"):
        (tmp_path / name).write_text(name)
    asked = []
    monkeypatch.setattr(
        "runner.batch.inputs.identify_input",
        lambda uri, sha256, original=identify_input: asked.append(uri) or original(uri, sha256),
    )
    index = InputIndex(FileHashes())
    with ThreadPoolExecutor(8) as pool:
        found = list(pool.map(lambda _: index.identify(job(str(tmp_path))), range(40)))
    assert all(each == found[0] for each in found)
    assert len(asked) == 3


def test_inputs_outside_the_roots_are_refused_when_identified_and_when_fetched(tmp_path):
    """A link may be changed in between."""
    inside, outside = tmp_path / "inside", tmp_path / "outside"
    for folder in (inside, outside):
        folder.mkdir()
        for name in ("ref.png", "dance.mp4", "mask.mp4"):
            (folder / name).write_text(f"{folder.name} {name}")
    roots = parse_roots([str(inside)])
    inputs = InputIndex(FileHashes(), roots).identify(job(str(inside)))
    assert fetch_request(job(str(inside)), tmp_path / "scratch", inputs, roots)[0].video == inside / "dance.mp4"
    with pytest.raises(InputUnreadable, match="--input-root"):
        InputIndex(FileHashes(), roots).identify(job(str(outside)))
    (inside / "dance.mp4").unlink()
    (inside / "dance.mp4").symlink_to(outside / "dance.mp4")
    with pytest.raises(InputUnreadable, match="--input-root"):
        fetch_request(job(str(inside)), tmp_path / "scratch", inputs, roots)

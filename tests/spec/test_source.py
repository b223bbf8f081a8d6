"""Source: where a manifest comes from, and where what it names lies."""

from __future__ import annotations

import io

import pytest

from runner.errors import ManifestInvalid
from runner.spec.manifest import load_manifest
from runner.spec.source import MAX_BYTES, resolve_place
from tests.spec.test_manifest import job


def test_relative_names_start_from_the_manifests_folder(tmp_path, monkeypatch):
    (tmp_path / "sub").mkdir()
    (tmp_path / "sub" / "m.yml").write_bytes(b"\xef\xbb\xbf" + job(reference="../贝 拉.png").encode())
    monkeypatch.chdir(tmp_path)
    for source in ("sub/m.yml", str(tmp_path / "sub" / "m.yml"), (tmp_path / "sub" / "m.yml").as_uri()):
        (made,) = load_manifest(source).jobs
        assert made.reference == f"{tmp_path}/sub/../贝 拉.png"
        assert made.video == f"{tmp_path}/sub/b.mp4"


def test_stdin_is_relative_to_the_working_directory(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    text = '{"id": "a", "reference": "a.png", "video": "舞.mp4"}'
    binary = io.TextIOWrapper(io.BytesIO(text.encode()), encoding="latin-1")  # a C locale does not garble it
    for stdin in (io.StringIO(text), binary):
        (made,) = load_manifest("-", stdin=stdin).jobs
        assert made.video == f"{tmp_path}/舞.mp4"


def test_a_manifest_on_s3(moto_s3, aws_env):
    bucket, client = aws_env(moto_s3).make_bucket(), moto_s3.client
    text = job(reference="../refs/a.png", video="b.mp4")
    client.put_object(Bucket=bucket, Key="nights/1/m.yaml", Body=text.encode())
    (made,) = load_manifest(f"s3://{bucket}/nights/1/m.yaml").jobs
    assert (made.reference, made.video) == (f"s3://{bucket}/nights/refs/a.png", f"s3://{bucket}/nights/1/b.mp4")
    with pytest.raises(ManifestInvalid, match="no such object"):
        load_manifest(f"s3://{bucket}/nights/2/m.yaml")
    with pytest.raises(ManifestInvalid, match="folder"):
        load_manifest(f"s3://{bucket}/nights/")


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("a b.png", "s3://b/p/q/a b.png"),
        ("./x/../y.png", "s3://b/p/q/y.png"),
        ("../../y.png", "s3://b/y.png"),
        ("/abs.png", "/abs.png"),
        ("S3://Other/k", "s3://Other/k"),
    ],
)
def test_places_below_an_s3_prefix(name, expected):
    assert resolve_place(name, "s3://b/p/q") == expected


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("../../../y.png", "leads out"), ("s3://bucket", "bucket and a key"), ("s3:///k", "bucket and a key"),
        ("folder/", "names a folder"), ("https://x/y.png", "not supported"), ("a\nb.png", "control character"),
        ("~nobody-here/x.png", "home folder"), ("file://host/x.png", "absolute path"),
    ],
)  # fmt: skip
def test_places_that_cannot_be(name, message):
    with pytest.raises(ValueError, match=message):
        resolve_place(name, "s3://b/p/q")


def test_sources_that_cannot_be_read(tmp_path):
    (tmp_path / "empty.yaml").touch()
    (tmp_path / "big.jsonl").write_bytes(b"#" * (MAX_BYTES + 1))
    (tmp_path / "utf16.yaml").write_text(job(), encoding="utf-16")
    (tmp_path / "latin.yaml").write_bytes(b"version: 1\n# caf\xe9\n")
    (tmp_path / "video.yaml").write_bytes(b"\x00\x00\x00\x18ftypmp42")
    expected = {
        "none.yaml": "no such file", "empty.yaml": "is empty", "big.jsonl": "larger than 64 MB",
        "utf16.yaml": "UTF-16", "latin.yaml": "line 2: is not UTF-8 text (byte 0xe9)", "video.yaml": "zero byte",
        ".": "is a folder", "n" * 300: "cannot be read", "m.yaml/m.yaml": "no such file",
    }  # fmt: skip
    for name, message in expected.items():
        with pytest.raises(ManifestInvalid) as caught:
            load_manifest(str(tmp_path / name))
        assert message in str(caught.value)
        assert caught.value.where == str(tmp_path / name)
    with pytest.raises(ManifestInvalid, match="not supported"):
        load_manifest("https://example.com/m.yaml")

"""Input upload: on a real S3 protocol, each content is sent once, under its own hash."""

from __future__ import annotations

import hashlib
import os

import pytest
from structlog.testing import capture_logs

from runner.errors import StorageUnavailable
from runner.launch.input_upload import InputUpload, plan_uploads, send_uploads


@pytest.fixture
def bucket(aws_env, moto_s3):
    """(client, name) of a bucket."""
    server = aws_env(moto_s3)
    return server.client, server.make_bucket()


def stored(bucket) -> dict[str, bytes]:
    client, name = bucket
    listed = client.list_objects_v2(Bucket=name).get("Contents", [])
    return {item["Key"]: client.get_object(Bucket=name, Key=item["Key"])["Body"].read() for item in listed}


def test_file_with_same_content_and_name_is_uploaded_once(bucket, tmp_path):
    root = f"s3://{bucket[1]}/inputs"
    for folder, content in (("a", b"anna"), ("b", b"anna"), ("c", b"another anna")):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "anna 1.png").write_bytes(content)
    places = [str(tmp_path / folder / "anna 1.png") for folder in "abc"]
    uploads = plan_uploads(dict.fromkeys(places, ()), root)
    assert stored(bucket) == {}, "planning sends nothing"
    with capture_logs() as log:
        assert send_uploads(uploads, root) == 2
    one, other = (hashlib.sha256(content).hexdigest()[:32] for content in (b"anna", b"another anna"))
    assert stored(bucket) == {
        f"inputs/{one}/anna 1.png": b"anna",
        f"inputs/{other}/anna 1.png": b"another anna",
    }
    assert [upload.place for upload in uploads] == places
    assert [upload.uri for upload in uploads] == [f"{root}/{digest}/anna 1.png" for digest in (one, one, other)]
    assert [(line["event"], line["number"], line["files"]) for line in log] == [("uploaded", 1, 2), ("uploaded", 2, 2)]
    with capture_logs() as log:
        assert send_uploads(plan_uploads({places[0]: ()}, root), root) == 0
    assert [line["event"] for line in log] == ["already_there"]


def test_folder_of_official_files_is_uploaded_as_folder(bucket, tmp_path):
    root = f"s3://{bucket[1]}"
    folder = tmp_path / "anna-waltz"
    folder.mkdir()
    for name in ("src_ref.png", "src_pose.mp4", "notes.txt"):
        (folder / name).write_bytes(name.encode())
    (upload,) = plan_uploads({str(folder): ["src_ref.png", "src_pose.mp4"]}, root)
    send_uploads([upload], root)
    assert upload.uri.endswith("/anna-waltz")
    prefix = upload.uri.removeprefix(root + "/")
    assert stored(bucket) == {f"{prefix}/{name}": name.encode() for name in ("src_ref.png", "src_pose.mp4")}
    (folder / "src_pose.mp4").write_bytes(b"other poses")
    (again,) = plan_uploads({str(folder): ["src_ref.png", "src_pose.mp4"]}, root)
    assert again.uri != upload.uri, "the folder of other contents is another one"


def test_file_changed_during_upload_is_not_left_under_old_hash(bucket, tmp_path):
    root = f"s3://{bucket[1]}"
    path = tmp_path / "v.mp4"
    path.write_bytes(b"first")
    (upload,) = plan_uploads({str(path): ()}, root)
    path.write_bytes(b"other")
    os.utime(path, ns=(1, 1))
    with pytest.raises(StorageUnavailable, match="was changed while it was sent"):
        send_uploads([upload], root)
    assert stored(bucket) == {}


def test_send_uploads_of_empty_list_sends_no_request():
    assert send_uploads(list[InputUpload](), "s3://no-such-bucket-at-all") == 0

"""S3: what goes over the line, what happens when the line fails, who is refused, two runners on one bucket."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import structlog

from runner.errors import (
    BucketMissing,
    ConfigInvalid,
    InputNotFound,
    StorageDenied,
    StorageUnavailable,
)
from runner.storage import Storage, fetch_input, open_storage, probe_writable, stat_input
from runner.storage.s3 import S3Storage, _parse_time
from runner.storage.uris import download_name, identify_input
from tests.s3_servers import FaultyServer, S3Server

UseServer = Callable[..., S3Server]


@pytest.fixture
def line(faulty_s3: FaultyServer, aws_env: UseServer) -> FaultyServer:
    """The faulty server, with botocore's own retries off: what recovers does so by repeating the whole transfer."""
    aws_env(faulty_s3, AWS_MAX_ATTEMPTS="1")
    return faulty_s3


@pytest.fixture
def store(line: FaultyServer) -> S3Storage:
    return S3Storage(f"s3://{line.make_bucket()}/pre", sleep=lambda _: None)


@pytest.fixture
def source(tmp_path: Path) -> Path:
    path = tmp_path / "source.mp4"
    path.write_bytes(os.urandom(100_000))
    return path


# What goes over the line


def test_a_small_publish_is_one_put(line: FaultyServer, store: S3Storage, source: Path) -> None:
    store.publish(source, "output.mp4")
    store.write_bytes("result.json", b"{}")
    assert [path.rpartition("/")[2] for _, path, _ in line.seen("PUT", "/pre/")] == ["output.mp4", "result.json"]
    assert line.seen("POST") == []


def test_a_large_publish_appears_with_its_completion(
    line: FaultyServer, store: S3Storage, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "big").write_bytes(bytes(40 << 20))
    seen: list[Any] = []
    real = line.note

    def spy(method: str, path: str, query: str) -> str | None:
        if method == "POST" and "uploadId" in query:  # all parts are there, and still nobody sees them
            seen.append(line.client.list_objects_v2(Bucket=store.bucket)["KeyCount"])
        return real(method, path, query)

    monkeypatch.setattr(line, "note", spy)
    info = store.publish(tmp_path / "big", "big")
    assert seen == [0]
    assert len(line.seen("PUT", "partNumber")) == 3
    assert len(line.seen("POST", "uploadId")) == 1
    assert info.identity.endswith(f"-3:{40 << 20}")


def test_a_failed_multipart_upload_is_given_up(line: FaultyServer, store: S3Storage, tmp_path: Path) -> None:
    (tmp_path / "big").write_bytes(bytes(40 << 20))
    line.fail("503", "PUT", "big", times=1000)
    with pytest.raises(StorageUnavailable, match="SlowDown"):
        store.publish(tmp_path / "big", "big")
    assert "Uploads" not in line.client.list_multipart_uploads(Bucket=store.bucket)
    assert store.stat("big") is None


def test_extra_arguments_reach_every_upload(
    moto_s3: S3Server, aws_env: UseServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    bucket = aws_env(moto_s3).make_bucket()
    monkeypatch.setenv(
        "VIDEO_LAB_S3_EXTRA",
        '{"ServerSideEncryption": "aws:kms", "SSEKMSKeyId": "alias/renders", "StorageClass": "STANDARD_IA",'
        ' "Metadata": {"run": "7"}}',
    )
    store = open_storage(f"s3://{bucket}")
    contents = {"small.mp4": b"x", "big.mp4": bytes(17 << 20), "result.json": b"{}"}
    for name in ("small.mp4", "big.mp4"):
        (tmp_path / name).write_bytes(contents[name])
        store.publish(tmp_path / name, name)
    store.write_bytes("result.json", b"{}")
    for key, kind in [("small.mp4", "video/mp4"), ("big.mp4", "video/mp4"), ("result.json", "application/json")]:
        head = moto_s3.client.head_object(Bucket=bucket, Key=key)
        assert head["ServerSideEncryption"] == "aws:kms"
        assert head["SSEKMSKeyId"].endswith("alias/renders")
        assert head["StorageClass"] == "STANDARD_IA"
        assert head["Metadata"] == {"run": "7", "sha256": hashlib.sha256(contents[key]).hexdigest()}
        assert head["ContentType"] == kind
    assert store.read_bytes("result.json") == b"{}"
    assert {info.key for info in store.list()} == {"small.mp4", "big.mp4", "result.json"}
    store.delete("result.json")


def test_arguments_that_reads_take_go_with_reads(moto_s3: S3Server, aws_env: UseServer) -> None:
    aws_env(moto_s3)
    store = S3Storage("s3://bucket", extra={"ExpectedBucketOwner": "111122223333", "StorageClass": "GLACIER"})
    for operation in ("GetObject", "HeadObject", "ListObjectsV2", "DeleteObject", "HeadBucket"):
        assert store._arguments(operation) == {"Bucket": "bucket", "ExpectedBucketOwner": "111122223333"}
    assert store._arguments("PutObject")["StorageClass"] == "GLACIER"


def test_download_names() -> None:
    assert download_name("s3://b/x/dance.mp4").endswith("/dance.mp4")
    assert download_name("s3://b/x/dance.mp4") != download_name("s3://b/y/dance.mp4")
    long = download_name(f"s3://b/{'舞' * 300}.mp4")
    assert long.endswith(".mp4")
    assert all(len(part.encode()) <= 255 for part in long.split("/"))


# When the line fails


@pytest.mark.parametrize("kind", ["503", "drop"])
def test_botocore_repeats_a_request(faulty_s3: FaultyServer, aws_env: UseServer, source: Path, kind: str) -> None:
    aws_env(faulty_s3)
    store = S3Storage(f"s3://{faulty_s3.make_bucket()}", attempts=1)
    faulty_s3.fail(kind, "PUT", "output.mp4", times=2)
    store.publish(source, "output.mp4")
    assert len(faulty_s3.seen("PUT", "output.mp4")) == 3
    assert store.read_bytes("output.mp4") == source.read_bytes()


@pytest.mark.parametrize("kind", ["503", "drop"])
def test_a_transfer_is_repeated(line: FaultyServer, store: S3Storage, source: Path, tmp_path: Path, kind: str) -> None:
    line.fail(kind, "PUT", "output.mp4", times=2)
    store.publish(source, "output.mp4")
    line.fail(kind, "PUT", "result.json", times=2)
    store.write_bytes("result.json", b"{}")
    line.fail(kind, "HEAD", "output.mp4", times=1)
    line.fail(kind, "GET", "output.mp4", times=2)
    store.fetch("output.mp4", tmp_path / "copy")
    assert (tmp_path / "copy").read_bytes() == source.read_bytes()
    line.fail(kind, "GET", "result.json", times=2)
    assert store.read_bytes("result.json") == b"{}"


@pytest.mark.parametrize("kind", ["503", "drop"])
def test_small_requests_are_repeated(line: FaultyServer, store: S3Storage, kind: str) -> None:
    store.write_bytes("x", b"data")
    line.fail(kind, "HEAD", "/x", times=2)
    info = store.stat("x")
    assert info is not None
    line.fail(kind, "GET", store.bucket, times=2)
    assert list(store.list()) == [info]
    line.fail(kind, "DELETE", "/x", times=2)
    store.delete("x")
    assert store.stat("x") is None
    line.fail(kind, "DELETE", "/x", times=1000)
    with pytest.raises(StorageUnavailable, match="/x"):
        store.delete("x")


def test_a_list_goes_on_at_the_page_that_failed(line: FaultyServer, store: S3Storage) -> None:
    for n in range(3):
        store.write_bytes(f"{n}", b"")
    events = store.client.meta.events
    one = lambda params, **_: params | {"MaxKeys": 1}  # noqa: E731  a handler must be kept to be unregistered
    events.register("provide-client-params.s3.ListObjectsV2", one)
    try:
        found = []
        for info in store.list():
            found.append(info.key)
            line.fail("503", "GET", store.bucket)
        assert found == ["0", "1", "2"]
    finally:
        events.unregister("provide-client-params.s3.ListObjectsV2", one)


def test_a_truncated_body_is_read_again(line: FaultyServer, store: S3Storage, source: Path, tmp_path: Path) -> None:
    store.publish(source, "output.mp4")
    line.fail("truncate", "GET", "output.mp4", times=2)
    assert store.read_bytes("output.mp4") == source.read_bytes()
    line.fail("truncate", "GET", "output.mp4", times=7)  # more than boto3's own five attempts
    store.fetch("output.mp4", tmp_path / "copy")
    assert (tmp_path / "copy").read_bytes() == source.read_bytes()
    assert len(line.seen("GET", "output.mp4")) == 3 + 8


@pytest.mark.parametrize("kind", ["503", "drop", "truncate"])
def test_what_never_recovers_leaves_nothing(
    line: FaultyServer, store: S3Storage, source: Path, tmp_path: Path, kind: str
) -> None:
    store.publish(source, "output.mp4")
    (tmp_path / "copy").write_bytes(b"before")
    line.fail(kind, "GET", "output.mp4", times=1000)
    moved = []
    with pytest.raises(StorageUnavailable, match=r"output\.mp4") as caught:
        store.fetch("output.mp4", tmp_path / "copy", on_bytes=moved.append)
    assert caught.value.retryable
    assert caught.value.exit_code == 3
    assert (tmp_path / "copy").read_bytes() == b"before"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["copy", "source.mp4"]
    assert sum(moved) == 0
    with pytest.raises(StorageUnavailable):
        store.read_bytes("output.mp4")


def test_progress_adds_up(line: FaultyServer, store: S3Storage, source: Path, tmp_path: Path) -> None:
    store.publish(source, "output.mp4")
    line.fail("truncate", "GET", "output.mp4")
    line.fail("503", "GET", "output.mp4")
    moved: list[int] = []
    store.fetch("output.mp4", tmp_path / "copy", on_bytes=moved.append)
    assert sum(moved) == 100_000


def test_attempts_are_counted_and_pauses_grow(line: FaultyServer) -> None:
    pauses: list[float] = []
    store = S3Storage(f"s3://{line.make_bucket()}", attempts=3, sleep=pauses.append)
    line.fail("503", "GET", times=1000)
    with pytest.raises(StorageUnavailable, match="SlowDown"):
        store.read_bytes("x")
    assert len(line.seen("GET", "/x")) == 3
    assert len(pauses) == 2
    assert all(0 <= pause <= 2**i for i, pause in enumerate(pauses))


@pytest.mark.parametrize("size", [1000, 40 << 20])
def test_an_object_that_changes_while_it_is_read(
    line: FaultyServer, store: S3Storage, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, size: int
) -> None:
    """Parts of two versions must not make one file, nor one version's bytes another's identity."""
    old, new = bytes(size), b"\1" * size
    store.write_bytes("big", old)
    changes = [new]
    real = line.note

    def spy(method: str, path: str, query: str) -> str | None:
        if method == "GET" and path.endswith("/big") and changes:
            line.client.put_object(Bucket=store.bucket, Key="pre/big", Body=changes.pop())
        return real(method, path, query)

    monkeypatch.setattr(line, "note", spy)
    info = store.fetch("big", tmp_path / "copy")
    assert (tmp_path / "copy").read_bytes() == new
    assert info == store.stat("big")


def test_nobody_answers(aws_env: UseServer, tmp_path: Path) -> None:
    aws_env(S3Server("http://127.0.0.1:9"), AWS_MAX_ATTEMPTS="1")  # the discard port, where nothing listens
    store = S3Storage("s3://bucket", attempts=1)
    for use in (
        lambda: store.stat("x"),
        lambda: store.fetch("x", tmp_path / "x"),
        lambda: list(store.list()),
        lambda: store.write_bytes("x", b""),
        lambda: store.delete("x"),
    ):
        with pytest.raises(StorageUnavailable, match="AWS_ENDPOINT_URL_S3"):
            use()


# Leftovers


def test_every_page_of_uploads_is_listed(line: FaultyServer, store: S3Storage, monkeypatch: pytest.MonkeyPatch) -> None:
    """moto knows no pages of uploads: they are served here two at a time."""
    where = {"Bucket": store.bucket}
    for n in range(5):
        store.client.create_multipart_upload(**where, Key=f"pre/{n}")
    whole = store._uploads("pre/", {})["Uploads"]

    def page(prefix: str, position: dict[str, str]) -> dict[str, Any]:
        ids = [upload["UploadId"] for upload in whole]
        first = ids.index(position["UploadIdMarker"]) + 1 if position else 0
        some = whole[first : first + 2]
        markers = {"NextKeyMarker": some[-1]["Key"], "NextUploadIdMarker": some[-1]["UploadId"]}
        return {"Uploads": some, "IsTruncated": first + 2 < len(whole)} | markers

    monkeypatch.setattr(store, "_uploads", page)
    assert sorted(left.key for left in store.leftovers()) == ["0", "1", "2", "3", "4"]


@pytest.mark.parametrize("kind", ["403", "503"])
def test_leftovers_that_cannot_be_listed_stop_no_job(line: FaultyServer, store: S3Storage, kind: str) -> None:
    line.fail(kind, "GET", store.bucket, times=1000)
    with structlog.testing.capture_logs() as lines:
        assert store.remove_leftovers("jobs/a/") == 0
    warnings = [entry for entry in lines if entry["event"] == "storage.leftovers"]
    assert [entry["log_level"] for entry in warnings] == ["warning"]
    with pytest.raises(StorageDenied if kind == "403" else StorageUnavailable, match=r"ListMultipartUploads"):
        list(store.leftovers())


def test_a_store_without_a_list_of_uploads_has_none(line: FaultyServer, store: S3Storage) -> None:
    store.write_bytes(".video-lab-probe-1", b"")
    line.fail("501", "GET", store.bucket)
    assert [left.key for left in store.leftovers()] == [".video-lab-probe-1"]


def test_an_upload_that_another_runner_removes_is_begun_again(
    line: FaultyServer, store: S3Storage, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "big").write_bytes(bytes(17 << 20))
    before(line, monkeypatch, "POST", "uploadId", lambda: S3Storage(store.root).remove_leftovers("jobs/a/"))
    store.publish(tmp_path / "big", "jobs/a/output.mp4")
    assert store.stat("jobs/a/output.mp4")
    assert len(line.seen("POST", "?uploads")) == 2
    assert list(store.leftovers()) == []


# Two runners on one bucket


def before(line: FaultyServer, monkeypatch: pytest.MonkeyPatch, method: str, text: str, act: Callable[[], Any]) -> None:
    """Do `act` once, when the next request of `method` that contains `text` has come and is not yet answered."""
    real, left = line.note, [act]

    def spy(called: str, path: str, query: str) -> str | None:
        if called == method and text in f"{path}?{query}" and left:
            left.pop()()
        return real(called, path, query)

    monkeypatch.setattr(line, "note", spy)


@pytest.mark.parametrize("size", [1000, 20 << 20])
def test_a_publish_tells_of_its_own_bytes(
    line: FaultyServer, store: S3Storage, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, size: int
) -> None:
    """Another runner stores its output between our upload and the look at what lies there."""
    mine, other = os.urandom(size), b"of another seed"
    (tmp_path / "mine.mp4").write_bytes(mine)
    (tmp_path / "other.mp4").write_bytes(other)
    second = S3Storage(store.root)
    alone = store.publish(tmp_path / "mine.mp4", "alone.mp4")
    before(line, monkeypatch, "HEAD", "output.mp4", lambda: second.publish(tmp_path / "other.mp4", "output.mp4"))
    info = store.publish(tmp_path / "mine.mp4", "output.mp4")
    assert (info.identity, info.bytes) == (alone.identity, size)
    assert store.read_bytes("output.mp4") == other
    assert len(line.seen("HEAD", "output.mp4")) == 2  # once each: what is there instead is no reason to upload again


def test_an_upload_that_is_not_there_is_made_again(
    line: FaultyServer, store: S3Storage, source: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before(line, monkeypatch, "HEAD", "output.mp4", lambda: S3Storage(store.root).delete("output.mp4"))
    store.publish(source, "output.mp4")
    assert store.read_bytes("output.mp4") == source.read_bytes()


@pytest.mark.parametrize("exists", [False, True])
@pytest.mark.parametrize("same", [False, True])
def test_of_two_conditional_writes_the_second_is_refused(
    line: FaultyServer, store: S3Storage, monkeypatch: pytest.MonkeyPatch, exists: bool, same: bool
) -> None:
    """Both have seen the same version, and one is under way when the other is done; also where both say the same."""
    version = store.write_if("x", b"old", None) if exists else None
    theirs = b"mine" if same else b"theirs"
    won: list[str | None] = []
    before(line, monkeypatch, "PUT", "/x", lambda: won.append(S3Storage(store.root).write_if("x", theirs, version)))
    assert store.write_if("x", b"mine", version) is None
    found = store.read_versioned("x")
    assert found is not None
    assert (found.data, [found.version]) == (theirs, won)


def test_a_conditional_write_of_what_is_deleted_meanwhile(
    line: FaultyServer, store: S3Storage, monkeypatch: pytest.MonkeyPatch
) -> None:
    version = store.write_if("x", b"old", None)
    before(line, monkeypatch, "PUT", "/x", lambda: S3Storage(store.root).delete("x"))
    assert store.write_if("x", b"new", version) is None
    assert not store.exists("x")


@pytest.mark.parametrize("attempts", ["1", "3"], ids=["repeated by us", "repeated by botocore"])
@pytest.mark.parametrize("exists", [False, True])
def test_a_conditional_write_whose_answer_is_lost(
    line: FaultyServer, store: S3Storage, monkeypatch: pytest.MonkeyPatch, attempts: str, exists: bool
) -> None:
    """It is done; its repetition is refused for it. That must not read as another's work."""
    version = store.write_if("x", b"old", None) if exists else None
    monkeypatch.setenv("AWS_MAX_ATTEMPTS", attempts)
    line.fail("lose", "PUT", "/x")
    written = store.write_if("x", b"new", version)
    found = store.read_versioned("x")
    assert found is not None
    assert (found.data, found.version) == (b"new", written)
    assert len(line.seen("PUT", "/x")) == (3 if exists else 2)


@pytest.mark.parametrize("kind", ["409", "503", "drop"])
def test_a_conditional_write_is_repeated(line: FaultyServer, store: S3Storage, kind: str) -> None:
    line.fail(kind, "PUT", "/x", times=2)
    written = store.write_if("x", b"new", None)
    assert written is not None
    line.fail(kind, "PUT", "/x", times=2)
    assert store.write_if("x", b"newer", written)
    assert store.read_bytes("x") == b"newer"


def test_a_store_that_knows_no_conditions(line: FaultyServer, store: S3Storage) -> None:
    line.fail("501", "PUT", "/x")
    version = store.write_if("x", b"one", None)
    assert store.write_if("x", b"two", None) is None
    assert store.write_if("x", b"two", "other") is None
    assert store.read_bytes("x") == b"one"
    assert store.write_if("x", b"two", version)
    assert store.read_bytes("x") == b"two"
    assert len(line.seen("PUT", "/x")) == 3  # refused, one, two: it is asked only once


def test_two_that_append_to_one_log_keep_each_others_lines(line: FaultyServer, store: S3Storage) -> None:
    other = S3Storage(store.root)
    for n in range(3):
        store.append_lines("log.txt", f"mine {n}\n".encode())
        other.append_lines("log.txt", f"other {n}\n".encode())
    lines = [store.read_bytes(info.key) for info in sorted(store.list(), key=lambda info: info.key)]
    assert lines == [f"{who} {n}\n".encode() for n in range(3) for who in ("mine", "other")]
    assert len([query for _, _, query in line.seen("GET", "list-type") if "log-" in query]) == 2  # one each


def test_numbers_go_on_after_the_highest(store: S3Storage) -> None:
    for name in ("log-0003.txt", "log-9999.txt", "log-12.txt", "log-x.txt", "log-10000.txt.txt"):
        store.write_bytes(name, b"")
    store.append_lines("log.txt", b"line\n")
    assert store.read_bytes("log-10000.txt") == b"line\n"


# Who is refused, and what is not there


@pytest.mark.s3
@pytest.mark.parametrize(
    "wrong", [{"AWS_ACCESS_KEY_ID": "nobody"}, {"AWS_SECRET_ACCESS_KEY": "wrong-secret"}], ids=["key", "secret"]
)
def test_wrong_credentials(seaweedfs_s3: S3Server, aws_env: UseServer, tmp_path: Path, wrong: dict[str, str]) -> None:
    bucket = seaweedfs_s3.make_bucket()
    seaweedfs_s3.client.put_object(Bucket=bucket, Key="x", Body=b"x")
    aws_env(seaweedfs_s3, **wrong)
    store = open_storage(f"s3://{bucket}")
    (tmp_path / "source").write_bytes(b"x")
    for use in (
        lambda: store.stat("x"),
        lambda: store.fetch("x", tmp_path / "copy"),
        lambda: store.read_bytes("x"),
        lambda: list(store.list()),
        lambda: store.publish(tmp_path / "source", "y"),
        lambda: store.write_bytes("y", b""),
        lambda: store.delete("x"),
        lambda: probe_writable(store),
        lambda: stat_input(f"s3://{bucket}/x"),
    ):
        with pytest.raises(StorageDenied, match="AWS_ACCESS_KEY_ID"):
            use()
    listing = seaweedfs_s3.client.list_objects_v2(Bucket=bucket)
    assert [entry["Key"] for entry in listing["Contents"]] == ["x"]


def test_no_credentials(moto_s3: S3Server, aws_env: UseServer, monkeypatch: pytest.MonkeyPatch) -> None:
    aws_env(moto_s3)
    monkeypatch.delenv("AWS_ACCESS_KEY_ID")
    monkeypatch.delenv("AWS_SECRET_ACCESS_KEY")
    with pytest.raises(StorageDenied, match=r"AWS_ACCESS_KEY_ID.*role"):
        open_storage("s3://bucket").stat("x")


@pytest.mark.parametrize(("kind", "advice"), [("skewed", "clock"), ("expired", "Renew"), ("403", "AWS_ACCESS_KEY_ID")])
def test_the_cause_of_a_refused_head(line: FaultyServer, store: S3Storage, kind: str, advice: str) -> None:
    """Its answer has no body, and looks like wrong credentials or, for an expired token, like a wrong address."""
    store.write_bytes("x", b"")
    line.fail(kind, "HEAD", "/x", times=10)
    line.fail(kind, "GET", "/x", times=10)
    with pytest.raises(StorageDenied, match=advice):
        store.stat("x")


@pytest.mark.s3
def test_a_missing_bucket_on_a_real_server(seaweedfs_s3: S3Server, aws_env: UseServer, tmp_path: Path) -> None:
    aws_env(seaweedfs_s3)
    missing_bucket(open_storage("s3://no-such-bucket/pre"), tmp_path)


def test_a_missing_bucket(moto_s3: S3Server, aws_env: UseServer, tmp_path: Path) -> None:
    aws_env(moto_s3)
    missing_bucket(open_storage("s3://no-such-bucket/pre"), tmp_path)


def missing_bucket(store: Storage, tmp_path: Path) -> None:
    """Reads say that the bucket is not there, writes that it has to be made; a read of one input fails that input."""
    (tmp_path / "source").write_bytes(b"x")
    for read in (
        lambda: store.stat("x"),
        lambda: store.fetch("x", tmp_path / "x"),
        lambda: store.read_bytes("x"),
        lambda: list(store.list()),
        lambda: list(store.folders()),
    ):
        with pytest.raises(BucketMissing, match=r"the bucket no-such-bucket does not exist\. Check its name") as caught:
            read()
        assert (caught.value.code, caught.value.exit_code) == ("input.not_found", 2)
    for ask in (stat_input, identify_input, lambda uri: fetch_input(uri, tmp_path)):
        with pytest.raises(InputNotFound, match="the bucket no-such-bucket does not exist") as missing:
            ask(store.uri("x"))
        assert (missing.value.code, missing.value.exit_code) == ("input.not_found", 1)
    for write in (
        lambda: store.publish(tmp_path / "source", "x"),
        lambda: store.write_bytes("x", b""),
        lambda: probe_writable(store),
    ):
        with pytest.raises(ConfigInvalid, match=r"the bucket no-such-bucket does not exist\. Create the bucket"):
            write()


def test_a_malformed_endpoint(aws_env: UseServer) -> None:
    aws_env(S3Server("not a url"))
    with pytest.raises(ConfigInvalid, match="AWS_ENDPOINT_URL_S3"):
        open_storage("s3://bucket").stat("x")


def test_an_unknown_profile(aws_env: UseServer) -> None:
    aws_env(S3Server("http://127.0.0.1:9"), AWS_PROFILE="nobody")
    with pytest.raises(ConfigInvalid, match="nobody"):
        open_storage("s3://bucket").stat("x")


def test_one_client_for_one_environment(moto_s3: S3Server, aws_env: UseServer) -> None:
    aws_env(moto_s3)
    first = S3Storage("s3://bucket").client
    assert S3Storage("s3://other").client is first
    aws_env(moto_s3, AWS_ACCESS_KEY_ID="other")
    assert S3Storage("s3://bucket").client is not first


def test_the_times_of_a_listing_are_not_parsed_by_the_slow_parser(moto_s3, aws_env, monkeypatch):
    """botocore's own takes most of a listing's CPU time."""
    storage = open_storage(f"s3://{aws_env(moto_s3).make_bucket()}")
    for name in "abc":
        storage.write_bytes(name, b"x")
    stats = {name: storage.stat(name) for name in "abc"}

    def refuse(text: object) -> None:
        raise AssertionError(text)

    monkeypatch.setattr("runner.storage.s3.parse_timestamp", refuse)
    found = {info.key: info for info in storage.list()}
    assert {name: int(info.modified) for name, info in found.items()} == {
        name: int(info.modified) for name, info in stats.items() if info
    }


@pytest.mark.parametrize(
    "text",
    [
        "2026-01-31T04:05:06.789Z",
        "2026-01-31T04:05:06Z",
        "2026-01-31T04:05:06+02:00",
        "Sat, 31 Jan 2026 04:05:06 GMT",
        "2026-01-31T04:05:06",
        "20260131T040506Z",
        1769832306,
        1769832306.5,
    ],
)
def test_a_time_means_what_botocore_makes_of_it(text):
    from botocore.utils import parse_timestamp

    assert _parse_time(text) == parse_timestamp(text)
    assert _parse_time(text).utcoffset() == parse_timestamp(text).utcoffset()

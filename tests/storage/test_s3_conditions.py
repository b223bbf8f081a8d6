"""S3 conditions: exact interleavings of two runners, lost answers, stores that know less."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from email.utils import format_datetime, parsedate_to_datetime
from pathlib import Path
from typing import Any

import pytest
from boto3.s3.transfer import TransferConfig

from runner.errors import LeaseLost, StorageUnavailable
from runner.storage import ObjectInfo, open_storage, probe_conditions
from runner.storage.s3 import S3Storage
from tests.s3_servers import FaultyServer, S3Server
from tests.storage.lease_contract import LEASE, OUTPUT, contents, fence

UseServer = Callable[..., S3Server]
SMALL, LARGE = 1000, (5 << 20) + 1000
COMPLETIONS = {SMALL: "PutObject", LARGE: "CompleteMultipartUpload"}  # the request that makes an output appear
MINE, THEIRS = fence(b"me"), fence(b"another")


@pytest.fixture(autouse=True)
def small_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    config = TransferConfig(multipart_threshold=5 << 20, multipart_chunksize=5 << 20, max_concurrency=2)
    monkeypatch.setattr("runner.storage.s3.TRANSFER", config)


@pytest.fixture(
    params=["moto_s3", pytest.param("seaweedfs_s3", marks=pytest.mark.s3)], ids=lambda name: name.removesuffix("_s3")
)
def store(request: pytest.FixtureRequest, aws_env: UseServer) -> S3Storage:
    server = aws_env(request.getfixturevalue(request.param))
    return S3Storage(f"s3://{server.make_bucket()}/pre", sleep=lambda _: None)


@pytest.fixture
def line(faulty_s3: FaultyServer, aws_env: UseServer) -> FaultyServer:
    aws_env(faulty_s3, AWS_MAX_ATTEMPTS="1")
    return faulty_s3


@pytest.fixture
def behind(line: FaultyServer) -> S3Storage:
    """A store behind the faulty line."""
    return S3Storage(f"s3://{line.make_bucket()}/pre", sleep=lambda _: None)


@contextmanager
def hooked(store: S3Storage, event: str, handler: Callable[..., Any], *, first: bool = False) -> Iterator[None]:
    events = store.client.meta.events
    (events.register_first if first else events.register_last)(event, handler)
    try:
        yield
    finally:
        events.unregister(event, handler)


@contextmanager
def interposed(
    store: S3Storage, operation: str, key: str, act: Callable[[], Any], *, first: bool
) -> Iterator[list[Any]]:
    """Do `act` once, when the next request for `key` is about to be sent: with `first` before this runner's last check,
    else between that check and the request."""
    acted: list[Any] = []

    def handler(request: Any, **_: Any) -> None:
        if not acted and request.url.partition("?")[0].endswith(f"/{key}"):
            acted.append(None)
            other = threading.Thread(target=lambda: acted.insert(0, act()))
            other.start()
            other.join()

    with hooked(store, f"before-send.s3.{operation}", handler, first=first):
        yield acted
    assert len(acted) == 2, "the other runner has not been there, or has failed"


def begin(store: S3Storage, tmp_path: Path, size: int, exists: bool) -> tuple[Path, ObjectInfo | None]:
    """This runner has its lease, has seen what lies there, and has an output of `size` bytes."""
    store.write_if(LEASE, b"me", None)
    if exists:
        store.write_bytes(OUTPUT, b"of an earlier run")
    (tmp_path / "mine").write_bytes(os.urandom(size))
    return tmp_path / "mine", store.stat(OUTPUT)


def take_over(store: S3Storage) -> None:
    found = store.read_versioned(LEASE)
    assert found is not None
    assert store.write_if(LEASE, b"another", found.version)


def take_over_and_publish(store: S3Storage, tmp_path: Path, seen: ObjectInfo | None) -> ObjectInfo:
    take_over(store)
    (tmp_path / "theirs").write_bytes(b"theirs")
    return S3Storage(store.root).publish(tmp_path / "theirs", OUTPUT, fence=THEIRS, replaces=seen)


# Two runners


@pytest.mark.parametrize("size", COMPLETIONS, ids=["one request", "two parts"])
@pytest.mark.parametrize("exists", [False, True], ids=["nothing was there", "something was there"])
def test_publish_is_refused_if_other_runner_publishes_after_last_check(
    store: S3Storage, tmp_path: Path, size: int, exists: bool, request: pytest.FixtureRequest
) -> None:
    ignored = exists and size == LARGE and "moto" in request.node.name  # moto completes whatever If-Match says
    path, seen = begin(store, tmp_path, size, exists)
    act = lambda: take_over_and_publish(store, tmp_path, seen)  # noqa: E731
    with (
        interposed(store, COMPLETIONS[size], OUTPUT, act, first=ignored) as acted,
        pytest.raises(LeaseLost, match="changed"),
    ):
        store.publish(path, OUTPUT, fence=MINE, replaces=seen)
    assert acted[0] == store.stat(OUTPUT)
    assert contents(store) == {LEASE: b"another", OUTPUT: b"theirs"}
    assert list(store.leftovers()) == []


@pytest.mark.parametrize("size", COMPLETIONS, ids=["one request", "two parts"])
@pytest.mark.parametrize("exists", [False, True])
def test_publish_is_refused_if_other_runner_takes_over_before_last_check(
    store: S3Storage, tmp_path: Path, size: int, exists: bool
) -> None:
    """The other runner has published nothing yet, so only the lease shows the takeover."""
    path, seen = begin(store, tmp_path, size, exists)
    before = store.read_bytes(OUTPUT)
    for replaces in (seen, "anything"):
        store.write_bytes(LEASE, b"me")
        with interposed(store, COMPLETIONS[size], OUTPUT, lambda: take_over(store), first=True) as acted:
            with pytest.raises(LeaseLost, match=r"attempt\.json"):
                store.publish(path, OUTPUT, fence=MINE, replaces=replaces)
        assert acted[0] is None
        assert store.read_bytes(OUTPUT) == before
        assert list(store.leftovers()) == []


@pytest.mark.parametrize("exists", [False, True])
def test_multipart_completion_is_compared_if_store_ignores_condition(
    store: S3Storage, tmp_path: Path, exists: bool
) -> None:
    """Another process without a lease stores an object while the parts are uploaded."""
    path, seen = begin(store, tmp_path, LARGE, exists)

    def send(request: Any, **_: Any) -> None:
        raise AssertionError(f"{request.method} is sent")

    act = lambda: store.write_bytes(OUTPUT, b"theirs")  # noqa: E731
    with interposed(store, "UploadPart", OUTPUT, act, first=True) as acted:
        with hooked(store, "before-send.s3.CompleteMultipartUpload", send), pytest.raises(LeaseLost, match="changed"):
            store.publish(path, OUTPUT, fence=MINE, replaces=seen)
    assert acted[0] is None
    assert store.read_bytes(OUTPUT) == b"theirs"
    assert list(store.leftovers()) == []


def test_publish_without_lease_sends_no_part(behind: S3Storage, line: FaultyServer, tmp_path: Path) -> None:
    path, seen = begin(behind, tmp_path, LARGE, exists=False)
    take_over(behind)
    with pytest.raises(LeaseLost):
        behind.publish(path, OUTPUT, fence=MINE, replaces=seen)
    assert line.seen("POST") == []
    assert line.seen("PUT", "partNumber") == []


@pytest.mark.parametrize("operation", ["PutObject", "DeleteObject"])
@pytest.mark.parametrize("first", [False, True], ids=["after the check", "before the check"])
def test_write_if_and_delete_after_takeover_change_nothing(store: S3Storage, operation: str, first: bool) -> None:
    """The record is changed by its version: another runner's new lease or record is noticed, in any order."""
    key = "jobs/a/result.json"
    store.write_if(LEASE, b"me", None)
    version = store.write_if(key, b"old", None)

    def act() -> None:
        take_over(store)
        store.write_bytes(key, b"theirs")

    def change() -> object:
        if operation == "PutObject":
            return store.write_if(key, b"mine", version, fence=MINE)
        return store.delete(key, version=version, fence=MINE)

    with interposed(store, operation, key, act, first=first) as acted:
        if first:
            with pytest.raises(LeaseLost):
                change()
        else:
            assert not change()
    assert acted[0] is None
    assert contents(store) == {LEASE: b"another", key: b"theirs"}


def test_delete_of_object_removed_meanwhile_succeeds(store: S3Storage) -> None:
    version = store.write_if(LEASE, b"me", None)
    with interposed(store, "DeleteObject", LEASE, lambda: S3Storage(store.root).delete(LEASE), first=False) as acted:
        assert store.delete(LEASE, version=version)
    assert acted[0] is True
    assert not store.exists(LEASE)


# A line that fails


def test_lease_is_read_before_each_repeated_request(
    behind: S3Storage, line: FaultyServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """botocore waits up to 20 s before it repeats a request. Another runner may take over meanwhile."""
    monkeypatch.setenv("AWS_MAX_ATTEMPTS", "3")
    path, _ = begin(behind, tmp_path, SMALL, exists=True)
    real = line.note

    def note(method: str, where: str, query: str) -> str | None:
        if method == "PUT" and where.endswith(OUTPUT) and contents(behind)[LEASE] == b"me":
            take_over(behind)
            real(method, where, query)
            return "503"
        return real(method, where, query)

    monkeypatch.setattr(line, "note", note)
    with pytest.raises(LeaseLost):
        behind.publish(path, OUTPUT, fence=MINE)
    assert len(line.seen("PUT", OUTPUT)) == 2  # the earlier output, and one try
    assert behind.read_bytes(OUTPUT) == b"of an earlier run"


@pytest.mark.parametrize("attempts", ["1", "3"], ids=["repeated by us", "repeated by botocore"])
@pytest.mark.parametrize("exists", [False, True])
@pytest.mark.parametrize("size", COMPLETIONS, ids=["one request", "two parts"])
def test_publish_with_lost_answer_succeeds(
    behind: S3Storage,
    line: FaultyServer,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    size: int,
    exists: bool,
    attempts: str,
) -> None:
    """The publish is done, so its repetition is refused. This must not look like a publish of another runner."""
    path, seen = begin(behind, tmp_path, size, exists)
    monkeypatch.setenv("AWS_MAX_ATTEMPTS", attempts)
    real, lost = line.note, []

    def note(method: str, where: str, query: str) -> str | None:
        kind = real(method, where, query)
        completes = "uploadId" in query if size == LARGE else method == "PUT" and where.endswith(OUTPUT)
        if completes and method in ("PUT", "POST") and "partNumber" not in query and not lost:
            lost.append(where)
            return "lose"
        return kind

    monkeypatch.setattr(line, "note", note)
    info = behind.publish(path, OUTPUT, fence=MINE, replaces=seen)
    assert len(lost) == 1
    assert info == behind.stat(OUTPUT)
    assert behind.read_bytes(OUTPUT) == path.read_bytes()
    assert list(behind.leftovers()) == []


def test_completed_upload_with_lost_answer_is_not_repeated(
    behind: S3Storage, line: FaultyServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """S3 answers a repeated completion with an error: the upload is not there any more."""
    path, seen = begin(behind, tmp_path, LARGE, exists=False)
    real, refused = behind.client.complete_multipart_upload, []

    def complete(**arguments: Any) -> Any:
        real(**arguments)
        refused.append(arguments["UploadId"])
        return behind.client.list_parts(Bucket=behind.bucket, Key=f"pre/{OUTPUT}", UploadId=arguments["UploadId"])

    monkeypatch.setattr(behind.client, "complete_multipart_upload", complete)
    info = behind.publish(path, OUTPUT, fence=MINE, replaces=seen)
    assert len(refused) == 1
    assert info == behind.stat(OUTPUT)
    assert list(behind.leftovers()) == []


@pytest.mark.parametrize("kind", ["503", "drop", "409"])
def test_connection_failure_is_no_conflict(
    behind: S3Storage, line: FaultyServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    path, seen = begin(behind, tmp_path, SMALL, exists=True)
    line.fail(kind, "PUT", OUTPUT, times=2)
    line.fail("503", "GET", LEASE, times=2)
    assert behind.publish(path, OUTPUT, fence=MINE, replaces=seen) == behind.stat(OUTPUT)
    line.fail(kind, "PUT", OUTPUT, times=1000)
    with pytest.raises(StorageUnavailable):
        behind.publish(path, OUTPUT, fence=MINE, replaces=behind.stat(OUTPUT))
    line.faults.clear()
    line.fail("503", "GET", LEASE, times=1000)
    with pytest.raises(StorageUnavailable):
        behind.publish(path, OUTPUT, fence=MINE)


# Stores that know less


@pytest.mark.parametrize("size", COMPLETIONS, ids=["one request", "two parts"])
def test_store_without_conditions_is_compared_before_write(
    behind: S3Storage, line: FaultyServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, size: int
) -> None:
    path, seen = begin(behind, tmp_path, size, exists=True)
    real, conditions = line.note, []

    def note(method: str, where: str, query: str) -> str | None:
        kind = real(method, where, query)
        completes = method == "POST" and "uploadId" in query if size == LARGE else method == "PUT" and OUTPUT in where
        if completes and not conditions:
            conditions.append(where)
            return "501"
        return kind

    monkeypatch.setattr(line, "note", note)
    info = behind.publish(path, OUTPUT, fence=MINE, replaces=seen)
    assert len(conditions) == 1
    assert behind.read_bytes(OUTPUT) == path.read_bytes()
    assert "does not support" in (behind.weak_conditions() or "")
    for stale in (seen, None):
        with pytest.raises(LeaseLost):
            behind.publish(path, OUTPUT, fence=MINE, replaces=stale)
    assert behind.publish(path, OUTPUT, fence=MINE, replaces=info)
    with pytest.raises(LeaseLost):
        behind.write_if(OUTPUT, b"", "x", fence=THEIRS)
    assert list(behind.leftovers()) == []


@pytest.mark.parametrize("exists", [False, True])
def test_compared_write_with_lost_answer_succeeds(behind: S3Storage, line: FaultyServer, exists: bool) -> None:
    version = behind.write_if(LEASE, b"old", None) if exists else None
    behind.distrust_conditions()
    line.fail("lose", "PUT", LEASE)
    written = behind.write_if(LEASE, b"new", version)
    found = behind.read_versioned(LEASE)
    assert found is not None
    assert (found.data, found.version) == (b"new", written)


def test_store_without_conditional_delete_is_compared_before_delete(behind: S3Storage, line: FaultyServer) -> None:
    first = behind.write_if(LEASE, b"one", None)
    second = behind.write_if(LEASE, b"two", first)
    line.fail("501", "DELETE", LEASE)
    assert not behind.delete(LEASE, version=first)
    assert line.seen("DELETE") == []
    assert behind.delete(LEASE, version=second)
    assert not behind.exists(LEASE)


@pytest.mark.parametrize(
    ("header", "sentence"), [("If-None-Match", "create it only if"), ("If-Match", "not the expected")]
)
def test_probe_conditions_finds_store_that_ignores_condition(
    moto_s3: S3Server, aws_env: UseServer, header: str, sentence: str
) -> None:
    store = S3Storage(f"s3://{aws_env(moto_s3).make_bucket()}")

    def strip(request: Any, **_: Any) -> None:
        if header in request.headers:
            del request.headers[header]

    with hooked(store, "before-send.s3.PutObject", strip):
        assert sentence in (probe_conditions(store) or "")
        assert list(store.list()) == []
        version = store.write_if("x", b"one", None)  # from now on it is compared before it is written
        assert store.write_if("x", b"two", None) is None
        assert store.write_if("x", b"two", "other") is None
        assert store.read_bytes("x") == b"one"
        assert store.write_if("x", b"two", version)
        assert store.read_bytes("x") == b"two"


def test_probe_conditions_finds_store_that_refuses_conditions(behind: S3Storage, line: FaultyServer) -> None:
    line.fail("501", "PUT")
    assert "does not support conditional writes" in (probe_conditions(behind) or "")
    assert list(behind.list()) == []


def test_probe_conditions_that_fails_leaves_no_object(behind: S3Storage, line: FaultyServer) -> None:
    real = line.note
    with pytest.MonkeyPatch.context() as patch:
        left = [None, "403", "403"]  # the first request is done
        patch.setattr(line, "note", lambda m, p, q: real(m, p, q) or (left.pop(0) if m == "PUT" and left else None))
        with pytest.raises(Exception, match="AccessDenied"):
            probe_conditions(behind)
    assert list(behind.list()) == []


# Ages


@pytest.mark.parametrize("skew", [-86400.0, 86400.0])
def test_age_is_difference_of_store_times(store: S3Storage, monkeypatch: pytest.MonkeyPatch, skew: float) -> None:
    """The store's clock differs from this machine's by a day, and it wrote the object 40 s ago."""

    def skewed(response_dict: Any, **_: Any) -> None:
        headers = response_dict["headers"]
        for name, past in (("Date", 0), ("Last-Modified", -40)):
            moved = parsedate_to_datetime(headers["Last-Modified"]).timestamp() + skew + past
            headers[name] = format_datetime(datetime.fromtimestamp(moved, UTC), usegmt=True)

    store.write_bytes(LEASE, b"me")
    with hooked(store, "before-parse.s3.GetObject", skewed):
        found = store.read_versioned(LEASE, aged=True)
        assert found is not None
        assert found.age_s == 40


@pytest.mark.parametrize(("date", "age"), [("Thu, 01 Jan 1970 00:00:00 GMT", 0.0), ("", None), ("yesterday", None)])
def test_age_with_odd_date_header_is_zero_or_none(store: S3Storage, date: str, age: float | None) -> None:
    def odd(response_dict: Any, **_: Any) -> None:
        response_dict["headers"]["Date"] = date

    store.write_bytes(LEASE, b"me")
    with hooked(store, "before-parse.s3.GetObject", odd):
        found = store.read_versioned(LEASE, aged=True)
    assert found is not None
    assert found.age_s == age


def test_extra_arguments_are_sent_with_conditions(
    moto_s3: S3Server, aws_env: UseServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    bucket = aws_env(moto_s3).make_bucket()
    monkeypatch.setenv("VIDEO_LAB_S3_EXTRA", '{"StorageClass": "STANDARD_IA", "Metadata": {"run": "7"}}')
    store = open_storage(f"s3://{bucket}")
    for size in COMPLETIONS:
        path, _ = begin(store, tmp_path, size, exists=False)
        store.delete(OUTPUT)
        store.publish(path, OUTPUT, replaces=None)
        head = moto_s3.client.head_object(Bucket=bucket, Key=OUTPUT)
        assert head["StorageClass"] == "STANDARD_IA"
        assert set(head["Metadata"]) == {"run", "sha256", "video-lab-write"}

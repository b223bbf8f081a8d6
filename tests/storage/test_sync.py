"""Sync: a model store in a bucket, copied once, by one of many."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import structlog
from filelock import FileLock

from runner.errors import ConfigInvalid, StorageDenied, StorageFull, StorageUnavailable, WeightsMissing
from runner.storage import open_storage
from runner.storage.s3 import S3Storage
from runner.storage.sync import cache_name, sync_models
from tests.s3_servers import FaultyServer, S3Server

FILES = {
    "Wan/config.json": b"{}",
    "Wan/transformer/model-00001-of-00002.safetensors": b"1" * 50_000,
    "Wan/transformer/model-00002-of-00002.safetensors": b"2" * 40_000,
    "process/det/模型 v10.onnx": b"3" * 30_000,
    "loras/other.safetensors": b"not asked for",
}
WANTED = {key: data for key, data in FILES.items() if not key.startswith("loras/")}


def wanted(key: str) -> bool:
    return not key.startswith("loras/")


class Bucket:
    """A model store on the faulty server, with what was read from it."""

    def __init__(self, server: FaultyServer) -> None:
        self.server, self.name = server, server.make_bucket()
        self.uri = f"s3://{self.name}/models/v1"
        for key, data in FILES.items():
            self.put(key, data)
        self.forget()

    def put(self, key: str, data: bytes) -> None:
        self.server.client.put_object(Bucket=self.name, Key=f"models/v1/{key}", Body=data)

    def remove(self, key: str) -> None:
        self.server.client.delete_object(Bucket=self.name, Key=f"models/v1/{key}")

    def forget(self) -> None:
        self.server.requests.clear()

    def read(self) -> list[str]:
        """Keys read since the last time, as often as they were."""
        found = [path for _, path, _ in self.server.seen("GET") if "/models/v1/" in path]
        self.forget()
        keys = [path.partition("/models/v1/")[2].encode("latin-1").decode() for path in found]  # as WSGI spells paths
        return sorted(keys)


@pytest.fixture
def bucket(faulty_s3: FaultyServer, aws_env: Callable[..., S3Server]) -> Bucket:
    aws_env(faulty_s3, AWS_MAX_ATTEMPTS="1")
    return Bucket(faulty_s3)


def tree(folder: Path) -> dict[str, bytes]:
    return {p.relative_to(folder).as_posix(): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


def test_sync_copies_only_wanted_files_and_only_once(bucket: Bucket, tmp_path: Path) -> None:
    folder = sync_models(bucket.uri, tmp_path / "cache", wanted)
    assert tree(folder) == WANTED
    assert bucket.read() == sorted(WANTED)
    assert folder.parent == tmp_path / "cache"
    assert sync_models(bucket.uri + "/", tmp_path / "cache", wanted) == folder
    assert bucket.read() == []
    sync_models(bucket.uri, tmp_path / "cache", lambda key: True)  # another recipe wants more
    assert bucket.read() == ["loras/other.safetensors"]
    assert tree(folder) == FILES


def test_sync_without_download_changes_nothing_and_needs_full_cache(bucket: Bucket, tmp_path: Path) -> None:
    cache = tmp_path / "cache"
    with pytest.raises(WeightsMissing, match=r"4 files, 0\.0 GB, would be downloaded.*dry run"):
        sync_models(bucket.uri, cache, wanted, download=False)
    assert not cache.exists()
    folder = sync_models(bucket.uri, cache, wanted)
    assert sync_models(bucket.uri, cache, wanted, download=False) == folder
    before = tree(cache)
    bucket.put("Wan/config.json", b"{ }")
    with pytest.raises(WeightsMissing, match="1 files"):
        sync_models(bucket.uri, cache, wanted, download=False)
    bucket.put("Wan/config.json", b"{}")
    bucket.remove("process/det/模型 v10.onnx")
    with pytest.raises(WeightsMissing, match="0 files"):
        sync_models(bucket.uri, cache, wanted, download=False)
    assert tree(cache) == before


@pytest.mark.s3
def test_sync_from_real_server_copies_wanted_files(
    seaweedfs_s3: S3Server, aws_env: Callable[..., S3Server], tmp_path: Path
) -> None:
    aws_env(seaweedfs_s3)
    uri = f"s3://{seaweedfs_s3.make_bucket()}"
    store = open_storage(uri)
    for key, data in FILES.items():
        store.write_bytes(key, data)
    folder = sync_models(uri, tmp_path, wanted)
    assert tree(folder) == WANTED
    index = json.loads(folder.with_name(folder.name + ".json").read_text())
    assert {k: v["identity"] for k, v in index["files"].items()} == {k: store.stat(k).identity for k in WANTED}  # type: ignore[union-attr]


def test_sync_copies_changed_files_again(bucket: Bucket, tmp_path: Path) -> None:
    folder = sync_models(bucket.uri, tmp_path, wanted)
    bucket.put("Wan/config.json", b"[]")  # as long as before: only the ETag tells
    (folder / "process/det/模型 v10.onnx").write_bytes(b"cut short")
    (folder / "Wan/transformer/model-00001-of-00002.safetensors").unlink()
    bucket.forget()
    sync_models(bucket.uri, tmp_path, wanted)
    assert tree(folder) == WANTED | {"Wan/config.json": b"[]"}
    assert bucket.read() == [
        "Wan/config.json",
        "Wan/transformer/model-00001-of-00002.safetensors",
        "process/det/模型 v10.onnx",
    ]


def test_sync_removes_files_gone_from_bucket(bucket: Bucket, tmp_path: Path) -> None:
    folder = sync_models(bucket.uri, tmp_path, lambda key: True)
    bucket.remove("Wan/transformer/model-00002-of-00002.safetensors")
    bucket.remove("loras/other.safetensors")
    (folder / "mine.txt").write_bytes(b"put there by a person")
    sync_models(bucket.uri, tmp_path, wanted)
    kept = {"mine.txt", *FILES} - {"Wan/transformer/model-00002-of-00002.safetensors"}
    assert set(tree(folder)) == kept  # the LoRA was nobody's question this time


@pytest.mark.parametrize("text", ["", "{", "[]", '{"version": 0, "files": {}}', '{"version": 1, "files": 3}'])
def test_sync_with_damaged_index_downloads_again(bucket: Bucket, tmp_path: Path, text: str) -> None:
    folder = sync_models(bucket.uri, tmp_path, wanted)
    folder.with_name(folder.name + ".json").write_text(text)
    bucket.forget()
    assert tree(sync_models(bucket.uri, tmp_path, wanted)) == WANTED
    assert bucket.read() == sorted(WANTED)


def test_sync_after_failure_copies_only_missing_files(
    bucket: Bucket, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(S3Storage.__init__, "__kwdefaults__", {"extra": None, "attempts": 1, "sleep": lambda _: None})
    bucket.server.fail("503", "GET", "model-00002", times=1000)
    with pytest.raises(StorageUnavailable, match="model-00002"):
        sync_models(bucket.uri, tmp_path, wanted)
    done = [key for key in bucket.read() if "model-00002" not in key]
    (tmp_path / cache_name(bucket.uri) / "Wan" / f".staged-{'a' * 32}.tmp").write_bytes(b"of a killed process")
    bucket.server.faults.clear()
    folder = sync_models(bucket.uri, tmp_path, wanted)
    assert tree(folder) == WANTED
    assert done == ["Wan/config.json", "Wan/transformer/model-00001-of-00002.safetensors"]
    assert bucket.read() == sorted(set(WANTED) - set(done))


def test_sync_by_two_processes_copies_each_file_once(bucket: Bucket, tmp_path: Path) -> None:
    code = "import sys; from pathlib import Path; from runner.storage.sync import sync_models; "
    code += "print(sync_models(sys.argv[1], Path(sys.argv[2]), lambda key: not key.startswith('loras/')))"
    command = [sys.executable, "-c", code, bucket.uri, tmp_path]
    repository = Path(__file__).parents[2]
    processes = [subprocess.Popen(command, stdout=subprocess.PIPE, cwd=repository) for _ in range(2)]
    outputs = [process.communicate()[0].decode().splitlines()[-1] for process in processes]
    assert [process.returncode for process in processes] == [0, 0]
    assert set(outputs) == {str(tmp_path / cache_name(bucket.uri))}
    assert tree(Path(outputs[0])) == WANTED
    assert bucket.read() == sorted(WANTED)  # each file once, whoever came first


def test_sync_that_waits_for_other_process_logs_waiting(
    bucket: Bucket, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    other = FileLock(tmp_path / (cache_name(bucket.uri) + ".lock"))
    other.acquire()
    events: list[str] = []

    def note(event: str, **_: Any) -> None:
        events.append(event)
        if event == "models.waiting":
            other.release()

    monkeypatch.setattr(structlog, "get_logger", lambda: SimpleNamespace(info=note))
    sync_models(bucket.uri, tmp_path, wanted)
    assert events[0] == "models.waiting"
    assert events[-1] == "models.ready"


def test_sync_logs_files_and_progress(bucket: Bucket, tmp_path: Path) -> None:
    with structlog.testing.capture_logs() as lines:
        sync_models(bucket.uri, tmp_path, wanted)
        sync_models(bucket.uri, tmp_path, wanted)
    names = [line["event"] for line in lines]
    assert names[0] == "models.sync"
    assert names.count("models.file") == len(WANTED)
    assert names.count("models.progress") >= 2
    ready = [line for line in lines if line["event"] == "models.ready"]
    assert [line["downloaded"] for line in ready] == [len(WANTED), 0]
    assert [line["key"] for line in lines if line["event"] == "models.file"] == sorted(WANTED)


def test_sync_with_flipped_bit_in_weights_is_repeated_then_refused(
    bucket: Bucket, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(S3Storage.__init__, "__kwdefaults__", {"extra": None, "attempts": 2, "sleep": lambda _: None})
    bucket.server.fail("flip", "GET", "model-00001")
    bucket.server.fail("flip", "GET", "model-00002", times=2)
    with pytest.raises(StorageUnavailable, match=r"model-00002.*are not the stored ones"):
        sync_models(bucket.uri, tmp_path, wanted)
    with structlog.testing.capture_logs() as lines:
        assert tree(sync_models(bucket.uri, tmp_path, wanted)) == WANTED
    assert "models.unverified" not in [line["event"] for line in lines]


def test_sync_logs_weights_that_cannot_be_verified(bucket: Bucket, tmp_path: Path) -> None:
    """`aws s3 cp` stores large files in parts, without a digest of the whole."""
    where = {"Bucket": bucket.name, "Key": "models/v1/Wan/config.json"}
    upload = where | {"UploadId": bucket.server.client.create_multipart_upload(**where)["UploadId"]}
    etag = bucket.server.client.upload_part(**upload, PartNumber=1, Body=b"{}")["ETag"]
    bucket.server.client.complete_multipart_upload(
        **upload, MultipartUpload={"Parts": [{"PartNumber": 1, "ETag": etag}]}
    )
    with structlog.testing.capture_logs() as lines:
        assert tree(sync_models(bucket.uri, tmp_path, wanted)) == WANTED
    found = [(line["key"], line["log_level"]) for line in lines if line["event"] == "models.unverified"]
    assert found == [("Wan/config.json", "warning")]


def test_sync_of_local_store_copies_nothing(tmp_path: Path) -> None:
    (tmp_path / "models").mkdir()
    for uri in (tmp_path / "models", str(tmp_path / "models"), f"file://{tmp_path}/models"):
        assert sync_models(uri, tmp_path / "cache", wanted) == tmp_path / "models"
    assert not (tmp_path / "cache").exists()
    with pytest.raises(WeightsMissing, match="--models"):
        sync_models(tmp_path / "absent", tmp_path / "cache", wanted)


def test_sync_without_files_to_copy_is_weights_missing(bucket: Bucket, tmp_path: Path) -> None:
    with pytest.raises(WeightsMissing, match="has no files"):
        sync_models(f"s3://{bucket.name}/elsewhere", tmp_path, wanted)
    with pytest.raises(WeightsMissing, match=r"none of the needed files.*Wan/config\.json"):
        sync_models(bucket.uri, tmp_path, lambda key: False)
    with pytest.raises(WeightsMissing, match="ucket"):
        sync_models("s3://no-such-bucket/models", tmp_path, wanted)


def test_sync_refuses_keys_that_lead_out_of_cache(bucket: Bucket, tmp_path: Path) -> None:
    bucket.put("../../../evil", b"x")
    with pytest.raises(ConfigInvalid, match="evil"):
        sync_models(bucket.uri, tmp_path / "a" / "b" / "c", wanted)
    assert not list(tmp_path.rglob("evil"))


def test_sync_with_too_small_cache_fails_before_download(
    bucket: Bucket, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import shutil

    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=100_000))
    with pytest.raises(StorageFull, match="--cache"):
        sync_models(bucket.uri, tmp_path, wanted)
    assert bucket.read() == []


def test_sync_with_unwritable_cache_is_storage_denied(
    bucket: Bucket, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def deny(path: Path, *_: object, **__: object) -> None:
        raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr(Path, "mkdir", deny)
    with pytest.raises(StorageDenied, match="--user"):
        sync_models(bucket.uri, tmp_path / "cache", wanted)


def test_cache_name_is_stable_and_unique() -> None:
    assert cache_name("s3://bucket/models/v1") == cache_name("s3://bucket/models/v1")
    assert cache_name("s3://bucket/models/v1").startswith("v1-")
    names = {cache_name(f"s3://{root}") for root in ("a/v1", "b/v1", "a", "a/中文", "a/..", "a/v 1", "a/" + "x" * 500)}
    assert len(names) == 7
    assert all(os.path.basename(name) == name and len(name) < 80 and name[0] not in ".-" for name in names)

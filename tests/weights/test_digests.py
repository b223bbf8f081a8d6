from __future__ import annotations

import hashlib
import json
import os
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import save_file

from runner.errors import StorageDenied, WeightsCorrupt
from runner.storage import file_hashes
from runner.storage.file_hashes import FileHashes
from runner.weights.digests import METADATA_KEY, FileDigests


def sha(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


@pytest.fixture
def hashed(monkeypatch) -> list[str]:
    """Names of files that were read in full."""
    names: list[str] = []
    honest = file_hashes.sha256_stream
    monkeypatch.setattr(
        file_hashes, "sha256_stream", lambda file: (names.append(Path(file.name).name), honest(file))[1]
    )
    return names


@pytest.fixture
def file(tmp_path) -> Path:
    path = tmp_path / "store" / "model.onnx"
    path.parent.mkdir()
    path.write_bytes(b"weights")
    os.utime(path, (time.time() - 60,) * 2)  # what has just changed is not remembered
    return path


def one(file: Path, folder: Path | None = None) -> str:
    return FileDigests().find([file], file.parent, folder)[file]


def test_file_digest_is_hashed_once_and_cached(file, tmp_path, hashed):
    cache = tmp_path / "cache"
    assert one(file, cache) == sha(b"weights")
    assert one(file, cache) == sha(b"weights")
    assert hashed == ["model.onnx"]


@pytest.mark.parametrize("change", ["size", "mtime", "inode"])
def test_file_digest_of_changed_file_is_hashed_again(file, tmp_path, hashed, change):
    cache = tmp_path / "cache"
    one(file, cache)
    stat = file.stat()
    if change == "size":
        file.write_bytes(b"weights!")
        os.utime(file, ns=(stat.st_atime_ns, stat.st_mtime_ns))
    elif change == "mtime":
        file.write_bytes(b"Weights")
        os.utime(file, ns=(stat.st_atime_ns, stat.st_mtime_ns + 1))
    else:
        other = file.with_name("other")
        other.write_bytes(b"Weights")
        os.utime(other, ns=(stat.st_atime_ns, stat.st_mtime_ns))
        other.replace(file)
    assert one(file, cache) == sha(file.read_bytes())
    assert len(hashed) == 2


def test_file_digests_without_cache_folder_hash_once_per_object(file, hashed):
    digests = FileDigests()
    assert digests.find([file], file.parent) == digests.find([file], file.parent)
    assert hashed == ["model.onnx"]


def test_file_digests_with_damaged_cache_hash_again(file, tmp_path):
    (tmp_path / "weight-identities.json").write_text('{"x": ')
    assert one(file, tmp_path) == sha(b"weights")
    assert sha(b"weights") in (tmp_path / "weight-identities.json").read_text()


def test_file_digests_in_cache_of_version_0_1_0_are_used(file, tmp_path, hashed):
    stat = file.stat()
    entry = {"file": [stat.st_size, stat.st_mtime_ns, stat.st_ino], "sha256": sha(b"weights")}
    (tmp_path / "weight-identities.json").write_text(json.dumps({str(file): entry}, indent=1))
    assert one(file, tmp_path) == sha(b"weights")
    assert hashed == []
    other = file.with_name("other.onnx")
    other.write_bytes(b"others")
    os.utime(other, (1, 1))
    assert one(other, tmp_path) == sha(b"others")  # and is still there when the file is written anew
    assert (one(file, tmp_path), one(other, tmp_path)) == (sha(b"weights"), sha(b"others"))
    assert hashed == ["other.onnx"]


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_file_digests_with_unwritable_cache_is_storage_denied(file, tmp_path):
    closed = tmp_path / "closed"
    closed.mkdir(mode=0o500)
    with pytest.raises(StorageDenied):
        one(file, closed)


def test_file_digests_of_many_threads_are_all_cached(tmp_path):
    files = []
    for i in range(16):
        files.append(tmp_path / f"{i}.onnx")
        files[-1].write_bytes(b"%d" % i)
        os.utime(files[-1], (1, 1))
    cache = tmp_path / "cache"
    with ThreadPoolExecutor(8) as pool:
        digests = list(pool.map(lambda file: one(file, cache), files))
    assert digests == [sha(b"%d" % i) for i in range(16)]
    memory = FileHashes(cache / "weight-identities.json")
    assert [memory.known(file) for file in files] == digests
    assert [p.name for p in cache.iterdir()] == ["weight-identities.json"]


def test_file_digest_in_safetensors_metadata_is_used(tmp_path, hashed):
    file = tmp_path / "w.safetensors"
    save_file({"a": np.zeros(3)}, file, metadata={METADATA_KEY: "a" * 64})
    assert one(file) == "a" * 64
    assert hashed == []


@pytest.mark.parametrize("value", ["", "A" * 64, "a" * 63, "sha256:" + "a" * 64])
def test_file_digest_in_metadata_that_is_no_sha256_is_ignored(tmp_path, hashed, value):
    file = tmp_path / "w.safetensors"
    save_file({"a": np.zeros(3)}, file, metadata={METADATA_KEY: value})
    assert one(file) == sha(file.read_bytes())
    assert hashed == ["w.safetensors"]


def test_file_digest_of_broken_safetensors_is_weights_corrupt(tmp_path):
    (tmp_path / "w.safetensors").write_bytes(b"nothing")
    with pytest.raises(WeightsCorrupt):
        one(tmp_path / "w.safetensors")


def hub_record(base: Path, name: str, etag: str, age_s: float = 0) -> None:
    record = base / ".cache/huggingface/download" / f"{name}.metadata"
    record.parent.mkdir(parents=True, exist_ok=True)
    record.write_text(f"{'c' * 40}\n{etag}\n{time.time() - age_s}\n")


@pytest.mark.parametrize("base", [".", ".."])
def test_file_digest_in_hub_record_is_used(file, hashed, base):
    """The download's own folder may be the file's folder or any above it, up to the store's root."""
    folder = (file.parent / base).resolve()
    hub_record(folder, file.relative_to(folder).as_posix(), "b" * 64)
    assert FileDigests().find([file], folder)[file] == "b" * 64
    assert hashed == []


def test_hub_record_outside_store_is_ignored(file):
    hub_record(file.parent.parent, f"{file.parent.name}/{file.name}", "b" * 64)
    assert one(file) == sha(b"weights")


@pytest.mark.parametrize(("etag", "age_s"), [("d" * 40, 0), ("b" * 64, 3600)])
def test_hub_record_with_git_etag_or_old_date_is_ignored(file, etag, age_s):
    hub_record(file.parent, file.name, etag, age_s)
    assert one(file) == sha(b"weights")


def test_hub_record_in_other_format_is_ignored(file):
    hub_record(file.parent, file.name, "b" * 64)
    (file.parent / ".cache/huggingface/download/model.onnx.metadata").write_text("nonsense")
    assert one(file) == sha(b"weights")

from __future__ import annotations

import hashlib
import os
import time
from pathlib import Path

import pytest

from runner.storage.file_hashes import FileHashes, content_sha256


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "clip.mp4"
    path.write_bytes(b"frames")
    os.utime(path, (1_000_000_000, 1_000_000_000))
    return path


def digest(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def reads(monkeypatch) -> list[int]:
    """One entry for each file that is read whole."""
    done: list[int] = []
    original = hashlib.file_digest
    monkeypatch.setattr(hashlib, "file_digest", lambda *a: done.append(1) or original(*a))
    return done


def test_file_is_hashed_once_and_again_when_changed(file, monkeypatch):
    done, hashes = reads(monkeypatch), FileHashes()
    assert hashes.sha256(file) == hashes.sha256(file) == digest(b"frames")
    assert len(done) == 1
    file.write_bytes(b"other!")
    os.utime(file, (1_000_000_001, 1_000_000_001))
    assert hashes.sha256(file) == digest(b"other!")
    assert len(done) == 2


def test_file_with_same_size_and_time_but_other_inode_is_hashed_again(file, tmp_path, monkeypatch):
    hashes = FileHashes()
    hashes.sha256(file)
    other = tmp_path / "other"
    other.write_bytes(b"FRAMES")
    os.utime(other, (1_000_000_000, 1_000_000_000))
    other.replace(file)
    assert hashes.sha256(file) == digest(b"FRAMES")


def test_file_changed_just_now_is_not_remembered(file):
    """It may change again within one tick of the file system's clock, with the same size, time and inode."""
    hashes = FileHashes()
    file.write_bytes(b"first!")
    stamp = file.stat().st_mtime_ns
    assert hashes.sha256(file) == digest(b"first!")
    file.write_bytes(b"second")
    os.utime(file, ns=(stamp, stamp))
    assert hashes.sha256(file) == digest(b"second")
    assert time.time_ns() - stamp < 2e9, "the test took too long to show anything"


def test_saved_hashes_are_used_by_next_run(file, tmp_path, monkeypatch):
    first = FileHashes(tmp_path / "cache/hashes.json")
    first.sha256(file)
    first.save()
    done = reads(monkeypatch)
    assert FileHashes(tmp_path / "cache/hashes.json").sha256(file) == digest(b"frames")
    assert done == []


@pytest.mark.parametrize("content", [b"", b"[]", b"{", b'{"version": 1, "files": {"a": 1}}', b"[" * 100_000, b"\xff"])
def test_damaged_hashes_file_only_costs_hashing_again(file, tmp_path, content):
    (tmp_path / "hashes.json").write_bytes(content)
    hashes = FileHashes(tmp_path / "hashes.json")
    assert hashes.sha256(file) == digest(b"frames")
    hashes.save()
    memory = (tmp_path / "hashes.json").read_text()
    assert digest(b"frames") in memory
    assert file.name not in memory, "a file's name may hold a secret"


def test_hashes_file_shared_by_processes_loses_no_hash(tmp_path):
    """Both processes read the file before either saves."""
    files = [tmp_path / "a", tmp_path / "b"]
    memory = tmp_path / "hashes.json"
    both = [FileHashes(memory), FileHashes(memory)]
    for path, hashes in zip(files, both, strict=True):
        path.write_bytes(path.name.encode())
        os.utime(path, (1, 1))
        hashes.sha256(path)
    for hashes in both:
        hashes.save()
    assert [FileHashes(memory).known(path) for path in files] == [digest(b"a"), digest(b"b")]


def test_known_digest_of_changed_file_is_none(file, monkeypatch):
    hashes = FileHashes()
    assert hashes.known(file) is None
    hashes.sha256(file)
    done = reads(monkeypatch)
    assert hashes.known(file) == digest(b"frames")
    os.utime(file, (1_000_000_001, 1_000_000_001))
    assert hashes.known(file) is None
    assert done == []


def test_hashes_that_could_not_be_saved_are_saved_later(file, tmp_path):
    hashes = FileHashes(tmp_path / "cache" / "hashes.json")
    hashes.sha256(file)
    (tmp_path / "cache").write_bytes(b"in the way")
    with pytest.raises(OSError, match="exists"):
        hashes.save()
    (tmp_path / "cache").unlink()
    hashes.save()
    assert FileHashes(tmp_path / "cache" / "hashes.json").known(file) == digest(b"frames")


def test_content_sha256_is_computed_again_only_for_changed_file(tmp_path):
    path = tmp_path / "clip.mp4"
    path.write_bytes(b"abc")
    os.utime(path, (1, 1))
    # FIPS 180-2, appendix B.1
    assert content_sha256(path) == "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"
    stat = path.stat()
    path.write_bytes(b"abd")
    os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns))  # same path, size, inode and time: taken at its word
    assert content_sha256(path).startswith("ba7816bf")
    os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns + 1))
    assert not content_sha256(path).startswith("ba7816bf")


def test_fact_is_found_once_and_kept_with_hashes(file, tmp_path):
    memory = tmp_path / "memory.json"
    hashes = FileHashes(memory)
    hashes.sha256(file)
    assert [hashes.fact("yes", lambda: True), hashes.fact("no", lambda: False)] == [True, False]
    assert hashes.fact("yes", lambda: pytest.fail("found again"))
    hashes.save()
    other = FileHashes(memory)
    assert other.known(file) == digest(b"frames")
    assert not other.fact("no", lambda: pytest.fail("found again"))
    other.fact("third", lambda: True)
    other.save()
    assert FileHashes(memory).fact("yes", lambda: pytest.fail("lost"))


def test_fact_that_cannot_be_found_is_looked_for_again():
    hashes = FileHashes()
    with pytest.raises(ZeroDivisionError):
        hashes.fact("f", lambda: bool(1 / 0))
    assert hashes.fact("f", lambda: True)

from __future__ import annotations

import hashlib
import os
import time
from pathlib import Path

import pytest

from runner.batch.hashes import FileHashes


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


def test_a_file_is_read_once_and_again_when_it_changes(file, monkeypatch):
    done, hashes = reads(monkeypatch), FileHashes()
    assert hashes.sha256(file) == hashes.sha256(file) == digest(b"frames")
    assert len(done) == 1
    file.write_bytes(b"other!")
    os.utime(file, (1_000_000_001, 1_000_000_001))
    assert hashes.sha256(file) == digest(b"other!")
    assert len(done) == 2


def test_a_file_of_the_same_size_and_time_under_another_inode_is_read(file, tmp_path, monkeypatch):
    hashes = FileHashes()
    hashes.sha256(file)
    other = tmp_path / "other"
    other.write_bytes(b"FRAMES")
    os.utime(other, (1_000_000_000, 1_000_000_000))
    other.replace(file)
    assert hashes.sha256(file) == digest(b"FRAMES")


def test_a_file_that_has_just_changed_is_not_remembered(file):
    """It may change once more within a tick of the file system's clock, and keep size, time and inode."""
    hashes = FileHashes()
    file.write_bytes(b"first!")
    stamp = file.stat().st_mtime_ns
    assert hashes.sha256(file) == digest(b"first!")
    file.write_bytes(b"second")
    os.utime(file, ns=(stamp, stamp))
    assert hashes.sha256(file) == digest(b"second")
    assert time.time_ns() - stamp < 2e9, "the test took too long to show anything"


def test_what_is_saved_is_known_to_the_next_run(file, tmp_path, monkeypatch):
    first = FileHashes(tmp_path / "cache/hashes.json")
    first.sha256(file)
    first.save()
    done = reads(monkeypatch)
    assert FileHashes(tmp_path / "cache/hashes.json").sha256(file) == digest(b"frames")
    assert done == []


@pytest.mark.parametrize("content", [b"", b"[]", b"{", b'{"version": 1, "files": {"a": 1}}', b"[" * 100_000, b"\xff"])
def test_a_damaged_memory_only_costs_hashing_again(file, tmp_path, content):
    (tmp_path / "hashes.json").write_bytes(content)
    hashes = FileHashes(tmp_path / "hashes.json")
    assert hashes.sha256(file) == digest(b"frames")
    hashes.save()
    memory = (tmp_path / "hashes.json").read_text()
    assert digest(b"frames") in memory
    assert file.name not in memory, "a file's name may hold a secret"

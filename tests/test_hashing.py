"""Hashing: one function for the sha256 of a file."""

from __future__ import annotations

import hashlib
from pathlib import Path

import pytest

from runner.hashing import combine, sha256_file, sha256_stream

RUNNER = Path(__file__).resolve().parent.parent / "runner"


def test_sha256_file_is_that_of_its_bytes(tmp_path):
    data = bytes(range(256)) * 5000
    (tmp_path / "x").write_bytes(data)
    assert sha256_file(tmp_path / "x") == hashlib.sha256(data).hexdigest()
    with pytest.raises(FileNotFoundError):
        sha256_file(tmp_path / "none")


def test_sha256_stream_begins_at_its_position(tmp_path):
    (tmp_path / "x").write_bytes(b"headdata")
    with (tmp_path / "x").open("rb") as stream:
        stream.seek(4)
        assert sha256_stream(stream) == hashlib.sha256(b"data").hexdigest()


def test_files_are_hashed_in_one_module():
    users = {path.relative_to(RUNNER).as_posix() for path in RUNNER.rglob("*.py") if "file_digest(" in path.read_text()}
    assert users == {"hashing.py"}


def test_combine_is_the_digest_of_a_sha256sum_listing():
    assert combine({"a": "1" * 64}) == "1" * 64
    both = {"b": "2" * 64, "a": "1" * 64}
    assert combine(both) == hashlib.sha256(f"{'1' * 64}  a\n{'2' * 64}  b\n".encode()).hexdigest()
    assert combine(both) != combine({"a": "2" * 64, "b": "1" * 64})

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from runner.batch.fingerprint import differences, fingerprint, fingerprint_parts
from runner.batch.hashes import FileHashes
from runner.batch.inputs import InputIndex
from runner.errors import InputNotFound
from runner.spec.manifest import Job
from runner.spec.options import JobOptions

IDENTITY = {"transformer": "sha256:" + "0" * 64}


@pytest.fixture
def job(tmp_path: Path) -> Job:
    (tmp_path / "ref.png").write_bytes(b"reference")
    (tmp_path / "video.mp4").write_bytes(b"video")
    return Job("a", str(tmp_path / "ref.png"), str(tmp_path / "video.mp4"), None, "dance", JobOptions(), 1)


def parts_of(job: Job) -> dict:
    return fingerprint_parts(job, InputIndex(FileHashes()).identify(job), IDENTITY)


def test_local_inputs_are_identified_by_their_bytes(job, tmp_path):
    found = InputIndex(FileHashes()).identify(job)
    import hashlib

    assert found["video"].identity == "sha256:" + hashlib.sha256(b"video").hexdigest()
    assert found["video"].bytes == 5


def test_moving_or_renaming_an_input_changes_nothing(job, tmp_path):
    moved = tmp_path / "elsewhere.png"
    moved.write_bytes(b"reference")
    assert parts_of(job) == parts_of(replace(job, id="b", reference=str(moved), line=9))


def test_every_option_counts(job):
    base = fingerprint(parts_of(job))
    for change in ({"seed": 1}, {"fps": 8}, {"output": {"crf": 20}}, {"preprocess": {"parity": True}}):
        assert fingerprint(parts_of(replace(job, options=JobOptions.model_validate(change)))) != base


def test_contents_prompt_and_weights_count(job, tmp_path):
    base = fingerprint(parts_of(job))
    assert fingerprint(parts_of(replace(job, prompt="sit"))) != base
    assert (
        fingerprint(fingerprint_parts(job, InputIndex(FileHashes()).identify(job), {"transformer": "sha256:1"})) != base
    )
    (tmp_path / "video.mp4").write_bytes(b"other")
    assert fingerprint(parts_of(job)) != base


def test_a_missing_input_is_named(job, tmp_path):
    (tmp_path / "video.mp4").unlink()
    with pytest.raises(InputNotFound, match=r"video\.mp4"):
        InputIndex(FileHashes()).identify(job)


def test_differences_are_words():
    old = {"options.seed": 41, "input.video": "sha256:" + "a" * 64, "gone": 1}
    new = {"options.seed": 42, "input.video": "sha256:" + "b" * 64, "new": None}
    assert differences(old, new) == [
        "gone: 1 → (unset)",
        "input.video: sha256:aaaaaaaa → sha256:bbbbbbbb",
        "new: (unset) → None",
        "options.seed: 41 → 42",
    ]


flat = st.dictionaries(st.text(max_size=8), st.none() | st.booleans() | st.integers() | st.text(max_size=8), max_size=6)


@given(flat, flat)
def test_equal_fingerprints_mean_no_differences(old, new):
    same = fingerprint(old) == fingerprint(new)
    # JSON has one 1 where Python has 1 and True; both sides here are what JSON makes of them
    assert same == (repr(sorted(old.items())) == repr(sorted(new.items())))
    if same:
        assert differences(old, new) == []

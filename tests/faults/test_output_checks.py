"""Each thing that a kill or a fault could do wrong is seen by the checks."""

from __future__ import annotations

import hashlib
import json

import pytest

from runner.records.record import OutputRecord, ResultRecord
from tests.faults.output_checks import check_end, check_meanwhile, hidden_files, learn, look

CLIPS = {"old": b"the older clip", "new": b"the newer clip"}
PICTURES = {"old": [b"o0", b"o1"], "new": [b"n0", b"n1"]}


def record_of(which: str, files: dict[str, bytes], key: str, **more) -> bytes:
    data = b"".join(files.values())
    sha256 = hashlib.sha256(data).hexdigest()
    record = ResultRecord(
        job_id="a",
        status="succeeded",
        attempt=1,
        run_id="r",
        reason="",
        started_at="",
        finished_at="",
        fingerprint=which,
        fingerprint_parts={},
        output=OutputRecord(
            uri=key,
            key=key,
            bytes=len(data),
            files=len(files),
            identity=f"sha256:{sha256}",
            sha256=None if key.endswith("/") else sha256,
            frames=2,
            fps="8",
            width=4,
            height=4,
            frames_sha256=f"frames of {which}",
        ),
    )
    return record.model_copy(update=more).to_json()


def clip(which: str) -> dict[str, bytes]:
    data = CLIPS[which]
    files = {"jobs/a/output.mp4": data, "jobs/a/poster.jpg": b"poster of " + data}
    return files | {"jobs/a/result.json": record_of(which, {"output.mp4": data}, "jobs/a/output.mp4")}


def pictures(which: str) -> dict[str, bytes]:
    key = f"jobs/a/frames/{which}-token/"
    files = {f"{key}{i:06d}.png": data for i, data in enumerate(PICTURES[which])}
    return files | {"jobs/a/result.json": record_of(which, files, key)}


MADE = learn(clip("old")) | learn(clip("new"))
MADE_PICTURES = learn(pictures("old")) | learn(pictures("new"))


def kinds(files: dict[str, bytes], made=MADE, **more) -> set[str]:
    lenient = {"may_lack_record": False, "may_have_failed": False} | more
    return {problem.kind for problem in check_meanwhile(look(files, "a", made), "old", "new", **lenient)}


@pytest.mark.parametrize(("kind", "made"), [(clip, MADE), (pictures, MADE_PICTURES)])
def test_what_is_right_is_called_right(kind, made):
    for which in ("old", "new"):
        assert look(kind(which), "a", made).done == which
        assert kinds(kind(which), made) == set()
    assert check_end(kind("new"), {"a": "new"}, made) == []
    between = kind("old") | {k: v for k, v in kind("new").items() if "result" not in k}
    del between["jobs/a/result.json"]
    assert kinds(between, made, may_lack_record=True) == set()


@pytest.mark.parametrize(("kind", "made"), [(clip, MADE), (pictures, MADE_PICTURES)])
def test_a_record_beside_another_run_s_bytes_is_wrong(kind, made):
    files = {k: v for k, v in kind("new").items() if "result" not in k} | {
        "jobs/a/result.json": kind("old")["jobs/a/result.json"]
    }
    assert "wrong frames" in kinds(files, made)
    assert look(files, "a", made).done is None
    assert {p.kind for p in check_end(files, {"a": "old"}, made)} == {"job lost"}


def test_other_frames_under_a_right_fingerprint_are_wrong():
    files = clip("new")
    record = json.loads(files["jobs/a/result.json"])
    record["output"]["frames_sha256"] = "frames of another"
    assert "wrong frames" in kinds(files | {"jobs/a/result.json": json.dumps(record).encode()})


@pytest.mark.parametrize("field", ["identity", "sha256"])
def test_a_digest_that_the_output_has_not_is_wrong(field):
    files = clip("new")
    record = json.loads(files["jobs/a/result.json"])
    record["output"][field] = "sha256:" + "0" * 64
    assert kinds(files | {"jobs/a/result.json": json.dumps(record).encode()}) == {"record"}


def test_an_etag_is_held_against_the_bytes():
    data = CLIPS["new"]
    for digest, wanted in ((hashlib.md5(data).hexdigest(), set()), ("0" * 32, {"record"})):
        files = clip("new")
        record = json.loads(files["jobs/a/result.json"])
        record["output"]["identity"] = f"etag:{digest}:{len(data)}"
        assert kinds(files | {"jobs/a/result.json": json.dumps(record).encode()}) == wanted


@pytest.mark.parametrize("data", [b"", b"{", b"[]", b'{"status": "succeeded"}'])
def test_a_torn_record_is_wrong(data):
    assert "record" in kinds(clip("old") | {"jobs/a/result.json": data})


def test_an_older_output_that_is_gone_or_mixed_is_missed():
    assert "output removed" in kinds({}, may_lack_record=True)
    mixed = pictures("old") | {"jobs/a/frames/old-token/000001.png": PICTURES["new"][1]}
    del mixed["jobs/a/result.json"]
    assert "output removed" in kinds(mixed, MADE_PICTURES, may_lack_record=True)


def test_an_older_record_that_is_gone_is_missed():
    files = clip("old")
    del files["jobs/a/result.json"]
    assert kinds(files) == {"record"}


def test_a_failure_over_an_older_output_is_wrong():
    failed = record_of("new", {"x": b"x"}, "jobs/a/output.mp4", status="failed", output=None)
    assert kinds(clip("old") | {"jobs/a/result.json": failed}, may_have_failed=True) == {"record"}
    replaced = clip("new") | {"jobs/a/result.json": failed}
    assert kinds(replaced, may_have_failed=True) == set()
    assert kinds(replaced) == {"called failed"}
    alone = look({"jobs/a/result.json": failed}, "a", MADE)
    lenient = {"may_lack_record": False, "may_have_failed": True}
    assert check_meanwhile(alone, None, "new", **lenient) == []
    assert check_meanwhile(alone, None, "new", **lenient | {"may_have_failed": False})


@pytest.mark.parametrize(
    "more",
    [
        {"jobs/a/attempt.json": b"{}"},
        {"jobs/a/frames/000000.png": b"x"},
        {"jobs/b/output.mp4": b"x"},
        {"jobs/a/pose.mp4": b"x"},
    ],
)
def test_what_is_left_over_at_the_end_is_seen(more):
    assert {p.kind for p in check_end(clip("new") | more, {"a": "new"}, MADE)} == {"left over"}


def test_hidden_files_of_a_job_are_left_over_and_those_of_a_run_are_counted():
    """A rerun of a job removes its own; what a killed run left of its summary is for `video-lab clean`."""
    for key in (f"jobs/a/.staged-{'0' * 32}.tmp", f"jobs/a/frames/new-token/.staged-{'1' * 32}.tmp"):
        assert [p.kind for p in check_end(clip("new") | {key: b"half"}, {"a": "new"}, MADE)] == ["left over"]
        assert [p.kind for p in check_end(pictures("new") | {key: b"half"}, {"a": "new"}, MADE_PICTURES)] == [
            "left over"
        ]
    hidden = {f"runs/r/.staged-{'0' * 32}.tmp": b"half", ".video-lab-probe-0": b""}
    assert check_end(clip("new") | hidden, {"a": "new"}, MADE) == []
    assert hidden_files(clip("new") | hidden) == list(hidden)


def test_another_run_s_preview_is_seen_at_the_end():
    files = clip("new") | {"jobs/a/poster.jpg": clip("old")["jobs/a/poster.jpg"]}
    assert {p.kind for p in check_end(files, {"a": "new"}, MADE)} == {"wrong frames"}

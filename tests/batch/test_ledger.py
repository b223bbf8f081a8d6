from __future__ import annotations

import hashlib
import json
from pathlib import Path

import pytest

from runner.batch.fingerprint import fingerprint
from runner.batch.ledger import Decision, Ledger, output_identity
from runner.errors import StorageConflict, StorageUnavailable
from runner.records.record import ErrorRecord, OutputRecord, ResultRecord
from runner.storage import open_storage
from runner.storage.disk import staged

PARTS = {"options.seed": 42, "prompt": "dance"}
OTHER = {"options.seed": 41, "prompt": "dance"}


@pytest.fixture
def storage(tmp_path: Path):
    return open_storage(tmp_path / "out")


def result(storage, *, status="succeeded", parts=PARTS, attempt=1, output=b"mp4", code="internal") -> ResultRecord:
    """A record as the batch leaves it, its output beside it."""
    made = None
    if status == "succeeded":
        storage.write_bytes("jobs/a/output.mp4", output)
        identity, size, files = output_identity(storage, "jobs/a/output.mp4")
        made = OutputRecord(
            uri=storage.uri("jobs/a/output.mp4"),
            key="jobs/a/output.mp4",
            bytes=size,
            files=files,
            identity=identity,
            sha256=None,
            frames=1,
            fps="16",
            width=16,
            height=16,
            frames_sha256="0",
        )
    record = ResultRecord(
        job_id="a",
        status=status,
        attempt=attempt,
        run_id="r",
        reason="",
        started_at="t",
        finished_at="t",
        fingerprint=fingerprint(parts),
        fingerprint_parts=parts,
        output=made,
        error=None if made else ErrorRecord(code=code, message="m", stage="s", retryable=False),
    )
    storage.write_bytes("jobs/a/result.json", record.to_json())
    storage.delete("jobs/a/attempt.json")
    return record


def decide(storage, parts=PARTS, **options):
    return Ledger(storage, **options).decide("a", fingerprint(parts), parts)


def test_job_without_record_runs(storage):
    decision = decide(storage)
    assert (decision.action, decision.reason, decision.attempt) == ("run", "no record yet", 1)


def test_done_job_is_skipped(storage):
    result(storage)
    assert decide(storage).action == "skip"
    assert decide(storage).reason == "done"


def test_done_job_with_force_runs(storage):
    result(storage)
    assert decide(storage, force=True).action == "run"


def test_job_with_changed_option_runs_and_reason_names_option(storage):
    result(storage, parts=OTHER)
    assert decide(storage).reason == "options.seed: 41 → 42"
    assert decide(storage).attempt == 1


@pytest.mark.parametrize("change", ["gone", "other bytes, same length", "longer"])
def test_job_with_changed_output_file_runs_again(storage, change):
    result(storage)
    if change == "gone":
        storage.delete("jobs/a/output.mp4")
    else:
        storage.write_bytes("jobs/a/output.mp4", b"mp5" if "same" in change else b"mp4 and more")
    decision = decide(storage)
    assert decision.action == "run"
    assert "output" in decision.reason


def test_done_job_in_moved_output_folder_is_skipped(storage, tmp_path):
    result(storage)
    (tmp_path / "out").rename(tmp_path / "moved")
    assert decide(open_storage(tmp_path / "moved")).action == "skip"


def test_failed_job_runs_again_until_max_attempts(storage):
    result(storage, status="failed", attempt=2)
    assert decide(storage).attempt == 3
    assert "internal" in decide(storage).reason
    result(storage, status="failed", attempt=3)
    assert decide(storage).action == "exhausted"
    assert "--max-attempts 0" in decide(storage).reason
    assert decide(storage, max_attempts=0).attempt == 4
    assert decide(storage, force=True).action == "run"


def died(storage, *, parts=PARTS, stage="generating", alone=False, **options) -> Ledger:
    """As if a process had been killed at this stage of the job, and its lease had run out."""
    ledger = Ledger(storage, lease_s=0, **options)
    ledger.begin("a", ledger.decide("a", fingerprint(parts), parts), fingerprint(parts), "r", alone=alone)
    ledger.advance("a", stage)
    return ledger


def test_failure_of_unavailable_storage_uses_no_attempt(storage):
    result(storage, status="failed", attempt=3, code="storage.unavailable")
    assert (decide(storage).action, decide(storage).attempt, decide(storage).counted) == ("run", 4, 0)
    died(storage)  # once, which counts
    assert (decide(storage).action, decide(storage).counted) == ("run", 1)


def test_failed_job_with_changed_option_has_new_attempts(storage):
    result(storage, status="failed", parts=OTHER, attempt=3)
    decision = decide(storage)
    assert (decision.action, decision.attempt, decision.reason) == ("run", 1, "options.seed: 41 → 42")


def test_retry_failed_runs_only_failed_jobs(storage):
    assert decide(storage, retry_failed=True).action == "skip"
    result(storage)
    done = decide(storage, retry_failed=True)
    assert (done.action, done.reason) == ("skip", "succeeded before; --retry-failed runs only failed jobs")
    changed = decide(storage, parts=OTHER, retry_failed=True)
    assert changed.action == "skip"
    assert (
        changed.reason == "changed, but did not fail (options.seed: 42 → 41); a run without --retry-failed renders it"
    )
    assert decide(storage, parts=OTHER).action == "run"
    result(storage, status="failed")
    assert decide(storage, retry_failed=True).action == "run"
    assert decide(storage, parts=OTHER, retry_failed=True).reason == "options.seed: 42 → 41"


def test_crash_while_generating_is_counted(storage):
    for attempt in (1, 2, 3):
        decision = decide(storage)
        assert (decision.action, decision.attempt, decision.suspect) == ("run", attempt, attempt > 1)
        died(storage)
    decision = decide(storage)
    assert (decision.action, decision.error) == ("exhausted", None)
    ledger = Ledger(storage)
    record = ledger.crashed("a", PARTS, "r", "bf16", decision)
    assert record is not None
    assert record.error is not None
    assert record.error.code == "job.crashed"
    assert ledger.result("a") == record.model_copy(update={"attempts_counted": 3})
    assert ledger.attempt("a") is None
    assert decide(storage).action == "exhausted"


@pytest.mark.parametrize("stage", ["preparing", "delivering"])
def test_crash_while_preparing_or_delivering_is_not_counted(storage, stage):
    for _ in range(6):
        died(storage, stage=stage)
        decision = decide(storage)
        assert (decision.action, decision.counted) == ("run", 0)
        assert decision.suspect, "it may be the cause all the same, so it runs last and alone"


def test_crash_while_preparing_job_that_runs_alone_is_counted(storage):
    for _ in range(3):
        died(storage, stage="preparing", alone=True)
    assert decide(storage).action == "exhausted"


def test_crash_after_stop_signal_is_not_counted(storage):
    for _ in range(4):
        ledger = Ledger(storage, lease_s=0)
        ledger.begin("a", decide(storage), fingerprint(PARTS), "r")
        ledger.advance("a", "generating")
        ledger.note_stopping()
    decision = decide(storage)
    assert (decision.action, decision.counted, decision.suspect) == ("run", 0, False)
    assert "was stopped" in decision.reason


def test_mark_of_version_0_1_0_is_counted(storage):
    mark = {"schema_version": 1, "job_id": "a", "attempt": 3, "fingerprint": fingerprint(PARTS), "run_id": "r"}
    storage.write_bytes("jobs/a/attempt.json", json.dumps(mark | {"host": "h", "started_at": "t"}).encode())
    assert decide(storage).action == "exhausted"


def test_mark_with_other_fingerprint_parts_is_not_counted(storage):
    ledger = Ledger(storage, lease_s=0)
    ledger.begin("a", decide(storage, OTHER), fingerprint(OTHER), "r")
    decision = decide(storage)
    assert (decision.action, decision.attempt) == ("run", 1)
    assert "other inputs or options" in decision.reason


def test_begin_removes_staged_files_of_killed_attempt(storage, tmp_path):
    storage.write_bytes("jobs/b/attempt.json", b"{}")
    left = [tmp_path / f"out/jobs/{job}/.staged-{'0' * 32}.tmp" for job in "ab"]
    for path in left:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(b"half")
    with staged(tmp_path / "out/jobs/a/output.mp4") as file:  # by a process that lives
        Ledger(storage).begin("a", decide(storage), fingerprint(PARTS), "r")
        file.write(b"whole")
    assert [path.exists() for path in left] == [False, True], "its own, and no other job's"
    assert storage.read_bytes("jobs/a/output.mp4") == b"whole"


def test_abandon_removes_mark_of_job(storage):
    ledger = Ledger(storage)
    ledger.begin("a", decide(storage), fingerprint(PARTS), "r")
    ledger.abandon("a")
    assert decide(storage).attempt == 1
    assert list(storage.list("jobs/")) == []


def test_crash_while_replacing_output_keeps_older_output_done(storage):
    """The mark of the new attempt is there. The old record still describes the old output."""
    result(storage, parts=OTHER)
    died(storage)
    assert decide(storage, OTHER).action == "skip"
    assert decide(storage).attempt == 2


def fail(storage, *, parts=PARTS, blames_job=True, code="internal", **options) -> str:
    """An attempt that fails, as the batch notes it."""
    ledger = Ledger(storage, **options)
    decision = ledger.decide("a", fingerprint(parts), parts)
    ledger.begin("a", decision, fingerprint(parts), "r")
    error = ErrorRecord(code=code, message="m", stage="s", retryable=False)
    times = {"started_at": "t", "finished_at": "t"}
    record = ResultRecord(
        job_id="a",
        status="failed",
        attempt=decision.attempt,
        run_id="r",
        reason="",
        fingerprint=fingerprint(parts),
        fingerprint_parts=parts,
        error=error,
        **times,
    )
    outcome = ledger.fail(record, decision, blames_job=blames_job)
    if outcome == "recorded":
        ledger.abandon("a")
    return outcome


def test_job_failure_removes_stale_output_with_note(storage):
    result(storage, parts=OTHER)
    storage.write_bytes("jobs/a/pose.mp4", b"x")
    assert fail(storage) == "recorded"
    found = Ledger(storage).result("a")
    assert found is not None
    assert found.notes == ["the output of an earlier run was removed"]
    assert [info.key for info in storage.list("jobs/")] == ["jobs/a/result.json"]


def test_infrastructure_failure_keeps_older_output_and_record(storage):
    older = result(storage, parts=OTHER)
    assert fail(storage, blames_job=False, code="resource.out_of_memory") == "kept"
    assert Ledger(storage).result("a") == older
    assert storage.read_bytes("jobs/a/output.mp4") == b"mp4"
    mark = Ledger(storage).attempt("a")
    assert mark is not None
    assert mark.error is not None
    assert (mark.error.code, mark.counted) == ("resource.out_of_memory", 1)
    assert decide(storage, OTHER).action == "skip", "the older output is still done"
    assert decide(storage, OTHER).suspect, "so that the mark is taken away"
    decision = decide(storage)
    assert (decision.action, decision.attempt, decision.suspect) == ("run", 2, False)
    assert decision.reason == "failed before: resource.out_of_memory (attempt 1)"
    for _ in range(2):
        fail(storage, blames_job=False, code="resource.out_of_memory")
    decision = decide(storage)
    assert decision.action == "exhausted"
    assert decision.error is not None
    assert decision.error.code == "resource.out_of_memory"
    assert Ledger(storage).crashed("a", PARTS, "r", "bf16", decision) is None
    assert decide(storage, retry_failed=True, max_attempts=0).action == "run"


def test_tidy_lost_removes_files_that_killed_attempt_left(storage):
    """The attempt was killed after it wrote its record and before it removed the frames of the older output."""
    record = result(storage)
    died(storage, stage="delivering", force=True)
    for key in ("frames/0a/000000.png", "frames/0b/000000.png", "pose.mp4", "frames.sha256", "parts/0/0001.tar"):
        storage.write_bytes(f"jobs/a/{key}", b"x")
    decision = decide(storage)
    assert (decision.action, decision.suspect) == ("skip", True)
    Ledger(storage).tidy_lost("a", decision)
    assert {info.key for info in storage.list("jobs/")} == {
        "jobs/a/output.mp4",
        "jobs/a/pose.mp4",
        "jobs/a/frames.sha256",
        "jobs/a/result.json",
    }
    assert record.output is not None
    frames = record.model_copy(update={"output": record.output.model_copy(update={"key": "jobs/a/frames/0b/"})})
    for key in ("frames/0a/000000.png", "frames/0b/000000.png"):
        storage.write_bytes(f"jobs/a/{key}", b"x")
    Ledger(storage).tidy("a", frames)
    assert {info.key for info in storage.list("jobs/a/")} == {
        "jobs/a/frames/0b/000000.png",
        "jobs/a/pose.mp4",
        "jobs/a/frames.sha256",
        "jobs/a/result.json",
    }


def test_mark_stays_until_tidy_has_removed_other_files(storage, monkeypatch):
    """Otherwise a later run would find the job done, and nothing would remove these files."""
    record = result(storage)
    for key in ("frames/0a/000000.png", "poster.jpg"):
        storage.write_bytes(f"jobs/a/{key}", b"x")
    ledger = died(storage, stage="delivering", force=True)
    delete = type(storage).delete

    def refusing(self, key, **conditions):
        if "frames" in key:
            raise StorageUnavailable("away")
        return delete(self, key, **conditions)

    monkeypatch.setattr(type(storage), "delete", refusing)
    with pytest.raises(StorageUnavailable):
        ledger.tidy("a", record, {"jobs/a/output.mp4"})
    assert storage.exists("jobs/a/attempt.json")
    assert decide(storage).suspect
    monkeypatch.undo()
    ledger.tidy("a", record, {"jobs/a/output.mp4"})
    assert {info.key for info in storage.list("jobs/")} == {"jobs/a/output.mp4", "jobs/a/result.json"}


@pytest.mark.parametrize("blames_job", [True, False])
def test_forced_run_that_fails_keeps_valid_output(storage, blames_job):
    older = result(storage)
    assert fail(storage, blames_job=blames_job, force=True) == "kept"
    assert Ledger(storage).result("a") == older
    assert storage.read_bytes("jobs/a/output.mp4") == b"mp4"
    assert decide(storage).action == "skip"


def test_failure_without_older_output_is_recorded(storage):
    assert fail(storage, blames_job=False, code="storage.denied") == "recorded"
    found = Ledger(storage).result("a")
    assert found is not None
    assert (found.attempts_counted, found.error and found.error.code) == (0, "storage.denied")


def replacing(storage) -> tuple[Ledger, ResultRecord]:
    """An attempt that has removed the older record, and that record."""
    older = result(storage, parts=OTHER)
    ledger = Ledger(storage, lease_s=0)
    decision = ledger.decide("a", fingerprint(PARTS), PARTS)
    ledger.begin("a", decision, fingerprint(PARTS), "r")
    ledger.advance("a", "delivering")
    ledger.before_replacing("a", "jobs/a/output.mp4")
    assert ledger.result("a") is None
    return ledger, older


def test_record_removed_by_killed_attempt_is_restored_if_output_is_unchanged(storage):
    _, older = replacing(storage)
    decision = decide(storage, OTHER)
    assert (decision.action, decision.reason) == ("skip", "done")
    assert Ledger(storage).result("a") is None, "a decision alone changes nothing"
    Ledger(storage).tidy_lost("a", decision)
    assert Ledger(storage).result("a") == older
    assert Ledger(storage).attempt("a") is None


def test_record_removed_by_killed_attempt_stays_removed_if_output_changed(storage):
    replacing(storage)
    storage.write_bytes("jobs/a/output.mp4", b"new")
    assert decide(storage, OTHER).action == "run"
    assert Ledger(storage).result("a") is None


def test_record_of_other_output_is_not_removed_before_replacing(storage):
    older = result(storage, parts=OTHER)
    Ledger(storage).before_replacing("a", "jobs/a/frames/0a/")
    assert Ledger(storage).result("a") == older


def test_another_try_restores_record(storage):
    ledger, older = replacing(storage)
    decision = Decision("run", "", 1, older, counted=0)
    again = ledger.another_try("a", decision, "resource.out_of_memory")
    assert (again.attempt, again.counted) == (2, 1)
    assert ledger.result("a") == older
    mark = ledger.attempt("a")
    assert mark is not None
    assert not mark.counts, "it waits: a process that dies now did not die in this job"
    assert ledger.another_try("a", decision, "storage.unavailable").counted == 0


def published(storage, seed: int, content: bytes) -> tuple[Ledger, Decision, ResultRecord]:
    """A runner that has read the ledger; the record that it will write."""
    parts = {"options.seed": seed}
    ledger = Ledger(storage)
    decision = ledger.decide("a", fingerprint(parts), parts)
    digest = hashlib.sha256(content).hexdigest()
    made = OutputRecord(
        uri=storage.uri("jobs/a/output.mp4"),
        key="jobs/a/output.mp4",
        bytes=len(content),
        files=1,
        identity=f"sha256:{digest}",
        sha256=digest,
        frames=1,
        fps="16",
        width=16,
        height=16,
        frames_sha256="0",
    )
    record = ResultRecord(
        job_id="a",
        status="succeeded",
        attempt=1,
        run_id=f"run-{seed}",
        reason="",
        started_at="t",
        finished_at="t",
        fingerprint=fingerprint(parts),
        fingerprint_parts=parts,
        output=made,
    )
    return ledger, decision, record


def test_succeed_does_not_overwrite_record_of_present_output(storage):
    """There are two runners. The second one uploads last and records first."""
    first, first_decision, first_record = published(storage, 1, b"one")
    second, second_decision, second_record = published(storage, 2, b"second")
    storage.write_bytes("jobs/a/output.mp4", b"one")
    storage.write_bytes("jobs/a/output.mp4", b"second")
    assert second.succeed(second_record, second_decision).run_id == "run-2"
    with pytest.raises(StorageConflict, match="run-2"):
        first.succeed(first_record, first_decision)
    assert decide(storage, {"options.seed": 1}).action == "run"
    assert decide(storage, {"options.seed": 2}).reason == "done"


def test_succeed_overwrites_record_of_replaced_output(storage):
    """The second runner uploads last and records last. The record of the first one describes bytes that are gone."""
    first, first_decision, first_record = published(storage, 1, b"one")
    second, second_decision, second_record = published(storage, 2, b"second")
    storage.write_bytes("jobs/a/output.mp4", b"second")
    first.succeed(first_record, first_decision)
    second.succeed(second_record, second_decision)
    assert decide(storage, {"options.seed": 1}).action == "run"
    assert decide(storage, {"options.seed": 2}).reason == "done"


def test_succeed_after_same_job_of_other_run_keeps_its_record(storage):
    first, first_decision, first_record = published(storage, 1, b"one")
    other, other_decision, other_record = published(storage, 1, b"another encoder's one")
    storage.write_bytes("jobs/a/output.mp4", b"one")
    first.succeed(first_record, first_decision)
    standing = other.succeed(other_record, other_decision)
    assert standing.output == first_record.output


def test_fail_after_newer_output_of_other_run_removes_nothing(storage):
    result(storage, parts=OTHER)
    ledger, decision, _ = published(storage, 1, b"")
    other, other_decision, other_record = published(storage, 2, b"second")
    storage.write_bytes("jobs/a/output.mp4", b"second")
    other.succeed(other_record, other_decision)
    error = ErrorRecord(code="internal", message="m", stage="s", retryable=False)
    failed = other_record.model_copy(update={"status": "failed", "fingerprint": "1", "output": None, "error": error})
    with pytest.raises(StorageConflict):
        ledger.fail(failed, decision, blames_job=True)
    assert decide(storage, {"options.seed": 2}).reason == "done"


def test_crash_in_forced_rerun_of_done_job_is_suspect(storage):
    result(storage)
    assert not decide(storage).suspect
    Ledger(storage, lease_s=0).begin("a", decide(storage, force=True), fingerprint(PARTS), "r")
    decision = decide(storage)
    assert (decision.action, decision.suspect) == ("skip", True)


DEEP = b"[" * 100_000 + b"]" * 100_000


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b'{"schema_version": 7}', b"\xff\xfe", DEEP])
@pytest.mark.parametrize("name", ["result", "attempt"])
def test_torn_or_foreign_record_counts_as_none(storage, name, content):
    storage.write_bytes(f"jobs/a/{name}.json", content)
    assert decide(storage).reason == "no record yet"


@pytest.mark.parametrize("name", ["result", "attempt"])
def test_folder_in_place_of_record_counts_as_none(storage, name):
    storage.write_bytes(f"jobs/a/{name}.json/x", b"")
    assert decide(storage).reason == "no record yet"


@pytest.mark.parametrize(
    "key", ["../../other", "/etc/passwd", "jobs/b/output.mp4", "a\x00b", "jobs/a/../b", "", "x" * 2000]
)
def test_record_with_invalid_output_key_runs_again(storage, key):
    record = result(storage)
    assert record.output is not None
    odd = record.model_copy(update={"output": record.output.model_copy(update={"key": key})})
    storage.write_bytes("jobs/a/result.json", odd.to_json())
    assert decide(storage).action == "run"
    assert "the record names" in decide(storage).reason


def test_frames_folder_has_one_output_identity(storage):
    for n in range(3):
        storage.write_bytes(f"jobs/a/frames/{n:06d}.png", bytes([n]))
    first = output_identity(storage, "jobs/a/frames/")
    assert first is not None
    assert first[1:] == (3, 3)
    storage.write_bytes("jobs/a/frames/000001.png", b"\x07")
    assert output_identity(storage, "jobs/a/frames/") != first
    assert output_identity(storage, "jobs/b/frames/") is None


def test_result_record_is_plain_json(storage):
    result(storage)
    data = json.loads(storage.read_bytes("jobs/a/result.json"))
    assert data["schema_version"] == 1
    assert data["output"]["key"] == "jobs/a/output.mp4"

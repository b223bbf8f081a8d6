from __future__ import annotations

import json
from pathlib import Path

import pytest

from runner.batch.fingerprint import fingerprint
from runner.batch.ledger import Ledger, output_identity
from runner.records.record import ErrorRecord, OutputRecord, ResultRecord
from runner.storage import open_storage

PARTS = {"options.seed": 42, "prompt": "dance"}
OTHER = {"options.seed": 41, "prompt": "dance"}


@pytest.fixture
def storage(tmp_path: Path):
    return open_storage(tmp_path / "out")


def result(storage, *, status="succeeded", parts=PARTS, attempt=1, output=b"mp4") -> ResultRecord:
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
        error=None if made else ErrorRecord(code="internal", message="m", stage="s", retryable=False),
    )
    Ledger(storage).finish(record)
    return record


def decide(storage, parts=PARTS, **options):
    return Ledger(storage, **options).decide("a", fingerprint(parts), parts)


def test_a_job_without_record_runs(storage):
    decision = decide(storage)
    assert (decision.action, decision.reason, decision.attempt) == ("run", "no record yet", 1)


def test_done_is_skipped(storage):
    result(storage)
    assert decide(storage).action == "skip"
    assert decide(storage).reason == "done"


def test_force_runs_what_is_done(storage):
    result(storage)
    assert decide(storage, force=True).action == "run"


def test_a_changed_option_reruns_and_says_which(storage):
    result(storage, parts=OTHER)
    assert decide(storage).reason == "options.seed: 41 → 42"
    assert decide(storage).attempt == 1


@pytest.mark.parametrize("change", ["gone", "other bytes, same length", "longer"])
def test_an_output_that_is_not_as_recorded_reruns(storage, change):
    result(storage)
    if change == "gone":
        storage.delete("jobs/a/output.mp4")
    else:
        storage.write_bytes("jobs/a/output.mp4", b"mp5" if "same" in change else b"mp4 and more")
    decision = decide(storage)
    assert decision.action == "run"
    assert "output" in decision.reason


def test_moving_the_output_folder_keeps_what_is_done(storage, tmp_path):
    result(storage)
    (tmp_path / "out").rename(tmp_path / "moved")
    assert decide(open_storage(tmp_path / "moved")).action == "skip"


def test_failures_run_again_until_the_limit(storage):
    result(storage, status="failed", attempt=2)
    assert decide(storage).attempt == 3
    assert "internal" in decide(storage).reason
    result(storage, status="failed", attempt=3)
    assert decide(storage).action == "exhausted"
    assert "--max-attempts 0" in decide(storage).reason
    assert decide(storage, max_attempts=0).attempt == 4
    assert decide(storage, force=True).action == "run"


def test_a_store_that_was_away_uses_up_nothing(storage):
    record = result(storage, status="failed", attempt=3)
    away = ErrorRecord(code="storage.unavailable", message="m", stage="s", retryable=True)
    Ledger(storage).finish(record.model_copy(update={"error": away}))
    assert (decide(storage).action, decide(storage).attempt) == ("run", 4)
    Ledger(storage).begin("a", decide(storage), fingerprint(PARTS), "r")  # and no word after it
    assert decide(storage).action == "exhausted"


def test_a_change_gives_a_failed_job_new_attempts(storage):
    result(storage, status="failed", parts=OTHER, attempt=3)
    decision = decide(storage)
    assert (decision.action, decision.attempt, decision.reason) == ("run", 1, "options.seed: 41 → 42")


def test_retry_failed_runs_only_failures(storage):
    assert decide(storage, retry_failed=True).action == "skip"
    result(storage)
    assert decide(storage, parts=OTHER, retry_failed=True).action == "skip"
    result(storage, status="failed")
    assert decide(storage, retry_failed=True).action == "run"


def test_a_process_that_died_is_noticed_and_counted(storage):
    ledger = Ledger(storage)
    for attempt in (1, 2, 3):
        decision = decide(storage)
        assert decision.attempt == attempt
        ledger.begin("a", decision, fingerprint(PARTS), "r")  # and no word after it
    decision = decide(storage)
    assert decision.action == "exhausted"
    record = ledger.crashed("a", PARTS, "r", "bf16")
    assert record is not None
    assert record.error is not None
    assert record.error.code == "job.crashed"
    assert ledger.result("a") == record
    assert ledger.attempt("a") is None
    assert decide(storage).action == "exhausted"


def test_a_mark_with_other_parts_does_not_count(storage):
    ledger = Ledger(storage)
    ledger.begin("a", decide(storage, OTHER), fingerprint(OTHER), "r")
    decision = decide(storage)
    assert (decision.action, decision.attempt) == ("run", 1)
    assert "other inputs or options" in decision.reason


def test_an_abandoned_job_leaves_no_mark(storage):
    ledger = Ledger(storage)
    ledger.begin("a", decide(storage), fingerprint(PARTS), "r")
    ledger.abandon("a")
    assert decide(storage).attempt == 1
    assert list(storage.list("jobs/")) == []


def test_a_crash_while_replacing_a_good_output_does_not_hide_it(storage):
    """The mark of the new attempt stands; the old record still speaks for the old output."""
    result(storage, parts=OTHER)
    Ledger(storage).begin("a", decide(storage), fingerprint(PARTS), "r")
    assert decide(storage, OTHER).action == "skip"
    assert decide(storage).attempt == 2


def test_a_failure_removes_the_stale_output_and_says_so(storage):
    result(storage, parts=OTHER)
    storage.write_bytes("jobs/a/pose.mp4", b"x")
    result(storage, status="failed")
    found = Ledger(storage).result("a")
    assert found is not None
    assert found.notes == ["the output of an earlier run was removed"]
    assert [info.key for info in storage.list("jobs/")] == ["jobs/a/result.json"]


def test_a_crash_in_a_forced_rerun_of_what_is_done_is_known(storage):
    result(storage)
    assert not decide(storage).suspect
    Ledger(storage).begin("a", decide(storage, force=True), fingerprint(PARTS), "r")
    decision = decide(storage)
    assert (decision.action, decision.suspect) == ("skip", True)


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b'{"schema_version": 7}', b"\xff\xfe"])
def test_a_torn_or_foreign_record_counts_as_none(storage, content):
    storage.write_bytes("jobs/a/result.json", content)
    assert decide(storage).reason == "no record yet"


def test_frames_are_one_output(storage):
    for n in range(3):
        storage.write_bytes(f"jobs/a/frames/{n:06d}.png", bytes([n]))
    first = output_identity(storage, "jobs/a/frames/")
    assert first is not None
    assert first[1:] == (3, 3)
    storage.write_bytes("jobs/a/frames/000001.png", b"\x07")
    assert output_identity(storage, "jobs/a/frames/") != first
    assert output_identity(storage, "jobs/b/frames/") is None


def test_records_are_plain_json_for_other_tools(storage):
    result(storage)
    data = json.loads(storage.read_bytes("jobs/a/result.json"))
    assert data["schema_version"] == 1
    assert data["output"]["key"] == "jobs/a/output.mp4"

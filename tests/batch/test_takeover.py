"""Two runners and one job, interleaved by hand: what the ledger of each may still do after the other has the lease."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from runner.batch.fingerprint import fingerprint
from runner.batch.ledger import Decision, JobTaken, Ledger
from runner.errors import LeaseLost, StorageConflict
from runner.hashing import sha256_file
from runner.records.record import ErrorRecord, OutputRecord, ResultRecord
from runner.storage import Storage, open_storage
from runner.timing import now

OUTPUT = "jobs/a/output.mp4"


@pytest.fixture(
    params=["disk", pytest.param("moto", marks=pytest.mark.s3), pytest.param("seaweedfs", marks=pytest.mark.s3)]
)
def store(request, tmp_path: Path) -> Storage:
    if request.param == "disk":
        return open_storage(tmp_path / "out")
    server = request.getfixturevalue(f"{request.param}_s3")
    request.getfixturevalue("aws_env")(server)
    return open_storage(f"s3://{server.make_bucket()}/out")


class Runner:
    """One runner's ledger, and what it would publish: another content for each seed."""

    def __init__(self, store: Storage, folder: Path, seed: int = 1, *, lease_s: float = 60.0, **options) -> None:
        self.store, self.parts = store, {"options.seed": seed}
        self.ledger = Ledger(store, lease_s=lease_s, **options)
        self.local = folder / f"seed-{seed}.mp4"
        self.local.write_bytes(f"the output of seed {seed}".encode() * 50)
        self.decision = Decision("run", "")

    def decide(self) -> Decision:
        self.decision = self.ledger.decide("a", fingerprint(self.parts), self.parts)
        return self.decision

    def begin(self) -> None:
        assert self.decide().action == "run"
        self.ledger.begin("a", self.decision, fingerprint(self.parts), "r")
        self.ledger.confirm("a", self.decision)

    def publish(self) -> None:
        self.ledger.advance("a", "delivering")
        self.info = self.ledger.publish("a", self.local, OUTPUT)

    def record(self, **changes) -> ResultRecord:
        values = {
            "job_id": "a",
            "status": "succeeded",
            "attempt": self.decision.attempt,
            "run_id": "r",
            "reason": "",
            "started_at": now(),
            "finished_at": now(),
            "fingerprint": fingerprint(self.parts),
            "fingerprint_parts": self.parts,
        }
        return ResultRecord.model_validate(values | changes)

    def output(self) -> OutputRecord:
        return OutputRecord(
            uri=self.info.uri,
            key=OUTPUT,
            bytes=self.info.bytes,
            files=1,
            identity=self.store.identify(self.info),
            sha256=sha256_file(self.local),
            frames=1,
            fps="16",
            width=16,
            height=16,
            frames_sha256="0",
        )

    def succeed(self) -> ResultRecord:
        standing = self.ledger.succeed(self.record(output=self.output()), self.decision)
        self.ledger.tidy("a", standing, {OUTPUT})
        return standing

    def fail(self) -> str:
        error = ErrorRecord(code="internal", message="m", stage="s", retryable=False)
        return self.ledger.fail(self.record(status="failed", error=error), self.decision, blames_job=True)

    def render(self) -> None:
        self.begin()
        self.publish()
        self.succeed()

    def is_done(self) -> bool:
        """Whether record and output match, and are of this runner's settings."""
        data, record = self.store.read_bytes(OUTPUT), self.store.read_bytes("jobs/a/result.json")
        if data != self.local.read_bytes() or record is None:
            return False
        found = json.loads(record)
        return (found["status"], found["fingerprint"]) == ("succeeded", fingerprint(self.parts))


def test_a_job_that_another_runner_has_is_left_alone(store, tmp_path):
    first, second = Runner(store, tmp_path), Runner(store, tmp_path)
    first.begin()
    decision = second.decide()
    assert decision.action == "leased"
    assert decision.reason.startswith("running on ")
    first.publish()
    first.succeed()
    assert second.decide().reason == "done"


def test_force_leaves_a_live_job_alone_too(store, tmp_path):
    first, second = Runner(store, tmp_path), Runner(store, tmp_path, force=True)
    first.begin()
    assert second.decide().action == "leased"


def test_two_runners_that_decide_at_once_do_not_both_begin(store, tmp_path):
    first, second = Runner(store, tmp_path), Runner(store, tmp_path)
    first.decide()
    second.decide()
    first.begin()
    with pytest.raises(JobTaken):
        second.ledger.begin("a", second.decision, fingerprint(second.parts), "r")
    assert second.ledger.open_attempts == []
    assert first.ledger.leases.update("a")


def test_the_record_is_read_once_more_when_the_lease_is_taken(store, tmp_path):
    """The other runner began and ended between this one's decision and its lease."""
    first, second = Runner(store, tmp_path), Runner(store, tmp_path)
    second.decide()
    first.render()
    with pytest.raises(JobTaken):
        second.ledger.begin("a", second.decision, fingerprint(second.parts), "r")
    assert not store.exists("jobs/a/attempt.json"), "the lease was given back"
    assert second.decide().reason == "done"


def test_a_lost_job_is_taken_over(store, tmp_path):
    first, second = Runner(store, tmp_path, lease_s=0), Runner(store, tmp_path)
    first.begin()
    second.begin()
    assert "its process died" in second.decision.reason
    second.publish()
    second.succeed()
    assert second.is_done()


Step = Callable[[Runner], object]
STEPS: dict[str, Step] = {
    "advance": lambda runner: runner.ledger.advance("a", "delivering"),
    "publish": lambda runner: runner.ledger.publish("a", runner.local, OUTPUT),
    "succeed": lambda runner: runner.succeed(),
    "fail": lambda runner: runner.fail(),
    "tidy": lambda runner: runner.ledger.tidy("a", runner.record(), set()),
    "note": lambda runner: runner.ledger.note_segments("a", 3),
    "confirm": lambda runner: runner.ledger.confirm("a", runner.decision),
}


@pytest.mark.parametrize(
    ("store", "second_is", "seed"),
    [
        *(("disk", second_is, seed) for second_is in ("under way", "publishing", "done") for seed in (1, 2)),
        *(pytest.param("moto", second_is, 2, marks=pytest.mark.s3) for second_is in ("under way", "publishing")),
        *(pytest.param("seaweedfs", "done", seed, marks=pytest.mark.s3) for seed in (1, 2)),
    ],
    indirect=["store"],
)
@pytest.mark.parametrize("step", STEPS)
def test_a_runner_that_was_stopped_past_its_lease_changes_nothing(store, tmp_path, step, second_is, seed):
    """It goes on with one step after another runner has taken the job over, of the same or of other settings."""
    first, second = Runner(store, tmp_path, lease_s=0), Runner(store, tmp_path, seed)
    first.begin()
    if step == "tidy":
        store.write_bytes("jobs/a/frames/0/000000.png", b"x")
    if step == "succeed":
        first.publish()
    second.begin()
    if second_is != "under way":
        second.publish()
    if second_is == "done":
        second.succeed()
    before = {info.key: store.read_bytes(info.key) for info in store.list("jobs/")}
    with pytest.raises(StorageConflict):
        STEPS[step](first)
    assert {info.key: store.read_bytes(info.key) for info in store.list("jobs/")} == before
    if second_is != "done":
        second.publish()
        second.succeed()
    assert second.is_done()


def test_what_a_lost_runner_gives_back_is_not_the_lease_of_the_other(store, tmp_path):
    first, second = Runner(store, tmp_path, lease_s=0), Runner(store, tmp_path)
    first.begin()
    second.begin()
    first.ledger.abandon("a")
    assert second.ledger.leases.update("a")


def test_a_file_that_a_lost_runner_stored_at_the_last_moment_is_replaced(store, tmp_path, monkeypatch):
    """Its request was on its way when the lease was taken over: it arrives after the other runner has looked."""
    first, second = Runner(store, tmp_path, 1, lease_s=0), Runner(store, tmp_path, 2)
    first.begin()
    second.begin()
    store.publish(first.local, OUTPUT)
    second.publish()
    assert store.read_bytes(OUTPUT) == second.local.read_bytes()
    second.succeed()
    assert second.is_done()


def test_a_record_that_a_lost_runner_wrote_at_the_last_moment_is_replaced(store, tmp_path):
    first, second = Runner(store, tmp_path, 1, lease_s=0), Runner(store, tmp_path, 2)
    first.begin()
    first.publish()
    second.begin()
    second.publish()
    output = {"uri": "u", "key": OUTPUT, "bytes": 1, "files": 1, "identity": "sha256:0", "sha256": None, "frames": 1}
    output |= {"fps": "16", "width": 16, "height": 16, "frames_sha256": "0"}
    store.write_bytes("jobs/a/result.json", first.record(output=output).to_json())
    second.succeed()
    assert second.is_done()


def test_what_a_lost_runner_stored_after_the_other_had_tidied_is_removed(store, tmp_path):
    """Its request was on its way when it was stopped, and arrives when the job is done."""
    first, second = Runner(store, tmp_path, lease_s=0), Runner(store, tmp_path)
    first.begin()
    second.begin()
    second.publish()
    first.ledger.lose("a")
    second.ledger.succeed(second.record(output=second.output()), second.decision)
    assert first.decide().action == "leased", "the other may be tidying just now"
    second.ledger.tidy("a", second.ledger.result("a"), {OUTPUT})
    late = ["jobs/a/parts/0123456789abcdef/0002.state", "jobs/a/frames/token/000000.png"]
    for key in late:
        store.write_bytes(key, b"x")
    decision = first.decide()
    assert (decision.action, decision.suspect) == ("skip", True)
    first.ledger.tidy_lost("a", decision)
    assert not [key for key in (*late, "jobs/a/attempt.json") if store.exists(key)]
    assert second.is_done()
    assert first.decide().suspect is False


def test_a_job_that_failed_while_this_run_was_under_way_is_not_tried_again(store, tmp_path):
    since = now()
    first, second = Runner(store, tmp_path), Runner(store, tmp_path, since=since)
    first.begin()
    assert first.fail() == "recorded"
    first.ledger.abandon("a")
    decision = second.decide()
    assert (decision.action, decision.error and decision.error.code) == ("exhausted", "internal")
    later = Runner(store, tmp_path, since=now())
    assert later.decide().action == "run", "a run that begins later tries it again"


def test_attempts_count_only_without_progress(store, tmp_path):
    for done in (2, 5, 6):
        runner = Runner(store, tmp_path, lease_s=0)
        runner.begin()
        runner.ledger.note_segments("a", done - 1, before=True)
        assert Runner(store, tmp_path).decide().counted == 1
        runner = Runner(store, tmp_path, lease_s=0)
        runner.begin()
        runner.ledger.note_segments("a", done - 1, before=True)
        runner.ledger.note_segments("a", done)
        decision = Runner(store, tmp_path).decide()
        assert (decision.action, decision.counted, decision.suspect) == ("run", 0, False)
    for count in (1, 2, 3):
        runner = Runner(store, tmp_path, lease_s=0)
        runner.begin()
        runner.ledger.note_segments("a", 6, before=True)
        decision = Runner(store, tmp_path).decide()
        assert (decision.counted, decision.action) == (count, "run" if count < 3 else "exhausted")


def test_a_failure_after_progress_does_not_count(store, tmp_path):
    runner = Runner(store, tmp_path)
    runner.begin()
    runner.ledger.note_segments("a", 3)
    runner.fail()
    runner.ledger.abandon("a")
    assert Runner(store, tmp_path).decide().counted == 0
    runner = Runner(store, tmp_path)
    runner.begin()
    runner.ledger.note_segments("a", 3, before=True)
    runner.fail()
    runner.ledger.abandon("a")
    assert Runner(store, tmp_path).decide().counted == 1


@pytest.mark.parametrize("step", ["advance", "publish", "fail"])
def test_where_leases_do_not_exclude_each_other_a_lost_one_is_found_by_its_token(tmp_path, step):
    """As on a store that ignores conditions: both runners took the lease; the second wrote last."""
    store = open_storage(tmp_path / "out")
    first, second = Runner(store, tmp_path, 1, exclusive=False), Runner(store, tmp_path, 2, exclusive=False)
    first.begin()
    store.delete("jobs/a/attempt.json")
    second.begin()
    with pytest.raises(LeaseLost):
        STEPS[step](first)


def test_where_leases_do_not_exclude_each_other_the_record_is_read_before_rendering(tmp_path):
    store = open_storage(tmp_path / "out")
    first, second = Runner(store, tmp_path, exclusive=False), Runner(store, tmp_path, exclusive=False)
    first.decide()
    first.ledger.begin("a", first.decision, fingerprint(first.parts), "r")
    kept = store.read_bytes("jobs/a/attempt.json")
    store.delete("jobs/a/attempt.json")
    second.render()
    store.write_bytes("jobs/a/attempt.json", kept)
    with pytest.raises(LeaseLost):
        first.ledger.confirm("a", first.decision)

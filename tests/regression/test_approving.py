"""Approving: what is copied, what is refused, two approvers at every moment, a process that dies at every step."""

from __future__ import annotations

import json
import os
import shutil
import threading
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from runner.errors import ConfigInvalid, InputUnreadable, StorageUnavailable
from runner.records.approval import KEPT_APPROVALS, Approvals
from runner.records.output_layout import FRAME_DIGESTS, OUTPUT, POSTER, job_key
from runner.records.record import ResultRecord
from runner.regression import approving
from runner.regression.approving import ApprovalRequest, Approved, Refused
from runner.regression.baseline import Baseline
from runner.regression.baseline_layout import approvals_key, job_prefix, name_job
from runner.storage import LocalStorage, Storage, open_storage
from runner.timing import now
from tests.regression.night_stores import HookedStorage, Killed, write_render
from tests.s3_servers import FaultyServer, S3Server

WRITES = ("publish", "write_bytes", "write_if", "delete", "remove_leftover")


def tokens(storage: Storage, record: ResultRecord) -> set[str]:
    """The folders of renders that lie in the baseline of a job."""
    prefix = job_prefix(name_job(record))
    return {info.key.removeprefix(prefix).split("/")[0] for info in storage.list(prefix)} - {"approved.json"}


def named(storage: Storage, record: ResultRecord) -> list[str]:
    data = storage.read_bytes(approvals_key(name_job(record)))
    assert data is not None
    return [one.token for one in Approvals.parse(data).approvals]


def approve(
    baseline: Baseline, out: Storage, record: ResultRecord, who: str = "anna", **more: Any
) -> Approved | Refused:
    return baseline.approve(out, record, ApprovalRequest(who, f"as {who} wants it", **more))


def standing(baseline: Baseline, record: ResultRecord, dest: Path) -> tuple[str, bytes]:
    """(who, output) of the render that stands, verified."""
    job = baseline.find([name_job(record)])[name_job(record)]
    found = job.fetch(dest)
    paths = found if isinstance(found, list) else [found]
    assert len(job.digests() or []) == 3
    return job.approval.who, b"".join(path.read_bytes() for path in paths)


class BaselineContract:
    """What a baseline promises on every backend, which supplies the fixture `make`: it makes a new, empty storage."""

    steps: tuple[str, ...] = ()  # of an approval that another one comes between; (): all

    @pytest.fixture
    def out(self, make: Callable[[str], Storage]) -> Storage:
        return make("out")

    @pytest.fixture
    def baseline(self, make: Callable[[str], Storage], tmp_path: Path) -> Baseline:
        scratch = tmp_path / "scratch"
        scratch.mkdir()
        return Baseline(make("baseline"), scratch=scratch)

    @pytest.mark.parametrize("png", [False, True], ids=["mp4", "png"])
    def test_approved_render_is_found_whole(self, out: Storage, baseline: Baseline, tmp_path: Path, png: bool) -> None:
        record = write_render(out, tmp_path / "s", png=png)
        out.write_bytes("jobs/a/people.json", b"{}")
        done = approve(baseline, out, record, run_id="night-7")
        assert isinstance(done, Approved)
        assert (done.unchanged, done.notes) == (False, ())
        job = baseline.find([name_job(record)])[name_job(record)]
        assert job.approval == done.approval
        assert (job.approval.who, job.approval.why, job.approval.run_id) == ("anna", "as anna wants it", "night-7")
        assert (job.approval.out, job.approval.draft) == (out.root, False)
        assert job.record == record
        assert job.people() == b"{}"
        assert job.read(POSTER) == b"poster of first"
        assert job.read("pose.mp4") is None
        assert standing(baseline, record, tmp_path / "f") == ("anna", b"first 0first 1first 2")
        assert baseline.storage.exists(job.output_key + "000002.png" if png else job.output_key)
        assert list((tmp_path / "scratch").iterdir()) == []
        assert name_job(record) == ("cpu", "fp4-distill", "a")
        assert not tokens(baseline.storage, record) - {job.approval.token}

    def test_approve_of_frames_with_sound_keeps_sound_apart_from_frames(
        self, out: Storage, baseline: Baseline, tmp_path: Path
    ) -> None:
        record = write_render(out, tmp_path / "s", png=True, sound=b"tone")
        done = approve(baseline, out, record)
        assert isinstance(done, Approved)
        assert approve(baseline, out, record) == Approved(done.approval, unchanged=True)
        job = baseline.find([name_job(record)])[name_job(record)]
        assert (job.approval.output_files, job.read("frames/audio.wav")) == (4, b"tone")
        assert standing(baseline, record, tmp_path / "f") == ("anna", b"first 0first 1first 2")
        baseline.storage.write_bytes(f"{job.output_key}audio.wav", b"hiss")
        with pytest.raises(InputUnreadable, match="differs from the approved one"):
            job.fetch(tmp_path / "g")

    def test_approve_of_same_render_again_is_unchanged(self, out: Storage, baseline: Baseline, tmp_path: Path) -> None:
        record = write_render(out, tmp_path / "s")
        first = approve(baseline, out, record)
        again = approve(baseline, out, record, "bea", as_of="2020-01-01")
        assert isinstance(first, Approved)
        assert again == Approved(first.approval, unchanged=True)
        assert len(tokens(baseline.storage, record)) == 1
        baseline.storage.delete(job_prefix(name_job(record)) + f"{first.approval.token}/{OUTPUT}")
        assert isinstance(repaired := approve(baseline, out, record, "bea"), Approved)  # its files were lost
        assert not repaired.unchanged
        assert standing(baseline, record, tmp_path / "f")[0] == "bea"

    def test_approve_keeps_last_5_approvals(self, out: Storage, baseline: Baseline, tmp_path: Path) -> None:
        for number in range(7):
            moment = f"2026-01-0{number + 1}T00:00:00+00:00"
            record = write_render(out, tmp_path / "s", content=f"night {number} ", finished_at=moment)
            assert isinstance(approve(baseline, out, record, f"who {number}"), Approved)
        assert len(named(baseline.storage, record)) == KEPT_APPROVALS == 5
        assert tokens(baseline.storage, record) == set(named(baseline.storage, record))
        job = baseline.find([name_job(record)])[name_job(record)]
        assert [one.who for one in job.approvals.approvals] == [f"who {n}" for n in (6, 5, 4, 3, 2)]

    def test_approve_removes_unnamed_folder_that_is_old(
        self, out: Storage, baseline: Baseline, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        record = write_render(out, tmp_path / "s")
        approve(baseline, out, record)
        lost = job_prefix(name_job(record)) + "0123456789abcdef/"
        baseline.storage.write_bytes(lost + OUTPUT, b"half")
        record = write_render(out, tmp_path / "s", content="second", finished_at="2026-01-02T00:00:00+00:00")
        approve(baseline, out, record)
        assert baseline.storage.exists(lost + OUTPUT)  # another approver may be writing it
        record = write_render(out, tmp_path / "s", content="third", finished_at="2026-01-03T00:00:00+00:00")
        monkeypatch.setattr(approving, "ABANDONED_S", -3600.0)
        approve(baseline, out, record)
        assert tokens(baseline.storage, record) == set(named(baseline.storage, record))
        assert len(named(baseline.storage, record)) == 3

    @pytest.mark.parametrize("first", [True, False], ids=["of a new job", "of a job with a baseline"])
    def test_approve_by_two_at_same_time_refuses_one(
        self, make: Callable[[str], Storage], baseline: Baseline, tmp_path: Path, first: bool
    ) -> None:
        """The second approval runs in full between two steps of the first, once for each step."""
        outs = {who: make(who) for who in ("anna", "bea")}
        for step in range(100):
            records = {
                who: write_render(
                    out,
                    tmp_path / "s",
                    f"job{step}",
                    content=who,
                    finished_at=f"2026-01-0{3 if first else 4}T00:00:00Z",
                )
                for who, out in outs.items()
            }
            if not first:
                before = make(f"before{step}")
                old = write_render(
                    before, tmp_path / "s", f"job{step}", content="old", finished_at="2026-01-01T00:00:00Z"
                )
                assert isinstance(approve(baseline, before, old), Approved)
            done = approve_in_between(baseline, outs, records, step, self.steps)
            if "bea" not in done:
                break
            winners = [who for who, result in done.items() if isinstance(result, Approved)]
            assert len(winners) == 1, (step, done)
            (loser,) = done.keys() - set(winners)
            refusal = done[loser]
            assert isinstance(refusal, Refused)
            assert f"approved by {winners[0]}" in refusal.why
            assert f"as {winners[0]} wants it" in refusal.why
            assert refusal.standing is not None
            assert refusal.standing.who == winners[0]
            record = records[winners[0]]
            assert standing(baseline, record, tmp_path / f"f{step}") == (winners[0], _content(winners[0]))
            assert tokens(baseline.storage, record) == set(named(baseline.storage, record))
        assert step >= (4 if self.steps else 12)

    def test_draft_approval_replaces_nothing_and_is_replaced(
        self, out: Storage, baseline: Baseline, tmp_path: Path
    ) -> None:
        record = write_render(out, tmp_path / "s")
        assert isinstance(drafted := approve(baseline, out, record, draft=True), Approved)
        assert drafted.approval.draft
        assert isinstance(approve(baseline, out, record), Approved)
        assert not baseline.find([name_job(record)])[name_job(record)].approval.draft
        newer = write_render(out, tmp_path / "s", content="second", finished_at="2026-01-02T00:00:00+00:00")
        refused = approve(baseline, out, newer, draft=True)
        assert isinstance(refused, Refused)
        assert "a draft replaces none" in refused.why

    def test_approve_removal_takes_job_out_of_baseline(self, out: Storage, baseline: Baseline, tmp_path: Path) -> None:
        record = write_render(out, tmp_path / "s")
        name = name_job(record)
        request = ApprovalRequest("bea", "the dance is no longer needed", "r2")
        assert isinstance(baseline.approve_removal(name, request), Refused)  # it has no baseline
        approve(baseline, out, record)
        assert isinstance(baseline.approve_removal(name, replace(request, as_of="2020-01-01")), Refused)
        done = baseline.approve_removal(name, request)
        assert isinstance(done, Approved)
        assert baseline.find([name]) == {}
        assert baseline.jobs("cpu", "fp4-distill") == []
        assert baseline.approve_removal(name, request) == Approved(done.approval, unchanged=True)
        refused = approve(baseline, out, record)  # rendered before it was removed
        assert isinstance(refused, Refused)
        assert "A removal of run r2 was approved by bea" in refused.why
        back = write_render(out, tmp_path / "s", content="back", finished_at="2999-01-01T00:00:00+00:00")
        assert isinstance(approve(baseline, out, back), Approved)
        assert [job.record for job in baseline.jobs("cpu", "fp4-distill")] == [back]
        assert tokens(baseline.storage, record) | {""} == set(named(baseline.storage, record))


def approve_in_between(
    baseline: Baseline, outs: dict[str, Storage], records: dict[str, ResultRecord], step: int, steps: tuple[str, ...]
) -> dict[str, Approved | Refused]:
    """Anna approves; before the `step`-th call of hers Bea does, unless Anna has done by then. The results."""
    as_of, hooked = _later(), HookedStorage(baseline.storage)
    done: dict[str, Approved | Refused] = {}
    lock = threading.Lock()  # files are stored from several threads

    def interrupt(name: str, arguments: Any) -> None:
        with lock:
            if sum(call in steps or not steps for call, _ in hooked.calls) > step and "bea" not in done:
                done["bea"] = approve(baseline, outs["bea"], records["bea"], "bea", as_of=as_of)

    hooked.before = interrupt
    slow = Baseline(hooked)  # type: ignore[arg-type]
    done["anna"] = approve(slow, outs["anna"], records["anna"], "anna", as_of=as_of)
    return done


def _later() -> str:
    """Now, and later than every approval that was made before."""
    time.sleep(0.002)
    return now()


def _content(content: str) -> bytes:
    return b"".join(f"{content} {index}".encode() for index in range(3))


class TestLocalBaseline(BaselineContract):
    @pytest.fixture
    def make(self, tmp_path: Path) -> Callable[[str], Storage]:
        return lambda name: LocalStorage(tmp_path / "stores" / name)


class TestMotoBaseline(BaselineContract):
    steps = ("read_versioned", "write_if")

    @pytest.fixture
    def make(self, moto_s3: S3Server, aws_env: Callable[..., S3Server]) -> Callable[[str], Storage]:
        aws_env(moto_s3)
        bucket = moto_s3.make_bucket()
        return lambda name: open_storage(f"s3://{bucket}/nights 夜/{name}")


@pytest.mark.s3
class TestSeaweedBaseline(BaselineContract):
    steps = ("read_versioned", "write_if")

    @pytest.fixture
    def make(self, seaweedfs_s3: S3Server, aws_env: Callable[..., S3Server]) -> Callable[[str], Storage]:
        aws_env(seaweedfs_s3)
        bucket = seaweedfs_s3.make_bucket()
        return lambda name: open_storage(f"s3://{bucket}/nights/{name}")


# What is refused


@pytest.fixture
def out(tmp_path: Path) -> LocalStorage:
    return LocalStorage(tmp_path / "out")


@pytest.fixture
def baseline(tmp_path: Path) -> Baseline:
    return Baseline(LocalStorage(tmp_path / "baseline"))


def refusal(baseline: Baseline, out: Storage, record: ResultRecord, **more: Any) -> str:
    before = {info.key for info in baseline.storage.list()}
    refused = approve(baseline, out, record, "bea", **more)
    assert isinstance(refused, Refused)
    assert {info.key for info in baseline.storage.list()} == before  # not one file is left
    return refused.why


def test_approve_of_output_that_differs_from_record_is_refused(tmp_path, out, baseline):
    record = write_render(out, tmp_path / "s")
    out.write_bytes(job_key("a", OUTPUT), b"first 0first 1first X")
    assert "differs from its record" in refusal(baseline, out, record)
    out.delete(job_key("a", OUTPUT))
    assert "is missing" in refusal(baseline, out, record)


@pytest.mark.parametrize("wrong", ["changed", "missing", "one more", "all gone"])
def test_approve_of_frames_that_differ_from_record_is_refused(tmp_path, out, baseline, wrong):
    record = write_render(out, tmp_path / "s", png=True)
    keys = sorted(info.key for info in out.list(record.output.key))
    if wrong == "changed":
        out.write_bytes(keys[1], b"first X")
    for key in {"missing": keys[2:], "all gone": keys}.get(wrong, []):
        out.delete(key)
    if wrong == "one more":
        out.write_bytes(record.output.key + "000003.png", b"first 3")
    assert ("is missing" if wrong == "all gone" else "differs from its record") in refusal(baseline, out, record)


def test_approve_of_digests_that_differ_from_record_is_refused(tmp_path, out, baseline):
    record = write_render(out, tmp_path / "s")
    good = out.read_bytes(job_key("a", FRAME_DIGESTS))
    for data, said in (
        (good[65:], "2 digests for 3 frames"),
        (good[::-1], "digest"),
        (good[65:] + good[:65], "recorded"),
    ):
        out.write_bytes(job_key("a", FRAME_DIGESTS), data)
        assert said in refusal(baseline, out, record)
    out.delete(job_key("a", FRAME_DIGESTS))  # a record of an older version came without
    assert isinstance(approve(baseline, out, record), Approved)
    assert baseline.find([name_job(record)])[name_job(record)].digests() is None


def test_approve_of_failed_job_or_output_of_other_job_is_refused(tmp_path, out, baseline):
    record = write_render(out, tmp_path / "s")
    assert "failed" in refusal(baseline, out, record.model_copy(update={"status": "failed"}))
    assert "failed" in refusal(baseline, out, record.model_copy(update={"output": None}))
    for key, said in (
        ("jobs/b/output.mp4", "outside jobs/a/"),
        ("jobs/a/../b/output.mp4", "cannot be used"),
        ("/etc/passwd", "cannot be used"),
    ):
        output = record.output.model_copy(update={"key": key})
        assert said in refusal(baseline, out, record.model_copy(update={"output": output}))
    assert "cannot be used" in refusal(baseline, out, record.model_copy(update={"job_id": "../a"}))
    assert "cannot be used" in refusal(baseline, out, record.model_copy(update={"finished_at": "soon"}))


def test_approve_of_job_that_was_rendered_again_is_refused(tmp_path, out, baseline):
    record = write_render(out, tmp_path / "s")
    newer = write_render(out, tmp_path / "s", content="second")
    assert "rendered again" in refusal(baseline, out, record)
    hooked = HookedStorage(out)

    def render_again(name: str, arguments: Any) -> None:
        if name == "fetch" and arguments[0].endswith(POSTER):
            write_render(out, tmp_path / "s", content="third")

    hooked.before = render_again
    assert "rendered again" in refusal(baseline, hooked, newer)  # while it was copied


def test_approve_does_not_replace_later_approval_or_later_render(tmp_path, out, baseline):
    old_out = LocalStorage(tmp_path / "old")
    old = write_render(old_out, tmp_path / "s", content="old")
    new = write_render(out, tmp_path / "s", content="new", finished_at="2026-01-09T00:00:00.000+00:00")
    looked_at = _later()
    assert isinstance(approve(baseline, out, new), Approved)
    why = refusal(baseline, old_out, old)
    assert "its baseline was rendered later, at 2026-01-09" in why
    assert "approved by anna" in why
    newest = write_render(out, tmp_path / "s", content="newest", finished_at="2026-01-10T00:00:00+02:00")
    why = refusal(baseline, out, newest, as_of=looked_at)
    assert f"was approved after {looked_at}. A render of run 20260101T000000Z was approved by anna" in why
    assert "as anna wants it" in why
    assert isinstance(approve(baseline, out, newest, as_of=_later()), Approved)
    assert isinstance(approve(baseline, old_out, old, as_of=looked_at, replace_newer=True), Approved)
    assert standing(baseline, old, tmp_path / "f")[1] == _content("old")
    with pytest.raises(ConfigInvalid, match="is not a time"):
        approve(baseline, out, newest, as_of="yesterday")


def test_approve_with_replace_newer_keeps_approval_made_meanwhile(tmp_path, baseline):
    outs = {who: LocalStorage(tmp_path / who) for who in ("anna", "bea")}
    records = {who: write_render(out, tmp_path / "s", content=who) for who, out in outs.items()}
    hooked = HookedStorage(baseline.storage)

    def interrupt(name: str, arguments: Any) -> None:
        if name == "write_if" and not baseline.find([name_job(records["bea"])]):
            assert isinstance(approve(baseline, outs["bea"], records["bea"], "bea"), Approved)

    hooked.before = interrupt
    refused = approve(Baseline(hooked), outs["anna"], records["anna"], replace_newer=True)
    assert isinstance(refused, Refused)
    assert (
        "a was approved by another process meanwhile. A render of run 20260101T000000Z was approved by bea"
        in refused.why
    )
    assert standing(baseline, records["bea"], tmp_path / "f")[0] == "bea"


def test_approve_on_store_without_conditions_refuses_lost_approval(tmp_path, out, baseline):
    """The approval is refused if another approver's file replaces it before it is read again."""
    record = write_render(out, tmp_path / "s")
    hooked, key = HookedStorage(baseline.storage), approvals_key(name_job(record))

    def overwrite(name: str, arguments: Any) -> None:
        if name == "write_if":
            content = json.loads(baseline.storage.read_bytes(key))
            content["approvals"][0] |= {"token": "f" * 16, "who": "bea"}
            baseline.storage.write_bytes(key, json.dumps(content).encode())

    hooked.after = overwrite
    refused = approve(Baseline(hooked), out, record)
    assert isinstance(refused, Refused)
    assert "approved by bea" in refused.why


def test_approve_with_damaged_approvals_file_raises_and_keeps_file(tmp_path, out, baseline):
    record = write_render(out, tmp_path / "s")
    key = approvals_key(name_job(record))
    for data in (b"{", b"[]", b'{"job_id": "a", "approvals": []}', b"[" * 100_000):
        baseline.storage.write_bytes(key, data)
        with pytest.raises(InputUnreadable, match="is not a list of approvals"):
            approve(baseline, out, record)
        assert baseline.storage.read_bytes(key) == data


def test_approve_of_copy_that_differs_from_original_is_refused(tmp_path, out, baseline):
    record = write_render(out, tmp_path / "s")
    hooked = HookedStorage(baseline.storage)

    def damage(name: str, arguments: Any) -> None:
        if name == "publish" and arguments[1].endswith(OUTPUT):
            arguments[0].write_bytes(b"first 0first 1first X")

    hooked.before = damage
    with pytest.raises(StorageUnavailable, match="differs from the original"):
        approve(Baseline(hooked), out, record)
    assert list(baseline.storage.list()) == []


# A process that dies


def test_approve_killed_at_any_step_leaves_whole_baseline(tmp_path, out):
    """At the sixth approval, so that files of the oldest are removed too."""
    prepared = tmp_path / "prepared"
    for number in range(1, 6):
        record = write_render(out, tmp_path / "s", content=f"{number}", finished_at=f"2026-01-0{number}T00:00:00Z")
        approve(Baseline(LocalStorage(prepared)), out, record, f"who {number}")
    record = write_render(out, tmp_path / "s", content="6", finished_at="2026-01-06T00:00:00Z")
    last = LocalStorage(tmp_path / "last")
    newest = write_render(last, tmp_path / "s", content="7", finished_at="2026-01-07T00:00:00Z")
    count = run_until(tmp_path / "whole", prepared, out, record, None)
    assert count >= 9
    seen = set()
    for step in range(1, count + 1):
        folder = tmp_path / f"died{step}"
        assert run_until(folder, prepared, out, record, step) >= step
        baseline = Baseline(LocalStorage(folder))
        who, content = standing(baseline, record, tmp_path / f"f{step}")
        assert (who, content) in (("who 5", _content("5")), ("who 6", _content("6"))), step
        seen.add(who)
        done = approve(baseline, out, record, "who 6")
        assert isinstance(done, Approved)
        assert standing(baseline, record, tmp_path / f"g{step}") == ("who 6", _content("6"))
        for path in folder.rglob("*"):
            if path.name != "approved.json":
                os.utime(path, (time.time() - 2 * 86400,) * 2)
        assert isinstance(approve(baseline, last, newest), Approved)
        assert tokens(baseline.storage, record) == set(named(baseline.storage, record))
        assert [leftover.key for leftover in baseline.storage.leftovers()] == []
    assert seen == {"who 5", "who 6"}


def test_approve_removes_staged_file_of_killed_process(tmp_path, out, baseline):
    record = write_render(out, tmp_path / "s")
    folder = baseline.storage.path / job_prefix(name_job(record)) / "0123456789abcdef"
    folder.mkdir(parents=True)
    (folder / f".staged-{'0' * 32}.tmp").write_bytes(b"half")
    assert [leftover.abandoned for leftover in baseline.storage.leftovers()] == [True]
    approve(baseline, out, record)
    assert list(baseline.storage.leftovers()) == []


def run_until(folder: Path, prepared: Path, out: Storage, record: ResultRecord, step: int | None) -> int:
    """Approve in a copy of `prepared`, in a process that dies at the `step`-th write; how many writes were begun."""
    shutil.copytree(prepared, folder)
    hooked, writes = HookedStorage(LocalStorage(folder)), []

    def die(name: str, arguments: Any) -> None:
        writes.extend([name] if name in WRITES else [])
        if step is not None and len(writes) >= step:
            raise Killed

    hooked.before = die
    if step is None:
        assert isinstance(approve(Baseline(hooked), out, record, "who 6"), Approved)
    else:
        with pytest.raises(Killed):
            approve(Baseline(hooked), out, record, "who 6")
    return len(writes)


@pytest.mark.parametrize("moment", ["before", "after"])
def test_approve_with_error_at_write_leaves_no_files_or_whole_render(tmp_path, out, baseline, moment):
    """Before the write the store is unavailable; after it the answer is lost."""
    record = write_render(out, tmp_path / "s")
    hooked = HookedStorage(baseline.storage)

    def fail(name: str, arguments: Any) -> None:
        if name == "write_if":
            raise StorageUnavailable("no answer")

    setattr(hooked, moment, fail)
    with pytest.raises(StorageUnavailable):
        approve(Baseline(hooked), out, record)
    if moment == "before":
        assert list(baseline.storage.list()) == []
    else:
        assert standing(baseline, record, tmp_path / "f")[0] == "anna"


def test_approve_with_files_that_cannot_be_removed_notes_them(tmp_path, out, baseline):
    def fail(name: str, arguments: Any) -> None:
        if name == "delete":
            raise StorageUnavailable("the store is away")

    for number in range(1, 7):
        record = write_render(out, tmp_path / "s", content=f"{number}", finished_at=f"2026-01-0{number}T00:00:00Z")
        hooked = HookedStorage(baseline.storage)
        hooked.before = fail
        done = approve(Baseline(hooked), out, record)
        assert isinstance(done, Approved)
        assert bool(done.notes) == (number == 6)


def test_approve_with_lost_answer_on_s3_counts_as_approved(tmp_path, faulty_s3: FaultyServer, aws_env):
    """The request is repeated, and the repetition is refused because the first try was written."""
    aws_env(faulty_s3)
    bucket = faulty_s3.make_bucket()
    out, baseline = open_storage(f"s3://{bucket}/out"), Baseline(open_storage(f"s3://{bucket}/baseline"))
    record = write_render(out, tmp_path / "s")
    faulty_s3.fail("lose", "PUT", "approved.json")
    done = approve(baseline, out, record)
    assert isinstance(done, Approved)
    assert not any(fault.times for fault in faulty_s3.faults)
    assert named(baseline.storage, record) == [done.approval.token]

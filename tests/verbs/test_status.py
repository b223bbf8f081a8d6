from __future__ import annotations

import gc
import json
import os
import re
import shutil
import socket
import subprocess
import sys
import time
from collections import Counter
from dataclasses import replace
from pathlib import Path

import pytest

import runner.verbs.status as status_verb
from runner.batch.fingerprint import fingerprint_parts
from runner.batch.ledger import Decision, Ledger
from runner.batch.run_jobs import keep_run_jobs
from runner.cli import main
from runner.errors import ConfigInvalid, StorageUnavailable
from runner.records.record import AttemptMark, ErrorRecord, RunJobsRecord
from runner.storage import LocalStorage, open_storage
from runner.verbs.settings import StatusSettings
from runner.verbs.status import STATES, RunStatus, StatusReader, StatusRow, read_jobs, read_run_status, status
from tests.batch.loop_bench import Bench, bench

pytest_plugins = ["tests.s3_servers"]

__all__ = ["bench"]


def test_status_of_empty_folder_is_refused(tmp_path):
    """A mistyped path must not read as "0 failed"."""
    for read in (read_run_status, read_jobs):
        with pytest.raises(ConfigInvalid, match="--out"):
            read(open_storage(tmp_path / "mistyped"))
    open_storage(tmp_path).write_bytes("runs/r/0-of-1.summary.json", b"{}")
    assert read_run_status(open_storage(tmp_path)).rows == ()


def test_running_job_shows_host_and_time_of_last_mark(tmp_path, capsys):
    storage = open_storage(tmp_path)
    ledger = Ledger(storage)
    ledger.begin("a", Decision("run", "", attempt=2), "f", "r")
    ledger.note_segments("a", 3)
    (row,) = read_run_status(storage).rows
    assert (row.id, row.status, row.attempt, row.run_id) == ("a", "running", 2, "r")
    assert re.fullmatch(r"preparing since \S+, 3 segments finished", row.reason)
    assert row.host == socket.gethostname()
    assert 0 <= row.heard_s < 2
    assert main(["status", str(tmp_path)]) == 3
    told = capsys.readouterr().out
    assert re.search(rf"0 done · 0 failed · 1 running \({socket.gethostname()} heard of [01] s ago\)\n", told)
    assert "no run has written its list of jobs" in told


def test_job_with_expired_lease_is_lost(tmp_path):
    storage = open_storage(tmp_path)
    Ledger(storage, lease_s=30).begin("a", Decision("run", ""), "f", "r")
    long_ago = time.time() - 31
    os.utime(tmp_path / "jobs/a/attempt.json", (long_ago, long_ago))
    (row,) = read_run_status(storage).rows
    assert row.status == "lost"
    assert re.search(r"its runner has stopped reporting: preparing since .*; a rerun takes it over", row.reason)
    assert 30 < row.heard_s < 33


def test_job_with_ended_process_is_lost_at_once(tmp_path):
    begin = f"from tests.verbs.test_status import begin; begin({str(tmp_path)!r})"
    subprocess.run([sys.executable, "-c", begin], check=True, cwd=Path(__file__).parents[2])
    (row,) = read_run_status(open_storage(tmp_path)).rows
    assert (row.status, "its process has ended" in row.reason) == ("lost", True)


def begin(out: str) -> None:
    """Take a job's lease and end without a word."""
    Ledger(open_storage(out)).begin("a", Decision("run", ""), "f", "r")
    os._exit(0)


# -- against the run's manifest ----------------------------------------------------------------------------------------


def keep(bench: Bench, *jobs, run_id: str = "r1", force: bool = False) -> None:
    """Keep `jobs` as those of a run's manifest, as `run` does."""
    identity = bench.generator.identity
    keep_run_jobs(
        bench.out,
        run_id,
        jobs,
        lambda job: fingerprint_parts(job, {}, identity),
        manifest="m.yaml",
        recipe="stub",
        force=force,
    )


def states(bench: Bench, run_id: str | None = None) -> dict[str, str]:
    return {row.id: row.status for row in read_run_status(bench.out, run_id).rows if row.listed}


def test_job_of_manifest_that_has_not_begun_is_pending(bench, capsys):
    """A run stopped after two of seven jobs does not exit with 0; the jobs are in manifest order."""
    jobs = [bench.job(name) for name in "gfedcba"]
    keep(bench, *jobs)
    bench.run(*jobs[:2])
    found = read_run_status(bench.out)
    assert [row.id for row in found.rows] == list("gfedcba")
    assert found.counts == {
        "total": 7,
        "succeeded": 2,
        "failed": 0,
        "running": 0,
        "lost": 0,
        "pending": 5,
        "with_warnings": 0,
    }
    assert (found.exit_code, found.left, found.run_id, found.manifest) == (3, 5, "r1", "m.yaml")
    assert main(["status", str(bench.folder / "out")]) == 3
    assert capsys.readouterr().out.endswith("run r1 of m.yaml:\n2 of 7 done · 0 failed · 5 pending\n")
    bench.run(*jobs)
    assert main(["status", str(bench.folder / "out")]) == 0
    assert "7 of 7 done · 0 failed\n" in capsys.readouterr().out


def test_status_with_failed_job_exits_1_and_prints_reason_below_table(bench, capsys):
    jobs = [bench.job("a"), bench.job("b", "fail-generate")]
    keep(bench, *jobs)
    assert bench.run(*jobs) == 1
    row = read_run_status(bench.out).rows[1]
    assert (row.status, row.code, row.reason.startswith(f"{row.code}: ")) == ("failed", "internal", True)
    assert main(["status", str(bench.folder / "out")]) == 1
    told = capsys.readouterr().out
    assert f"\nb: {row.reason}\n" in told
    table = told[: told.index("\nb: ")]
    assert "internal" in table and row.reason not in table
    assert "6 frames 64x48 at 8 fps" in table, "a job that is done tells its output"


@pytest.mark.parametrize("change", ["options", "prompt", "weights"])
def test_job_with_record_of_other_settings_is_pending(bench, change):
    keep(bench, bench.job("a"))
    bench.run(bench.job("a"))
    assert states(bench) == {"a": "succeeded"}
    if change == "weights":
        bench.generator.identity = {"weights": "newer"}
    keep(
        bench,
        bench.job("a", *(["another"] if change == "prompt" else []), **({"seed": 9} if change == "options" else {})),
    )
    (row,) = read_run_status(bench.out).rows
    assert row.status == "pending"
    assert re.fullmatch(r"its settings have changed since: succeeded at \S+", row.reason)
    assert row.output is not None, "the older output lies there"


def test_forced_run_counts_only_own_records(bench):
    keep(bench, bench.job("a"))
    bench.run(bench.job("a"))
    keep(bench, bench.job("a"), run_id="r2", force=True)
    (row,) = read_run_status(bench.out, "r2").rows
    assert (row.status, row.reason.startswith("to be rendered again by run r2")) == ("pending", True)
    bench.run(bench.job("a"), run_id="r2", force=True)
    assert states(bench, "r2") == {"a": "succeeded"}


def test_failure_of_current_settings_beside_older_output_is_failed(bench):
    """The record beside the failure has older settings and does not make the job pending."""
    bench.run(bench.job("a", seed=1))
    keep(bench, bench.job("a", seed=2), run_id="r2")
    record = bench.result("a")
    mark = AttemptMark(
        job_id="a", attempt=1, fingerprint="of seed 2", run_id="r2", host="h", started_at="t", finished_at="t"
    )
    error = ErrorRecord(code="storage.unavailable", message="away", stage="publish", retryable=True)
    bench.out.write_bytes("jobs/a/attempt.json", mark.model_copy(update={"error": error}).to_json())
    (row,) = read_run_status(bench.out).rows
    assert (row.status, row.code, row.run_id) == ("failed", "storage.unavailable", "r2")
    assert (row.reason, row.output) == (
        "storage.unavailable: away; an older output is kept",
        record["output"]["uri"],
    )
    same = mark.model_copy(update={"error": error, "fingerprint": record["fingerprint"]})
    bench.out.write_bytes("jobs/a/attempt.json", same.to_json())
    assert states(bench) == {"a": "pending"}, "a failure of the older settings"


@pytest.mark.parametrize("form", ["mp4", "png"])
def test_job_with_missing_output_is_pending(bench, form):
    job = bench.job("a", output={"format": form})
    keep(bench, job)
    bench.run(job)
    assert states(bench) == {"a": "succeeded"}
    place = bench.folder / "out" / bench.result("a")["output"]["key"]
    shutil.rmtree(place) if form == "png" else place.unlink()
    (row,) = read_run_status(bench.out).rows
    assert (row.status, row.output, row.film) == ("pending", None, "")
    assert row.reason == f"the output is gone: {bench.result('a')['output']['key']}"
    assert bench.run(job, run_id="r2") == 0
    assert states(bench) == {"a": "succeeded"}


@pytest.mark.parametrize("form", ["mp4", "png"])
def test_job_with_output_of_other_size_is_pending(bench, form):
    job = bench.job("a", output={"format": form})
    keep(bench, job)
    bench.run(job)
    place = bench.folder / "out" / bench.result("a")["output"]["key"]
    if form == "png":
        next(place.glob("*.png")).unlink()
    else:
        os.truncate(place, 100)
    (row,) = read_run_status(bench.out).rows
    assert row.status == "pending"
    assert row.reason.startswith("the output is not what the record says: ")


def test_read_jobs_does_not_check_outputs(bench):
    """`compare` and `approve` report problems of an output on their own."""
    bench.run(bench.job("a"))
    (bench.folder / "out/jobs/a/output.mp4").unlink()
    found = read_jobs(bench.out)
    assert [(row.id, row.status) for row in found.rows] == [("a", "succeeded")]
    assert found.records["a"].job_id == "a"


def test_job_with_unreadable_record_is_pending(bench):
    keep(bench, bench.job("a"))
    bench.out.write_bytes("jobs/a/result.json", b"{torn")
    (row,) = read_run_status(bench.out).rows
    assert (row.status, row.reason) == ("pending", "its record cannot be read")


def test_jobs_of_other_manifests_come_last_and_are_not_counted(bench, capsys):
    jobs = [bench.job("z"), bench.job("a", "fail-generate"), bench.job("m")]
    keep(bench, *jobs)
    bench.run(*jobs)
    keep(bench, bench.job("m"), run_id="r2")
    found = read_run_status(bench.out, "r2")
    assert [(row.id, row.listed) for row in found.rows] == [("m", True), ("a", False), ("z", False)]
    assert (found.counts["total"], found.exit_code) == (1, 0)
    main(["status", str(bench.folder / "out"), "--run", "r2"])
    assert "jobs of other manifests: 1 succeeded · 1 failed\n" in capsys.readouterr().out


def test_status_shows_newest_run_unless_run_is_named(bench, capsys):
    for index, name in enumerate("abc"):
        keep(bench, *(bench.job(f"{name}{number}") for number in range(index + 1)), run_id=f"r-{name}")
        os.utime(bench.folder / f"out/runs/r-{name}/jobs.json", (1000 + index, 1000 + index))
    assert read_run_status(bench.out).run_id == "r-c"
    assert read_run_status(bench.out, "r-b").counts["total"] == 2
    assert main(["status", str(bench.folder / "out"), "--run", "r-d"]) == 2
    assert "there is no list of jobs of run r-d; runs with a list: r-c, r-b, r-a" in capsys.readouterr().err


def test_status_counts_and_shows_warnings(bench, capsys):
    keep(bench, bench.job("a"), bench.job("b"))
    bench.run(bench.job("a"), bench.job("b"))
    record = bench.result("b") | {"warnings": ["fps is above the source's"]}
    bench.out.write_bytes("jobs/b/result.json", json.dumps(record).encode())
    assert read_run_status(bench.out).counts["with_warnings"] == 1
    assert main(["status", str(bench.folder / "out")]) == 0
    told = capsys.readouterr().out
    assert re.search(r"^a +succeeded +1 ", told, re.M) and re.search(r"^b +succeeded ! +1 ", told, re.M)
    assert "\nb: ! fps is above the source's\n" in told
    assert told.endswith("2 of 2 done · 0 failed · 1 with warnings\n")


def test_status_json_is_one_object(bench, capsys):
    keep(bench, bench.job("a"), bench.job("b"))
    bench.run(bench.job("a"))
    capsys.readouterr()
    for words in ([], ["--watch", "--timeout", "0s"], ["--wait", "--timeout", "0s"]):
        assert main(["status", str(bench.folder / "out"), "--json", *words]) == 3
        found = json.loads(capsys.readouterr().out)
        assert list(found) == ["out", "run_id", "manifest", "counts", "rate_per_hour", "eta_s", "exit_code", "jobs"]
        assert (found["exit_code"], found["counts"]["pending"], found["eta_s"]) == (3, 1, None)
        assert found["rate_per_hour"] > 0
        assert [(job["id"], job["status"]) for job in found["jobs"]] == [("a", "succeeded"), ("b", "pending")]


def test_status_of_many_jobs_is_folded(bench, capsys):
    jobs = [bench.job(f"j{index:03d}") for index in range(60)]
    keep(bench, *jobs)
    bench.run(jobs[0], bench.job("j001", "fail-generate"))
    keep(bench, jobs[0], bench.job("j001", "fail-generate"), *jobs[2:])
    out = str(bench.folder / "out")
    main(["status", out])
    told = capsys.readouterr().out
    assert "j001 " in told and "j000 " not in told and "j059 " not in told
    assert "59 jobs that are done or have not begun: --all shows them" in told
    assert "1 of 60 done · 1 failed · 58 pending" in told
    main(["status", out, "--all"])
    told = capsys.readouterr().out
    assert all(f"{job.id} " in told for job in jobs) and "--all" not in told


# -- rate --------------------------------------------------------------------------------------------------------------

HOUR = 3600.0


def moment(seconds: float) -> str:
    return time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(seconds)) + ".000Z"


def ended(index: int, begin: float, end: float, **changes) -> StatusRow:
    row = StatusRow(id=str(index), status="succeeded", run_id="r", started_at=moment(begin), finished_at=moment(end))
    return row.model_copy(update=changes)


def seen(rows: list[StatusRow], now: float) -> RunStatus:
    return RunStatus("out", "r", "m.yaml", tuple(rows), {}, now)


RUNNING = StatusRow(id="run", status="running", host="gpu-a", heard_s=4.0, run_id="r")
PENDING = StatusRow(id="wait", status="pending", reason="not begun")


def test_rate_counts_from_first_start_of_run():
    rows = [ended(0, 0, HOUR), ended(1, 0, HOUR), ended(2, HOUR, 2 * HOUR, status="failed"), RUNNING, PENDING, PENDING]
    found = seen(rows, 2 * HOUR)
    assert (found.rate_per_hour, found.left) == (1.5, 3)
    assert found.eta_s == 2 * HOUR
    assert seen(rows, 4 * HOUR).rate_per_hour == 0.75, "a stall shows"


def test_rate_is_that_of_last_50_jobs():
    slow = [ended(index, index * HOUR, (index + 1) * HOUR) for index in range(100)]
    quick = [ended(100 + index, 100 * HOUR, 100 * HOUR + 36 * (index + 1)) for index in range(50)]
    assert seen([*slow, *quick], 100.5 * HOUR).rate_per_hour == pytest.approx(100)


def test_rate_ignores_jobs_of_older_runs_and_other_manifests():
    rows = [ended(0, 0, HOUR, run_id="older"), ended(1, 0, HOUR, listed=False), RUNNING]
    assert (seen(rows, HOUR).rate_per_hour, seen(rows, HOUR).eta_s) == (None, None)
    rows.append(ended(2, 0.5 * HOUR, HOUR))
    assert seen(rows, HOUR).rate_per_hour == 2


def test_eta_without_running_job_is_unknown():
    found = seen([ended(0, 0, HOUR), PENDING], 2 * HOUR)
    assert (found.rate_per_hour, found.eta_s) == (0.5, None)


def test_status_counts_sum_to_total():
    """Each job of the manifest has exactly one status, whatever the folder contains."""
    for code in range(5**4):
        picked = [STATES[code // 5**place % 5] for place in range(4)]
        rows = [StatusRow(id=str(i), status=state, listed=i != 3) for i, state in enumerate(picked)]
        counts = seen(rows, 0).counts
        assert sum(counts[state] for state in STATES) == counts["total"] == 3
        assert Counter(picked[:3]) == {state: counts[state] for state in STATES if counts[state]}
        assert seen(rows, 0).exit_code == (
            3 if {"running", "lost", "pending"} & set(picked[:3]) else 1 if "failed" in picked[:3] else 0
        )


# -- looking again -----------------------------------------------------------------------------------------------------


class CountingStorage(LocalStorage):
    """Notes what is read."""

    def __init__(self, root):
        super().__init__(root)
        self.reads: list[str] = []
        self.on_read = lambda key: None

    def read_bytes(self, key):
        self.reads.append(key)
        self.on_read(key)
        return super().read_bytes(key)

    def read_versioned(self, key, *, aged=False):
        self.reads.append(key)
        self.on_read(key)
        return super().read_versioned(key, aged=aged)


@pytest.fixture
def counting(bench) -> CountingStorage:
    return CountingStorage(bench.folder / "out")


def test_second_read_reads_only_changed_records(bench, counting):
    keep(bench, *(bench.job(name) for name in "abc"))
    bench.run(bench.job("a"), bench.job("b"))
    reader = StatusReader(counting)
    reader.read()
    assert sorted(counting.reads) == ["jobs/a/result.json", "jobs/b/result.json", "runs/r1/jobs.json"]
    counting.reads.clear()
    assert reader.read().counts["succeeded"] == 2
    assert counting.reads == []
    bench.run(bench.job("b", seed=5), bench.job("c"), run_id="r2")
    found = reader.read()
    assert sorted(counting.reads) == ["jobs/b/result.json", "jobs/c/result.json"]
    assert [(row.id, row.status) for row in found.rows] == [("a", "succeeded"), ("b", "pending"), ("c", "succeeded")]


def test_mark_that_is_not_renewed_ages_without_read(bench, counting):
    """The age is taken from the store's clock at the read, and then from the time between the reads."""
    Ledger(bench.out, lease_s=30).begin("a", Decision("run", ""), "f", "r")
    at = [100.0]
    reader = StatusReader(counting, clock=lambda: 5000 + at[0], timer=lambda: at[0])
    first = reader.read()
    assert first.rows[0].heard_s < 2
    counting.reads.clear()
    at[0] += 20
    (row,) = reader.read().rows
    assert (row.status, 20 <= row.heard_s < 22) == ("running", True)
    at[0] += 10
    last = reader.read()
    (row,) = last.rows
    assert (row.status, counting.reads) == ("lost", [])
    assert first.marks["a"].mark.run_id == "r"
    assert 5098 < first.marks["a"].heard_at <= 5100
    assert last.marks["a"].heard_at == pytest.approx(first.marks["a"].heard_at)


def test_renewed_mark_is_read_again(bench, counting):
    ledger = Ledger(bench.out, lease_s=30)
    ledger.begin("a", Decision("run", ""), "f", "r")
    at = [100.0]
    reader = StatusReader(counting, timer=lambda: at[0])
    reader.read()
    at[0] += 40
    ledger.note_segments("a", 2)
    (row,) = reader.read().rows
    assert (row.status, row.heard_s < 2, "2 segments" in row.reason) == ("running", True, True)


def test_process_that_ends_between_two_reads_is_lost(tmp_path):
    begin = f"from tests.verbs.test_status import begin_and_wait; begin_and_wait({str(tmp_path)!r})"
    process = subprocess.Popen(
        [sys.executable, "-c", begin], stdin=subprocess.PIPE, stdout=subprocess.PIPE, cwd=Path(__file__).parents[2]
    )
    assert process.stdout is not None
    process.stdout.read(1)
    reader = StatusReader(open_storage(tmp_path))
    assert reader.read().rows[0].status == "running"
    process.communicate(b"")
    assert reader.read().rows[0].status == "lost"


def begin_and_wait(out: str) -> None:
    Ledger(open_storage(out)).begin("a", Decision("run", ""), "f", "r")
    os.write(1, b".")
    sys.stdin.read()
    os._exit(0)


def test_job_that_ends_during_read_is_succeeded(bench, counting):
    """The listing has only the mark; when the mark is read, the job is done, and its record and output count."""
    keep(bench, bench.job("a"))
    bench.run(bench.job("a"))
    done = bench.folder / "done"
    (bench.folder / "out/jobs/a").rename(done)
    bench.out.write_bytes("jobs/a/attempt.json", b"{}")

    def end(key: str) -> None:
        if key.endswith("attempt.json") and done.exists():
            shutil.rmtree(bench.folder / "out/jobs/a")
            done.rename(bench.folder / "out/jobs/a")

    counting.on_read = end
    (row,) = StatusReader(counting).read().rows
    assert (row.status, row.reason) == ("succeeded", "")


def test_read_after_failed_read_is_complete(bench, counting):
    keep(bench, bench.job("a"))
    bench.run(bench.job("a"))

    def fail(key: str) -> None:
        raise StorageUnavailable("away", where=key)

    reader = StatusReader(counting)
    counting.on_read = fail
    with pytest.raises(StorageUnavailable):
        reader.read()
    counting.on_read = lambda key: None
    assert reader.read().counts["succeeded"] == 1


def test_new_run_is_found_by_next_read(bench):
    keep(bench, bench.job("a"))
    os.utime(bench.folder / "out/runs/r1/jobs.json", (1000, 1000))
    newest, named = StatusReader(bench.out), StatusReader(bench.out, "r1")
    assert newest.read().run_id == named.read().run_id == "r1"
    keep(bench, bench.job("a"), bench.job("b"), run_id="r2")
    assert (newest.read().run_id, named.read().run_id) == ("r2", "r1")
    assert newest.read().counts["total"] == 2


def test_status_waits_as_settings_say(bench, monkeypatch):
    keep(bench, bench.job("a"))
    waits = []
    monkeypatch.setattr(status_verb, "wait_for_end", lambda read, **how: waits.append(how) or read())
    out = str(bench.folder / "out")
    status(StatusSettings(out=out))
    assert waits == []
    status(StatusSettings(out=out, wait=True, every=2, timeout="30m"))
    status(StatusSettings(out=out, watch=True), print)
    assert waits == [
        {"every_s": 2, "timeout_s": 1800, "show": None},
        {"every_s": 10, "timeout_s": None, "show": print},
    ]
    with pytest.raises(ConfigInvalid, match="--wait or --watch"):
        StatusSettings(out=out, timeout="30m")


# -- on S3 -------------------------------------------------------------------------------------------------------------


def test_status_on_s3_requests_only_listed_records_and_marks(bench, faulty_s3, aws_env):
    """One request per record or mark; an output is checked by the listed ETag, and requested only if that differs."""
    aws_env(faulty_s3)
    storage = open_storage(f"s3://{faulty_s3.make_bucket()}/out")
    jobs = [bench.job(name) for name in "abc"]
    bench.run(*jobs[:2], storage=storage)
    keep(bench, *jobs)
    storage.write_bytes("runs/r1/jobs.json", bench.out.read_bytes("runs/r1/jobs.json"))
    faulty_s3.requests.clear()
    found = read_run_status(storage)
    assert [row.status for row in found.rows] == ["succeeded", "succeeded", "pending"]
    assert len(faulty_s3.seen("GET", "result.json")) == 2
    assert faulty_s3.seen("GET", "attempt.json") == faulty_s3.seen("HEAD") == []
    assert len(faulty_s3.seen("GET")) == 5, "two records, the run's jobs, and two listings"
    data = storage.read_bytes("jobs/a/output.mp4")
    storage.write_bytes("jobs/a/output.mp4", bytes(reversed(data)))
    row = read_run_status(storage).rows[0]
    assert (row.status, row.reason) == (
        "pending",
        "the output is not what the record says: jobs/a/output.mp4 has another ETag",
    )


def test_status_of_folder_with_jobs_of_all_states_is_consistent(bench):
    """Jobs of all states in one folder."""
    jobs = [
        bench.job("done"),
        bench.job("bad", "fail-generate"),
        bench.job("gone"),
        bench.job("held"),
        bench.job("new"),
    ]
    keep(bench, *jobs)
    bench.run(*jobs[:3])
    (bench.folder / "out/jobs/gone/output.mp4").unlink()
    Ledger(bench.out).begin("held", Decision("run", ""), "f", "r1")
    Ledger(bench.out, lease_s=30).begin("dead", Decision("run", ""), "f", "r1")
    long_ago = time.time() - 31
    os.utime(bench.folder / "out/jobs/dead/attempt.json", (long_ago, long_ago))
    kept = RunJobsRecord.model_validate_json(bench.out.read_bytes("runs/r1/jobs.json"))
    both = kept.model_copy(update={"jobs": kept.jobs | {"dead": None}})
    bench.out.write_bytes("runs/r1/jobs.json", both.to_json())
    found = read_run_status(bench.out)
    assert {row.id: row.status for row in found.rows} == {
        "done": "succeeded",
        "bad": "failed",
        "gone": "pending",
        "held": "running",
        "new": "pending",
        "dead": "lost",
    }
    assert sum(found.counts[state] for state in STATES) == found.counts["total"] == 6
    assert replace(found, rows=found.rows[:2]).exit_code == 1


def test_read_run_status_raises_gc_threshold_while_reading(bench, monkeypatch):
    keep(bench, bench.job("a"))
    bench.run(bench.job("a"))
    seen = []
    parse = status_verb.parse_record
    monkeypatch.setattr(status_verb, "parse_record", lambda data: seen.append(gc.get_threshold()[0]) or parse(data))
    before = gc.get_threshold()
    assert read_run_status(bench.out).counts["succeeded"] == 1
    assert seen == [status_verb.GC_THRESHOLD]
    assert gc.get_threshold() == before

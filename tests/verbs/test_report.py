"""Report: real runs, and what one report tells of them; sums are made anew from the raw JSON files."""

from __future__ import annotations

import json
import threading
import time
from datetime import datetime
from functools import partial
from pathlib import Path

import jsonschema
import pytest

from runner.cli import main
from runner.errors import ConfigInvalid
from runner.records.run_report import RunReport, report_schemas
from runner.storage import LocalStorage, open_storage
from runner.verbs.report import report
from runner.verbs.settings import ReportSettings
from runner.verbs.status_watch import wait_for_end
from tests.hand_clock import HandClock
from tests.verbs.reported_runs import FORECAST_BYTES, FORECAST_S, SUMMARY, read_raw, run_stub, run_that_dies

AB_ENDED = ["jobs/a/result.json", "jobs/b/result.json", "jobs/c/parts/*/*.state", SUMMARY]
CLOCKS_S = 0.05  # a process may pause between reading the clock of the day and the one that its seconds count from
FOUR = {"d": "ok", "a": "ok", "c": "fail-generate", "b": "ok"}  # no order but the manifest's


def report_of(out: str | Path, **given) -> RunReport:
    """Checked against its schema, and against the file that was written."""
    reported = report(ReportSettings(out=str(out), **given))
    data = json.loads(reported.report.to_json())
    jsonschema.validate(data, report_schemas()["report.v1.schema.json"])
    place = open_storage(given.get("to") or out)
    folder = "" if given.get("to") else f"runs/{reported.report.run_id}/"
    assert reported.files == (place.uri(f"{folder}report.html"), place.uri(f"{folder}report.json"))
    assert json.loads(place.read_bytes(f"{folder}report.json")) == data
    assert place.read_bytes(f"{folder}report.html").rstrip().endswith(b"</html>")
    return reported.report


def seconds_between(begin: str, end: str) -> float:
    return (datetime.fromisoformat(end) - datetime.fromisoformat(begin)).total_seconds()


def states(found: RunReport) -> dict[str, str]:
    return {job.id: job.status for job in found.jobs}


@pytest.fixture(params=["disk", "s3"])
def out(request, tmp_path) -> str:
    """An output storage."""
    if request.param == "disk":
        return str(tmp_path / "out")
    aws_env, moto = (request.getfixturevalue(name) for name in ("aws_env", "moto_s3"))
    return f"s3://{aws_env(moto).make_bucket()}/out"


def test_report_of_two_shards_with_same_run_id_is_one_report(out, tmp_path):
    assert run_stub(out, tmp_path, FOUR, run_id="r", shard="0/2") == 1
    assert run_stub(out, tmp_path, FOUR, run_id="r", shard="1/2") == 0
    found = report_of(out, gpu_hour=3600.0)  # a second costs 1

    raw = read_raw(out, "r")
    assert [summary["shard"] for summary in raw.summaries] == ["00000-of-00002", "00001-of-00002"]
    assert (found.run_id, found.manifest, found.recipe) == ("r", "night.json", "stub")
    assert states(found) == {"d": "succeeded", "a": "succeeded", "c": "failed", "b": "succeeded"}
    assert [job.id for job in found.jobs] == ["d", "a", "c", "b"]
    assert found.counts == {
        "total": 4,
        "succeeded": 3,
        "failed": 1,
        "skipped": 0,
        "running": 0,
        "lost": 0,
        "pending": 0,
    }

    loading = sum(span["end_s"] - span["begin_s"] for one in raw.processes for span in one["loading"])
    total, work = (sum(process[name] for process in raw.processes) for name in ("seconds", "work_s"))
    spent = found.gpu_seconds
    assert spent.total == pytest.approx(total, abs=0.005)
    assert spent.work == pytest.approx(work, abs=0.005)
    assert spent.loading == pytest.approx(loading, abs=0.005)
    assert spent.idle == pytest.approx(total - work - loading, abs=0.01)
    assert work >= sum(record["gpu_s"] for record in raw.records.values()) - 0.005 > 0.1

    film_s = sum(r["output"]["frames"] / int(r["output"]["fps"]) for r in raw.records.values() if r["output"])
    assert found.film_s == pytest.approx(film_s) == 3 * 6 / 8
    assert found.cost == pytest.approx(total, abs=0.005)
    assert found.cost_per_film_s == pytest.approx(total / film_s, abs=0.01)
    assert sum(job.cost or 0 for job in found.jobs) == pytest.approx(found.cost)
    assert {job.id for job in found.jobs if job.cost is None} == {"c"}
    begun = min(process["started_at"] for process in raw.processes)
    lasted = max(seconds_between(begun, process["started_at"]) + process["seconds"] for process in raw.processes)
    assert found.started_at == begun
    assert found.seconds == pytest.approx(lasted, abs=0.002)
    assert seconds_between(begun, found.finished_at) == pytest.approx(lasted, abs=0.002)


def test_report_with_wait_waits_for_start_and_last_job(tmp_path, monkeypatch):
    """A shard runs in each pause: the run is missing, then half done, then done."""
    out, clock, pauses = str(tmp_path / "out"), HandClock(50.0), []

    def sleep(seconds: float) -> None:
        pauses.append(seconds)
        clock.tick(seconds)
        if len(pauses) > 1:
            run_stub(out, tmp_path, FOUR, run_id="r", shard=f"{len(pauses) - 2}/2")

    monkeypatch.setattr("runner.verbs.report.wait_for_end", partial(wait_for_end, sleep=sleep, timer=clock))
    run_stub(out, tmp_path, {"z": "ok"}, run_id="another")
    found = report_of(out, run="r", wait=True, every=20, timeout="1h")
    assert (found.run_id, pauses) == ("r", [20, 20, 20])
    assert (found.counts["succeeded"], found.counts["failed"], found.counts["pending"]) == (3, 1, 0)


def test_report_after_timeout_shows_state_so_far(tmp_path, monkeypatch):
    out, clock = str(tmp_path / "out"), HandClock(50.0)
    monkeypatch.setattr("runner.verbs.report.wait_for_end", partial(wait_for_end, sleep=clock.tick, timer=clock))
    run_stub(out, tmp_path, FOUR, run_id="r", shard="0/2")
    assert main(["report", out, "--wait", "--timeout", "25s"]) == 0
    assert clock.now == 75.0
    assert RunReport.model_validate_json((tmp_path / "out/runs/r/report.json").read_bytes()).counts["pending"] == 2


def test_wait_for_unknown_run_exits_with_error_after_timeout(tmp_path, monkeypatch, capsys):
    clock = HandClock(50.0)
    for verb in ("report", "status"):
        again = partial(wait_for_end, sleep=clock.tick, timer=clock)
        monkeypatch.setattr(f"runner.verbs.{verb}.wait_for_end", again)
        assert main([verb, str(tmp_path / "out"), "--run", "r", "--wait", "--timeout", "25s"]) == 2
        assert "there is no list of jobs of run r" in capsys.readouterr().err
    assert clock.now == 100.0
    assert main(["report", str(tmp_path), "--timeout", "25s"]) == 2
    assert "--timeout: needs --wait. Give --wait, or leave --timeout out" in capsys.readouterr().err


def test_report_job_has_numbers_of_record(out, tmp_path):
    run_stub(out, tmp_path, {"a": "ok", "b": "fail-prepare"}, run_id="r")
    found = report_of(out)
    record = read_raw(out, "r").records["a"]
    good, bad = found.jobs
    assert (good.wall_s, good.gpu_s, good.forecast_s) == (record["wall_s"], record["gpu_s"], FORECAST_S)
    assert (good.device_bytes, good.forecast_bytes) == (None, FORECAST_BYTES)  # measured on a GPU only
    assert good.host_bytes == record["memory"]["host_rss_peak_bytes"]
    assert (good.frames, good.fps, good.film_s, good.width, good.height) == (6, "8", 0.75, 64, 48)
    assert good.stages_s == pytest.approx(record["timings_s"], abs=0.001)
    assert good.output == f"{open_storage(out).root}/jobs/a/output.mp4"
    assert open_storage(out).exists(good.poster)
    assert (good.host, good.shard) == (record["host"], "00000-of-00001")
    assert (bad.error.code, bad.error.message[-12:]) == ("input.unreadable", "Send a video")
    assert (bad.output, bad.film_s, bad.gpu_s) == (None, None, 0.0)
    assert (found.gpu_hour, found.cost, found.cost_per_film_s, good.cost) == (None, None, None, None)


def test_report_sums_stages_and_caches_over_jobs(tmp_path):
    run_stub(str(tmp_path / "out"), tmp_path, dict.fromkeys("abc", "ok"), run_id="r")
    found = report_of(tmp_path / "out")
    records = read_raw(tmp_path / "out", "r").records.values()
    for stage, seconds in found.stages_s.items():
        assert seconds == pytest.approx(sum(record["timings_s"].get(stage, 0) for record in records), abs=0.002)
    assert list(found.stages_s.values()) == sorted(found.stages_s.values(), reverse=True)
    assert (found.caches["prompt"].hits, found.caches["prompt"].misses, found.caches["prompt"].hit_rate) == (
        2,
        1,
        0.6667,
    )


def test_report_spans_lie_within_process_and_overlap(tmp_path):
    run_stub(str(tmp_path / "out"), tmp_path, dict.fromkeys("abc", "ok"), run_id="r", keep_ahead=True)
    (process,) = report_of(tmp_path / "out").processes
    kinds = [(span.stage, span.job_id) for span in process.spans]
    wanted = {("load", None)} | {(stage, job) for stage in ("prepare", "generate", "deliver") for job in "abc"}
    assert set(kinds) == wanted
    assert len(kinds) == 10
    for span in process.spans:
        assert process.begin_s - CLOCKS_S <= span.begin_s <= span.end_s <= process.end_s + CLOCKS_S
    at = {(span.stage, span.job_id): span for span in process.spans}
    assert [span.begin_s for span in process.spans] == sorted(span.begin_s for span in process.spans)
    assert at["load", None].end_s <= at["prepare", "a"].begin_s + CLOCKS_S
    for job, following in ("ab", "bc"):
        assert at["prepare", job].end_s <= at["generate", job].begin_s + 0.002
        assert at["prepare", following].begin_s < at["generate", job].end_s  # the next one is prepared meanwhile
    assert (process.begin_s, process.finished, process.exit_code, process.device) == (0.0, True, 0, "stub")


def test_report_shows_jobs_done_before_as_skipped_without_cost(tmp_path):
    out = tmp_path / "out"
    run_stub(str(out), tmp_path, {"a": "ok"}, run_id="first")
    run_stub(str(out), tmp_path, {"a": "ok", "b": "ok"}, run_id="second")
    found = report_of(out, gpu_hour=2.49)
    assert found.run_id == "second"
    assert states(found) == {"a": "skipped", "b": "succeeded"}
    skipped, rendered = found.jobs
    assert (skipped.gpu_s, skipped.wall_s, skipped.cost) == (None, None, None)
    assert (skipped.frames, skipped.output) == (6, f"{out}/jobs/a/output.mp4")
    assert rendered.cost == pytest.approx(found.cost)
    assert found.film_s == 0.75
    assert sum(found.stages_s.values()) == pytest.approx(sum(rendered.stages_s.values()))
    older = report_of(out, run="first")
    assert (older.run_id, states(older)) == ("first", {"a": "succeeded"})


def test_report_of_run_with_rerendered_outputs_says_numbers_are_gone(tmp_path):
    out = tmp_path / "out"
    run_stub(str(out), tmp_path, {"a": "ok"}, run_id="first")
    run_stub(str(out), tmp_path, {"a": "ok"}, run_id="second", force=True)
    found = report_of(out, run="first", gpu_hour=2.49)
    (job,) = found.jobs
    assert (job.status, job.gpu_s, job.cost, job.frames) == ("succeeded", None, None, None)
    assert (found.film_s, found.cost_per_film_s) == (0.0, None)
    assert found.cost == pytest.approx(found.gpu_seconds.total * 2.49 / 3600)
    assert any("another run has rendered since: a." in note for note in found.notes)


def test_report_of_unfinished_run_shows_pending_jobs(tmp_path):
    """Shard 1 of 2 has not begun, and none of its jobs counts as done."""
    out = tmp_path / "out"
    run_stub(str(out), tmp_path, dict.fromkeys("abcd", "ok"), run_id="r", shard="0/2")
    found = report_of(out)
    assert states(found) == {"a": "succeeded", "b": "pending", "c": "succeeded", "d": "pending"}
    assert {job.reason for job in found.jobs if job.status == "pending"} == {"not begun"}
    assert any("have written no summary: 00001-of-00002" in note for note in found.notes)


def test_report_of_run_ended_by_signal_shows_signal_and_pending_jobs(tmp_path):
    out = tmp_path / "out"
    prompts = {"a": "ok", "b": "terminate"} | dict.fromkeys("cdefg", "ok")
    assert run_stub(str(out), tmp_path, prompts, run_id="r") == 143
    found = report_of(out)
    assert states(found) == dict.fromkeys("ab", "succeeded") | dict.fromkeys("cdefg", "pending")
    (process,) = found.processes
    assert (process.finished, process.exit_code, process.stopped_by) == (True, 143, "SIGTERM")
    assert found.finished_at is not None


def test_report_of_killed_process_ends_at_last_record(tmp_path):
    out = tmp_path / "out"
    run_that_dies(out, tmp_path, {"a": "ok", "b": "ok", "c": "crash-at-1"}, AB_ENDED)
    raw = read_raw(out, "r")
    (stale,) = raw.processes
    assert {line["id"]: line["status"] for line in raw.summaries[0]["jobs"]}["b"] == "not_run"  # what the report mends
    found = report_of(out, gpu_hour=2.49)
    assert states(found) == {"a": "succeeded", "b": "succeeded", "c": "lost"}
    (process,) = found.processes
    assert not process.finished
    assert (found.finished_at, process.exit_code, process.pid) == (None, None, stale["pid"])
    begun = stale["started_at"]
    assert process.end_s >= seconds_between(begun, raw.records["b"]["finished_at"]) > stale["seconds"]
    worked = sum(record["gpu_s"] for record in raw.records.values())
    assert process.gpu_seconds.work >= worked - 0.001 > stale["work_s"]
    assert found.gpu_seconds.total == pytest.approx(process.end_s - process.begin_s, abs=0.002)
    assert {span.job_id for span in process.spans} == {None, "a", "b"}
    assert sum(job.cost or 0 for job in found.jobs) == pytest.approx(found.cost)
    assert any("still run or were killed" in note for note in found.notes)


def test_report_of_restarted_shard_has_two_processes_and_keeps_first_jobs(tmp_path):
    """The second summary lists the first jobs as skipped, because it only knows its own process."""
    out = tmp_path / "out"
    prompts = {"a": "ok", "b": "ok", "c": "crash-at-1"}
    run_that_dies(out, tmp_path, prompts, AB_ENDED)
    assert run_stub(str(out), tmp_path, prompts, run_id="r") == 0
    raw = read_raw(out, "r")
    assert {line["id"]: line["status"] for line in raw.summaries[0]["jobs"]} == {
        "a": "skipped",
        "b": "skipped",
        "c": "succeeded",
    }
    found = report_of(out, gpu_hour=2.49)
    assert set(states(found).values()) == {"succeeded"}
    first, second = found.processes
    assert [one.finished for one in (first, second)] == [False, True]
    assert (first.exit_code, second.exit_code) == (None, 0)
    assert first.end_s <= second.begin_s
    assert {span.job_id for span in first.spans} == {None, "a", "b"}
    assert {span.job_id for span in second.spans} == {None, "c"}
    assert found.gpu_seconds.total == pytest.approx(first.gpu_seconds.total + second.gpu_seconds.total, abs=0.002)
    assert found.gpu_seconds.work >= sum(record["gpu_s"] for record in raw.records.values()) - 0.005
    assert sum(job.cost for job in found.jobs) == pytest.approx(found.cost)


def test_report_of_job_killed_after_record_shows_succeeded(tmp_path):
    """The mark lies beside the record; a later attempt of the same run would have begun after the record."""
    out = tmp_path / "out"
    run_that_dies(out, tmp_path, {"a": "ok", "b": "crash-at-1"}, ["jobs/a/result.json"])
    mark = json.loads((out / "jobs/b/attempt.json").read_text("utf-8"))
    record = read_raw(out, "r").records["a"]
    (out / "jobs/a/attempt.json").write_text(
        json.dumps(mark | {"job_id": "a", "started_at": record["started_at"]}), "utf-8"
    )
    assert states(report_of(out))["a"] == "succeeded"
    later = record["finished_at"].replace("20", "29", 1)
    (out / "jobs/a/attempt.json").write_text(json.dumps(mark | {"job_id": "a", "started_at": later}), "utf-8")
    assert states(report_of(out))["a"] == "lost"


def test_report_shows_process_without_summary_by_records(tmp_path):
    out = tmp_path / "out"
    run_that_dies(out, tmp_path, {"a": "ok", "b": "crash-at-1"}, ["jobs/a/result.json"])
    assert read_raw(out, "r").summaries == []
    found = report_of(out)
    assert states(found) == {"a": "succeeded", "b": "lost"}
    (process,) = found.processes
    record = read_raw(out, "r").records["a"]
    assert (process.pid, process.host, process.finished) == (None, record["host"], False)
    assert process.gpu_seconds.work == pytest.approx(record["gpu_s"], abs=0.001)
    assert found.started_at == record["started_at"]


def test_report_shows_process_without_records_by_mark(tmp_path):
    out = tmp_path / "out"
    run_that_dies(out, tmp_path, {"a": "crash-at-1"} | dict.fromkeys("bcd", "ok"), [])
    found = report_of(out, gpu_hour=2.49)
    assert states(found)["a"] == "lost"
    assert states(found)["d"] == "pending"  # b and c may have been prepared meanwhile
    assert (found.processes, found.finished_at, found.cost) == ([], None, None)
    assert "a rerun takes the job over" in found.jobs[0].reason
    assert any("has written no summary: its seconds are missing" in note for note in found.notes)


def make_older(out: Path, run_id: str) -> None:
    """Leave of a run what a version without hosts, device times and kept jobs would have left."""
    (out / f"runs/{run_id}/jobs.json").unlink()
    for path in (out / f"runs/{run_id}").glob("*.summary.json"):
        data = json.loads(path.read_text("utf-8"))
        del data["processes"]
        for line in data["jobs"]:
            del line["warnings"]
        path.write_text(json.dumps(data), "utf-8")
    for path in out.glob("jobs/*/result.json"):
        data = json.loads(path.read_text("utf-8"))
        for name in ("host", "shard", "wall_s", "gpu_s", "spans", "reuse"):
            del data[name]
        path.write_text(json.dumps(data), "utf-8")


def test_report_of_run_of_older_version_shows_known_values_and_notes(tmp_path):
    out = tmp_path / "out"
    run_stub(str(out), tmp_path, {"a": "ok", "b": "fail-generate"}, run_id="r")
    gpu_s = read_raw(out, "r").records["a"]["gpu_s"]
    make_older(out, "r")
    found = report_of(out, gpu_hour=2.49)
    (summary,) = (json.loads(path.read_text("utf-8")) for path in (out / "runs/r").glob("*.summary.json"))
    assert (found.run_id, states(found)) == ("r", {"a": "succeeded", "b": "failed"})
    assert (found.processes, found.cost, found.cost_per_film_s) == ([], None, None)
    assert (found.started_at, found.seconds) == (summary["started_at"], summary["seconds"])
    assert found.finished_at is not None
    job = found.jobs[0]
    assert (job.host, job.gpu_s, job.wall_s) == ("", gpu_s, summary["jobs"][0]["seconds"])
    said = " ".join(found.notes)
    assert "written no list of its manifest's jobs" in said
    assert "of an older version do not list their processes: 00000-of-00001" in said
    assert "Records of an older version, without hosts and times by thread: a." in said


def test_report_with_damaged_summary_notes_damage_and_reports_rest(tmp_path):
    out = tmp_path / "out"
    for shard in ("0/2", "1/2"):
        run_stub(str(out), tmp_path, {"a": "ok", "b": "ok"}, run_id="r", shard=shard)
    (out / "runs/r/00001-of-00002.summary.json").write_bytes(b"{torn")
    (out / "runs/r/jobs.json").write_bytes(b"[]")
    found = report_of(out)
    assert states(found) == {"a": "succeeded", "b": "succeeded"}  # b by its record
    assert [process.pid is None for process in found.processes] == [False, True]
    said = " ".join(found.notes)
    assert "The summary of shard 00001-of-00002 cannot be read" in said
    assert "the jobs of run r cannot be read" in said


def test_report_page_shows_previews_and_links_in_any_folder(out, tmp_path):
    run_stub(out, tmp_path, {"a": "ok"}, run_id="r")
    report_of(out)
    beside = open_storage(out).read_bytes("runs/r/report.html").decode()
    assert "../../jobs/a/output.mp4" in beside
    assert "data:image/jpeg;base64," in beside or "/9j/" in beside  # how a JPEG begins
    report_of(out, to=str(tmp_path / "to"))
    elsewhere = (tmp_path / "to/report.html").read_text("utf-8")
    root = open_storage(out).root
    wanted = root if root.startswith("s3://") else Path(root).absolute().as_uri()
    assert f"{wanted}/jobs/a/output.mp4" in elsewhere
    assert "../../jobs" not in elsewhere


def test_report_of_unknown_run_or_empty_folder_is_refused(tmp_path, capsys):
    with pytest.raises(ConfigInvalid, match="has no run"):
        report(ReportSettings(out=str(tmp_path / "nothing")))
    run_stub(str(tmp_path / "out"), tmp_path, {"a": "ok"}, run_id="night-7")
    with pytest.raises(ConfigInvalid, match=r"there is no run night-8.*night-7"):
        report(ReportSettings(out=str(tmp_path / "out"), run="night-8"))
    assert main(["report", str(tmp_path / "out"), "--run", "night-8"]) == 2
    assert "--run" in capsys.readouterr().err


def test_report_of_failed_jobs_exits_0_and_json_is_one_object(tmp_path, capsys):
    out = tmp_path / "out"
    assert run_stub(str(out), tmp_path, {"a": "ok", "b": "fail-generate"}, run_id="r") == 1
    capsys.readouterr()
    assert main(["report", str(out), "--json", "--gpu-hour", "2.49", "--to", str(tmp_path / "to")]) == 0
    printed = json.loads(capsys.readouterr().out)
    assert printed == json.loads((tmp_path / "to/report.json").read_text("utf-8"))
    assert (printed["gpu_hour"], printed["counts"]["failed"]) == (2.49, 1)
    assert not (out / "runs/r/report.json").exists()
    assert main(["report", str(out)]) == 0
    assert (out / "runs/r/report.json").is_file()
    assert (out / "runs/r/report.html").is_file()
    assert "input" not in capsys.readouterr().err


def test_report_twice_gives_same_report(tmp_path):
    out = tmp_path / "out"
    run_stub(str(out), tmp_path, {"a": "ok"}, run_id="r")
    first, again = (report_of(out) for _ in range(2))
    assert first.model_copy(update={"made_at": again.made_at}) == again


@pytest.mark.parametrize("wrong", ["-1", "much", "nan", "inf", True])
def test_report_with_invalid_gpu_hour_is_refused(wrong):
    with pytest.raises(ConfigInvalid, match=r"--gpu-hour.*2\.49"):
        ReportSettings(out="out", gpu_hour=wrong)


def test_report_reads_many_records_in_parallel(tmp_path, monkeypatch):
    """On an object store each read takes one round trip."""
    out = tmp_path / "out"
    run_stub(str(out), tmp_path, {"a": "ok"}, run_id="r")
    record = json.loads((out / "jobs/a/result.json").read_text("utf-8"))
    kept = json.loads((out / "runs/r/jobs.json").read_text("utf-8"))
    for number in range(100):
        name = f"job-{number:03d}"
        (out / f"jobs/{name}").mkdir()
        (out / f"jobs/{name}/result.json").write_text(json.dumps(record | {"job_id": name}), "utf-8")
        kept["jobs"][name] = kept["jobs"]["a"]
    (out / "runs/r/jobs.json").write_text(json.dumps(kept), "utf-8")
    summary = json.loads((out / "runs/r/00000-of-00001.summary.json").read_text("utf-8"))
    for number in range(40):
        path = out / f"runs/r/host-{number}.summary.json"
        path.write_text(json.dumps(summary | {"shard": f"host-{number}", "processes": []}), "utf-8")
    lock, now_reading, most, names = threading.Lock(), [0], [0, 0], ("read_bytes", "read_versioned")
    plain = {name: getattr(LocalStorage, name) for name in names}

    def slow(name):
        def read(self, key, **more):
            kind = 1 if key.endswith(".summary.json") else 0
            with lock:
                now_reading[0] += 1
                most[kind] = max(most[kind], now_reading[0])
            time.sleep(0.05)
            try:
                return plain[name](self, key, **more)
            finally:
                with lock:
                    now_reading[0] -= 1

        return read

    for name in names:
        monkeypatch.setattr(LocalStorage, name, slow(name))
    found = report_of(out)
    assert found.counts["succeeded"] == 101
    assert min(most) >= 8, "records and summaries are read one after the other"

"""The loop with a stub generator: no torch, no model; real storage, real video files, real records."""

from __future__ import annotations

import json
import re
import socket
import threading
import time
from dataclasses import dataclass, replace
from datetime import datetime
from pathlib import Path
from typing import Annotated

import av
import numpy as np
import pytest
from PIL import Image

from runner.batch.ledger import Ledger
from runner.batch.queues import WorkList
from runner.batch.stop import Stop
from runner.batch.summary import SummaryWriter
from runner.records.events import EventLog
from runner.records.people import People
from runner.records.record import ProcessUsage
from runner.spec.field_marks import Introduced
from runner.spec.manifest import Job
from runner.spec.options import JobOptions
from runner.storage import LocalStorage
from tests.batch.loop_bench import FILES, SIGTERM, Bench, bench
from tests.stub_generator import HEIGHT, WIDTH, StubConditions, StubGenerator

__all__ = ["bench"]  # a fixture


def frames_in(path: Path) -> int:
    with av.open(str(path)) as container:
        return sum(1 for _ in container.decode(video=0))


def test_run_leaves_files_and_full_record_of_every_job(bench):
    assert bench.run(bench.job("a"), bench.job("b", seed=7)) == 0
    for name in ("a", "b"):
        assert bench.files(name) == FILES
        record = bench.result(name)
        assert record["status"] == "succeeded"
        assert record["output"]["frames"] == frames_in(bench.folder / f"out/jobs/{name}/output.mp4") == 6
        assert record["efficiency"]["frames_denoised"] == 6
        assert record["memory"]["host_rss_peak_bytes"] > 0
        assert {"fetch", "stub_prepare", "encode_video", "publish"} <= record["timings_s"].keys()
        assert len(record["steps_s"]) == 4
        assert record["environment"]["packages"]["torch"]
    assert bench.result("a")["output"]["frames_sha256"] != bench.result("b")["output"]["frames_sha256"]
    assert bench.summary["counts"] == {"total": 2, "succeeded": 2, "skipped": 0, "failed": 0, "not_run": 0}
    assert bench.summary["exit_code"] == 0
    prom = (bench.folder / "out/runs/r1/0-of-1.metrics.prom").read_text()
    labels = rf'device="[^"]*",host="{re.escape(socket.gethostname())}",recipe="stub",run="r1",shard="0-of-1"'
    assert re.search(rf'^video_lab_jobs{{{labels},state="succeeded"}} 2\.0$', prom, re.M)
    assert re.search(rf"^video_lab_frames_total{{{labels}}} 12\.0$", prom, re.M)
    assert (bench.folder / "out/runs/r1/0-of-1.events.jsonl").exists()
    assert bench.generator.closed
    assert all(conditions.closed for conditions in bench.generator.prepared)
    assert list((bench.folder / "scratch").iterdir()) == []


def test_record_has_spans_of_threads_and_device_seconds(bench):
    bench.generator.prepare_s, bench.generator.generate_s = 0.1, 0.8
    assert bench.run(bench.job("a"), bench.job("b", seed=7)) == 0
    begun = {}
    for name in "ab":
        record = bench.result(name)
        assert (record["host"], record["shard"]) == (socket.gethostname(), "0-of-1")
        assert record["gpu_s"] > 0.7
        assert record["gpu_s"] == pytest.approx(record["timings_s"]["denoise"], abs=0.001)
        assert list(record["spans"]) == ["prepare", "generate", "deliver"]
        spans = {stage: (span["begin_s"], span["end_s"]) for stage, span in record["spans"].items()}
        assert spans["prepare"][0] >= 0
        assert spans["prepare"][1] - spans["prepare"][0] >= 0.1
        assert spans["prepare"][1] <= spans["generate"][0]
        assert spans["generate"][0] < spans["deliver"][0] < spans["generate"][1]  # its first segment is encoded while
        assert spans["deliver"][1] - spans["prepare"][0] == pytest.approx(record["wall_s"], abs=0.05)
        started = datetime.fromisoformat(record["started_at"]).timestamp()
        begun[name] = {stage: (started + begin, started + end) for stage, (begin, end) in spans.items()}
    assert begun["b"]["prepare"][1] < begun["a"]["generate"][1]  # while the one before was generated
    lines = {line["id"]: line for line in bench.summary["jobs"]}
    assert all(lines[name]["seconds"] >= bench.result(name)["wall_s"] for name in "ab")
    (process,) = bench.summary["processes"]
    assert process["work_s"] == pytest.approx(sum(bench.result(name)["gpu_s"] for name in "ab"), abs=0.002)
    assert (process["device"], len(process["loading"])) == ("stub", 1)


def test_work_seconds_of_failed_attempts_count_for_process(bench):
    bench.generator.generate_s = 0.2
    assert bench.run(bench.job("a", prompt="fail-generate"), bench.job("b", prompt="flaky-at-1")) == 1
    (process,) = bench.summary["processes"]
    records = [bench.result(name)["gpu_s"] for name in "ab"]
    assert all(seconds > 0.1 for seconds in records)
    assert process["work_s"] > sum(records) + 0.1  # the first try of b is in no record


def test_summary_has_warnings_of_jobs_done_before(bench):
    bench.run(bench.job("a"))
    data = bench.result("a") | {"warnings": ["the sound was too short"]}
    bench.out.write_bytes("jobs/a/result.json", json.dumps(data).encode())
    assert bench.run(bench.job("a"), run_id="r2") == 0
    assert bench.summary["jobs"][0]["warnings"] == ["the sound was too short"]


def test_idle_seconds_metric_is_updated_during_run(bench):
    written = []

    class Storage(LocalStorage):
        def write_bytes(self, key, data):
            written.extend(re.findall(r'gpu_seconds_total{.*kind="idle".*} (.+)', data.decode()))
            super().write_bytes(key, data)

    bench.run(bench.job("a"), bench.job("b"), storage=Storage(bench.folder / "out"))
    first, *_, last = map(float, written)
    assert 0 < first <= last  # the first job was fetched before the device had work
    assert last == pytest.approx(ProcessUsage.model_validate(bench.summary["processes"][-1]).idle_s)


def test_generator_warnings_are_in_record_summary_and_log(bench):
    bench.generator.warns = ("The transformer's blocks run eagerly on the GPU, not compiled (no compiler).",)
    assert bench.run(bench.job("a"), bench.job("b")) == 0
    for name in "ab":
        assert bench.result(name)["warnings"] == list(bench.generator.warns)
    assert [line["warnings"] for line in bench.summary["jobs"]] == [list(bench.generator.warns)] * 2
    assert [event["message"] for event in bench.events if event["event"] == "job_warning"] == [
        *bench.generator.warns
    ] * 2


def test_preprocessing_warnings_are_in_notes_and_once_in_log(bench, monkeypatch):
    real, said = bench.generator.prepare, ["fps 32 is above the 16 of the driving video.", "No face was seen."]

    def prepare(request, timer):
        return replace(real(request, timer), report={"warnings": list(said)})

    monkeypatch.setattr(bench.generator, "prepare", prepare)
    assert bench.run(bench.job("a"), bench.job("b", prompt="flaky"), bench.job("c", prompt="fail-generate")) == 1
    for name in ("a", "b", "c"):
        assert bench.result(name)["notes"] == bench.result(name)["warnings"] == said
        assert {line["id"]: line["warnings"] for line in bench.summary["jobs"]}[name] == said
        events = [event for event in bench.events if event["event"] == "job_warning" and event["job"] == name]
        assert [(event["level"], event["message"]) for event in events] == [("warning", text) for text in said]


def test_rerun_of_done_jobs_loads_no_model(bench):
    bench.run(bench.job("a"), bench.job("b"))
    before = {name: (bench.folder / f"out/jobs/{name}/result.json").stat().st_mtime_ns for name in "ab"}
    assert bench.run(bench.job("a"), bench.job("b"), run_id="r2") == 0
    assert bench.loads == 1
    assert bench.summary["counts"]["skipped"] == 2
    assert [line["reason"] for line in bench.summary["jobs"]] == ["done", "done"]
    assert before == {name: (bench.folder / f"out/jobs/{name}/result.json").stat().st_mtime_ns for name in "ab"}


def test_job_with_changed_option_runs_again_alone_with_reason(bench):
    bench.run(bench.job("a", seed=41), bench.job("b"))
    assert bench.run(bench.job("a", seed=42), bench.job("b"), run_id="r2") == 0
    lines = {line["id"]: line for line in bench.summary["jobs"]}
    assert (lines["a"]["status"], lines["a"]["reason"]) == ("succeeded", "options.seed: 41 → 42")
    assert lines["b"]["status"] == "skipped"


class GlowOptions(JobOptions):
    glow: Annotated[float, Introduced(0)] = 0.0


class RaisedGlowOptions(JobOptions):
    glow: Annotated[float, Introduced(0)] = 0.5


def test_new_option_keeps_old_records_done_until_default_is_raised(bench, monkeypatch):
    def status(options: type[JobOptions], run_id: str, **changes) -> tuple[str, str]:
        monkeypatch.setattr("runner.batch.fingerprint.JobOptions", options)
        job = replace(bench.job("a"), options=options(**changes))
        assert bench.run(job, run_id=run_id) == 0
        (line,) = bench.summary["jobs"]
        return line["status"], line["reason"]

    assert bench.run(bench.job("a")) == 0
    assert status(GlowOptions, "r2") == ("skipped", "done")
    assert status(RaisedGlowOptions, "r3", glow=0.0) == ("skipped", "done")
    assert status(RaisedGlowOptions, "r4") == ("succeeded", "options.glow: 0 → 0.5")
    assert bench.result("a")["fingerprint_parts"]["options.glow"] == 0.5
    assert status(RaisedGlowOptions, "r5", seed=7) == ("succeeded", "options.seed: 42 → 7")
    assert status(GlowOptions, "r6", seed=7) == ("succeeded", "options.glow: 0.5 → 0")
    assert "options.glow" not in bench.result("a")["fingerprint_parts"]


@pytest.mark.parametrize("bad", ["fail-prepare", "fail-generate", "wrong-size", "few"])
def test_bad_job_does_not_stop_batch(bench, bad):
    assert bench.run(bench.job("a"), bench.job("bad", bad), bench.job("c")) == 1
    assert {line["id"]: line["status"] for line in bench.summary["jobs"]} == {
        "a": "succeeded",
        "bad": "failed",
        "c": "succeeded",
    }
    assert bench.files("bad", parts=bad != "fail-generate") == {"result.json"}
    record = bench.result("bad")
    assert record["error"]["code"] == ("input.unreadable" if bad == "fail-prepare" else "internal")
    assert record["error"]["stage"] == {"fail-prepare": "prepare", "fail-generate": "generate"}.get(bad, "deliver")
    assert record["error"]["message"]
    traces = [event for event in bench.events if event["event"] == "job_traceback"]
    assert [event["job"] for event in traces] == (["bad"] if bad == "fail-generate" else [])
    assert all("Traceback (most recent call last)" in event["exception"] for event in traces)
    # its neighbours' frames are what they are without it
    alone = Bench(bench.folder / "alone")
    alone.run(alone.job("c"))
    assert alone.result("c")["output"]["frames_sha256"] == bench.result("c")["output"]["frames_sha256"]


def test_png_job_leaves_numbered_frames(bench):
    assert bench.run(bench.job("a", output={"format": "png"})) == 0
    record = bench.result("a")
    assert record["output"]["files"] == 6
    assert record["output"]["key"].startswith("jobs/a/frames/")
    paths = sorted((bench.folder / "out" / record["output"]["key"]).iterdir())
    assert [path.name for path in paths] == [f"{n:06d}.png" for n in range(6)]
    assert np.asarray(Image.open(paths[0])).shape == (HEIGHT, WIDTH, 3)
    assert bench.run(bench.job("a", output={"format": "png"}), run_id="r2") == 0
    assert bench.summary["counts"]["skipped"] == 1
    # changing the format leaves nothing of the other one behind
    assert bench.run(bench.job("a"), run_id="r3") == 0
    assert bench.files("a") == FILES


def times(events: list[dict], name: str) -> dict[str, str]:
    return {event["job"]: event["time"] for event in events if event["event"] == name}


def test_stages_of_successive_jobs_overlap(bench):
    """Job 2 is prepared before job 1's generation ends. The run takes the time of the critical path and 5 % at most.

    The critical path is the first preparation, what the main thread spends on each job (to generate, and to write its
    marks to the disk: a tenth more at most), and the last delivery. Without the overlap it would take 28 % more.
    """
    count, prepare_s, generate_s = 4, 0.5, 1.2
    over = []
    for attempt in range(6):  # other work on the machine can only add: the best of six is the loop's own
        bench.generator = StubGenerator(prepare_s=prepare_s, generate_s=generate_s)
        begin = time.monotonic()
        assert bench.run(*[bench.job(f"j{n}") for n in range(count)], run_id=f"r{attempt}", force=True) == 0
        took = time.monotonic() - begin
        last = bench.result(f"j{count - 1}")["timings_s"]
        busy = sum(event["seconds"] for event in bench.events if event["event"] == "job_generated")
        path = prepare_s + min(busy, 1.1 * count * generate_s) + last["encode_video"] + last["publish"]
        over.append(took / path - 1)
        prepared, generated = times(bench.events, "job_prepared"), times(bench.events, "job_generated")
        if over[-1] <= 0.05 and all(prepared[f"j{n + 1}"] < generated[f"j{n}"] for n in range(count - 1)):
            break
    else:
        pytest.fail(f"no run of six overlapped within 5 %: {over}")
    assert any(line.startswith("prepare of") for line in bench.result("j1")["memory"]["overlapped"])


@pytest.mark.parametrize(("twice", "status"), [(False, "succeeded"), (True, "not_run")])
def test_stop_signal_drains_running_job_unless_sent_twice(bench, twice, status):
    bench.generator = StubGenerator(generate_s=0.6)

    def signal() -> None:
        bench.generator.generating.wait(10)
        for _ in range(2 if twice else 1):
            bench.stop.request(SIGTERM)

    threading.Thread(target=signal).start()
    assert bench.run(*[bench.job(name) for name in "abc"]) == 143
    assert [line["status"] for line in bench.summary["jobs"]] == [status, "not_run", "not_run"]
    assert bench.summary["stopped_by"] == "SIGTERM"
    left = {"a": len(FILES) if not twice else 0, "b": 0, "c": 0}
    assert {name: len(bench.files(name)) for name in "abc"} == left
    bench.stop = Stop()
    assert bench.run(*[bench.job(name) for name in "abc"], run_id="r2") == 0
    assert all(bench.result(name)["attempt"] == 1 for name in "abc")


def gone_within(bench, seconds: float, *jobs: Job, run_id: str = "r1") -> list[str]:
    """Run until SIGTERM's 143; the marks that are left."""
    begin = time.monotonic()
    assert bench.run(*jobs, run_id=run_id) == 143
    assert time.monotonic() - begin < seconds
    return [str(path) for path in (bench.folder / "out").rglob("attempt.json")]


def test_stop_signal_during_preparation_ends_run_and_leaves_no_mark(bench, monkeypatch):
    """Otherwise three machines that are taken back while the model loads would make the first job count as crashed."""
    entered, prepare = threading.Event(), StubGenerator.prepare

    def slow(self, request, timer):
        if request.prompt == "slow":
            bench.stop.request(SIGTERM)
            entered.wait(20)
        return prepare(self, request, timer)

    monkeypatch.setattr(StubGenerator, "prepare", slow)
    assert gone_within(bench, 15, bench.job("a"), bench.job("b", "slow")) == []
    assert bench.summary["counts"]["not_run"] >= 1
    entered.set()
    bench.stop = Stop()
    monkeypatch.setattr(StubGenerator, "prepare", prepare)
    assert bench.run(bench.job("a"), bench.job("b", "slow"), run_id="r2") == 0
    assert bench.result("b")["attempt"] == 1


def test_stop_signal_leaves_no_mark_of_job_that_waits_for_retry(bench, monkeypatch):
    monkeypatch.setattr("runner.batch.settlement.RETRY_DELAY_S", 60)
    events = bench.folder / "out/runs/r1/0-of-1.events.jsonl"

    def signal() -> None:
        while not (events.exists() and "job_retry" in events.read_text()):
            time.sleep(0.01)
        bench.stop.request(SIGTERM)

    threading.Thread(target=signal).start()
    assert gone_within(bench, 15, bench.job("a", "flaky")) == []


def test_stop_signal_between_failure_and_retry_leaves_no_mark(bench, monkeypatch):
    """The list of waiting jobs is closed before the failed job is put back."""
    closed, close, emit = threading.Event(), WorkList.close, EventLog.emit

    def closing(self):
        left = close(self)
        closed.set()
        return left

    def emitting(self, event, **fields):
        emit(self, event, **fields)
        if event == "job_retry":
            bench.stop.request(SIGTERM)
            assert closed.wait(10)

    monkeypatch.setattr(WorkList, "close", closing)
    monkeypatch.setattr(EventLog, "emit", emitting)
    assert gone_within(bench, 15, bench.job("a", "flaky")) == []
    assert bench.summary["counts"]["not_run"] == 1


def test_stopped_run_ends_after_marks_of_waiting_jobs_are_removed(bench, monkeypatch):
    """One thread removes the marks and another one ends the run. The storage may be slow."""
    abandon = Ledger.abandon

    def slowly(self, job_id):
        time.sleep(0.5)
        abandon(self, job_id)

    monkeypatch.setattr(Ledger, "abandon", slowly)
    test_stop_signal_leaves_no_mark_of_job_that_waits_for_retry(bench, monkeypatch)


def test_unforeseen_delivery_error_does_not_hang_run(bench, monkeypatch):
    monkeypatch.setattr(SummaryWriter, "add", lambda *_: 1 / 0)
    assert bench.run(bench.job("a"), bench.job("b")) != 0
    assert bench.result("a")["status"] == "succeeded", "what was done was undone"
    assert "output.mp4" in bench.files("a")


@pytest.mark.parametrize("format", ["mp4", "png"])
def test_people_json_is_published_with_output(bench, format):
    """The file has the boxes of this run. It is removed where a later run has no boxes."""
    where = bench.folder / "out/jobs/a/people.json"
    for seed in (0, 7):
        assert bench.run(bench.job("a", seed=seed, output={"format": format}), run_id=f"r{seed}") == 0
        made = People.parse(where.read_bytes())
        assert [made.person(i) for i in range(made.frames)] == [(i + seed, 4, i + seed + 20, 40) for i in range(6)]
        assert (made.width, made.height, made.fps) == (WIDTH, HEIGHT, "8")
    assert bench.run(bench.job("a", "no-people", output={"format": format}), run_id="last") == 0
    assert not where.exists()


@dataclass
class Read(StubConditions):
    reading: bool = False

    def close(self) -> None:
        assert not self.reading, "closed in one thread while another was reading: PyAV may crash the process"
        super().close()


class Reader(StubGenerator):
    def prepare(self, request, timer):
        made = super().prepare(request, timer)
        self.prepared[-1] = Read(made.request, made.clip)
        return self.prepared[-1]

    def generate(self, conditions, plan, timer, on_step=None, start=None):
        conditions.reading = True
        try:
            yield from super().generate(conditions, plan, timer, on_step, start)
        finally:
            conditions.reading = False


def test_failed_delivery_does_not_close_conditions_in_use(bench):
    bench.generator = Reader(generate_s=0.5)
    assert bench.run(bench.job("a", "wrong-size"), bench.job("b")) == 1
    assert bench.result("a")["error"]["stage"] == "deliver"
    assert bench.result("b")["status"] == "succeeded"
    assert all(conditions.closed for conditions in bench.generator.prepared)

"""Run: what the settings say is what the engine is, and what its fingerprints know."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import threading
from dataclasses import replace
from pathlib import Path

import pytest
from structlog.testing import capture_logs

import runner.verbs.run as run_verb
from runner.batch.loop import FRAME_BUFFER_BYTES, Engine
from runner.batch.run_pace import Phase, StepCount
from runner.batch.shards import AnyShard, Shard
from runner.batch.stop import Stop
from runner.batch.worker_link import MachineShare
from runner.errors import ConfigInvalid, WeightsCorrupt
from runner.launch.mailbox import Mailbox
from runner.records.record import JobLine
from runner.regression.kept_limits import limits_by_job
from runner.spec.manifest import parse_manifest
from runner.spec.regression_limits import RegressionLimits
from runner.storage import open_storage
from runner.verbs.run import build_engine, run
from runner.verbs.settings import RunSettings
from tests.stub_generator import StubGenerator

ROOT = Path(__file__).resolve().parents[2]

MANIFEST = "version: 1\nrecipe: fp32\njobs: [{id: a, reference: r.png, video: v.mp4}]\n"


@pytest.fixture
def settings(demo_models, tmp_path):
    """settings(x=…): those of `run`, over the demo's models."""

    def make(**given) -> RunSettings:
        common = {"manifest": "m.yaml", "out": str(tmp_path / "out"), "models": str(demo_models), "device": "cpu"}
        return RunSettings(**common, cache=tmp_path / "cache", **given)

    return make


def test_poses_of_another_precision_are_another_fingerprint(settings):
    """Not where nobody asked: what was rendered before the flag existed stays done."""
    manifest = parse_manifest(MANIFEST, base=".", source="m.yaml")
    plain, ours = (build_engine(settings(**more), manifest).identity for more in ({}, {"pose_precision": "int8"}))
    assert {**plain, "pose_precision": "int8"} == ours
    assert build_engine(settings(pose_precision="fp32", tensorrt="auto"), manifest).identity == plain


@pytest.fixture
def stub_run(monkeypatch, demo_media, tmp_path):
    """stub_run(prompt, …, **settings): RunSettings of a run of one job a prompt, rendered by the stub."""
    monkeypatch.setattr("runner.verbs.run.build_engine", lambda *_: Engine("stub", {"weights": "stub"}, StubGenerator))
    place = {"reference": str(demo_media / "references/anna.png"), "video": str(demo_media / "dances/wave.mp4")}

    def make(*prompts: str, **given) -> RunSettings:
        jobs = [{"id": f"job{index}", **place, "prompt": prompt} for index, prompt in enumerate(prompts)]
        manifest = parse_manifest(json.dumps({"version": 1, "jobs": jobs}), base=".", source="m.json")
        common = {"manifest": manifest, "out": str(tmp_path / "out"), "cache": tmp_path / "cache"}
        return RunSettings(**common | given)

    return make


def test_the_outcome_says_what_the_run_came_to(stub_run, tmp_path):
    outcome = run(stub_run("ok", "fail-generate", run_id="r1"))
    assert (outcome.exit_code, outcome.run_id, outcome.shard) == (1, "r1", Shard(0, 1))
    assert outcome.counts == {"total": 2, "succeeded": 1, "skipped": 0, "failed": 1, "not_run": 0}
    assert [(line.id, line.status) for line in outcome.lines] == [("job0", "succeeded"), ("job1", "failed")]
    assert (outcome.outputs, outcome.summary) == (f"{tmp_path}/out/jobs/", f"{tmp_path}/out/runs/r1/")
    assert Path(outcome.outputs, "job0", "result.json").is_file()
    assert Path(outcome.summary, "00000-of-00001.summary.json").is_file()
    assert outcome.sheet is None
    with pytest.raises(AttributeError):
        outcome.exit_code = 0
    with pytest.raises(TypeError):
        outcome.counts["failed"] = 0


def test_the_outcome_says_what_stopped_the_run(stub_run, monkeypatch):
    def load():
        raise WeightsCorrupt("cut short", where="models/x")

    assert run(stub_run("fail-generate")).error is None, "a job that fails stops nothing"
    engine = Engine("stub", {"weights": "stub"}, load)
    monkeypatch.setattr(run_verb, "build_engine", lambda *_: engine)
    outcome = run(stub_run("ok, anew", "ok, anew"))
    assert (outcome.exit_code, outcome.error.code, outcome.error.what) == (2, "weights.corrupt", "cut short")
    assert [line.status for line in outcome.lines] == ["not_run"] * 2


def test_a_second_run_in_one_process_finds_the_first_one_s_work(stub_run, tmp_path):
    assert run(stub_run("ok")).exit_code == 0
    again = run(stub_run("ok", "ok", shard="0/2", sheet=tmp_path / "sheet.png"))
    assert [(line.id, line.status) for line in again.lines] == [("job0", "skipped")]
    assert again.shard_reason == "--shard 0/2"
    assert again.sheet == f"contact sheet: {tmp_path / 'sheet.png'}"
    assert (tmp_path / "sheet.png").is_file()


def test_any_runs_all_jobs_and_names_its_files_after_the_process(stub_run, tmp_path):
    """Lines come in the manifest's order, whatever the order in which the jobs were started."""
    outcome = run(stub_run(*["ok"] * 5, shard="any", run_id="r1"))
    assert outcome.exit_code == 0
    assert [(line.id, line.status) for line in outcome.lines] == [(f"job{n}", "succeeded") for n in range(5)]
    assert outcome.shard == AnyShard.here()
    (summary,) = Path(outcome.summary).glob("*.summary.json")
    assert summary.name == f"{outcome.shard.name}.summary.json"
    assert json.loads(summary.read_text("utf-8"))["shard"] == outcome.shard.name
    events = [json.loads(line) for line in summary.with_name(f"{outcome.shard.name}.events.jsonl").open("rb")]
    started = [event["job"] for event in events if event["event"] == "job_started"]
    assert started == outcome.shard.arrange([f"job{n}" for n in range(5)])


def test_one_of_several_processes_takes_its_share_of_the_machine(stub_run, monkeypatch):
    """Caches are divided, the model is loaded when it may be, and `stop` ends the run in place of signals."""
    order, stop = [], Stop()
    batch = run_verb.Batch

    def build_engine(settings, manifest, processes, demands):
        order.append(f"one of {processes}")
        return Engine("stub", {"weights": "stub"}, lambda: order.append("load") or StubGenerator(generate_s=5.0))

    def watch_batch(*args, frame_buffer_bytes, **more):
        order.append(FRAME_BUFFER_BYTES // frame_buffer_bytes)
        return batch(*args, frame_buffer_bytes=frame_buffer_bytes, **more)

    def before_load():
        order.append("may load")
        stop.request(signal.SIGTERM)

    settings = stub_run("ok", "ok")
    monkeypatch.setattr(run_verb, "build_engine", build_engine)
    monkeypatch.setattr(run_verb, "Batch", watch_batch)
    monkeypatch.setattr(Stop, "listening", None)  # it is not called
    outcome = run(settings, share=MachineShare(4, stop, before_load))
    assert order == ["one of 4", 4, "may load", "load"]
    assert outcome.exit_code == 143


def test_the_engine_knows_how_many_share_the_machine(settings):
    engine = build_engine(settings(), parse_manifest(MANIFEST, base=".", source="m.yaml"), 3)
    assert engine.load.__self__.settings.processes == 3
    assert engine.files() == engine.load.__self__.files


class Watched:
    """A progress display that notes what it is told."""

    def __init__(self) -> None:
        self.told: list[tuple[object, ...]] = []

    def started(self, jobs: int) -> None:
        self.told.append(("started", jobs))

    def phase(self, job_id: str, phase: Phase) -> None:
        self.told.append(("phase", job_id, phase))

    def step(self, job_id: str, at: StepCount) -> None:
        self.told.append(("step", job_id, at))

    def finished(self, line: JobLine) -> None:
        self.told.append(("finished", line.id, line.status))

    def close(self) -> None:
        self.told.append(("close",))


def test_progress_is_told_from_the_first_job_to_the_end(stub_run):
    watched = Watched()
    run(stub_run("ok"), watched)
    phases = [("phase", "job0", phase) for phase in ("loading the model", "preparing", "generating", "publishing")]
    places = [(1, 1, 1), (1, 2, 2), (2, 1, 3), (2, 2, 4)]
    steps = [("step", "job0", StepCount(segment, 2, step, 2, done, 4)) for segment, step, done in places]
    assert watched.told == [
        ("started", 1), *phases[:3], *steps, phases[3], ("finished", "job0", "succeeded"), ("close",)
    ]  # fmt: skip


def test_what_is_wrong_for_all_jobs_is_raised(stub_run, tmp_path):
    with pytest.raises(ConfigInvalid, match="is not a folder"):
        run(stub_run("ok", input_root=[str(tmp_path / "none")]))
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("shard", [None, "0/1", "1/2", "any"])
def test_the_first_event_says_what_runs_and_where(stub_run, tmp_path, shard):
    with capture_logs() as events:
        run(stub_run("ok", "ok", run_id="r1", shard=shard))
    first = events[0]
    expected = {"event": "run", "log_level": "info", "id": "r1", "out": str(tmp_path / "out"), "recipe": "stub"}
    assert first | expected == first
    assert first["jobs"] == (1 if shard == "1/2" else 2)
    assert ("shard" in first) is (shard in ("1/2", "any"))


def test_outside_the_main_thread_no_signal_is_listened_to(stub_run):
    handlers = signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)
    outcomes = []
    with capture_logs() as events:
        thread = threading.Thread(target=lambda: outcomes.append(run(stub_run("ok"))))
        thread.start()
        thread.join(60)
    assert [outcome.exit_code for outcome in outcomes] == [0]
    assert [event["event"] for event in events].count("signals_ignored") == 1
    assert (signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)) == handlers


EMBEDDED = """
import logging, sys
import runner.verbs.run as verb
from runner.batch.loop import Engine
from runner.verbs.settings import RunSettings
from tests.stub_generator import StubGenerator
import structlog

verb.build_engine = lambda *_: Engine("stub", {}, StubGenerator)
manifest, out, cache = sys.argv[1:]
outcome = verb.run(RunSettings(manifest=manifest, out=out, cache=cache))
assert outcome.exit_code == 0, outcome
assert not structlog.is_configured()
assert logging.getLogger().handlers == []
assert "runner.cli" not in sys.modules
"""


def test_a_run_in_another_program_prints_nothing_and_configures_nothing(demo_media, tmp_path):
    """structlog, left as it is, would print on standard output."""
    place = {"reference": str(demo_media / "references/anna.png"), "video": str(demo_media / "dances/wave.mp4")}
    manifest = tmp_path / "m.jsonl"
    manifest.write_text(json.dumps({"id": "a", **place, "prompt": "ok"}) + "\n", encoding="utf-8")
    done = subprocess.run(
        [sys.executable, "-c", EMBEDDED, str(manifest), str(tmp_path / "out"), str(tmp_path / "cache")],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout == ""
    assert done.stderr == ""


def test_jobs_may_come_from_a_mailbox(stub_run):
    """The manifest's run keys hold, and its jobs do not run."""
    settings = stub_run("ok")
    mailbox = Mailbox()
    (job,) = settings.manifest.jobs
    for name in ("sent-1", "sent-2"):
        mailbox.send(replace(job, id=name))
    mailbox.end()
    outcome = run(settings, source=mailbox)
    assert [(line.id, line.status) for line in outcome.lines] == [("sent-1", "succeeded"), ("sent-2", "succeeded")]
    assert outcome.exit_code == 0 and outcome.counts["total"] == 2


def limited(settings: RunSettings, *limits: RegressionLimits) -> RunSettings:
    """The same run with these limits, one a job."""
    jobs = tuple(replace(job, regression=own) for job, own in zip(settings.manifest.jobs, limits, strict=True))
    return replace(settings, manifest=replace(settings.manifest, jobs=jobs))


def test_a_run_that_knows_no_job_at_its_start_leaves_what_its_driver_kept(stub_run, tmp_path):
    settings = limited(stub_run("ok", run_id="r1"), RegressionLimits(psnr_min=30))
    run(settings)
    kept = {name: (tmp_path / "out/runs/r1" / name).read_bytes() for name in ("jobs.json", "regression.json")}
    mailbox = Mailbox()
    mailbox.send(settings.manifest.jobs[0])
    mailbox.end()
    again = run(replace(settings, manifest=replace(settings.manifest, jobs=())), source=mailbox)
    assert [line.status for line in again.lines] == ["skipped"]
    assert {name: (tmp_path / "out/runs/r1" / name).read_bytes() for name in kept} == kept


def test_the_limits_of_the_whole_manifest_are_kept_before_the_first_job_starts(stub_run, tmp_path, monkeypatch):
    """By a shard too, and where the job fails."""
    first, second = RegressionLimits(psnr_min=30), RegressionLimits(same_frames=True)
    settings = limited(stub_run("fail-generate", "ok", run_id="r1", shard="0/2"), first, second)
    found = {}

    def watch(*args, **more):
        found.update(limits_by_job(open_storage(tmp_path / "out")))
        return batch(*args, **more)

    batch = run_verb.Batch
    monkeypatch.setattr(run_verb, "Batch", watch)
    outcome = run(settings)
    assert [line.id for line in outcome.lines] == ["job0"]
    assert found == {"job0": first, "job1": second}
    assert Path(outcome.summary, "regression.json").is_file()


def test_a_run_without_limits_keeps_none(stub_run):
    assert not Path(run(stub_run("ok")).summary, "regression.json").exists()


def test_limits_change_no_fingerprint(stub_run):
    """What was rendered before a limit was given stays done."""
    settings = stub_run("ok")
    run(settings)
    again = run(limited(settings, RegressionLimits(psnr_min=30)))
    assert [line.status for line in again.lines] == ["skipped"]


@pytest.mark.parametrize(("place", "below"), [("out", "out/jobs"), ("cache", "cache/checkpoints"), ("off", None)])
def test_finished_segments_are_kept_where_the_settings_say(stub_run, tmp_path, place, below):
    """The job fails in its second segment: the first stays."""
    run(stub_run("fail-generate", checkpoint=place))
    kept = {path.relative_to(tmp_path).as_posix() for path in tmp_path.rglob("0001.tar")}
    assert [name.startswith(below) for name in kept] == [True] if below else kept == set()


def test_a_store_that_ignores_conditions_is_said_once_and_the_run_goes_on(stub_run, monkeypatch):
    monkeypatch.setattr(run_verb, "probe_conditions", lambda storage: "the store ignores If-None-Match")
    with capture_logs() as logs:
        outcome = run(stub_run("ok", "ok"))
    assert outcome.exit_code == 0
    said = [line for line in logs if line["event"] == "leases_are_warnings"]
    assert [(line["log_level"], line["reason"]) for line in said] == [("warning", "the store ignores If-None-Match")]


def test_a_job_that_another_runner_has_is_waited_for(stub_run, monkeypatch, tmp_path):
    """The run ends when that job is done, with 0."""
    monkeypatch.setattr("runner.batch.settlement.LOOK_AGAIN_S", 0.05)
    begun, go_on = threading.Event(), threading.Event()

    class Slow(StubGenerator):
        def generate(self, *arguments):
            begun.set()
            assert go_on.wait(60)
            yield from super().generate(*arguments)

    monkeypatch.setattr(run_verb, "build_engine", lambda *_: Engine("stub", {"weights": "stub"}, Slow))
    first: list = []
    thread = threading.Thread(target=lambda: first.append(run(stub_run("ok", run_id="r1"))))
    thread.start()
    assert begun.wait(60)
    threading.Timer(0.5, go_on.set).start()
    with capture_logs() as logs:
        second = run(stub_run("ok", run_id="r2"))
    thread.join()
    assert (first[0].exit_code, second.exit_code) == (0, 0)
    assert [line.status for line in second.lines] == ["skipped"]
    leased = [line for line in logs if line["event"] == "job_leased"]
    assert len(leased) == 1, "said once, not at every look"
    assert leased[0]["reason"].startswith("running on ")

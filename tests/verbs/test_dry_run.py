"""Dry run: each job is decided as a run would decide it, and not a byte on the disk is changed."""

from __future__ import annotations

import json
import os
import shutil
import threading
import time
from pathlib import Path

import pytest

import runner.verbs.run as run_verb
from runner.batch.loop import Engine
from runner.batch.survey import AT_ONCE
from runner.errors import ConfigInvalid, StorageDenied, WeightsMissing
from runner.launch.mailbox import Mailbox
from runner.records.record import AttemptMark
from runner.spec.manifest import parse_manifest
from runner.storage.local import LocalStorage
from runner.verbs.run import run
from runner.verbs.settings import RunSettings
from tests.stub_generator import StubGenerator


def load_nothing() -> StubGenerator:
    raise AssertionError("a dry run loads no engine")


@pytest.fixture
def stub_run(monkeypatch, demo_media, tmp_path):
    """stub_run({id: prompt}, **settings): RunSettings of these jobs, rendered by the stub."""
    engine = Engine("stub", {"weights": "stub"}, StubGenerator)
    monkeypatch.setattr(run_verb, "build_engine", lambda *_: engine)
    place = {"reference": str(demo_media / "references/anna.png"), "video": str(demo_media / "dances/wave.mp4")}

    def make(prompts: dict[str, str], **given) -> RunSettings:
        jobs = [
            {"id": name, **place, "prompt": prompt} | ({"video": "none.mp4"} if prompt == "gone" else {})
            for name, prompt in prompts.items()
        ]
        manifest = parse_manifest(json.dumps({"version": 1, "jobs": jobs}), base=str(tmp_path), source="m.json")
        return RunSettings(manifest=manifest, out=str(tmp_path / "out"), cache=tmp_path / "cache", **given)

    return make


def state(*folders: Path) -> dict[str, tuple[int, int, int]]:
    """Each file and folder below, with its size, times of change and inode: a file that came and went changes these."""
    found = {}
    for folder in folders:
        for path in [folder, *folder.rglob("*")] if folder.exists() else []:
            status = path.stat()
            found[str(path)] = (status.st_size, status.st_mtime_ns, status.st_ino)
    return found


def hold(out: Path, job_id: str, fingerprint: str = "f") -> None:
    """Another host's lease, renewed just now."""
    mark = AttemptMark(
        job_id=job_id,
        attempt=1,
        fingerprint=fingerprint,
        run_id="other",
        host="elsewhere",
        started_at="2026-01-01T00:00:00Z",
        token="t",
        lease_s=60.0,
    )
    folder = out / "jobs" / job_id
    folder.mkdir(parents=True)
    (folder / "attempt.json").write_bytes(mark.to_json())


@pytest.fixture
def rendered(stub_run, tmp_path, monkeypatch):
    """An output folder with a job of each kind; from now on an engine that is loaded fails the test."""
    run(stub_run({"done": "ok", "broken": "fail-prepare", "stale": "ok"}, max_attempts=1))
    hold(tmp_path / "out", "held")
    engine = Engine("stub", {"weights": "stub"}, load_nothing)
    monkeypatch.setattr(run_verb, "build_engine", lambda *_: engine)
    return {"gone": "gone", "new": "ok", "stale": "again", "held": "ok", "broken": "fail-prepare", "done": "ok"}


def test_dry_run_decides_every_job_and_writes_nothing(stub_run, rendered, tmp_path):
    before = state(tmp_path)
    settings = stub_run(rendered, max_attempts=1, run_id="r9", sheet=tmp_path / "sheet.png", dry_run=True)
    outcome = run(settings)
    assert state(tmp_path) == before
    assert outcome.dry_run and outcome.exit_code == 1
    lines = {line.id: line for line in outcome.lines}
    assert list(lines) == list(rendered), "the manifest's order"
    assert outcome.actions == {
        "gone": "fail",
        "new": "run",
        "stale": "run",
        "held": "leased",
        "broken": "exhausted",
        "done": "skip",
    }
    assert {name: line.status for name, line in lines.items()} == {
        "gone": "failed",
        "new": "not_run",
        "stale": "not_run",
        "held": "not_run",
        "broken": "failed",
        "done": "skipped",
    }
    assert lines["new"].reason == "no record yet"
    assert lines["stale"].reason == "prompt: ok → again"
    assert lines["held"].reason.startswith("running on elsewhere, heard of ")
    assert (
        "(1 used, last: input.unreadable)" in lines["broken"].reason
        and lines["broken"].error.code == "input.unreadable"
    )
    assert lines["gone"].error.code == "input.not_found"
    assert outcome.counts == {"total": 6, "succeeded": 0, "skipped": 1, "failed": 2, "not_run": 3}
    assert outcome.summary == "" and "dry run" in outcome.sheet


def test_run_after_dry_run_does_what_dry_run_said(stub_run, tmp_path):
    settings = {"b": "ok", "a": "ok"}
    run(stub_run({"a": "ok"}))
    said = run(stub_run(settings, dry_run=True))
    done = run(stub_run(settings))
    assert (said.exit_code, dict(said.actions)) == (0, {"b": "run", "a": "skip"})
    assert [(line.id, line.status) for line in done.lines] == [("b", "succeeded"), ("a", "skipped")]
    assert not done.dry_run and done.actions is None


def test_dry_run_respects_flags_of_run(stub_run, rendered):
    forced = run(stub_run(rendered, force=True, dry_run=True, only=["done", "held"]))
    assert forced.actions == {"held": "leased", "done": "run"}
    assert forced.lines[1].reason == "--force"
    retried = run(stub_run(rendered, retry_failed=True, dry_run=True, only=["new", "done", "broken"]))
    assert retried.actions == {"new": "skip", "broken": "run", "done": "skip"}
    assert [line.id for line in run(stub_run(rendered, dry_run=True, limit=2)).lines] == ["gone", "new"]
    outside = run(stub_run(rendered, dry_run=True, only=["new"], input_root=["/usr"]))
    assert outside.lines[0].error.code == "input.unreadable"


def test_dry_run_with_gpus_needs_no_gpu_and_no_process(stub_run, monkeypatch):
    monkeypatch.setattr(run_verb, "find_gpus", None)
    monkeypatch.setattr(run_verb, "run_processes", None)
    outcome = run(stub_run({"a": "ok", "b": "ok"}, gpus="all", dry_run=True))
    assert outcome.actions == {"a": "run", "b": "run"}
    assert outcome.shard_reason.startswith("--gpus all")


def test_dry_run_with_ray_needs_no_cluster(stub_run, monkeypatch):
    monkeypatch.setattr(run_verb, "RayCluster", None)
    outcome = run(stub_run({"a": "ok", "b": "ok"}, on="ray:auto", workers=2, dry_run=True))
    assert outcome.actions == {"a": "run", "b": "run"}
    assert outcome.shard_reason.startswith("--on ray:auto")


def test_dry_run_with_missing_output_folder_does_not_create_folder(stub_run, tmp_path):
    before = state(tmp_path)
    assert run(stub_run({"a": "ok"}, dry_run=True)).exit_code == 0
    assert state(tmp_path) == before and not (tmp_path / "out").exists()


def test_dry_run_counts_expired_lease_as_lost_without_writing(stub_run, tmp_path):
    """The age is measured by the clock of this machine, because a query of the disk's time writes a file."""
    hold(tmp_path / "out", "a")
    old = time.time() - 120
    os.utime(tmp_path / "out/jobs/a/attempt.json", (old, old))
    before = state(tmp_path)
    assert run(stub_run({"a": "ok"}, dry_run=True)).actions == {"a": "run"}
    assert state(tmp_path) == before


def test_dry_run_raises_error_that_would_stop_run(stub_run, monkeypatch):
    def away(*_):
        raise StorageDenied("credentials refused", where="out")

    with monkeypatch.context() as patch:
        patch.setattr(LocalStorage, "list", away)
        with pytest.raises(StorageDenied):
            run(stub_run({"a": "ok"}, dry_run=True))

    def corrupt(job):
        raise WeightsMissing("gone meanwhile")

    engine = Engine("stub", {}, load_nothing, own=corrupt)
    monkeypatch.setattr(run_verb, "build_engine", lambda *_: engine)
    with pytest.raises(WeightsMissing):
        run(stub_run({"a": "ok"}, dry_run=True))


def test_run_with_source_refuses_only_limit_and_dry_run(stub_run):
    for more in ({"only": ["a"]}, {"limit": 1}, {"dry_run": True}):
        with pytest.raises(ConfigInvalid, match="come from a source"):
            run(stub_run({"a": "ok"}, **more), source=Mailbox())


def test_dry_run_decides_many_jobs_in_parallel(stub_run, monkeypatch):
    """The first reads wait for each other at a barrier, which breaks if they are made one after the other."""
    read, together, met = LocalStorage.read_versioned, threading.Barrier(AT_ONCE, timeout=30), threading.Event()

    def meet(self, key, **how):
        if not met.is_set():
            together.wait()
            met.set()
        return read(self, key, **how)

    monkeypatch.setattr(LocalStorage, "read_versioned", meet)
    settings = stub_run({f"j{number}": "ok" for number in range(2 * AT_ONCE)}, dry_run=True)
    assert set(run(settings).actions.values()) == {"run"}


def test_dry_run_with_demo_weights_does_not_add_to_cache(demo_models, demo_media, tmp_path):
    models = tmp_path / "models"
    shutil.copytree(demo_models, models, symlinks=False)
    place = {"reference": str(demo_media / "references/anna.png"), "video": str(demo_media / "dances/wave.mp4")}
    text = json.dumps({"version": 1, "recipe": "fp32", "jobs": [{"id": "a", **place}]})
    manifest = parse_manifest(text, base=".", source="m.json")
    settings = RunSettings(
        manifest=manifest, out=str(tmp_path / "out"), models=str(models), cache=tmp_path / "cache", dry_run=True
    )
    before = state(tmp_path)
    assert run(settings).actions == {"a": "run"}
    assert state(tmp_path) == before

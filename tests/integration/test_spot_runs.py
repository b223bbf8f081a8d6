"""Whole runs on a machine that the cloud takes back: the metadata service is a local fake, the frames are a stub's."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.batch.test_spot import PREEMPTED, Service, service, wait_for

__all__ = ["service"]  # a fixture

RUN = """
import sys
from tests.faults.stub_runs import run_command
from tests.stub_generator import StubGenerator

sys.exit(run_command(sys.argv[2:], lambda: StubGenerator(generate_s=float(sys.argv[1])), {}))
"""


def begin(folder: Path, kind: str, service: Service, generate_s: float) -> subprocess.Popen[str]:
    command = [sys.executable, "-c", RUN, str(generate_s), str(folder / "jobs.jsonl"), "--out", str(folder / "out")]
    command += ["--cache", str(folder / "cache"), "--run-id", "r", "--spot", kind, "--log-format", "json"]
    return subprocess.Popen(
        command,
        cwd=Path(__file__).parents[2],
        env={**os.environ, **service.aws, **service.gcp, "HTTP_PROXY": "http://127.0.0.1:1"},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
    )


@pytest.mark.parametrize(
    ("kind", "left_s", "generate_s", "first"),
    [("aws", 3, 90, "not_run"), ("gcp", 15, 4, "succeeded")],
)
def test_a_notice_ends_the_run_before_the_machine_ends(demo_media, service, tmp_path, kind, left_s, generate_s, first):
    """The running job is finished where the notice leaves the time; none starts after it, and a rerun does the rest."""
    service.answers[PREEMPTED] = "FALSE"
    place = {"reference": str(demo_media / "references/anna.png"), "video": str(demo_media / "dances/wave.mp4")}
    jobs = [{"id": name, **place, "prompt": "ok", "options": {"keep_audio": False, "steps": 100}} for name in "abc"]
    (tmp_path / "jobs.jsonl").write_text("".join(json.dumps(job) + "\n" for job in jobs), encoding="utf-8")
    events = tmp_path / "out/runs/r/00000-of-00001.events.jsonl"

    run = begin(tmp_path, kind, service, generate_s)
    try:
        wait_for(lambda: run.poll() is not None or (events.exists() and '"job_prepared"' in events.read_text()), 120)
        service.announce(left_s)
        service.answers[PREEMPTED] = "TRUE"
        noticed = time.monotonic()
        _, said = run.communicate(timeout=120)
    finally:
        run.kill()
    assert run.returncode == 143, said
    assert time.monotonic() - noticed < 60
    summary = json.loads((tmp_path / "out/runs/r/00000-of-00001.summary.json").read_text())
    assert [job["status"] for job in summary["jobs"]] == [first, "not_run", "not_run"]
    assert summary["stopped_by"].startswith("spot notice of")
    assert '"event": "spot_notice"' in said
    assert list((tmp_path / "out").rglob("attempt.json")) == []

    service.answers.clear()
    service.answers[PREEMPTED] = "FALSE"
    again = begin(tmp_path, kind, service, 0.0)
    _, said = again.communicate(timeout=120)
    assert again.returncode == 0, said
    assert all((tmp_path / f"out/jobs/{name}/output.mp4").exists() for name in "abc")

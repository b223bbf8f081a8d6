"""JSON objects: `--json` prints one object and nothing else, of a verb that ends with an error too."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from types import MappingProxyType

import pytest

from runner.batch.shards import Shard
from runner.cli import main
from runner.errors import ConfigInvalid, DeviceLost, InputNotFound
from runner.generation.protocol import SegmentPlan
from runner.records.record import ErrorRecord, JobLine
from runner.spec.manifest import parse_manifest
from runner.verbs.commands import ONE_OBJECT, VERBS
from runner.verbs.doctor import Check
from runner.verbs.json_objects import checks_object, plan_object, run_object, validation_object
from runner.verbs.outcome import RunOutcome
from runner.verbs.plan import Forecast, RunForecast
from runner.verbs.validate import Validation

ROOT = Path(__file__).resolve().parents[2]
GONE = InputNotFound("no such file", where="r.png", todo="Check the path")


def outcome(**more) -> RunOutcome:
    error = ErrorRecord(code="input.not_found", message="r.png: no such file", stage="prepare", retryable=False)
    lines = (
        JobLine(id="a", status="succeeded", reason="no record yet", attempt=1, output="out/jobs/a/output.mp4"),
        JobLine(id="b", status="failed", reason="no record yet", attempt=2, error=error, warnings=["a warning"]),
    )
    counts = MappingProxyType({"total": 2, "succeeded": 1, "skipped": 0, "failed": 1, "not_run": 0})
    return RunOutcome(1, "r1", Shard(0, 1), "no scheduler", counts, lines, "out/jobs/", "out/runs/r1/", None, **more)


def test_of_a_run():
    found = json.loads(json.dumps(run_object(outcome(error=DeviceLost("the GPU is lost")))))
    assert (found["run_id"], found["exit_code"], found["dry_run"]) == ("r1", 1, False)
    assert found["counts"]["total"] == 2 and found["sheet"] is None
    assert (found["outputs"], found["summary"]) == ("out/jobs/", "out/runs/r1/")
    assert found["shard"] == {"name": "00000-of-00001", "reason": "no scheduler"}
    assert found["error"] == {"code": "device.lost", "message": "the GPU is lost", "exit_code": 3}
    first, second = found["jobs"]
    assert (first["id"], first["status"], first["output"]) == ("a", "succeeded", "out/jobs/a/output.mp4")
    assert second["error"]["code"] == "input.not_found" and second["warnings"] == ["a warning"]
    assert "action" not in first and run_object(outcome())["error"] is None


def test_of_a_dry_run():
    found = run_object(outcome(actions={"a": "run", "b": "fail"}))
    assert found["dry_run"] is True
    assert [job["action"] for job in found["jobs"]] == ["run", "fail"]


def test_of_a_plan():
    plan = SegmentPlan(49, 81, 1, 1, 832, 480, 6, evaluations=6, tflop=1500.0, seconds=30.0)
    rows = (Forecast("a", plan, memory={"stream": 7_000_000_000}, warnings=("2 people",)), Forecast("b", None, GONE))
    found = json.loads(json.dumps(plan_object(RunForecast(rows, "RTX 5090", ("blocks run eagerly",)))))
    assert found["warnings"] == ["blocks run eagerly"] and plan_object(RunForecast(rows, None))["warnings"] == []
    first, second = found["jobs"]
    assert (first["frames"], first["frames_denoised"], first["padding_frames"], first["overlap_frames"]) == (
        49,
        81,
        32,
        0,
    )
    assert first["memory_bytes"] == {"stream": 7_000_000_000} and first["forecast_s"] == 30.0 and first["error"] is None
    assert first["warnings"] == ["2 people"]
    assert second == {"id": "b", "error": {"code": "input.not_found", "message": GONE.message}, "warnings": []}
    totals = {"jobs": 2, "failed": 1, "frames": 49, "frames_denoised": 81, "tflop": 1500.0, "forecast_s": 30.0}
    assert (found["gpu"], found["totals"]) == ("RTX 5090", totals)
    assert plan_object(RunForecast(rows, None))["totals"]["forecast_s"] is None


def test_of_a_validation_and_of_checks():
    manifest = parse_manifest(
        "version: 1\njobs: [{id: a, reference: r, video: v}, {id: b, reference: r, video: v}]\n", base=".", source="m"
    )
    found = validation_object(Validation(manifest, (("b", GONE),)), inputs_checked=True)
    assert found["jobs"] == [{"id": "a", "valid": True}, {"id": "b", "valid": False}]
    assert found["problems"] == [{"job": "b", "code": "input.not_found", "message": GONE.message}]
    assert (found["manifest"], found["inputs_checked"]) == ("m", True)
    checks = [Check("python", "ok", "3.11"), Check("gpu", "fail", "none", "Buy one")]
    assert checks_object(checks[:1])["ok"] is True
    assert checks_object(checks) == {
        "ok": False,
        "checks": [
            {"name": "python", "status": "ok", "found": "3.11", "todo": ""},
            {"name": "gpu", "status": "fail", "found": "none", "todo": "Buy one"},
        ],
    }


WORDS = {"run": ["m.yaml", "--out", "out"], "validate": ["m.yaml"], "plan": ["m.yaml"], "doctor": []}


@pytest.mark.parametrize("name", WORDS)
@pytest.mark.parametrize(
    "error", [ConfigInvalid("no", where="--x", todo="y"), ValueError("a bug"), OSError(28, "full")]
)
def test_an_error_is_an_object_too_and_still_said(monkeypatch, capsys, name, error):
    def fail(*_):
        raise error

    monkeypatch.setattr(f"runner.verbs.{name}.{name}", fail)
    code = main([name, *WORDS[name], "--json"])
    said = capsys.readouterr()
    found = json.loads(said.out)
    assert list(found) == ["error"] and found["error"]["exit_code"] == code != 0
    assert said.err.splitlines()[-1] == f"{found['error']['code']}: {found['error']['message']}"


def test_a_wrong_value_of_a_flag_is_an_object_too(capsys):
    assert main(["run", "m.yaml", "--out", "out", "--limit", "0", "--json"]) == 2
    assert json.loads(capsys.readouterr().out)["error"]["code"] == "config.invalid"


def test_verbs_that_print_one_object():
    assert {verb.name for verb in VERBS if verb.json_prints == ONE_OBJECT} >= set(WORDS)


NOISY = """
import os, subprocess, sys
import runner.verbs.doctor as verb
from runner.cli import main

def doctor(settings):
    print("a library prints")
    os.write(1, b"a native library writes\\n")
    subprocess.run(["echo", "a process says"], check=True)
    return [verb.Check("python", "ok", "3.11")]

verb.doctor = doctor
code = main(["doctor", "--json"])
print("and standard output is open again")
sys.exit(code)
"""


def test_what_others_write_to_standard_output_goes_to_standard_error():
    done = subprocess.run([sys.executable, "-c", NOISY], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    first, *rest = done.stdout.splitlines()
    assert json.loads(first)["ok"] is True and rest == ["and standard output is open again"]
    for said in ("a library prints", "a native library writes", "a process says"):
        assert said in done.stderr

"""AWS Batch's files: against botocore's model and the API's rules; `submit.sh` with a stand-in for `aws`."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from runner.batch.shards import Shard, choose_shard, run_id_from_env
from runner.launch.aws_batch import AwsBatch
from runner.launch.aws_batch_files import same_definition
from runner.launch.submission import Submission

ROLE = "arn:aws:iam::123456789012:role/video-lab"


def submission(**other: Any) -> Submission:
    common: dict[str, Any] = {"name": "night-12", "run_id": "r-12", "manifest": "s3://bucket/out/runs/r-12/m.jsonl"}
    common |= {"out": "s3://bucket/out", "models": "s3://bucket/models", "image": "registry:5000/video-lab:1.2"}
    return Submission(**common | {"shards": 4} | other)


def problems(operation: str, arguments: dict[str, Any]) -> str:
    """What botocore's model of the service finds wrong with the arguments."""
    import botocore.session
    from botocore.validate import ParamValidator

    model = botocore.session.Session().get_service_model("batch").operation_model(operation)
    return str(ParamValidator().validate(arguments, model.input_shape).generate_report())


FULL = AwsBatch(
    queue="gpus",
    report_queue="arn:aws:batch:eu-west-1:123456789012:job-queue/cpus",
    job_role=ROLE,
    execution_role=ROLE,
    region="eu-west-1",
    log_group="/video-lab",
    share_identifier="team",
    cache_folder="/mnt/video-lab",
)


@pytest.mark.parametrize("platform", [AwsBatch(queue="gpus"), FULL], ids=["least", "full"])
@pytest.mark.parametrize("shards", [1, 2, 10_000])
def test_rendered_files_fit_batch_service_model(platform, shards):
    made = submission(shards=shards, environment={"B": "2", "A": "1"}, gpu_hour=2.5)
    platform.check(made)
    files = platform.render(made)
    for name, operation in (
        ("job-definition.json", "RegisterJobDefinition"),
        ("report-definition.json", "RegisterJobDefinition"),
        ("run.json", "SubmitJob"),
        ("report.json", "SubmitJob"),
    ):
        arguments = json.loads(files[name])
        assert problems(operation, arguments) == ""
        for value in json.dumps(arguments).split('"'):
            assert "Ref::" not in value
        if operation == "RegisterJobDefinition":
            check_rules(arguments["retryStrategy"])
            assert re.fullmatch(r"[A-Za-z0-9_-]{1,128}", arguments["jobDefinitionName"])
            assert arguments["timeout"]["attemptDurationSeconds"] >= 60
    assert files == platform.render(replace(made, environment={"A": "1", "B": "2"}))  # the same bytes


def check_rules(strategy: dict[str, Any]) -> None:
    """As the API reference has them: EvaluateOnExit, RetryStrategy."""
    rules = strategy["evaluateOnExit"]
    assert 1 <= strategy["attempts"] <= 10
    assert 1 <= len(rules) <= 5
    allowed = {"onExitCode": r"[0-9]*\*?", "onReason": r"[A-Za-z0-9.:\s]*\*?", "onStatusReason": r"[A-Za-z0-9.:\s]*\*?"}
    for rule in rules:
        assert rule["action"] in ("RETRY", "EXIT")
        for key, pattern in rule.items():
            assert key == "action" or (re.fullmatch(allowed[key], pattern) and 0 < len(pattern) <= 512)


@pytest.mark.parametrize(
    ("status_reason", "reason", "code", "action"),
    [
        ("Essential container in task exited", "", 0, "RETRY"),  # a job that ends with 0 has succeeded: never asked for
        ("Essential container in task exited", "", 1, "EXIT"),
        ("Essential container in task exited", "", 2, "EXIT"),
        ("Essential container in task exited", "", 3, "RETRY"),
        ("Essential container in task exited", "", 12, "RETRY"),
        ("Essential container in task exited", "", 21, "RETRY"),
        ("Essential container in task exited", "OutOfMemoryError: Container killed", 137, "RETRY"),
        ("Essential container in task exited", "", 143, "RETRY"),
        ("Host EC2 (instance i-0b1) terminated.", "", 1, "RETRY"),
        ("Task failed to start", "CannotPullContainerError: manifest unknown", None, "EXIT"),
        ("Task failed to start", "DockerTimeoutError: could not create", None, "RETRY"),
    ],
)
def test_retry_rules_choose_action_by_exit_code_and_reason(status_reason, reason, code, action):
    """The rules, read as the user guide says: the first rule all of whose conditions hold."""
    rules = json.loads(AwsBatch(queue="q").render(submission())["job-definition.json"])["retryStrategy"][
        "evaluateOnExit"
    ]

    def fits(pattern: str | None, text: str | None) -> bool:
        if pattern is None:
            return True
        if text is None:
            return False
        return text.startswith(pattern[:-1]) if pattern.endswith("*") else text == pattern

    held = [
        rule["action"]
        for rule in rules
        if fits(rule.get("onStatusReason"), status_reason)
        and fits(rule.get("onReason"), reason)
        and fits(rule.get("onExitCode"), None if code is None else str(code))
    ]
    assert [*held, "RETRY"][0] == action


def test_job_definition_depends_on_image_and_not_on_run():
    """Another run of the same image and sizes has the same definitions; another image has others."""
    platform = AwsBatch(queue="q")
    first, second, third = (
        platform.render(made)
        for made in (
            submission(run_id="r-12", environment={"A": "1"}),
            submission(run_id="r-13", name="other", manifest="s3://b/m.jsonl", out="s3://b/o", shards=9),
            submission(image="registry:5000/video-lab:1.3"),
        )
    )
    for name in ("job-definition.json", "report-definition.json"):
        assert first[name] == second[name] != third[name]
        assert "r-12" not in first[name]
        assert json.loads(first[name])["jobDefinitionName"] != json.loads(third[name])["jobDefinitionName"]
    assert first["run.json"] != second["run.json"]


def test_rendered_jobs_have_resources_mounts_and_arguments():
    made = submission(gpus_per_task=2, cpus=16, memory_gib=120, environment={"VIDEO_LAB_S3_EXTRA": "{}"})
    files = FULL.render(made)
    container = json.loads(files["job-definition.json"])["containerProperties"]
    needs = {entry["type"]: entry["value"] for entry in container["resourceRequirements"]}
    assert needs == {"VCPU": "16", "MEMORY": str(120 * 1024), "GPU": "2"}
    assert container["volumes"] == [{"name": "cache", "host": {"sourcePath": "/mnt/video-lab"}}]
    assert container["mountPoints"][0]["containerPath"] == "/cache"
    assert container["logConfiguration"] == {"logDriver": "awslogs", "options": {"awslogs-group": "/video-lab"}}
    run, report = json.loads(files["run.json"]), json.loads(files["report.json"])
    words = run["containerOverrides"]["command"]
    assert words[:2] == ["run", made.manifest]
    assert words[words.index("--spot") + 1] == "aws"
    assert words[words.index("--gpus") + 1] == "all"
    assert words[words.index("--log-format") + 1] == "json"
    assert run["containerOverrides"]["environment"] == [{"name": "VIDEO_LAB_S3_EXTRA", "value": "{}"}]
    assert run["arrayProperties"] == {"size": 4}
    assert report["jobQueue"].endswith("/cpus")
    assert "arrayProperties" not in report and "dependsOn" not in report
    needs = json.loads(files["report-definition.json"])["containerProperties"]["resourceRequirements"]
    assert {entry["type"] for entry in needs} == {"VCPU", "MEMORY"}


def test_report_time_limit_is_longer_than_its_wait():
    files = AwsBatch(queue="q").render(submission(time_limit_s=3600))
    words = json.loads(files["report.json"])["containerOverrides"]["command"]
    wait = int(words[words.index("--timeout") + 1].removesuffix("s"))
    assert wait == 7200
    assert json.loads(files["report-definition.json"])["timeout"]["attemptDurationSeconds"] > wait


def test_run_with_one_task_is_no_array_and_takes_all_jobs():
    request = json.loads(AwsBatch(queue="q").render(submission(shards=1))["run.json"])
    assert "arrayProperties" not in request
    env = {"AWS_BATCH_JOB_ID": "5a4e-11", "AWS_BATCH_JOB_ATTEMPT": "1"}  # what a job that is no array has
    assert choose_shard(None, None, env)[0] == Shard(0, 1)
    assert run_id_from_env(env) == "5a4e-11"


@pytest.mark.parametrize(
    ("change", "same"),
    [
        (lambda d: d | {"revision": 3, "status": "ACTIVE", "tags": {"a": "b"}, "jobDefinitionArn": "arn"}, True),
        (lambda d: d | {"containerProperties": d["containerProperties"] | {"ulimits": [], "command": []}}, True),
        (lambda d: d | {"containerProperties": d["containerProperties"] | {"privileged": True}}, False),
        (lambda d: d | {"containerProperties": d["containerProperties"] | {"environment": [{"name": "A"}]}}, False),
        (lambda d: d | {"timeout": {"attemptDurationSeconds": 61}}, False),
        (lambda d: d | {"platformCapabilities": ["FARGATE"]}, False),
        (lambda d: json.loads(json.dumps(d).replace('"RETRY"', '"retry"').replace('"EXIT"', '"exit"')), True),
        (lambda d: json.loads(json.dumps(d).replace('"RETRY"', '"exit"')), False),
        (lambda d: json.loads(json.dumps(d).replace('"host": {}, ', "")), True),
        (lambda d: {key: value for key, value in d.items() if key != "retryStrategy"}, False),
    ],
)
def test_same_definition_ignores_server_fields_and_detects_changes(change, same):
    wanted = json.loads(AwsBatch(queue="q").render(submission())["job-definition.json"])
    assert same_definition(wanted, change(wanted)) is same


# -- submit.sh ---------------------------------------------------------------------------------------------------------

STAND_IN = """\
#!{python}
import json, os, sys
words = sys.argv[1:]
folder = os.environ["STAND_IN"]
with open(os.path.join(folder, "calls.jsonl"), "a") as file:
    file.write(json.dumps([words, os.getcwd(), os.environ.get("AWS_MAX_ATTEMPTS")]) + "\\n")
text = " ".join(words)
for part in filter(None, os.environ.get("FAILS", "").split("|")):
    if part in text:
        sys.exit("An error occurred")
if "describe-job-definitions" in words:
    print("arn:registered" if os.environ.get("REGISTERED") else "None")
elif "register-job-definition" in words:
    print("arn:" + json.load(open(words[words.index("--cli-input-json") + 1].removeprefix("file://")))["jobDefinitionName"])
elif "submit-job" in words:
    print("id-" + json.load(open(words[words.index("--cli-input-json") + 1].removeprefix("file://")))["jobName"])
"""


@pytest.fixture
def script(tmp_path) -> Callable[..., tuple[subprocess.CompletedProcess[str], list[list[str]]]]:
    """script(**environment): runs a rendered submit.sh with a stand-in for `aws`; (what came, the calls of `aws`)."""
    bin_, folder = tmp_path / "bin", tmp_path / "rendered files"
    bin_.mkdir()
    folder.mkdir()
    (bin_ / "aws").write_text(STAND_IN.format(python=sys.executable), encoding="utf-8")
    (bin_ / "aws").chmod(0o755)
    made = submission(manifest="s3://bucket/o'ut $x/m.jsonl")
    for name, text in FULL.render(made).items():
        (folder / name).write_text(text, encoding="utf-8")
    (folder / "manifest.jsonl").write_text("{}\n", encoding="utf-8")

    def run(**environment: str) -> tuple[subprocess.CompletedProcess[str], list[list[str]]]:
        calls = tmp_path / "calls.jsonl"
        calls.unlink(missing_ok=True)
        env = {"PATH": f"{bin_}:{os.environ['PATH']}", "STAND_IN": str(tmp_path)} | environment
        command = ["bash", str(folder / "submit.sh")]
        done = subprocess.run(command, env=env, cwd=tmp_path, capture_output=True, text=True, check=False, timeout=60)
        seen = [json.loads(line) for line in calls.read_text(encoding="utf-8").splitlines()]
        assert {place for _, place, _ in seen} == {str(folder)}
        assert {attempts for words, _, attempts in seen if "submit-job" in words} <= {"1"}
        return done, [words for words, _, _ in seen]

    return run


def test_submit_sh_passes_shellcheck(tmp_path):
    shellcheck = Path(sys.executable).with_name("shellcheck")
    if not shellcheck.exists():
        pytest.skip("shellcheck is not installed")
    for number, platform in enumerate((AwsBatch(queue="q"), FULL)):
        path = tmp_path / f"{number}.sh"
        path.write_text(platform.render(submission())["submit.sh"], encoding="utf-8")
        done = subprocess.run([str(shellcheck), str(path)], capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stdout


def verbs(calls: list[list[str]]) -> list[str]:
    return [words[1] for words in calls]


def test_submit_sh_copies_then_registers_then_submits(script):
    done, calls = script()
    assert done.returncode == 0, done.stderr
    assert verbs(calls) == ["cp"] + ["describe-job-definitions", "register-job-definition"] * 2 + ["submit-job"] * 2
    assert calls[0] == ["s3", "cp", "manifest.jsonl", "s3://bucket/o'ut $x/m.jsonl"]
    files = FULL.render(submission())
    for name, words in (("job-definition.json", calls[5]), ("report-definition.json", calls[6])):
        wanted = json.loads(files[name])["jobDefinitionName"]
        assert words[words.index("--job-definition") + 1] == f"arn:{wanted}"
    assert all(words[-2:] == ["--region", "eu-west-1"] for words in calls[1:])
    assert done.stdout.splitlines()[-2:] == ["run: id-night-12", "report: id-night-12-report"]


def test_submit_sh_with_registered_definitions_registers_none(script):
    done, calls = script(REGISTERED="1")
    assert done.returncode == 0, done.stderr
    assert "register-job-definition" not in verbs(calls)
    assert all("arn:registered" in words for words in calls if words[1] == "submit-job")


@pytest.mark.parametrize(
    ("fails", "last"),
    [
        ("s3 cp", "cp"),
        ("describe-job-definitions", "describe-job-definitions"),
        ("register-job-definition", "register-job-definition"),
        ("file://run.json", "submit-job"),
    ],
)
def test_submit_sh_stops_at_first_failure(script, fails, last):
    done, calls = script(FAILS=fails)
    assert done.returncode != 0
    assert verbs(calls)[-1] == last
    assert "terminate-job" not in verbs(calls)
    assert verbs(calls).count("submit-job") == (1 if "run.json" in fails else 0)


@pytest.mark.parametrize("fails", ["file://report.json", "file://report.json|terminate-job"])
def test_submit_sh_with_refused_report_terminates_run(script, fails):
    done, calls = script(FAILS=fails)
    assert done.returncode != 0
    assert verbs(calls)[-3:] == ["submit-job", "submit-job", "terminate-job"]
    assert calls[-1][calls[-1].index("--job-id") + 1] == "id-night-12"
    assert "terminating id-night-12" in done.stderr
    assert "report: " not in done.stdout


def test_rendered_files_contain_no_secret_of_environment(monkeypatch):
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_SESSION_TOKEN"):
        monkeypatch.setenv(name, "not-for-files-1234567890")
    assert "not-for-files" not in "".join(FULL.render(submission()).values())

"""AWS Batch files: a submission as arguments of RegisterJobDefinition and SubmitJob, and the script that sends them.

In:   a `Submission` and the settings of the queue. Out: objects that become JSON, and the text of `submit.sh`.
Never: requests.

Two submissions of one image with the same sizes have the same job definitions.
"""

from __future__ import annotations

import hashlib
import json
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from runner.launch.submission import FINAL_CODES, Submission, report_words, run_words

__all__ = [
    "REPORT",
    "REPORT_DEFINITION",
    "RUN",
    "RUN_DEFINITION",
    "TASK_SETTINGS",
    "TaskSettings",
    "as_json",
    "report_definition",
    "report_request",
    "run_definition",
    "run_request",
    "same_definition",
    "submit_script",
]

RUN_DEFINITION, RUN = "job-definition.json", "run.json"
REPORT_DEFINITION, REPORT = "report-definition.json", "report.json"

CACHE = "cache"  # the volume's name
REPORT_CPUS, REPORT_MIB = 1, 3072  # leaves room for ECS's agent on the smallest usual machines (2 vCPU, 4 GiB)
REPORT_WRITES_S = 900  # for writing the report after the wait; assumed


@dataclass(frozen=True)
class TaskSettings:
    """What the job definitions need beyond the submission."""

    job_role: str | None = None  # ARN: what the runner in the container may do, e.g. read and write the bucket
    execution_role: str | None = None  # ARN: what ECS's agent may do for the container, e.g. write to a log group
    log_group: str | None = None  # an existing log group of CloudWatch Logs; None: /aws/batch/job
    cache_folder: str | None = None  # a folder of the instance; None: each task has its own volume


TASK_SETTINGS = TaskSettings()


def run_definition(submission: Submission, settings: TaskSettings = TASK_SETTINGS) -> dict[str, Any]:
    """Return the arguments of RegisterJobDefinition for the tasks of the array."""
    needs = {"VCPU": submission.cpus, "MEMORY": submission.memory_gib * 1024, "GPU": submission.gpus_per_task}
    return _definition("run", submission, settings, needs, submission.time_limit_s)


def report_definition(submission: Submission, settings: TaskSettings = TASK_SETTINGS) -> dict[str, Any]:
    """Return the arguments of RegisterJobDefinition for the job that writes the report."""
    needs = {"VCPU": REPORT_CPUS, "MEMORY": REPORT_MIB}
    return _definition("report", submission, settings, needs, _wait_s(submission) + REPORT_WRITES_S)


def run_request(
    submission: Submission, definition: str, queue: str, share_identifier: str | None = None
) -> dict[str, Any]:
    """Return the arguments of SubmitJob for the array; for one task, of a plain job. `definition`: its name or ARN."""
    # The queue's compute environment decides whether machines are Spot machines, so the task always polls for the
    # notice; on other machines the service answers 404. A container reaches the service only if the launch template
    # has HttpPutResponseHopLimit 2.
    words = run_words(submission, spot="aws")
    request = _request(submission, submission.name, definition, queue, words, share_identifier)
    if submission.shards > 1:  # AWS Batch: an array has 2 to 10,000 jobs
        request["arrayProperties"] = {"size": submission.shards}
    return request


def report_request(
    submission: Submission, definition: str, queue: str, share_identifier: str | None = None
) -> dict[str, Any]:
    """Return the arguments of SubmitJob for the job that writes the report.

    `report --wait` waits for the run. A job dependency is not used: a dependent job fails together with the run, and a
    failed run needs its report most.
    """
    words = report_words(submission, wait_s=_wait_s(submission))
    return _request(submission, f"{submission.name}-report", definition, queue, words, share_identifier)


def _wait_s(submission: Submission) -> int:
    return 2 * submission.time_limit_s


def _definition(
    role: str, submission: Submission, settings: TaskSettings, needs: Mapping[str, int], time_limit_s: int
) -> dict[str, Any]:
    container: dict[str, Any] = {
        "image": submission.image,
        "resourceRequirements": [{"type": kind, "value": str(value)} for kind, value in needs.items()],
        "volumes": [_cache_volume(settings)],
        "mountPoints": [{"sourceVolume": CACHE, "containerPath": "/cache", "readOnly": False}],
        "logConfiguration": {"logDriver": "awslogs"},
    }
    if settings.log_group is not None:
        container["logConfiguration"]["options"] = {"awslogs-group": settings.log_group}
    if settings.job_role is not None:
        container["jobRoleArn"] = settings.job_role
    if settings.execution_role is not None:
        container["executionRoleArn"] = settings.execution_role
    definition = {
        "type": "container",
        "platformCapabilities": ["EC2"],  # Fargate has no GPUs
        "containerProperties": container,
        "retryStrategy": {"attempts": submission.attempts, "evaluateOnExit": _retry_rules()},
        "timeout": {"attemptDurationSeconds": time_limit_s},  # AWS Batch retries no job that has reached it
    }
    digest = hashlib.sha256(json.dumps(definition, sort_keys=True).encode()).hexdigest()[:16]
    return {"jobDefinitionName": f"video-lab-{role}-{digest}", **definition}


def _cache_volume(settings: TaskSettings) -> dict[str, Any]:
    """Return the volume for /cache.

    Its size is that of the instance's disk, which the launch template sets: a job definition cannot request disk on
    EC2. Without `cache_folder` Docker creates a volume for the task. That volume takes owner and mode of /cache from
    the image (mode 1777), so that the image's user may write. If `cache_folder` does not exist, Docker creates it for
    root with mode 755, and the image's user cannot write: the launch template must create it.
    """
    host = {} if settings.cache_folder is None else {"sourcePath": settings.cache_folder}
    return {"name": CACHE, "host": host}


def _retry_rules() -> list[dict[str, str]]:
    """Return the retry rules.

    AWS Batch takes at most 5 rules. The first rule that matches counts; a failure that matches none is retried.
    """
    return [
        {"onStatusReason": "Host EC2*", "action": "RETRY"},  # the machine was taken back or failed
        {"onReason": "CannotPullContainer*", "action": "EXIT"},  # ECS's agent has tried five times by then
        *({"onExitCode": str(code), "action": "EXIT"} for code in FINAL_CODES),
        {"onReason": "*", "action": "RETRY"},
    ]


def _request(
    submission: Submission,
    name: str,
    definition: str,
    queue: str,
    words: Sequence[str],
    share_identifier: str | None,
) -> dict[str, Any]:
    overrides: dict[str, Any] = {"command": list(words)}
    if submission.environment:
        entries = sorted(submission.environment.items())
        overrides["environment"] = [{"name": key, "value": value} for key, value in entries]
    request = {"jobName": name, "jobQueue": queue, "jobDefinition": definition, "containerOverrides": overrides}
    if share_identifier is not None:
        request["shareIdentifier"] = share_identifier
    return request


def as_json(value: Mapping[str, Any]) -> str:
    """Return the value as the JSON text of a file."""
    return json.dumps(value, indent=2, ensure_ascii=False) + "\n"


def same_definition(definition: Mapping[str, Any], registered: Mapping[str, Any]) -> bool:
    """Return whether `registered`, as DescribeJobDefinitions returns it, has the same effect as `definition`.

    The service adds only empty values to a definition, such as `"ulimits": []`, and writes the actions of retry rules
    in lower case.
    """
    return all(_same(value, registered.get(key)) for key, value in definition.items())


def _same(wanted: Any, registered: Any) -> bool:
    if isinstance(wanted, dict) and isinstance(registered, dict):
        added = registered.keys() - wanted.keys()
        return all(_same(value, registered.get(key)) for key, value in wanted.items()) and not any(
            registered[key] for key in added
        )
    if isinstance(wanted, list) and isinstance(registered, list):
        return len(wanted) == len(registered) and all(map(_same, wanted, registered))
    if wanted in ("RETRY", "EXIT"):
        return str(registered).upper() == wanted
    return bool(wanted == registered) or (not wanted and not registered)


def submit_script(submission: Submission, run_name: str, report_name: str, region: str | None) -> str:
    """Return `submit.sh`, which copies the manifest, registers missing definitions and submits both jobs or none."""
    flag = f" --region {shlex.quote(region)}" if region else ""
    return _SCRIPT.format(
        run_id=submission.run_id,
        manifest=shlex.quote(submission.manifest),
        region=flag,
        run_name=shlex.quote(run_name),
        report_name=shlex.quote(report_name),
        RUN_DEFINITION=RUN_DEFINITION,
        REPORT_DEFINITION=REPORT_DEFINITION,
        RUN=RUN,
        REPORT=REPORT,
    )


_SCRIPT = """\
#!/usr/bin/env bash
# Submits the run {run_id} to AWS Batch with the aws command line tool.
set -euo pipefail
cd "$(dirname "${{BASH_SOURCE[0]}}")"
export AWS_PAGER=

batch() {{
  aws batch "$@"{region}
}}

# definition NAME FILE: prints the ARN of the job definition and registers the definition if it is not registered yet.
# NAME contains a digest of the file's content.
definition() {{
  local arn
  arn=$(batch describe-job-definitions --job-definition-name "$1" --status ACTIVE --no-paginate \\
    --query 'jobDefinitions[0].jobDefinitionArn' --output text) || return
  if [[ -z $arn || $arn == None ]]; then
    arn=$(batch register-job-definition --cli-input-json "file://$2" --query jobDefinitionArn --output text) || return
  fi
  echo "$arn"
}}

# submit FILE DEFINITION: submits the job and prints its id. Sent only once: a repeated request could submit two jobs.
submit() {{
  AWS_MAX_ATTEMPTS=1 batch submit-job --cli-input-json "file://$1" --job-definition "$2" --query jobId --output text
}}

take_back() {{
  echo "the job that writes the report was not submitted: terminating $run" >&2
  batch terminate-job --job-id "$run" --reason 'the job that writes the report was not submitted'
}}

aws s3 cp manifest.jsonl {manifest}
run_definition=$(definition {run_name} {RUN_DEFINITION})
report_definition=$(definition {report_name} {REPORT_DEFINITION})

run=$(submit {RUN} "$run_definition")
trap take_back EXIT
report=$(submit {REPORT} "$report_definition")
trap - EXIT

echo "run: $run"
echo "report: $report"
"""

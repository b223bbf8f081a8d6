"""AWS Batch: a run as an array job on EC2 machines, and a job that waits for its end and writes the report.

In:   a `Submission`, a queue and roles, the AWS environment. Out: job definitions and jobs, by boto3; their files.
Never: compute environments, queues, launch templates, roles: they exist.

The launch template of the machines must set three things that a job cannot request:
- a disk that is large enough for the image, models and scratch (the default one has 30 GiB);
- HttpPutResponseHopLimit 2: with a lower limit a container cannot read the Spot notice;
- ECS_ENABLE_SPOT_INSTANCE_DRAINING=true in /etc/ecs/ecs.config: without it, a task that has drained is started again on
  the machine that is about to be taken back, and uses up its attempts there.
"""

from __future__ import annotations

import json
import re
import shlex
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import Any, ClassVar

from runner.errors import ClusterDenied, ClusterUnavailable, ConfigInvalid, RunnerError, first_few
from runner.launch.aws_batch_files import (
    REPORT,
    REPORT_DEFINITION,
    RUN,
    RUN_DEFINITION,
    TaskSettings,
    as_json,
    report_definition,
    report_request,
    run_definition,
    run_request,
    same_definition,
    submit_script,
)
from runner.launch.platform import Platform
from runner.launch.submission import Submission, SubmittedJob
from runner.launch.submission_checks import check_image

__all__ = ["AwsBatch"]

STOP_S = 30.0  # AWS Batch: from SIGTERM to SIGKILL, at a time limit and at TerminateJob; it cannot be set
END_S = 10.0  # part of STOP_S for encoding and publishing after the running segment; assumed
REPORT_SUFFIX = "-report"
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_-]{0,127}")  # of a job
_QUEUE = re.compile(r"[A-Za-z0-9][A-Za-z0-9_-]{0,127}|arn:aws[a-z-]*:batch:[a-z0-9-]+:\d{12}:job-queue/[A-Za-z0-9_-]+")
_ROLE = re.compile(r"arn:aws[a-z-]*:iam::\d{12}:role/\S+")
_DEFINITION_BYTES, _REQUEST_BYTES = 24 * 1024, 30 * 1024  # AWS Batch's quotas, which cannot be raised


@dataclass(frozen=True)
class AwsBatch(Platform):
    """A job queue, and the roles and settings of its jobs."""

    queue: str  # name or ARN
    # The report job mostly waits, so a queue of machines without GPUs is cheaper. None: the same queue.
    report_queue: str | None = None
    job_role: str | None = None  # ARN: reads manifest, inputs and models, writes OUT; None: the machine's role
    execution_role: str | None = None  # ARN; None: the machine's role
    region: str | None = None  # None: the region of the environment or the profile
    log_group: str | None = None  # an existing log group of CloudWatch Logs; None: /aws/batch/job
    share_identifier: str | None = None  # required if the queue has a scheduling policy
    # A folder of the machine for /cache, shared by all its tasks, so that models are fetched once per machine.
    # The launch template creates it (`install -d -m 1777 FOLDER`), because the container's user is 10001.
    cache_folder: str | None = None  # None: each task has its own volume

    name: ClassVar[str] = "aws-batch"

    def check(self, submission: Submission) -> None:
        """Raise ConfigInvalid for values that AWS Batch would refuse or interpret differently. Sends nothing."""
        check_image(submission.image)
        self._check_settings()
        longest = 128 - len(REPORT_SUFFIX)
        if not _NAME.fullmatch(submission.name) or len(submission.name) > longest:
            raise ConfigInvalid(
                f"{submission.name!r} cannot be the name of a job of AWS Batch",
                where="--name",
                todo=f"Write letters, digits, - and _, {longest} at most, a letter or digit first",
            )
        _in_range("--shards", submission.shards, 1, 10_000, "an array of AWS Batch has 2 to 10,000 jobs, one is a job")
        _in_range("--attempts", submission.attempts, 1, 10, "AWS Batch starts a job 1 to 10 times")
        _in_range("--gpus-per-task", submission.gpus_per_task, 1, None, "a task renders on GPUs")
        _in_range("--cpus", submission.cpus, 1, None, "a job of AWS Batch has at least 1 vCPU")
        _in_range("--memory-gib", submission.memory_gib, 1, None, "a job of AWS Batch has at least 4 MiB")
        _in_range("--time-limit", submission.time_limit_s, 60, None, "AWS Batch's shortest time limit is 60 s")
        if submission.drain_s > STOP_S - END_S:
            raise ConfigInvalid(
                f"{submission.drain_s:g} s are too long: AWS Batch kills a container {STOP_S:g} s after SIGTERM, and "
                f"encoding and publishing need about {END_S:g} s of them",
                where="--drain-s",
                todo=f"Give {STOP_S - END_S:g} or less; after a Spot notice the running job still has two minutes",
            )
        if reserved := [key for key in submission.environment if key.startswith("AWS_BATCH")]:
            raise ConfigInvalid(
                f"{reserved[0]}: AWS Batch sets the variables that begin with AWS_BATCH",
                where="--env",
                todo="Leave it out",
            )
        self._check_files(submission)

    def _check_settings(self) -> None:
        for flag, queue in (("--queue", self.queue), ("--report-queue", self.report_queue)):
            if queue is not None and not _QUEUE.fullmatch(queue):
                raise ConfigInvalid(f"{queue!r} is not a job queue", where=flag, todo="Write its name or its ARN")
        for flag, role in (("--job-role", self.job_role), ("--execution-role", self.execution_role)):
            if role is not None and not _ROLE.fullmatch(role):
                todo = "Write arn:aws:iam::ACCOUNT:role/NAME"
                raise ConfigInvalid(f"{role!r} is not the ARN of a role", where=flag, todo=todo)
        if self.cache_folder is not None and not self.cache_folder.startswith("/"):
            todo = "Write its full path, e.g. /mnt/video-lab"
            raise ConfigInvalid(f"{self.cache_folder!r} is not a full path", where="--cache-folder", todo=todo)

    def _check_files(self, submission: Submission) -> None:
        """Check the sizes of the requests, and the arguments that AWS Batch would refuse or replace."""
        for request in (run_request(submission, "", self.queue), report_request(submission, "", self.queue)):
            for word in request["containerOverrides"]["command"]:
                if not word or "Ref::" in word:  # AWS Batch: Ref::name stands for a parameter of the job
                    problem = "an empty argument" if not word else f"{word!r}, in which AWS Batch replaces Ref::…"
                    raise ConfigInvalid(
                        f"the container's command has {problem}", where="AWS Batch", todo="Change that path or flag"
                    )
            if len(json.dumps(request).encode()) + 512 > _REQUEST_BYTES:  # 512: for the ARN of its definition
                raise ConfigInvalid(
                    "the job is larger than the 30 KiB that AWS Batch accepts",
                    where="AWS Batch",
                    todo="Shorten the environment or the flags of run",
                )
        if len(json.dumps(run_definition(submission, self._tasks)).encode()) > _DEFINITION_BYTES:
            raise ConfigInvalid(
                "the job definition is larger than the 24 KiB that AWS Batch accepts",
                where="AWS Batch",
                todo="Shorten the names",
            )

    @property
    def _tasks(self) -> TaskSettings:
        return TaskSettings(self.job_role, self.execution_role, self.log_group, self.cache_folder)

    def render(self, submission: Submission) -> Mapping[str, str]:
        """Return the definitions and requests as JSON, and `submit.sh`."""
        run, report = run_definition(submission, self._tasks), report_definition(submission, self._tasks)
        run_name, report_name = run["jobDefinitionName"], report["jobDefinitionName"]
        share = self.share_identifier
        return {
            RUN_DEFINITION: as_json(run),
            REPORT_DEFINITION: as_json(report),
            RUN: as_json(run_request(submission, run_name, self.queue, share)),
            REPORT: as_json(report_request(submission, report_name, self.report_queue or self.queue, share)),
            "submit.sh": submit_script(submission, run_name, report_name, self.region),
        }

    # -- requests ------------------------------------------------------------------------------------------------------

    def ask(self, submission: Submission) -> None:
        """Check that the queues exist and would run the jobs. Changes nothing.

        AWS Batch has no dry run, so that the rights to register definitions and to submit jobs are not checked. Raises
        ConfigInvalid for a queue that does not exist or would not run the jobs, ClusterDenied, ClusterUnavailable.
        """
        with _requests():
            client, _ = self._clients()
            names = sorted({self.queue, self.report_queue or self.queue})
            found = client.describe_job_queues(jobQueues=names)["jobQueues"]
        queues = {name: queue for queue in found for name in (queue["jobQueueName"], queue["jobQueueArn"])}
        for flag, name in (("--queue", self.queue), ("--report-queue", self.report_queue)):
            if name is not None:
                if name not in queues:
                    raise self._unknown_queue(client, flag, name)
                self._check_queue(flag, queues[name])
        if submission.spot and not self._has_spot(client, queues[self.queue]):
            raise ConfigInvalid(
                f"{self.queue} has no compute environment of Spot machines",
                where="--spot",
                todo="Name a queue that has one, or leave --spot out: on AWS Batch the queue selects the machines",
            )

    def _check_queue(self, flag: str, queue: Mapping[str, Any]) -> None:
        name, status = queue["jobQueueName"], queue.get("status")
        if queue["state"] != "ENABLED" or status not in ("VALID", "UPDATING", None):
            reason = f": {queue['statusReason']}" if queue.get("statusReason") else ""
            raise ConfigInvalid(
                f"the queue {name} accepts no jobs: it is {queue['state']} and {status}{reason}",
                where=flag,
                todo="Enable or repair it, or name another one",
            )
        kind = queue.get("jobQueueType", "ECS")
        if kind != "ECS":
            raise ConfigInvalid(
                f"the queue {name} is of the type {kind}, but the jobs are containers on EC2 machines",
                where=flag,
                todo="Name a queue whose compute environment is of the type EC2 or SPOT",
            )
        if bool(queue.get("schedulingPolicyArn")) != (self.share_identifier is not None):
            has = "a scheduling policy, which needs one" if queue.get("schedulingPolicyArn") else "no scheduling policy"
            raise ConfigInvalid(
                f"the queue {name} has {has}",
                where="--share-identifier",
                todo="Give it for queues that have a scheduling policy, and for no others",
            )

    def _unknown_queue(self, client: Any, flag: str, name: str) -> ConfigInvalid:
        names: list[str] = []
        with suppress(RunnerError), _requests():
            for page in client.get_paginator("describe_job_queues").paginate():
                names += [queue["jobQueueName"] for queue in page["jobQueues"]]
        there = f"; there are {first_few(sorted(names), 10)}" if names else ""
        region = client.meta.region_name
        return ConfigInvalid(f"no queue {name} in {region}{there}", where=flag, todo="Check the name and the region")

    def _has_spot(self, client: Any, queue: Mapping[str, Any]) -> bool:
        """Return whether the queue has a compute environment of Spot machines; True if this user may not list them."""
        names = [entry["computeEnvironment"] for entry in queue["computeEnvironmentOrder"]]
        try:
            with _requests():
                found = client.describe_compute_environments(computeEnvironments=names)["computeEnvironments"]
        except ClusterDenied:
            return True
        # A compute environment of type UNMANAGED is managed by its owner and can have any machines.
        return any(entry.get("computeResources", {}).get("type", "SPOT") == "SPOT" for entry in found)

    def submit(self, submission: Submission, files: Mapping[str, str]) -> tuple[SubmittedJob, ...]:
        """Register missing definitions, then submit the array and the job that writes the report, or neither."""
        arguments = {name: json.loads(files[name]) for name in (RUN_DEFINITION, REPORT_DEFINITION, RUN, REPORT)}
        with _requests():
            client, client_without_retries = self._clients()
            run_arn = _ensure_definition(client, arguments[RUN_DEFINITION])
            report_arn = _ensure_definition(client, arguments[REPORT_DEFINITION])
        run = _submit_job(client_without_retries, arguments[RUN], run_arn)
        try:
            report = _submit_job(client_without_retries, arguments[REPORT], report_arn)
        except BaseException as error:
            _take_back(client, run, error)
            raise
        return SubmittedJob("run", run), SubmittedJob("report", report)

    def _clients(self) -> tuple[Any, Any]:
        """Return two clients of AWS Batch: one that retries, and one that does not, for SubmitJob.

        A SubmitJob that is retried after a lost answer would submit two jobs.
        """
        import boto3
        from botocore.config import Config

        from runner import __version__

        config = Config(
            retries={"mode": "standard"},  # AWS_MAX_ATTEMPTS still sets the number of attempts
            connect_timeout=10,
            read_timeout=60,
            user_agent_extra=f"video-lab-runner/{__version__}",
        )
        once = config.merge(Config(retries={"mode": "standard", "total_max_attempts": 1}))
        session = boto3.session.Session()
        first, second = (session.client("batch", region_name=self.region, config=each) for each in (config, once))
        return first, second

    def watch(self, submission: Submission, jobs: tuple[SubmittedJob, ...]) -> tuple[str, ...]:
        """Return command lines that watch the run, read its logs (`aws` version 2) and stop it."""
        region = ["--region", self.region] if self.region else []
        ids = [job.id for job in jobs]
        query = "jobs[].[jobName,status,arrayProperties.statusSummary]"
        group = self.log_group or "/aws/batch/job"
        stream = run_definition(submission, self._tasks)["jobDefinitionName"]  # streams begin with it
        reason = "stopped by hand"
        lines: Sequence[Sequence[str]] = [
            ["video-lab", "status", submission.out, "--run", submission.run_id, "--watch"],
            ["aws", "batch", "describe-jobs", "--jobs", *ids, "--query", query, *region],
            ["aws", "logs", "tail", group, "--log-stream-name-prefix", stream, "--follow", *region],
            *(["aws", "batch", "terminate-job", "--job-id", id, "--reason", reason, *region] for id in ids),
        ]
        return tuple(shlex.join(line) for line in lines)


_WHERE = "AWS Batch"


@contextmanager
def _requests() -> Iterator[None]:
    """Raise botocore's errors as RunnerErrors."""
    from runner.launch.aws_errors import aws_errors

    with aws_errors(_WHERE):
        yield


def _in_range(flag: str, value: int, least: int, most: int | None, why: str) -> None:
    if value < least or (most is not None and value > most):
        allowed = f"at least {least}" if most is None else f"{least} to {most}"
        raise ConfigInvalid(f"{value} is not {allowed}: {why}", where=flag, todo="Give another number")


def _ensure_definition(client: Any, definition: Mapping[str, Any]) -> str:
    """Return the ARN of a registered definition with this content. Register it if there is none."""
    name = definition["jobDefinitionName"]
    registered: list[dict[str, Any]] = []
    for page in client.get_paginator("describe_job_definitions").paginate(jobDefinitionName=name, status="ACTIVE"):
        registered += page["jobDefinitions"]
    registered.sort(key=lambda found: int(found["revision"]), reverse=True)
    for found in registered:
        if same_definition(definition, found):
            return str(found["jobDefinitionArn"])
    return str(client.register_job_definition(**definition)["jobDefinitionArn"])


def _submit_job(client: Any, request: Mapping[str, Any], definition: str) -> str:
    try:
        with _requests():
            return str(client.submit_job(**{**request, "jobDefinition": definition})["jobId"])
    except ClusterUnavailable as error:
        # Without an answer it is unknown whether the job was accepted, and SubmitJob has no token for a safe retry.
        filters = f"name=JOB_NAME,values={request['jobName']}"
        look = shlex.join(["aws", "batch", "list-jobs", "--job-queue", request["jobQueue"], "--filters", filters])
        raise ClusterUnavailable(
            error.what, where=error.where, todo=f"The job may have been accepted: check with `{look}`, then retry"
        ) from error


def _take_back(client: Any, job: str, error: BaseException) -> None:
    """Terminate the job. If that fails too, add it to the error's message, or as a note to an error of another type."""
    try:
        with _requests():
            client.terminate_job(jobId=job, reason="the job that writes the report was not submitted")
    except RunnerError as failed:
        line = shlex.join(["aws", "batch", "terminate-job", "--job-id", job, "--reason", "no report job"])
        text = f"the array job {job} could not be terminated ({failed.what}): run `{line}`"
        if isinstance(error, RunnerError):
            kind = type(error)
            raise kind(f"{error.what}; and {text}", where=error.where, todo=error.todo) from error
        error.add_note(text)

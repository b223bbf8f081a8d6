"""AWS Batch: what is checked before anything is sent, and requests to moto's Batch, some of which are refused."""

from __future__ import annotations

import functools
import io
import json
import socket
import urllib.request
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from typing import Any
from uuid import uuid4

import pytest

from runner.errors import ClusterDenied, ClusterUnavailable, ConfigInvalid
from runner.launch import aws_batch
from runner.launch.aws_batch import AwsBatch
from runner.launch.submission import Submission, SubmittedJob
from tests.launch.test_aws_batch_files import FULL, ROLE, submission
from tests.s3_servers import S3Server, moto_app, serving

# -- checks ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "good",
    [
        {"shards": 1},
        {"shards": 2},
        {"shards": 10_000},
        {"attempts": 1},
        {"attempts": 10},
        {"name": "a"},
        {"name": "9_-" + "x" * 118},  # with "-report" 128
        {"time_limit_s": 60},
        {"memory_gib": 1, "cpus": 1},
        {"drain_s": 20.0},
        {"environment": {"AWS_REGION": "eu-west-1"}},
        {"image": "video-lab@sha256:" + "ab" * 32},
    ],
)
def test_check_of_submission_within_limits_passes(good):
    made = submission(**good)
    FULL.check(made)
    for name in ("run.json", "report.json"):
        assert len(json.loads(FULL.render(made)[name])["jobName"]) <= 128


@pytest.mark.parametrize(
    ("bad", "where", "words"),
    [
        ({"shards": 0}, "--shards", "1 to 10000.*2 to 10,000"),
        ({"shards": 10_001}, "--shards", "1 to 10000"),
        ({"attempts": 0}, "--attempts", "1 to 10"),
        ({"attempts": 11}, "--attempts", "1 to 10"),
        ({"name": ""}, "--name", "letters, digits"),
        ({"name": "-night"}, "--name", "letter or digit first"),
        ({"name": "night.12"}, "--name", "letters, digits"),
        ({"name": "x" * 122}, "--name", "121 at most"),
        ({"time_limit_s": 59}, "--time-limit", "60 s"),
        ({"memory_gib": 0}, "--memory-gib", "4 MiB"),
        ({"cpus": 0}, "--cpus", "1 vCPU"),
        ({"gpus_per_task": 0}, "--gpus-per-task", "GPUs"),
        ({"drain_s": 20.5}, "--drain-s", "30 s after SIGTERM.*20 or less"),
        ({"drain_s": 60.0, "spot": True}, "--drain-s", "Spot notice"),
        ({"environment": {"AWS_BATCH_X": "1"}}, "--env", "AWS_BATCH_X"),
        ({"environment": {"LONG": "x" * 31_000}}, "AWS Batch", "30 KiB"),
        ({"image": "host:5000/video-lab"}, "--image", "no tag"),
        ({"run_flags": ("--recipe", "")}, "AWS Batch", "empty argument"),
        ({"run_flags": ("--recipe", "Ref::x")}, "AWS Batch", "Ref::x"),
    ],
)
def test_check_of_submission_outside_limits_names_option(bad, where, words):
    with pytest.raises(ConfigInvalid, match=words) as raised:
        AwsBatch(queue="gpus").check(submission(**bad))
    assert raised.value.where == where


@pytest.mark.parametrize(
    ("settings", "where"),
    [
        ({"queue": ""}, "--queue"),
        ({"queue": "s3://gpus"}, "--queue"),
        ({"queue": "arn:aws:batch:eu-west-1:123456789012:job-definition/x:1"}, "--queue"),
        ({"report_queue": "a b"}, "--report-queue"),
        ({"job_role": "video-lab"}, "--job-role"),
        ({"execution_role": "arn:aws:iam::123456789012:user/x"}, "--execution-role"),
        ({"cache_folder": "cache"}, "--cache-folder"),
    ],
)
def test_check_of_invalid_setting_names_option(settings, where):
    with pytest.raises(ConfigInvalid) as raised:
        AwsBatch(**{"queue": "gpus"} | settings).check(submission())
    assert raised.value.where == where


def test_problem_of_place_outside_s3_gives_reason():
    platform = AwsBatch(queue="q")
    assert platform.problem_of_place("s3://bucket/x") is None
    assert "this machine" in str(platform.problem_of_place("/data/x"))
    assert "a store that the tasks cannot read" in str(platform.problem_of_place("gs://bucket/x"))


def test_watch_gives_status_log_and_terminate_commands():
    lines = FULL.watch(submission(), (SubmittedJob("run", "j1"), SubmittedJob("report", "j2")))
    assert lines[0] == "video-lab status s3://bucket/out --run r-12 --watch"
    assert all(line.endswith("--region eu-west-1") for line in lines[1:])
    assert [line for line in lines if "describe-jobs --jobs j1 j2" in line]
    assert [line for line in lines if "logs tail /video-lab" in line]
    assert len([line for line in lines if "terminate-job" in line]) == 2


# -- requests ----------------------------------------------------------------------------------------------------------


@dataclass
class BatchServer(S3Server):
    """moto's Batch behind a line that refuses what a test asks it to, and keeps what was asked."""

    refusals: list[tuple[str, int, str, str]] = field(default_factory=list)  # operation, status, code, message
    changes: list[dict[str, Any]] = field(default_factory=list)  # of answers of DescribeJobQueues
    requests: list[tuple[str, dict[str, Any]]] = field(default_factory=list)
    queue: str = "gpus"

    @functools.cached_property
    def batch(self) -> Any:
        """A client of the test's own."""
        return self.client_of("batch")

    def client_of(self, service: str) -> Any:
        import boto3

        return boto3.session.Session().client(
            service,
            endpoint_url=self.endpoint,
            aws_access_key_id=self.access_key,
            aws_secret_access_key=self.secret_key,
            region_name=self.region,
        )

    def asked(self, operation: str) -> list[dict[str, Any]]:
        return [body for name, body in self.requests if name == operation]

    def job(self, name: str) -> dict[str, Any]:
        """The one job of this name in the queue."""
        filters = [{"name": "JOB_NAME", "values": [name]}]
        found = self.batch.list_jobs(jobQueue=self.queue, filters=filters)["jobSummaryList"]
        (id_,) = {job["jobId"].partition(":")[0] for job in found}  # moto lists the children of an array too
        (job,) = self.batch.describe_jobs(jobs=[id_])["jobs"]
        return dict(job)


def batch_app(server: BatchServer) -> Callable[..., Any]:
    moto = moto_app()

    def app(environ: dict[str, Any], start_response: Callable[..., Any]) -> Any:
        operation = environ["PATH_INFO"].removeprefix("/v1/")
        data = environ["wsgi.input"].read(int(environ.get("CONTENT_LENGTH") or 0))
        environ["wsgi.input"] = io.BytesIO(data)
        if environ["PATH_INFO"].startswith("/v1/"):
            server.requests.append((operation, json.loads(data or b"{}")))
        for refusal in server.refusals:
            if refusal[0] == operation:
                server.refusals.remove(refusal)
                _, status, code, message = refusal
                body = json.dumps({"message": message}).encode()
                headers = [("Content-Type", "application/json"), ("x-amzn-ErrorType", code)]
                start_response(f"{status} {code}", headers)
                return [body]
        if operation == "describejobqueues" and server.changes:
            body = json.loads(b"".join(moto(environ, lambda *_: None)))
            body["jobQueues"] = [queue | server.changes[0] for queue in body["jobQueues"]]
            start_response("200 OK", [("Content-Type", "application/json")])
            return [json.dumps(body).encode()]
        return moto(environ, start_response)

    return app


@pytest.fixture(scope="module")
def _batch_line() -> Iterator[BatchServer]:
    pytest.importorskip("moto.moto_server.werkzeug_app", reason="moto[server] is not installed")
    server = BatchServer("")
    with serving(batch_app(server)) as server.endpoint:
        data = json.dumps({"batch": {"use_docker": False}}).encode()
        url = f"{server.endpoint}/moto-api/config"
        headers = {"Content-Type": "application/json"}
        urllib.request.urlopen(urllib.request.Request(url, data, headers, method="POST")).close()
        make_environments(server)
        for name, environment, state in (
            ("gpus", "on-demand", "ENABLED"),
            ("cpus", "on-demand", "ENABLED"),
            ("spot", "spot", "ENABLED"),
            ("off", "on-demand", "DISABLED"),
        ):
            order = [{"order": 1, "computeEnvironment": environment}]
            server.batch.create_job_queue(jobQueueName=name, state=state, priority=1, computeEnvironmentOrder=order)
        yield server


def make_environments(server: BatchServer) -> None:
    """Two compute environments, `on-demand` and `spot`, and what moto wants for them."""
    ec2, iam = server.client_of("ec2"), server.client_of("iam")
    vpc = ec2.create_vpc(CidrBlock="10.0.0.0/16")["Vpc"]["VpcId"]
    subnet = ec2.create_subnet(VpcId=vpc, CidrBlock="10.0.1.0/24")["Subnet"]["SubnetId"]
    group = ec2.create_security_group(VpcId=vpc, GroupName="g", Description="g")["GroupId"]
    role = iam.create_role(RoleName=f"r-{uuid4().hex}", AssumeRolePolicyDocument="{}")["Role"]["Arn"]
    profile = iam.create_instance_profile(InstanceProfileName=f"p-{uuid4().hex}")["InstanceProfile"]["Arn"]
    for name, kind in (("on-demand", "EC2"), ("spot", "SPOT")):
        resources = {"type": kind, "minvCpus": 0, "maxvCpus": 64, "desiredvCpus": 0, "instanceTypes": ["g5.xlarge"]}
        resources |= {"subnets": [subnet], "securityGroupIds": [group], "instanceRole": profile}
        if kind == "SPOT":
            resources |= {"bidPercentage": 100, "spotIamFleetRole": role}
        server.batch.create_compute_environment(
            computeEnvironmentName=name, type="MANAGED", state="ENABLED", computeResources=resources, serviceRole=role
        )


@pytest.fixture
def server(_batch_line, aws_env) -> BatchServer:
    """The server; this process asks it, with credentials that it believes."""
    _batch_line.refusals = []
    _batch_line.changes.clear()
    aws_env(_batch_line, AWS_ENDPOINT_URL=_batch_line.endpoint)
    _batch_line.requests.clear()
    return _batch_line


def fresh(**other: Any) -> Submission:
    """A submission of an image and a name that no other test has."""
    word = uuid4().hex[:12]
    return submission(**{"name": f"night-{word}", "image": f"video-lab:{word}"} | other)


def submit(platform: AwsBatch, made: Submission) -> dict[str, str]:
    platform.check(made)
    return {job.role: job.id for job in platform.submit(made, platform.render(made))}


def test_submit_creates_array_job_and_report_job(server):
    made, platform = fresh(), AwsBatch(queue="gpus", job_role=ROLE)
    platform.ask(made)
    ids = submit(platform, made)
    run, report = server.job(made.name), server.job(f"{made.name}-report")
    assert {"run": run["jobId"], "report": report["jobId"]} == ids
    assert run["arrayProperties"]["size"] == 4
    children = server.batch.describe_jobs(jobs=[f"{ids['run']}:{i}" for i in range(4)])["jobs"]
    assert len(children) == 4
    command = children[3]["container"]["command"]
    assert command[0] == "run" and "--run-id" in command
    assert report["container"]["command"][0] == "report"
    assert {job["jobDefinition"].partition("us-east-1")[0] for job in (run, report)} == {"arn:aws:batch:"}


def test_second_submission_registers_no_definition(server):
    first, platform = fresh(), AwsBatch(queue="gpus")
    ids = submit(platform, first)
    assert len(server.asked("registerjobdefinition")) == 2
    again = submit(platform, replace(first, name=f"{first.name}-b", run_id="r-13", shards=7))
    assert len(server.asked("registerjobdefinition")) == 2
    assert len(server.asked("submitjob")) == 4
    assert not set(ids.values()) & set(again.values())
    submit(platform, replace(first, memory_gib=30))  # another size: the report's definition is still good
    assert len(server.asked("registerjobdefinition")) == 3


def test_job_definition_changed_by_hand_is_not_used(server):
    """Under the same name another image was registered by hand; then the good revision is taken away."""
    made, platform = fresh(), AwsBatch(queue="gpus")
    arguments = json.loads(platform.render(made)["job-definition.json"])
    name = arguments["jobDefinitionName"]
    container = arguments["containerProperties"] | {"image": "other:1"}
    server.batch.register_job_definition(**arguments)
    server.batch.register_job_definition(**arguments | {"containerProperties": container})
    submit(platform, made)
    assert server.asked("submitjob")[0]["jobDefinition"].endswith(f"{name}:1")
    server.batch.deregister_job_definition(jobDefinition=f"{name}:1")
    submit(platform, made)
    assert server.asked("submitjob")[2]["jobDefinition"].endswith(f"{name}:3")


def test_unknown_queue_error_lists_existing_queues(server):
    with pytest.raises(ConfigInvalid, match="no queue nowhere in us-east-1; there are cpus, gpus, off, spot") as raised:
        AwsBatch(queue="nowhere").ask(submission())
    assert raised.value.where == "--queue"
    with pytest.raises(ConfigInvalid, match="nowhere") as raised:
        AwsBatch(queue="gpus", report_queue="nowhere").ask(submission())
    assert raised.value.where == "--report-queue"


def test_queue_given_as_arn_is_accepted(server):
    arn = server.batch.describe_job_queues(jobQueues=["gpus"])["jobQueues"][0]["jobQueueArn"]
    AwsBatch(queue=arn, report_queue="cpus").ask(submission())
    AwsBatch(queue=arn).check(submission())


def test_disabled_queue_is_refused(server):
    with pytest.raises(ConfigInvalid, match="accepts no jobs: it is DISABLED"):
        AwsBatch(queue="off").ask(submission())


@pytest.mark.parametrize(
    ("change", "settings", "words"),
    [
        ({"status": "INVALID", "statusReason": "no role"}, {}, "INVALID: no role"),
        ({"jobQueueType": "ECS_FARGATE"}, {}, "ECS_FARGATE"),
        ({"jobQueueType": "EKS"}, {}, "EKS"),
        ({"schedulingPolicyArn": "arn:aws:batch:x"}, {}, "which needs one"),
        ({}, {"share_identifier": "team"}, "no scheduling policy"),
    ],
)
def test_queue_that_cannot_run_jobs_is_refused(server, change, settings, words):
    server.changes.append(change)
    with pytest.raises(ConfigInvalid, match=words):
        AwsBatch(queue="gpus", **settings).ask(submission())


def test_spot_with_queue_without_spot_machines_is_refused(server):
    with pytest.raises(ConfigInvalid, match="no compute environment of Spot") as raised:
        AwsBatch(queue="gpus").ask(submission(spot=True))
    assert raised.value.where == "--spot"
    AwsBatch(queue="spot").ask(submission(spot=True))
    server.refusals.append(("describecomputeenvironments", 403, "AccessDeniedException", "no"))
    AwsBatch(queue="gpus").ask(submission(spot=True))  # a user who may not look is believed


def test_ask_only_describes_queues(server):
    AwsBatch(queue="gpus").ask(submission())
    assert {name for name, _ in server.requests} == {"describejobqueues"}


# -- failures ----------------------------------------------------------------------------------------------------------


def test_denied_request_error_names_missing_permission(server):
    server.refusals.append(("describejobqueues", 403, "AccessDeniedException", "no"))
    with pytest.raises(ClusterDenied, match="allow batch:DescribeJobQueues") as raised:
        AwsBatch(queue="gpus").ask(submission())
    assert raised.value.exit_code == 2


def test_failed_registration_submits_no_job(server):
    message = "User: x is not authorized to perform: iam:PassRole on resource: y"
    server.refusals.append(("registerjobdefinition", 403, "AccessDeniedException", message))
    with pytest.raises(ClusterDenied, match="allow iam:PassRole"):
        submit(AwsBatch(queue="gpus", job_role=ROLE), fresh())
    assert server.asked("submitjob") == []


def test_throttled_request_is_repeated(server, monkeypatch):
    server.refusals.append(("describejobqueues", 429, "TooManyRequestsException", "slow"))
    AwsBatch(queue="gpus").ask(submission())
    assert len(server.asked("describejobqueues")) == 2


def test_ask_without_credentials_raises_cluster_denied(server, monkeypatch):
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.delenv(name)
    with pytest.raises(ClusterDenied, match=r"no usable credentials.*AWS_PROFILE"):
        AwsBatch(queue="gpus").ask(submission())


def test_ask_at_closed_port_raises_cluster_unavailable(server, monkeypatch):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
    monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://127.0.0.1:{port}")
    monkeypatch.setenv("AWS_MAX_ATTEMPTS", "1")
    with pytest.raises(ClusterUnavailable, match="cannot be reached") as raised:
        AwsBatch(queue="gpus").ask(submission())
    assert raised.value.exit_code == 3


def test_ask_without_region_is_refused(server, monkeypatch):
    monkeypatch.delenv("AWS_DEFAULT_REGION")
    with pytest.raises(ConfigInvalid, match="region"):
        AwsBatch(queue="gpus").ask(submission())
    AwsBatch(queue="gpus", region="us-east-1").ask(submission())


@pytest.mark.parametrize(
    ("status", "code", "error"),
    [(403, "AccessDeniedException", ClusterDenied), (500, "ServerException", ClusterUnavailable)],
)
def test_failed_report_submission_terminates_array(server, status, code, error):
    made, platform = fresh(), AwsBatch(queue="gpus", report_queue="cpus")
    refuse_second_submission(server, status, code)
    with pytest.raises(error) as raised:
        submit(platform, made)
    (run, report), (ended,) = server.asked("submitjob"), server.asked("terminatejob")
    assert (run["jobName"], report["jobName"]) == (made.name, f"{made.name}-report")
    assert ended["jobId"] == server.job(made.name)["jobId"]
    assert "could not be terminated" not in str(raised.value)
    if error is ClusterUnavailable:  # it may have been accepted: how to look
        assert f"list-jobs --job-queue cpus --filters name=JOB_NAME,values={made.name}-report" in str(raised.value)


def refuse_second_submission(server: BatchServer, status: int, code: str) -> None:
    """The first SubmitJob passes, the next is refused."""

    class AfterTheFirst(list[tuple[str, int, str, str]]):
        def __iter__(self) -> Iterator[tuple[str, int, str, str]]:
            ready = len(server.asked("submitjob")) >= 2
            return (entry for entry in list.__iter__(self) if ready or entry[0] != "submitjob")

    server.refusals = AfterTheFirst([("submitjob", status, code, "no")])


def test_array_that_cannot_be_terminated_is_named_with_command(server):
    made = fresh()
    refuse_second_submission(server, 403, "AccessDeniedException")
    server.refusals.append(("terminatejob", 403, "AccessDeniedException", "no"))
    with pytest.raises(ClusterDenied, match=r"could not be terminated.*aws batch terminate-job --job-id") as raised:
        submit(AwsBatch(queue="gpus"), made)
    assert server.job(made.name)["jobId"] in str(raised.value)


def test_interrupted_submission_terminates_array(server, monkeypatch):
    """Ctrl-C between the two jobs."""
    first = aws_batch._submit_job

    def interrupted(client: Any, request: Any, definition: str) -> str:
        if request["jobName"].endswith("-report"):
            raise KeyboardInterrupt
        return first(client, request, definition)

    monkeypatch.setattr(aws_batch, "_submit_job", interrupted)
    with pytest.raises(KeyboardInterrupt):
        submit(AwsBatch(queue="gpus"), fresh())
    assert len(server.asked("terminatejob")) == 1


def test_submit_job_without_answer_is_not_repeated(server):
    """A job submitted twice would cost twice; SubmitJob has no token to repeat it by."""
    server.refusals.append(("submitjob", 503, "ServiceUnavailable", "no"))
    with pytest.raises(ClusterUnavailable, match="may have been accepted"):
        submit(AwsBatch(queue="gpus"), fresh())
    assert len(server.asked("submitjob")) == 1
    assert server.asked("terminatejob") == []

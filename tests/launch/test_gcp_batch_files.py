"""GCP Batch files: against the description that Google publishes of the API, and against what its texts say."""

from __future__ import annotations

import copy
import json
import re
from dataclasses import replace
from pathlib import Path

import pytest

from runner.batch.shards import Shard, choose_shard
from runner.cli import parse_command
from runner.launch.gcp_batch_files import LONGEST_RUN_S, buckets_of, report_job, run_job
from runner.launch.gcp_machines import choose_machine
from runner.launch.submission import Submission
from runner.verbs.settings import RunSettings
from tests.launch.discovery_schema import problems, schema

API = "batch.v1.json"
OUT = "/mnt/disks/gcs/renders/out"
SUBMISSION = Submission(
    name="night",
    run_id="20261130-100300.AB12",
    manifest=f"{OUT}/runs/20261130-100300.AB12/manifest.jsonl",
    out=OUT,
    models="/mnt/disks/gcs/models.example.org/wan",
    image="europe-docker.pkg.dev/project/repository/video-lab:1.2",
    shards=7,
    inputs=("/mnt/disks/gcs/clips/a.mp4", "/mnt/disks/gcs/renders/b.mp4", "/mnt/disks/gcs/clips/c.png"),
)
L4 = choose_machine("g2-standard-16", None)
T4 = choose_machine(None, "nvidia-tesla-t4")
JOBS = {
    "plain": run_job(SUBMISSION, L4),
    "spot": run_job(replace(SUBMISSION, spot=True, environment={"B": "2", "A": "1"}), T4, "renderer@p.iam.example.com"),
    "many": run_job(replace(SUBMISSION, shards=100_000, attempts=1), L4),
    "report": report_job(SUBMISSION),
    "report by an account": report_job(replace(SUBMISSION, gpu_hour=0.7), "renderer@p.iam.example.com"),
}


def group_of(job: dict) -> dict:
    (group,) = job["taskGroups"]
    return group


def container_of(job: dict) -> dict:
    (runnable,) = group_of(job)["taskSpec"]["runnables"]
    return runnable["container"]


@pytest.mark.parametrize("name", JOBS)
def test_the_published_description_of_the_api_holds(name):
    assert problems(API, "Job", JOBS[name]) == []


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        (lambda job: group_of(job).update(taskCount=7), "Job.taskGroups[0].taskCount: 7 is no string"),
        (lambda job: group_of(job).update(tasks="7"), "Job.taskGroups[0].tasks: unknown"),
        (lambda job: group_of(job)["taskSpec"].update(maxRetryCount="4"), "maxRetryCount: '4' is no integer"),
        (lambda job: group_of(job)["taskSpec"].update(maxRunDuration="24h"), "'24h' is no google-duration"),
        (lambda job: job["logsPolicy"].update(destination="CLOUD"), "'CLOUD' is none of"),
        (lambda job: job.update(uid="x"), "Job.uid: read-only"),
        (lambda job: job["labels"].update(a=1), "Job.labels.a: 1 is no string"),
    ],
)
def test_the_description_sees_what_is_wrong(change, problem):
    job = copy.deepcopy(JOBS["plain"])
    change(job)
    (found,) = problems(API, "Job", job)
    assert problem in found


@pytest.mark.parametrize("name", JOBS)
def test_what_the_texts_of_the_api_say(name):
    """Ranges and rules that stand in descriptions of fields."""
    job = JOBS[name]
    spec, labels = group_of(job)["taskSpec"], job["labels"]
    assert "[0, 10]" in schema(API, "TaskSpec")["properties"]["maxRetryCount"]["description"]
    assert 0 <= spec["maxRetryCount"] <= 10
    assert (
        "only support one lifecycle policy" in schema(API, "TaskSpec")["properties"]["lifecyclePolicies"]["description"]
    )
    assert len(spec["lifecyclePolicies"]) == 1
    assert len(job["taskGroups"]) == len(job["allocationPolicy"]["instances"]) == 1
    assert int(spec["maxRunDuration"].removesuffix("s")) <= LONGEST_RUN_S == 1_209_600
    for key, value in [*labels.items(), *job["allocationPolicy"]["labels"].items()]:
        assert re.fullmatch(r"[a-z][a-z0-9_-]{0,62}", key) and re.fullmatch(r"[a-z0-9_-]{0,63}", value)
        assert not key.startswith(("goog-", "google-"))
    assert job["logsPolicy"] == {"destination": "CLOUD_LOGGING"}


def decide(job: dict, code: int) -> str:
    """What GCP Batch does after `code`: the policy's action where it fits, else the opposite."""
    (policy,) = group_of(job)["taskSpec"]["lifecyclePolicies"]
    fits = code in policy["actionCondition"]["exitCodes"]
    return "retry" if fits == (policy["action"] == "RETRY_TASK") else "fail"


@pytest.mark.parametrize("code", [1, 2, 3, 134, 137, 139, 143, 50001, 50005])
def test_what_becomes_of_a_task_that_failed(code):
    """From 50001 on these are the platform's own: a machine taken back, one that does not answer, …"""
    assert (
        "fail tasks if we notice any exit code match and retry tasks if no match"
        in (schema(API, "LifecyclePolicy")["properties"]["action"]["description"])
    )
    for job in JOBS.values():
        assert decide(job, code) == ("fail" if code in (1, 2) else "retry")


def test_a_task_a_shard_on_a_machine_of_its_own_with_one_gpu():
    group = group_of(JOBS["plain"])
    assert (group["taskCount"], group["parallelism"], group["taskCountPerNode"]) == ("7", "7", "1")
    assert group_of(JOBS["many"])["taskCount"] == "100000"
    assert group_of(JOBS["many"])["parallelism"] == "5000"
    assert group_of(JOBS["many"])["taskSpec"]["maxRetryCount"] == 0
    (instance,) = JOBS["plain"]["allocationPolicy"]["instances"]
    assert instance["installGpuDrivers"] is True
    assert instance["policy"]["accelerators"] == [{"type": "nvidia-l4", "count": "1"}]
    assert instance["policy"]["machineType"] == "g2-standard-16"
    assert instance["policy"]["provisioningModel"] == "STANDARD"
    assert int(instance["policy"]["bootDisk"]["sizeGb"]) >= SUBMISSION.disk_gib + 40
    assert group["taskSpec"]["computeResource"] == {"cpuMilli": "8000", "memoryMib": str(60 * 1024)}


def test_spot_machines_and_who_says_that_they_are_taken_back():
    (instance,) = JOBS["spot"]["allocationPolicy"]["instances"]
    assert instance["policy"]["provisioningModel"] == "SPOT"
    assert "machineType" not in instance["policy"]
    words = container_of(JOBS["spot"])["commands"]
    assert words[words.index("--spot") + 1] == "gcp"
    assert "--spot" not in container_of(JOBS["plain"])["commands"]


def test_the_container_starts_as_the_image_says():
    """It is spelt out; the Dockerfile is where it comes from."""
    dockerfile = (Path(__file__).parents[2] / "Dockerfile").read_text(encoding="utf-8")
    entry = json.loads(re.search(r"^ENTRYPOINT (.+)$", dockerfile, re.MULTILINE)[1])
    user = int(re.search(r"^USER (\d+):\d+$", dockerfile, re.MULTILINE)[1])
    assert "LD_LIBRARY_PATH" not in dockerfile
    for job in JOBS.values():
        container = container_of(job)
        assert [container["entrypoint"], *container["commands"]][: len(entry)] == entry
        assert container["commands"][len(entry) - 1] in ("run", "report")
        for volume in group_of(job)["taskSpec"]["volumes"]:
            assert f"--uid={user}" in volume["mountOptions"]


def test_options_of_docker_that_the_task_needs():
    options = container_of(run_job(replace(SUBMISSION, drain_s=20.5), L4))["options"].split()
    assert options[options.index("--mount") + 1] == "type=volume,source=video-lab-cache,destination=/cache"
    assert int(options[options.index("--stop-timeout") + 1]) >= 20.5 + 60
    assert int(options[options.index("--shm-size") + 1].removesuffix("g")) >= 1
    # Batch gives containers the GPU by itself; on its own system `docker run --gpus` finds no driver.
    assert "--gpus" not in options


def test_every_bucket_that_is_named_is_mounted_once_where_the_words_expect_it():
    assert buckets_of(SUBMISSION) == ["clips", "models.example.org", "renders"]
    for name, job in JOBS.items():
        volumes = group_of(job)["taskSpec"]["volumes"]
        paths = {volume["gcs"]["remotePath"]: volume["mountPath"] for volume in volumes}
        wanted = ["renders"] if name.startswith("report") else buckets_of(SUBMISSION)
        assert paths == {bucket: f"/mnt/disks/gcs/{bucket}" for bucket in wanted}
        assert all("-o allow_other" in volume["mountOptions"] for volume in volumes)
        places = [word for word in container_of(job)["commands"] if word.startswith("/mnt/")]
        assert places
        assert all(any(place.startswith(f"{path}/") for path in paths.values()) for place in places)


def test_the_environment_and_the_account():
    (runnable,) = group_of(JOBS["spot"])["taskSpec"]["runnables"]
    variables = runnable["environment"]["variables"]
    assert list(variables.items()) == [("A", "1"), ("B", "2"), ("LD_LIBRARY_PATH", "/usr/local/nvidia/lib64")]
    assert JOBS["spot"]["allocationPolicy"]["serviceAccount"] == {"email": "renderer@p.iam.example.com"}
    assert "serviceAccount" not in JOBS["plain"]["allocationPolicy"]


@pytest.mark.parametrize("shards", [1, 2, 7, 40])
def test_the_shards_of_all_tasks_are_disjoint_and_complete(shards):
    """With what GCP Batch tells a task: its index and the count."""
    job = run_job(replace(SUBMISSION, shards=shards), L4)
    count = group_of(job)["taskCount"]
    verb, flags, _ = parse_command(container_of(job)["commands"][3:])
    assert verb.name == "run"
    settings = RunSettings(**flags)
    names = [f"job-{number}" for number in range(23)]
    taken = []
    for index in range(int(count)):
        told = {"BATCH_TASK_INDEX": str(index), "BATCH_TASK_COUNT": count}
        shard, _ = choose_shard(settings.shard, settings.shard_count, told)
        assert shard == Shard(index, shards)
        taken += shard.take(names)
    assert sorted(taken) == sorted(names)
    described = schema(API, "TaskGroup")["properties"]["taskEnvironments"]["description"]
    assert "Tasks get a BATCH_TASK_INDEX and BATCH_TASK_COUNT environment variable" in described


def test_the_report_waits_on_a_machine_without_a_gpu():
    for name in ("report", "report by an account"):
        job = JOBS[name]
        (instance,) = job["allocationPolicy"]["instances"]
        assert instance.keys() == {"policy"}
        assert instance["policy"]["machineType"] == "e2-standard-2"
        assert instance["policy"]["provisioningModel"] == "STANDARD"
        assert group_of(job)["taskCount"] == "1"
        words = container_of(job)["commands"]
        waited = int(words[words.index("--timeout") + 1].removesuffix("s"))
        assert words[3:7] == ["report", OUT, "--run", SUBMISSION.run_id]
        assert SUBMISSION.time_limit_s < waited < int(group_of(job)["taskSpec"]["maxRunDuration"].removesuffix("s"))


def test_the_longest_run_has_a_report_within_the_platform_s_limit():
    job = report_job(replace(SUBMISSION, time_limit_s=LONGEST_RUN_S))
    words = container_of(job)["commands"]
    assert group_of(job)["taskSpec"]["maxRunDuration"] == f"{LONGEST_RUN_S}s"
    assert 0 < int(words[words.index("--timeout") + 1].removesuffix("s")) < LONGEST_RUN_S

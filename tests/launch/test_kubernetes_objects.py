"""Kubernetes objects: against the API's published schemas, strictly, and against the rules that these do not hold."""

from __future__ import annotations

import copy
import re
from dataclasses import replace

import kubernetes_validate
import pytest

from runner.batch.shards import AnyShard, Shard, choose_shard
from runner.cli import parse_command
from runner.launch.kubernetes_objects import PodSettings, report_job, run_job
from runner.launch.submission import Submission
from runner.verbs.settings import RunSettings

SUBMISSION = Submission(
    name="night",
    run_id="20261130-100300.ab12",
    manifest="s3://bucket/out/runs/20261130-100300.ab12/manifest.jsonl",
    out="s3://bucket/out",
    models="s3://bucket/models",
    image="registry.example/video-lab:1.2",
    shards=7,
)
SETTINGS = PodSettings(
    namespace="renders",
    service_account="renderer",
    secret="s3-keys",
    node_selector=(("cloud.google.com/gke-accelerator", "nvidia-l4"),),
    tolerations=(("dedicated", "gpu", "NoSchedule"), ("slow", None, None)),
)
VARIANTS = {
    "plain": (SUBMISSION, PodSettings()),
    "all settings": (
        replace(SUBMISSION, spot=True, environment={"B": "2", "A": "$(HOME)"}, gpu_hour=2.5, run_flags=("--retry",)),
        SETTINGS,
    ),
    "several GPUs": (replace(SUBMISSION, gpus_per_task=4), PodSettings()),
    "any": (replace(SUBMISSION, share="any", shards=100_000), PodSettings()),
}
# From 1.29 on a cluster has backoffLimitPerIndex without being asked for it; up to 1.34 a condition needs a status.
VERSIONS = ["1.29", "1.31", "1.34", kubernetes_validate.latest_version().removesuffix(".0")]


def jobs(variant: str) -> tuple[dict, dict]:
    return run_job(*VARIANTS[variant]), report_job(*VARIANTS[variant])


def pod_of(job: dict) -> dict:
    return job["spec"]["template"]["spec"]


@pytest.mark.parametrize("version", VERSIONS)
def test_the_published_schemas_hold(version):
    for variant in VARIANTS:
        for job in jobs(variant):
            assert kubernetes_validate.validate(job, version, strict=True) == version


@pytest.mark.parametrize("version", VERSIONS)
def test_the_schemas_see_a_misspelt_key_and_a_missing_one(version):
    misspelt = copy.deepcopy(jobs("plain")[0])
    misspelt["spec"]["backoffLimitPerIndx"] = misspelt["spec"].pop("backoffLimitPerIndex")
    missing = copy.deepcopy(jobs("plain")[0])
    del missing["spec"]["podFailurePolicy"]["rules"][0]["action"]
    for job in (misspelt, missing):
        with pytest.raises(kubernetes_validate.ValidationError):
            kubernetes_validate.validate(job, version, strict=True)


LABEL_VALUE = re.compile(r"[A-Za-z0-9](?:[-A-Za-z0-9_.]*[A-Za-z0-9])?")
QUANTITY = re.compile(r"[1-9][0-9]*(?:Gi)?")


@pytest.mark.parametrize("variant", VARIANTS)
def test_the_rules_of_the_api_that_no_schema_holds(variant):
    """As in Kubernetes' own validation of Jobs and pods."""
    for job in jobs(variant):
        spec, pod = job["spec"], pod_of(job)
        (container,) = pod["containers"]
        assert (job["apiVersion"], job["kind"], pod["restartPolicy"]) == ("batch/v1", "Job", "Never")
        for labels in (job["metadata"]["labels"], spec["template"]["metadata"]["labels"]):
            assert all(LABEL_VALUE.fullmatch(value) and len(value) <= 63 for value in labels.values())
        for rule in spec["podFailurePolicy"]["rules"]:
            actions = {"FailIndex", "Ignore", "Count"} if "completionMode" in spec else {"FailJob", "Ignore", "Count"}
            assert rule["action"] in actions
            assert ("onExitCodes" in rule) != ("onPodConditions" in rule)
            if codes := rule.get("onExitCodes"):
                assert codes["operator"] in ("In", "NotIn")
                assert codes["containerName"] == container["name"]
                assert codes["values"] == sorted(set(codes["values"]))
                assert 0 not in codes["values"]
        mounted = {mount["name"]: mount["mountPath"] for mount in container["volumeMounts"]}
        volumes = {volume["name"]: volume["emptyDir"] for volume in pod["volumes"]}
        assert mounted.keys() == volumes.keys()
        assert all(QUANTITY.fullmatch(folder["sizeLimit"]) for folder in volumes.values())
        assert {folder.get("medium", "") for folder in volumes.values()} <= {"", "Memory"}
        requests, limits = container["resources"]["requests"], container["resources"]["limits"]
        assert requests == limits
        assert all(QUANTITY.fullmatch(value) for value in limits.values())
        for toleration in pod.get("tolerations", []):
            assert toleration["operator"] in ("Exists", "Equal")
            assert ("value" in toleration) == (toleration["operator"] == "Equal")
            assert toleration.get("effect", "NoExecute") in ("NoSchedule", "NoExecute", "PreferNoSchedule")


@pytest.mark.parametrize("variant", VARIANTS)
def test_the_run_is_an_indexed_job_with_a_pod_a_shard(variant):
    submission, _ = VARIANTS[variant]
    run, _ = jobs(variant)
    spec = run["spec"]
    assert spec["completionMode"] == "Indexed"
    assert spec["completions"] == spec["parallelism"] == submission.shards
    assert spec["backoffLimitPerIndex"] == 9
    assert "backoffLimit" not in spec  # with it, the failures of one shard would end the others
    assert "maxFailedIndexes" not in spec
    host_name = f"{run['metadata']['name']}-{submission.shards - 1}"
    assert len(host_name) <= 63
    assert pod_of(run)["activeDeadlineSeconds"] == submission.time_limit_s
    assert "activeDeadlineSeconds" not in spec
    gpus = pod_of(run)["containers"][0]["resources"]["limits"]["nvidia.com/gpu"]
    assert gpus == str(submission.gpus_per_task)


def decide(job: dict, code: int, *, disrupted: bool = False) -> str:
    """What the Job controller does with a pod that ended with `code`: by the first rule that fits."""
    for rule in job["spec"]["podFailurePolicy"]["rules"]:
        if "onPodConditions" in rule:
            wanted = [(pattern["type"], pattern["status"]) for pattern in rule["onPodConditions"]]
            if disrupted and ("DisruptionTarget", "True") in wanted:
                return rule["action"]
        elif (code in rule["onExitCodes"]["values"]) == (rule["onExitCodes"]["operator"] == "In"):
            return rule["action"]
    return "Count"


@pytest.mark.parametrize(
    ("code", "disrupted", "action"),
    [
        (1, False, "FailIndex"),
        (2, False, "FailIndex"),
        (3, False, "Count"),
        (134, False, "Count"),
        (137, False, "Count"),
        (143, False, "Count"),
        (143, True, "Ignore"),
        (137, True, "Ignore"),
        (1, True, "Ignore"),
    ],
)
def test_what_becomes_of_a_shard_whose_pod_ended(code, disrupted, action):
    run, report = jobs("plain")
    assert decide(run, code, disrupted=disrupted) == action
    assert decide(report, code, disrupted=disrupted) == action.replace("FailIndex", "FailJob")


def choose(args: list[str], index: int) -> object:
    """As the container's command line reads its words, and takes its shard."""
    verb, flags, _ = parse_command(args)
    assert verb.name == "run"
    settings = RunSettings(**flags)
    return choose_shard(settings.shard, settings.shard_count, {"JOB_COMPLETION_INDEX": str(index)})[0]


@pytest.mark.parametrize("shards", [1, 2, 7, 40])
def test_the_shards_of_all_indexes_are_disjoint_and_complete(shards):
    """With what Kubernetes tells a pod: its index."""
    args = pod_of(run_job(replace(SUBMISSION, shards=shards)))["containers"][0]["args"]
    names = [f"job-{number}" for number in range(23)]
    taken = []
    for index in range(shards):
        shard = choose(args, index)
        assert shard == Shard(index, shards)
        taken += shard.take(names)
    assert sorted(taken) == sorted(names)


def test_pods_that_share_by_leases_are_not_told_a_count():
    for variant, flags in (("any", ["--shard", "any"]), ("several GPUs", ["--gpus", "all"])):
        args = pod_of(jobs(variant)[0])["containers"][0]["args"]
        assert "--shard-count" not in args
        assert args[args.index(flags[0]) + 1] == flags[1]
    assert isinstance(choose(pod_of(jobs("any")[0])["containers"][0]["args"], 3), AnyShard)


def test_the_report_waits_without_a_gpu():
    for variant in VARIANTS:
        _, report = jobs(variant)
        container = pod_of(report)["containers"][0]
        assert container["args"][:4] == ["report", "s3://bucket/out", "--run", SUBMISSION.run_id]
        waited = int(container["args"][container["args"].index("--timeout") + 1].removesuffix("s"))
        assert "--wait" in container["args"]
        assert waited > SUBMISSION.time_limit_s
        assert pod_of(report)["activeDeadlineSeconds"] > waited
        assert "nvidia.com/gpu" not in container["resources"]["limits"]
        assert "nodeSelector" not in pod_of(report)
        assert "completions" not in report["spec"]  # one


def test_a_pod_has_the_time_to_drain_and_the_places_to_write_and_no_more_rights():
    for variant, (submission, settings) in VARIANTS.items():
        for job in jobs(variant):
            pod = pod_of(job)
            (container,) = pod["containers"]
            mounted = {mount["mountPath"] for mount in container["volumeMounts"]}
            assert {"/cache", "/tmp"} <= mounted
            assert pod["securityContext"]["runAsUser"] == pod["securityContext"]["fsGroup"] == 10001
            assert pod["securityContext"]["runAsNonRoot"] is True
            assert container["securityContext"]["readOnlyRootFilesystem"] is True
            assert container["securityContext"]["capabilities"] == {"drop": ["ALL"]}
            token = pod.get("automountServiceAccountToken", True)
            assert token == (settings.service_account is not None)
        assert pod_of(jobs(variant)[0])["terminationGracePeriodSeconds"] >= submission.drain_s + 60
    slow = pod_of(run_job(replace(SUBMISSION, drain_s=500.5)))
    assert slow["terminationGracePeriodSeconds"] >= 560.5


def test_settings_reach_both_jobs_where_they_are_meant_for_both():
    run, report = jobs("all settings")
    for job in (run, report):
        assert job["metadata"]["namespace"] == "renders"
        assert pod_of(job)["serviceAccountName"] == "renderer"
        container = pod_of(job)["containers"][0]
        assert container["envFrom"] == [{"secretRef": {"name": "s3-keys"}}]
        # The API replaces $(NAME) in values; $$ stays a $.
        assert container["env"] == [{"name": "A", "value": "$$(HOME)"}, {"name": "B", "value": "2"}]
        assert job["metadata"]["annotations"] == {"video-lab/run-id": SUBMISSION.run_id}
    assert pod_of(run)["nodeSelector"] == {"cloud.google.com/gke-accelerator": "nvidia-l4"}
    tolerations = pod_of(run)["tolerations"]
    assert {"key": "dedicated", "operator": "Equal", "value": "gpu", "effect": "NoSchedule"} in tolerations
    assert {"key": "slow", "operator": "Exists"} in tolerations
    assert {"key": "nvidia.com/gpu", "operator": "Exists", "effect": "NoSchedule"} in tolerations


def test_spot_tolerates_the_taints_of_machines_that_may_be_taken_back():
    keys = [{row["key"] for row in pod_of(jobs(name)[0])["tolerations"]} for name in ("all settings", "plain")]
    assert keys[0] - keys[1] >= {"cloud.google.com/gke-spot", "kubernetes.azure.com/scalesetpriority"}
    assert "cloud.google.com/gke-spot" not in keys[1]


def test_the_selected_run_is_the_one_that_was_submitted():
    """Two runs of one name have other names and labels."""
    first = run_job(SUBMISSION)["metadata"]
    second = run_job(replace(SUBMISSION, run_id="another"))["metadata"]
    assert first["name"] != second["name"]
    assert first["labels"]["app.kubernetes.io/instance"] != second["labels"]["app.kubernetes.io/instance"]
    assert report_job(SUBMISSION)["metadata"]["labels"]["app.kubernetes.io/instance"] == first["name"]

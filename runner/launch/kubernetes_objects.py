"""Kubernetes objects: a submission as two Jobs of batch/v1, the run's and its report's.

In:   a `Submission`, what the cluster needs beyond it. Out: objects that become YAML.
Never: requests; credentials: pods get them from a service account or from a Secret that exists.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from runner.launch.job_names import job_names
from runner.launch.submission import FINAL_CODES, Submission, report_words, run_words

__all__ = ["POD_SETTINGS", "PodSettings", "report_job", "run_job"]

USER = 10001  # of the image
CACHE, TEMPORARY, SHARED_MEMORY = "cache", "tmp", "shm"
RESERVE_S = 90  # after the drain: `run --gpus` gives its processes 60 s more, then writes its summary; assumed
REPORT_CPUS, REPORT_GIB, REPORT_DISK_GIB = 1, 3, 2  # assumed; the records of 10,000 jobs are 30 MB
REPORT_WRITES_S = 900  # for the report itself, after its wait; assumed
KEPT_S = 7 * 24 * 3600  # a week to read what the pods logged; what the run wrote stays in OUT
GPU = "nvidia.com/gpu"  # as NVIDIA's device plugin names it, and the taint of GPU nodes on GKE
# Taints of machines that may be taken back: on GKE and AKS the providers', the others customary.
SPOT_TAINTS = (
    "cloud.google.com/gke-spot",
    "kubernetes.azure.com/scalesetpriority",
    "eks.amazonaws.com/capacityType",
    "karpenter.sh/capacity-type",
)

# The first rule that fits counts; a failure that fits none uses up an attempt. That of an evicted pod, or of one whose
# node is taken back, uses up none. Exit code 143 alone has no such rule: it is also that of a pod which has passed its
# time limit, and a pod that hangs would be started again for ever.
DISRUPTED: Mapping[str, Any] = {
    "action": "Ignore",
    "onPodConditions": [{"type": "DisruptionTarget", "status": "True"}],  # Kubernetes up to 1.34 requires the status
}


@dataclass(frozen=True)
class PodSettings:
    """What the pods need beyond the submission."""

    namespace: str = "default"
    service_account: str | None = None
    secret: str | None = None  # its keys become environment variables
    node_selector: tuple[tuple[str, str], ...] = ()  # label, value
    tolerations: tuple[tuple[str, str | None, str | None], ...] = ()  # key, value, effect; None: any


POD_SETTINGS = PodSettings()


def run_job(submission: Submission, settings: PodSettings = POD_SETTINGS) -> dict[str, Any]:
    """The Job of the run: a pod for each shard, all at once as far as there are GPUs."""
    words = run_words(submission)
    if submission.gpus_per_task == 1 and submission.share == "index":
        words += ["--shard-count", str(submission.shards)]  # a pod is told its index and not how many there are
    resources = {
        "cpu": str(submission.cpus),
        "memory": f"{submission.memory_gib}Gi",
        "ephemeral-storage": f"{submission.disk_gib}Gi",
        GPU: str(submission.gpus_per_task),
    }
    pod = _pod(submission, settings, "run", words, resources, submission.disk_gib)
    pod["activeDeadlineSeconds"] = submission.time_limit_s  # of one pod; on the Job it would end all of them
    pod["terminationGracePeriodSeconds"] = math.ceil(submission.drain_s) + RESERVE_S
    pod["volumes"].append(
        {"name": SHARED_MEMORY, "emptyDir": {"medium": "Memory", "sizeLimit": f"{-(-submission.memory_gib // 8)}Gi"}}
    )
    pod["containers"][0]["volumeMounts"].append({"name": SHARED_MEMORY, "mountPath": "/dev/shm"})  # else 64 MiB
    tolerations = [(GPU, None, "NoSchedule"), *settings.tolerations]
    if submission.spot:
        tolerations += [(key, None, "NoSchedule") for key in SPOT_TAINTS]
    pod["tolerations"] = [_toleration(*row) for row in tolerations]
    if settings.node_selector:
        pod["nodeSelector"] = dict(settings.node_selector)
    spec = {
        "completionMode": "Indexed",
        "completions": submission.shards,
        "parallelism": submission.shards,
        # A shard's failures are its own: maxFailedIndexes, which would end the others, is left out.
        "backoffLimitPerIndex": submission.attempts - 1,
        "podFailurePolicy": {"rules": [DISRUPTED, {"action": "FailIndex", "onExitCodes": _final("run")}]},
    }
    return _job(submission, settings, "run", spec, pod)


def report_job(submission: Submission, settings: PodSettings = POD_SETTINGS) -> dict[str, Any]:
    """The Job that waits until no job of the run is left, and writes its report. It needs no GPU."""
    wait_s = 2 * submission.time_limit_s
    resources = {
        "cpu": str(REPORT_CPUS),
        "memory": f"{REPORT_GIB}Gi",
        "ephemeral-storage": f"{REPORT_DISK_GIB}Gi",
    }
    words = report_words(submission, wait_s=wait_s)
    pod = _pod(submission, settings, "report", words, resources, REPORT_DISK_GIB)
    pod["activeDeadlineSeconds"] = wait_s + REPORT_WRITES_S
    spec = {
        "backoffLimit": submission.attempts - 1,
        "podFailurePolicy": {"rules": [DISRUPTED, {"action": "FailJob", "onExitCodes": _final("report")}]},
    }
    return _job(submission, settings, "report", spec, pod)


def _final(container: str) -> dict[str, Any]:
    return {"containerName": container, "operator": "In", "values": sorted(FINAL_CODES)}


def _toleration(key: str, value: str | None, effect: str | None) -> dict[str, str]:
    found = {"key": key, "operator": "Exists"} if value is None else {"key": key, "operator": "Equal", "value": value}
    return found if effect is None else {**found, "effect": effect}


def _job(
    submission: Submission, settings: PodSettings, role: str, spec: Mapping[str, Any], pod: Mapping[str, Any]
) -> dict[str, Any]:
    run, report = job_names(submission)

    def metadata(**more: Any) -> dict[str, Any]:
        labels = {
            "app.kubernetes.io/name": "video-lab",
            "app.kubernetes.io/instance": run,
            "app.kubernetes.io/component": role,
        }
        # A run id may be longer than a label's 63 characters.
        return {**more, "labels": labels, "annotations": {"video-lab/run-id": submission.run_id}}

    template = metadata()
    # An autoscaler that moves a pod to save a machine costs the running segment.
    template["annotations"] |= {
        "cluster-autoscaler.kubernetes.io/safe-to-evict": "false",
        "karpenter.sh/do-not-disrupt": "true",
    }
    return {
        "apiVersion": "batch/v1",
        "kind": "Job",
        "metadata": metadata(name=run if role == "run" else report, namespace=settings.namespace),
        "spec": {**spec, "ttlSecondsAfterFinished": KEPT_S, "template": {"metadata": template, "spec": dict(pod)}},
    }


def _pod(
    submission: Submission,
    settings: PodSettings,
    role: str,
    words: Sequence[str],
    resources: Mapping[str, str],
    disk_gib: int,
) -> dict[str, Any]:
    container: dict[str, Any] = {
        "name": role,
        "image": submission.image,
        "args": [_literal(word) for word in words],
        "resources": {"requests": dict(resources), "limits": dict(resources)},
        "securityContext": {
            "allowPrivilegeEscalation": False,
            "capabilities": {"drop": ["ALL"]},
            "readOnlyRootFilesystem": True,
        },
        "volumeMounts": [{"name": CACHE, "mountPath": "/cache"}, {"name": TEMPORARY, "mountPath": "/tmp"}],
    }
    if submission.environment:
        entries = sorted(submission.environment.items())
        container["env"] = [{"name": key, "value": _literal(value)} for key, value in entries]
    if settings.secret is not None:
        container["envFrom"] = [{"secretRef": {"name": settings.secret}}]
    pod: dict[str, Any] = {"restartPolicy": "Never"}  # podFailurePolicy and backoffLimitPerIndex require it
    if settings.service_account is not None:
        pod["serviceAccountName"] = settings.service_account
    else:
        pod["automountServiceAccountToken"] = False
    pod["securityContext"] = {
        "runAsNonRoot": True,
        "runAsUser": USER,
        "runAsGroup": USER,
        "fsGroup": USER,  # the group of the volumes, so that the user may write
        "seccompProfile": {"type": "RuntimeDefault"},
    }
    pod["containers"] = [container]
    pod["volumes"] = [
        {"name": CACHE, "emptyDir": {"sizeLimit": f"{disk_gib}Gi"}},
        {"name": TEMPORARY, "emptyDir": {"sizeLimit": "1Gi"}},
    ]
    return pod


def _literal(text: str) -> str:
    """Kubernetes replaces $(NAME) in arguments and values by a variable; $$ is a $."""
    return text.replace("$", "$$")

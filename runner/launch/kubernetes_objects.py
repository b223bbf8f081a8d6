"""Kubernetes objects: a submission as two Jobs of batch/v1, one for the run and one for its report.

In:   a `Submission`, the settings of the cluster. Out: objects that become YAML.
Never: requests; credentials: pods get them from a service account or from an existing Secret.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from runner.launch.job_names import job_names
from runner.launch.submission import FINAL_CODES, Submission, report_words, run_words

__all__ = ["POD_SETTINGS", "PodSettings", "report_job", "run_job"]

USER = 10001  # user of the image
CACHE, TEMPORARY, SHARED_MEMORY = "cache", "tmp", "shm"
RESERVE_S = 90  # after the drain: `run --gpus` gives its processes 60 s more, then writes its summary; assumed
REPORT_CPUS, REPORT_GIB, REPORT_DISK_GIB = 1, 3, 2  # assumed; the records of 10,000 jobs are 30 MB
REPORT_WRITES_S = 900  # for writing the report after the wait; assumed
KEPT_S = 7 * 24 * 3600  # the pods' logs can be read for a week; the files of the run stay in OUT
GPU = "nvidia.com/gpu"  # the resource of NVIDIA's device plugin, and the taint of GPU nodes on GKE
# Taints of spot machines. GKE and AKS set the first two; the others are customary.
SPOT_TAINTS = (
    "cloud.google.com/gke-spot",
    "kubernetes.azure.com/scalesetpriority",
    "eks.amazonaws.com/capacityType",
    "karpenter.sh/capacity-type",
)

# The first rule that matches counts; a failure that matches none uses up an attempt. An evicted pod, or a pod whose
# node is taken back, uses up none. Exit code 143 has no such rule: a pod that reaches its time limit also ends with it,
# and a pod that hangs would be started again forever.
DISRUPTED: Mapping[str, Any] = {
    "action": "Ignore",
    "onPodConditions": [{"type": "DisruptionTarget", "status": "True"}],  # Kubernetes up to 1.34 requires the status
}


@dataclass(frozen=True)
class PodSettings:
    """Settings of the pods that are not part of the submission."""

    namespace: str = "default"
    service_account: str | None = None
    secret: str | None = None  # its keys become environment variables
    node_selector: tuple[tuple[str, str], ...] = ()  # label, value
    tolerations: tuple[tuple[str, str | None, str | None], ...] = ()  # key, value, effect; None: any


POD_SETTINGS = PodSettings()


def run_job(submission: Submission, settings: PodSettings = POD_SETTINGS) -> dict[str, Any]:
    """Return the Job of the run: one pod per shard, all in parallel as far as there are GPUs."""
    words = run_words(submission)
    if submission.gpus_per_task == 1 and submission.share == "index":
        words += ["--shard-count", str(submission.shards)]  # Kubernetes gives a pod its index but not the count
    resources = {
        "cpu": str(submission.cpus),
        "memory": f"{submission.memory_gib}Gi",
        "ephemeral-storage": f"{submission.disk_gib}Gi",
        GPU: str(submission.gpus_per_task),
    }
    pod = _pod(submission, settings, "run", words, resources, submission.disk_gib)
    pod["activeDeadlineSeconds"] = submission.time_limit_s  # for one pod; on the Job it would end all pods
    pod["terminationGracePeriodSeconds"] = math.ceil(submission.drain_s) + RESERVE_S
    pod["volumes"].append(
        {"name": SHARED_MEMORY, "emptyDir": {"medium": "Memory", "sizeLimit": f"{-(-submission.memory_gib // 8)}Gi"}}
    )
    pod["containers"][0]["volumeMounts"].append({"name": SHARED_MEMORY, "mountPath": "/dev/shm"})  # default: 64 MiB
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
        # maxFailedIndexes is left out: it would end the other shards after some have failed.
        "backoffLimitPerIndex": submission.attempts - 1,
        "podFailurePolicy": {"rules": [DISRUPTED, {"action": "FailIndex", "onExitCodes": _final("run")}]},
    }
    return _job(submission, settings, "run", spec, pod)


def report_job(submission: Submission, settings: PodSettings = POD_SETTINGS) -> dict[str, Any]:
    """Return the Job that waits until no job of the run is left and then writes its report. It needs no GPU."""
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
    # If an autoscaler moves a pod to save a machine, the running segment is lost.
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
        "fsGroup": USER,  # group of the volumes, so that the user may write
        "seccompProfile": {"type": "RuntimeDefault"},
    }
    pod["containers"] = [container]
    pod["volumes"] = [
        {"name": CACHE, "emptyDir": {"sizeLimit": f"{disk_gib}Gi"}},
        {"name": TEMPORARY, "emptyDir": {"sizeLimit": "1Gi"}},
    ]
    return pod


def _literal(text: str) -> str:
    """Escape `$`: Kubernetes replaces $(NAME) in arguments and values by a variable, and $$ by $."""
    return text.replace("$", "$$")

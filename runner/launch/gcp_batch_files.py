"""GCP Batch files: a submission as two jobs of the Batch API, and the script that submits them.

In:   a `Submission` whose paths are in mounted buckets, the machine. Out: objects that become JSON; `submit.sh`.
Never: requests; credentials: tasks have those of their service account.
"""

from __future__ import annotations

import math
import shlex
from collections.abc import Mapping, Sequence
from typing import Any

from runner.launch.gcp_machines import BOOT_DISK, Machine
from runner.launch.job_names import job_names
from runner.launch.submission import FINAL_CODES, Submission, report_words, run_words

__all__ = ["LONGEST_RUN_S", "MOUNTS", "REPORT", "RUN", "buckets_of", "report_job", "run_job", "submit_script"]

RUN, REPORT = "run.json", "report.json"
MOUNTS = "/mnt/disks/gcs"  # a bucket is mounted below it under its own name
USER = 10001  # user of the image
MOST_PARALLEL = 5000  # GCP Batch: parallel tasks per job
LONGEST_RUN_S = 14 * 24 * 3600  # GCP Batch: run time before automatic failure
RESERVE_S = 90  # for publishing after the drain; assumed
IMAGE_GIB = 50  # part of the boot disk for the system and the unpacked image; assumed
REPORT_MACHINE, REPORT_CPUS, REPORT_GIB = "e2-standard-2", 2, 3  # the machine has 8 GiB; assumed
REPORT_DISK_GIB = 10
REPORT_WRITES_S = 900  # for writing the report after the wait; assumed
# GCP Batch puts the driver's libraries here. The image does not set this variable itself.
DRIVER = {"LD_LIBRARY_PATH": "/usr/local/nvidia/lib64"}
# The image's entry point, repeated here: on machines with a GPU, GCP Batch sometimes ignored the image's entry point.
ENTRYPOINT, ENTRY_WORDS = "/usr/bin/tini", ("--", "python", "/app/entrypoint.py")


def buckets_of(submission: Submission) -> list[str]:
    """Return the buckets that the tasks read or write, sorted."""
    return _buckets(submission.manifest, submission.out, submission.models, *submission.inputs)


def _buckets(*places: str) -> list[str]:
    below = [place.removeprefix(f"{MOUNTS}/") for place in places if place.startswith(f"{MOUNTS}/")]
    return sorted({place.partition("/")[0] for place in below})


def run_job(submission: Submission, machine: Machine, service_account: str | None = None) -> dict[str, Any]:
    """Return the job of the run: one task per shard, each on a separate machine with one GPU."""
    words = run_words(submission, spot="gcp" if submission.spot else None)
    # A Docker volume takes owner and mode of /cache from the image, where all users may write. A folder of the machine
    # would belong to root. Container-Optimized OS also mounts most of its folders noexec, and compiled kernels in
    # /cache could not be loaded.
    options = ["--mount", "type=volume,source=video-lab-cache,destination=/cache"]
    options += ["--shm-size", f"{-(-submission.memory_gib // 8)}g"]
    options += ["--stop-timeout", str(math.ceil(submission.drain_s) + RESERVE_S)]
    resources = (submission.cpus, submission.memory_gib)
    spec = _task(submission, words, resources, buckets_of(submission), submission.time_limit_s, options, DRIVER)
    policy: dict[str, Any] = {
        "accelerators": [{"type": machine.gpu, "count": "1"}],
        "provisioningModel": "SPOT" if submission.spot else "STANDARD",
        "bootDisk": {"type": machine.disk, "sizeGb": str(submission.disk_gib + IMAGE_GIB)},
    }
    if machine.type is not None:
        policy["machineType"] = machine.type
    group = {
        "taskCount": str(submission.shards),
        "parallelism": str(min(submission.shards, MOST_PARALLEL)),
        "taskCountPerNode": "1",
        "taskSpec": spec,
    }
    return _job(submission, "run", group, {"installGpuDrivers": True, "policy": policy}, service_account)


def report_job(submission: Submission, service_account: str | None = None) -> dict[str, Any]:
    """Return the job that waits until no job of the run is left and then writes its report. It needs no GPU."""
    wait_s = min(2 * submission.time_limit_s, LONGEST_RUN_S - REPORT_WRITES_S)
    words = report_words(submission, wait_s=wait_s)
    resources = (REPORT_CPUS, REPORT_GIB)
    spec = _task(submission, words, resources, _buckets(submission.out), wait_s + REPORT_WRITES_S)
    policy = {
        "machineType": REPORT_MACHINE,
        "provisioningModel": "STANDARD",
        "bootDisk": {"type": BOOT_DISK, "sizeGb": str(REPORT_DISK_GIB + IMAGE_GIB)},
    }
    return _job(submission, "report", {"taskCount": "1", "taskSpec": spec}, {"policy": policy}, service_account)


def _task(
    submission: Submission,
    words: Sequence[str],
    resources: tuple[int, int],
    buckets: Sequence[str],
    time_limit_s: int,
    options: Sequence[str] = (),
    variables: Mapping[str, str] = {},
) -> dict[str, Any]:
    container: dict[str, Any] = {
        "imageUri": submission.image,
        "entrypoint": ENTRYPOINT,
        "commands": [*ENTRY_WORDS, *words],
    }
    if options:
        container["options"] = " ".join(options)
    runnable: dict[str, Any] = {"container": container}
    if environment := {**variables, **submission.environment}:
        runnable["environment"] = {"variables": dict(sorted(environment.items()))}
    cpus, memory_gib = resources
    return {
        "runnables": [runnable],
        "volumes": [_volume(bucket) for bucket in buckets],  # containers have them under the same paths
        "computeResource": {"cpuMilli": str(cpus * 1000), "memoryMib": str(memory_gib * 1024)},
        "maxRetryCount": submission.attempts - 1,
        "maxRunDuration": f"{time_limit_s}s",
        # GCP Batch takes one policy. It retries after all other codes, such as 50001, its code for a preempted machine.
        "lifecyclePolicies": [{"action": "FAIL_TASK", "actionCondition": {"exitCodes": sorted(FINAL_CODES)}}],
    }


def _volume(bucket: str) -> dict[str, Any]:
    """Return a volume of a bucket, mounted by gcsfuse with the image's user as owner.

    Root mounts it, so that the user has access only with `allow_other`.
    """
    options = ["--implicit-dirs", "-o allow_other", f"--uid={USER}", f"--gid={USER}"]
    return {"gcs": {"remotePath": bucket}, "mountPath": f"{MOUNTS}/{bucket}", "mountOptions": options}


def _job(
    submission: Submission,
    role: str,
    group: Mapping[str, Any],
    instance: Mapping[str, Any],
    service_account: str | None,
) -> dict[str, Any]:
    run, _ = job_names(submission)
    labels = {"video-lab-run": run, "video-lab-role": role}  # on logs, and on machines for the bill
    allocation: dict[str, Any] = {"instances": [dict(instance)], "labels": dict(labels)}
    if service_account is not None:
        allocation["serviceAccount"] = {"email": service_account}
    return {
        "taskGroups": [dict(group)],
        "allocationPolicy": allocation,
        "labels": labels,
        "logsPolicy": {"destination": "CLOUD_LOGGING"},
    }


def submit_script(submission: Submission, manifest: str, flags: Sequence[str]) -> str:
    """Return `submit.sh`, which copies the manifest to `manifest` (gs://…) and submits both jobs or none.

    flags: flags of gcloud batch.
    """
    run, report = job_names(submission)
    return _SCRIPT.format(
        run_id=submission.run_id,
        flags=shlex.join(flags),
        manifest=shlex.quote(manifest),
        run=run,
        report=report,
        RUN=RUN,
        REPORT=REPORT,
    )


_SCRIPT = """\
#!/usr/bin/env bash
# Submits the run {run_id} to GCP Batch with gcloud.
set -euo pipefail
cd "$(dirname "${{BASH_SOURCE[0]}}")"

batch() {{
  gcloud batch jobs "$@" {flags}
}}

take_back() {{
  echo "the job that writes the report was not submitted: deleting {run}" >&2
  batch delete {run}
}}

gcloud storage cp manifest.jsonl {manifest}
batch submit {run} --config {RUN}
trap take_back EXIT
batch submit {report} --config {REPORT}
trap - EXIT

echo "run: {run}"
echo "report: {report}"
"""

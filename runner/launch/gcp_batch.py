"""GCP Batch: a run as a job with one task per shard, and a second job that waits for it and writes its report.

In:   a `Submission`. Out: `run.json`, `report.json`, `submit.sh`, and two jobs, submitted with gcloud.
Never: credentials: tasks have those of their service account.

The jobs mount buckets as folders. Leases do not exclude other runners on a mounted bucket, so options that need leases
are refused.
"""

from __future__ import annotations

import json
import re
import shlex
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import ClassVar

from runner.errors import ClusterDenied, ClusterUnavailable, ConfigInvalid
from runner.launch.gcp_batch_files import (
    LONGEST_RUN_S,
    MOUNTS,
    REPORT,
    RUN,
    buckets_of,
    report_job,
    run_job,
    submit_script,
)
from runner.launch.gcp_machines import Machine, choose_machine
from runner.launch.job_names import job_names
from runner.launch.platform import Platform
from runner.launch.submission import Submission, SubmittedJob
from runner.launch.submission_checks import check_image
from runner.launch.tool import run_tool, taken_back
from runner.records.output_layout import REPORT_HTML, run_folder

__all__ = ["GcpBatch"]

ASK_S = 120.0  # for one call of gcloud, which takes seconds to start; assumed
COPY_S = 600.0  # for the manifest; assumed
MOST_SHARDS = 100_000  # GCP Batch: tasks per task group
MOST_ATTEMPTS = 10  # the same limit as on AWS Batch; GCP Batch allows one more
BUCKET = "gs://"
_NO_OBJECT = ("matched no objects or files", "not found: 404")  # gcloud storage cat, for an object that does not exist
_PLACE = re.compile(r"gs://(?P<bucket>[a-z0-9][a-z0-9._-]{1,220}[a-z0-9])(?P<key>(?:/[^/\0\r\n]+)*)/?")


@dataclass(frozen=True)
class GcpBatch(Platform):
    """Settings of the jobs.

    Raises ConfigInvalid for names that Google Cloud does not allow, and for machines without exactly one GPU.
    """

    name: ClassVar[str] = "gcp-batch"

    location: str  # a region, e.g. us-central1
    machine_type: str | None = None  # e.g. g2-standard-16
    gpu_type: str | None = None  # e.g. nvidia-tesla-t4, attached to the machine
    project: str | None = None  # None: gcloud's current project
    service_account: str | None = None  # its e-mail address; None: Compute Engine's default account

    def __post_init__(self) -> None:
        for flag, value, form, example in (
            ("--location", self.location, r"[a-z]+(?:-[a-z]+)+[0-9]+", "us-central1"),
            ("--machine-type", self.machine_type, r"[a-z][a-z0-9]*(?:-[a-z0-9]+)+", "g2-standard-16"),
            ("--gpu-type", self.gpu_type, r"[a-z][a-z0-9]*(?:-[a-z0-9]+)*", "nvidia-tesla-t4, one model for all tasks"),
            ("--project", self.project, r"(?:[a-z0-9.-]+:)?[a-z][a-z0-9-]{4,28}[a-z0-9]", "my-project-1"),
            ("--service-account", self.service_account, r"[\w.+-]+@[\w-]+(?:\.[\w-]+)+", "name@project.iam.…"),
        ):
            if value is not None and not re.fullmatch(form, value, re.ASCII):
                raise ConfigInvalid(f"Google Cloud does not allow {value!r}", where=flag, todo=f"E.g. {example}")
        self._machine()

    def _machine(self) -> Machine:
        return choose_machine(self.machine_type, self.gpu_type)

    def place(self, uri: str) -> str:
        """Return the path of gs://bucket/key in a job, which mounts the bucket as a folder."""
        return f"{MOUNTS}/{uri.removeprefix(BUCKET).rstrip('/')}" if uri.startswith(BUCKET) else uri

    def problem_of_place(self, uri: str) -> str | None:
        if not uri.startswith(BUCKET):
            if "://" in uri and not uri.lower().startswith("file:"):
                return "is not in Google Cloud Storage; the jobs can only mount gs:// buckets"
            return "is on this machine; the tasks run on other machines and mount gs:// buckets"
        found = _PLACE.fullmatch(uri)
        if found is None or {".", ".."} & set(found["key"].split("/")):
            return "is not a path in a bucket that can be mounted; write gs://bucket/folder/file"
        return None

    def check(self, submission: Submission) -> None:
        check_image(submission.image)
        job_names(submission)
        for flag, value, most in (
            ("--shards", submission.shards, MOST_SHARDS),
            ("--attempts", submission.attempts, MOST_ATTEMPTS),
            ("--time-limit", submission.time_limit_s, LONGEST_RUN_S),
        ):
            if not 1 <= value <= most:
                raise ConfigInvalid(f"{value} is not from 1 to {most}", where=flag, todo="Give a number in this range")
        if submission.gpus_per_task > 1 or submission.share == "any":
            flag = "--gpus-per-task" if submission.gpus_per_task > 1 else "--share any"
            raise ConfigInvalid(
                "it shares the jobs by leases, which do not work on a mounted bucket: two tasks could render the same "
                "job",
                where=flag,
                todo="Give each task one GPU and share the jobs by index; for more GPUs use more tasks",
            )
        machine = self._machine()
        for what, needed, there in (
            ("CPUs", submission.cpus, machine.cpus),
            ("GiB of memory", submission.memory_gib, machine.memory_gib),
        ):
            if there is not None and needed > there:
                raise ConfigInvalid(
                    f"{machine.type} has {there} {what}, and a task requests {needed}",
                    where="--machine-type",
                    todo="Choose a larger machine, or request less",
                )

    def render(self, submission: Submission) -> Mapping[str, str]:
        run = run_job(submission, self._machine(), self.service_account)
        report = report_job(submission, self.service_account)
        script = submit_script(submission, _uri(submission.manifest), self._flags())
        return {RUN: _as_json(run), REPORT: _as_json(report), "submit.sh": script}

    def ask(self, submission: Submission) -> None:
        run_tool(self._batch("list", "--limit", "1", "--format", "value(name)"), timeout_s=ASK_S)
        for bucket in buckets_of(submission):
            with suppress(ClusterDenied):  # a user without the right to list a bucket may still submit
                words = ["gcloud", "storage", "buckets", "describe", f"{BUCKET}{bucket}", "--format", "value(name)"]
                run_tool([*words, "--quiet"], timeout_s=ASK_S)

    def kept_manifest(self, out: str, key: str) -> bytes | None:
        """See Platform. Uses gcloud; raises ClusterDenied and ClusterUnavailable too."""
        try:
            read = run_tool(["gcloud", "storage", "cat", f"{out.rstrip('/')}/{key}", "--quiet"], timeout_s=COPY_S)
        except ConfigInvalid as error:
            if any(words in error.what for words in _NO_OBJECT):
                return None
            raise
        return read.encode()

    def keep_manifest(self, out: str, key: str, data: bytes) -> None:
        """See Platform. Uses gcloud; raises ClusterDenied and ClusterUnavailable too."""
        words = ["gcloud", "storage", "cp", "-", f"{out.rstrip('/')}/{key}", "--quiet"]
        run_tool(words, stdin=data, timeout_s=COPY_S)

    def submit(self, submission: Submission, files: Mapping[str, str]) -> tuple[SubmittedJob, ...]:
        run, report = job_names(submission)
        unanswered = (ClusterUnavailable, KeyboardInterrupt)  # it may have been accepted
        with TemporaryDirectory(prefix="video-lab-") as folder:
            for name in (RUN, REPORT):
                (Path(folder) / name).write_text(files[name], encoding="utf-8")
            submit_run = self._batch("submit", run, "--config", str(Path(folder) / RUN))
            submit_report = self._batch("submit", report, "--config", str(Path(folder) / REPORT))
            remove_run, remove_report = self._batch("delete", run), self._batch("delete", report)
            with taken_back(run, remove_run, timeout_s=ASK_S, after=unanswered, gone="NOT_FOUND"):
                run_tool(submit_run, timeout_s=ASK_S)
            with (
                taken_back(run, remove_run, timeout_s=ASK_S),
                taken_back(report, remove_report, timeout_s=ASK_S, after=unanswered, gone="NOT_FOUND"),
            ):
                run_tool(submit_report, timeout_s=ASK_S)
        return SubmittedJob("run", run), SubmittedJob("report", report)

    def _flags(self) -> list[str]:
        project = [] if self.project is None else ["--project", self.project]
        return ["--location", self.location, *project, "--quiet"]  # --quiet: gcloud does not wait for an answer

    def _batch(self, *words: str) -> list[str]:
        return ["gcloud", "batch", "jobs", *words, *self._flags()]

    def watch(self, submission: Submission, jobs: tuple[SubmittedJob, ...]) -> tuple[str, ...]:
        run, _ = job_names(submission)
        project = [] if self.project is None else ["--project", self.project]
        out, folder = _uri(submission.out), run_folder(submission.run_id)
        bucket, _, key = out.removeprefix(BUCKET).partition("/")
        logs = f'logName:batch_task_logs AND labels."video-lab-run"="{run}"'
        status = ["video-lab", "status", f"{bucket}/{key}".rstrip("/"), "--run", submission.run_id, "--watch"]
        mount = [["mkdir", "-p", bucket], ["gcsfuse", "--implicit-dirs", bucket, bucket], status]
        return (
            shlex.join(self._batch("describe", run)),
            shlex.join(["gcloud", "logging", "read", logs, "--freshness", "1d", *project]),
            *(shlex.join(self._batch("delete", job.id)) for job in jobs),
            " && ".join(map(shlex.join, mount)),
            shlex.join(["gcloud", "storage", "cp", f"{out}/{folder}{REPORT_HTML}", "."]),
        )


def _uri(path: str) -> str:
    """Return the gs:// URI of a task's `path`."""
    return f"{BUCKET}{path.removeprefix(f'{MOUNTS}/')}"


def _as_json(value: object) -> str:
    return json.dumps(value, indent=2, ensure_ascii=False) + "\n"

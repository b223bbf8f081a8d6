"""Kubernetes: a run as an Indexed Job, and a second Job that waits for it and writes its report.

In:   a `Submission`. Out: `job.yaml`, `submit.sh`, and two Jobs on the cluster of kubectl's context.
Never: credentials: pods get them from a service account or from an existing Secret.
"""

from __future__ import annotations

import json
import re
import shlex
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from typing import ClassVar

import yaml

from runner.errors import ClusterDenied, ClusterUnavailable, ConfigInvalid
from runner.launch.job_names import job_names
from runner.launch.kubernetes_objects import PodSettings, report_job, run_job
from runner.launch.platform import Platform
from runner.launch.submission import Submission, SubmittedJob
from runner.launch.submission_checks import check_image
from runner.launch.tool import run_tool, taken_back

__all__ = ["Kubernetes"]

ASK_S = 60.0  # for one answer of the cluster; assumed
MOST_SHARDS = 100_000  # Kubernetes: the largest parallelism of an Indexed Job
MOST_ATTEMPTS = 10  # the same limit as on AWS Batch
JOB = "job.yaml"

_LABEL = r"[a-z0-9](?:[-a-z0-9]{0,61}[a-z0-9])?"  # RFC 1123
_SUBDOMAIN = rf"{_LABEL}(?:\.{_LABEL})*"
_WORD = r"[A-Za-z0-9](?:[-A-Za-z0-9_.]{0,61}[A-Za-z0-9])?"  # a label's value, and its key after the prefix
_KEY = rf"(?:{_SUBDOMAIN}/)?{_WORD}"
_SELECTOR = re.compile(rf"(?P<key>{_KEY})=(?P<value>(?:{_WORD})?)")
_TOLERATION = re.compile(
    rf"(?P<key>{_KEY})(?:=(?P<value>(?:{_WORD})?))?(?::(?P<effect>NoSchedule|PreferNoSchedule|NoExecute))?"
)


@dataclass(frozen=True)
class Kubernetes(Platform):
    """Settings of the cluster. Raises ConfigInvalid for names that Kubernetes does not allow."""

    name: ClassVar[str] = "kubernetes"

    namespace: str = "default"
    service_account: str | None = None
    secret: str | None = None  # an existing Secret; its keys become environment variables
    node_selector: tuple[str, ...] = ()  # LABEL=VALUE; selects the GPU model, and with `spot` the machines
    tolerations: tuple[str, ...] = ()  # KEY, KEY:EFFECT or KEY=VALUE:EFFECT, for taints beyond the usual ones
    context: str | None = None  # kubectl's context; None: its current one

    def __post_init__(self) -> None:
        for flag, value, form in (
            ("--namespace", self.namespace, _LABEL),
            ("--service-account", self.service_account, _SUBDOMAIN),
            ("--secret", self.secret, _SUBDOMAIN),
            ("--context", self.context, r"[^-\s]\S*"),
        ):
            if value is not None and (len(value) > 253 or not re.fullmatch(form, value)):
                raise ConfigInvalid(f"Kubernetes does not allow the name {value!r}", where=flag, todo="Check the name")
        self._settings()

    def _settings(self) -> PodSettings:
        selected, tolerated = [], []
        for text in self.node_selector:
            if not (found := _SELECTOR.fullmatch(text)):
                todo = "Write LABEL=VALUE, e.g. cloud.google.com/gke-accelerator=nvidia-l4"
                raise ConfigInvalid(f"{text!r} is not a node selector", where="--node-selector", todo=todo)
            selected.append((found["key"], found["value"]))
        for text in self.tolerations:
            if not (found := _TOLERATION.fullmatch(text)):
                todo = "Write KEY, KEY:EFFECT or KEY=VALUE:EFFECT, e.g. dedicated=gpu:NoSchedule"
                raise ConfigInvalid(f"{text!r} is not a toleration", where="--toleration", todo=todo)
            tolerated.append((found["key"], found["value"], found["effect"]))
        return PodSettings(self.namespace, self.service_account, self.secret, tuple(selected), tuple(tolerated))

    def check(self, submission: Submission) -> None:
        check_image(submission.image)
        job_names(submission)
        for flag, value, most in (
            ("--shards", submission.shards, MOST_SHARDS),
            ("--attempts", submission.attempts, MOST_ATTEMPTS),
        ):
            if not 1 <= value <= most:
                raise ConfigInvalid(f"{value} is not from 1 to {most}", where=flag, todo="Give a number in this range")

    def render(self, submission: Submission) -> Mapping[str, str]:
        settings = self._settings()
        jobs = [run_job(submission, settings), report_job(submission, settings)]
        head = f"# The run {submission.run_id}: its shards, then the job that waits for them and writes the report.\n"
        text = yaml.safe_dump_all(jobs, sort_keys=False, allow_unicode=True, width=1000, explicit_start=True)
        return {JOB: head + text, "submit.sh": self._script(submission)}

    def ask(self, submission: Submission) -> None:
        for kind, name in (("serviceaccount", self.service_account), ("secret", self.secret)):
            if name is not None:
                with suppress(ClusterDenied):  # a user who may create Jobs may lack the right to read these
                    run_tool(self._kubectl("get", kind, name, "-o", "name"), timeout_s=ASK_S)
        self._create(self.render(submission)[JOB], "--dry-run=server")

    def submit(self, submission: Submission, files: Mapping[str, str]) -> tuple[SubmittedJob, ...]:
        run, report = job_names(submission)
        documents = [json.dumps(document) for document in yaml.safe_load_all(files[JOB])]
        remove = self._kubectl("delete", "job", run, report, "--ignore-not-found", "--wait=false")
        with taken_back(
            run, remove, timeout_s=ASK_S, after=(ClusterUnavailable, KeyboardInterrupt)
        ):  # in these cases the Job may have been accepted
            self._create(documents[0])
        with taken_back(run, remove, timeout_s=ASK_S):
            self._create(documents[1])
        return SubmittedJob("run", run), SubmittedJob("report", report)

    def _create(self, documents: str, *flags: str) -> None:
        words = self._kubectl("create", *flags, "-f", "-", "-o", "name")
        run_tool(words, stdin=documents.encode(), timeout_s=ASK_S)

    def _kubectl(self, *words: str) -> list[str]:
        context = [] if self.context is None else ["--context", self.context]
        return ["kubectl", *context, "--namespace", self.namespace, *words]

    def watch(self, submission: Submission, jobs: tuple[SubmittedJob, ...]) -> tuple[str, ...]:
        chosen = f"app.kubernetes.io/instance={job_names(submission)[0]}"
        shards = f"{chosen},app.kubernetes.io/component=run"
        most = str(max(5, submission.shards))  # by default kubectl refuses to follow more than 5 pods
        commands = (
            self._kubectl("get", "jobs,pods", "-l", chosen),
            self._kubectl("logs", "-l", shards, "--prefix", "--tail", "20", "--max-log-requests", most, "--follow"),
            self._kubectl("delete", "job", *(job.id for job in jobs)),
            ["video-lab", "status", submission.out, "--run", submission.run_id, "--watch"],
        )
        return tuple(map(shlex.join, commands))

    def _script(self, submission: Submission) -> str:
        return _SCRIPT.format(
            run_id=submission.run_id,
            kubectl=shlex.join(self._kubectl()),
            manifest=shlex.quote(submission.manifest),
            job=JOB,
        )


_SCRIPT = """\
#!/usr/bin/env bash
# Submits the run {run_id} to Kubernetes with kubectl, and copies the manifest with the aws command line tool.
set -euo pipefail
cd "$(dirname "${{BASH_SOURCE[0]}}")"

cluster() {{
  {kubectl} "$@"
}}

cluster create --dry-run=server -f {job} >/dev/null
aws s3 cp manifest.jsonl {manifest}
if ! accepted=$(cluster create -f {job} -o name); then
  if [[ -n $accepted ]]; then
    echo "one of the two jobs was not accepted: deleting the other one" >&2
    mapfile -t names <<<"$accepted"
    cluster delete "${{names[@]}}"
  fi
  exit 1
fi
echo "$accepted"
"""

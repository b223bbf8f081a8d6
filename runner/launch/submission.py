"""Submission: one run as an array of tasks, in terms that every batch platform has.

In:   checked values. Out: `Submission`, and the command lines of its tasks.
Never: terms of one platform; credentials: tasks get them from the platform.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Literal

__all__ = ["FINAL_CODES", "Submission", "SubmittedJob", "report_words", "run_words"]

# Exit codes of `run` after which a platform must not restart a task. After all others (3, 143, a crash, a kill, a lost
# host) it restarts the task: the next attempt skips finished jobs, and `--max-attempts` limits the attempts of a job
# that crashes repeatedly.
FINAL_CODES = (1, 2)  # a retry would fail again: jobs failed because of their inputs, or the configuration is wrong


@dataclass(frozen=True)
class Submission:
    """One run, divided into tasks. Paths are those in a task."""

    name: str  # of the array job; the platform checks its characters and length
    run_id: str  # shared by all tasks
    manifest: str  # the frozen manifest: URI or path
    out: str
    models: str
    image: str  # with a tag or a digest
    shards: int  # tasks of the array
    share: Literal["index", "any"] = "index"  # a task's jobs: every N-th from its index, or any that is not leased
    gpus_per_task: int = 1  # above 1 a task runs one process per GPU, and jobs are shared as with "any"
    cpus: int = 8  # of a task
    memory_gib: int = 60  # of a task
    disk_gib: int = 100  # of a task, for models and scratch
    spot: bool = False  # machines that the cloud may take back
    # Maximum starts of a task; AWS Batch's limit. `--max-attempts` limits the attempts of a job that crashes.
    attempts: int = 10
    drain_s: float = 20.0  # seconds that the running job gets after SIGTERM
    time_limit_s: int = 24 * 3600  # of one attempt of a task
    environment: Mapping[str, str] = field(default_factory=lambda: MappingProxyType({}))  # without credentials
    run_flags: tuple[str, ...] = ()  # more flags of `run`, e.g. ("--recipe", "fp4-distill")
    gpu_hour: float | None = None  # price of a GPU hour, for the report
    inputs: tuple[str, ...] = ()  # of the jobs; a platform that mounts buckets reads the buckets from them


@dataclass(frozen=True)
class SubmittedJob:
    """A job that a platform has accepted: its role (`run` or `report`) and the platform's id."""

    role: str
    id: str


def run_words(submission: Submission, *, spot: str | None = None) -> list[str]:
    """Return the arguments of a task's container: `run MANIFEST --out …`.

    `spot`: the source of notices that the machine is taken back, see `run --spot`; None: SIGTERM only.
    """
    words = ["run", submission.manifest, "--out", submission.out, "--models", submission.models]
    words += ["--run-id", submission.run_id, "--drain-s", f"{submission.drain_s:g}", "--log-format", "json"]
    if submission.gpus_per_task > 1:
        words += ["--gpus", "all"]
    elif submission.share == "any":
        words += ["--shard", "any"]
    if spot is not None:
        words += ["--spot", spot]
    return [*words, *submission.run_flags]


def report_words(submission: Submission, *, wait_s: int | None = None) -> list[str]:
    """Return the arguments of the container that runs `report`.

    `wait_s`: maximum seconds to wait until no job is left; None: the platform starts it when the tasks have ended.
    """
    words = ["report", submission.out, "--run", submission.run_id, "--log-format", "json"]
    if submission.gpu_hour is not None:
        words += ["--gpu-hour", f"{submission.gpu_hour:g}"]
    if wait_s is not None:
        words += ["--wait", "--timeout", f"{wait_s}s"]
    return words

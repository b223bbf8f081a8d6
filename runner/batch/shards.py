"""Shards: choose this process's share of the jobs, from a flag or from the scheduler's environment.

In:   `--shard`, `--shard-count`, an environment. Out: `Shard` or `AnyShard`, and the reason as a text; a run id that is
the same for all shards.
Never: the content of jobs.

A share is a pure function of (jobs, index, count), so array jobs need no coordinator. `AnyShard` is for runners that
each take the jobs whose leases no other runner holds.
"""

from __future__ import annotations

import hashlib
import os
import re
import socket
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Self, TypeVar

from runner.errors import ConfigInvalid

__all__ = ["AnyShard", "Shard", "choose_shard", "run_id_from_env"]

ANY = "any"
T = TypeVar("T")


@dataclass(frozen=True)
class Shard:
    """Share `index` of `count`, from 0. Raises ConfigInvalid for a share that does not exist."""

    index: int
    count: int

    def __post_init__(self) -> None:
        if self.count < 1:
            raise ConfigInvalid(
                f"{self.count} shards are too few: there must be at least 1", todo="Correct the number of shards"
            )
        if not 0 <= self.index < self.count:
            raise ConfigInvalid(
                f"shard {self.index} of {self.count} does not exist",
                todo=f"Shards are numbered from 0: choose 0/{self.count} to {self.count - 1}/{self.count}",
            )

    @classmethod
    def named(cls, name: str) -> Self | None:
        """Return the share with this name (`00003-of-00010`); None for other texts."""
        numbers = re.fullmatch(r"(\d+)-of-(\d+)", name)
        return cls(int(numbers[1]), int(numbers[2])) if numbers and int(numbers[1]) < int(numbers[2]) else None

    def take(self, jobs: Sequence[T]) -> list[T]:
        """Return every `count`-th job from number `index` on. So neighbours, which often cost the same, are spread."""
        return list(jobs[self.index :: self.count])

    def arrange(self, jobs: Sequence[T]) -> list[T]:
        """Return the share's jobs in the order in which they start: the manifest's order."""
        return list(jobs)

    @property
    def name(self) -> str:
        """`00003-of-00010`, for file names: they sort by index."""
        return f"{self.index:05d}-of-{self.count:05d}"

    def __str__(self) -> str:
        return f"{self.index}/{self.count}"


@dataclass(frozen=True)
class AnyShard:
    """All jobs, for one of several runners that share them by leases. `runner`: HOST-PID of this one."""

    runner: str

    @classmethod
    def here(cls) -> AnyShard:
        """Return the share of this process."""
        return cls(f"{socket.gethostname()}-{os.getpid()}")

    def take(self, jobs: Sequence[T]) -> list[T]:
        """Return every job, in the manifest's order."""
        return list(jobs)

    def arrange(self, jobs: Sequence[T]) -> list[T]:
        """Return the jobs in the order in which they start: the manifest's, from a job that depends on `runner`.

        Runners that start at different jobs rarely try to take the same job at the same time.
        """
        if not jobs:
            return []
        first = int.from_bytes(hashlib.sha256(self.runner.encode()).digest()[:8], "big") % len(jobs)
        return [*jobs[first:], *jobs[:first]]

    @property
    def name(self) -> str:
        """HOST-PID, for file names. Characters of the host other than A-Z a-z 0-9 . _ - are replaced."""
        host, _, pid = self.runner.rpartition("-")
        return f"{_clean(host)[:64].strip('-.') or 'host'}-{pid}"

    def __str__(self) -> str:
        return ANY


@dataclass(frozen=True)
class _ArrayTask:
    """One task of a scheduler's array. `count`: number of tasks, None if the scheduler does not give it."""

    scheduler: str
    index: int
    count: int | None
    variables: str  # NAME=VALUE texts, for the reason and for error messages


def choose_shard(text: str | None, count: int | None, env: Mapping[str, str]) -> tuple[Shard | AnyShard, str]:
    """Return the shard, and the reason for it as a text.

    `text` ("I/N", from 0, or "any") overrides the environment. Without it, the environment of AWS Batch, Kubernetes,
    GCP Batch or Slurm arrays gives the share. `count` gives the number of shards if the scheduler does not
    (Kubernetes). Without any of them: all jobs. Raises ConfigInvalid for values that are malformed, out of range,
    incomplete or contradictory, as a wrong share would render jobs twice or never.
    """
    if text is not None and text.strip() == ANY:
        if count is not None:
            raise ConfigInvalid(
                f"--shard any and --shard-count {count} contradict each other",
                todo="Remove --shard-count: with --shard any the number of runners may change",
            )
        return AnyShard.here(), "--shard any"
    if text is not None:
        shard = _parse(text)
        if count is not None and count != shard.count:
            raise ConfigInvalid(
                f"--shard {text} and --shard-count {count} contradict each other", todo="Remove one of them"
            )
        return shard, f"--shard {text}"
    if count is not None and count < 1:
        raise ConfigInvalid(
            f"--shard-count {count} is too small: there must be at least 1 shard", todo="Correct --shard-count"
        )
    tasks = [task for read in (_aws, _kubernetes, _gcp, _slurm) if (task := read(env)) is not None]
    if not tasks:
        if count not in (None, 1):
            raise ConfigInvalid(
                f"--shard-count {count} is given, but the index of this shard is not",
                todo=f"Add --shard I/{count} instead, with I from 0, or start this as an array job",
            )
        return Shard(0, 1), "all jobs: no --shard, and no array job in the environment"
    shards = {(task.index, _task_count(task, count)) for task in tasks}
    if len(shards) > 1:
        raise ConfigInvalid(
            "the environment names two array jobs: " + " and ".join(task.variables for task in tasks),
            todo="Set --shard I/N",
        )
    ((index, total),) = shards
    task = tasks[0]
    counted = "" if task.count is not None else f" and --shard-count {total}"
    try:
        return Shard(index, total), f"{task.scheduler}: {task.variables}{counted}"
    except ConfigInvalid as err:
        raise ConfigInvalid(
            f"{task.variables}{counted}: {err.what}", todo="Use an array without gaps, or set --shard I/N"
        ) from err


def run_id_from_env(env: Mapping[str, str]) -> str | None:
    """Return the id of the array job or job that all shards of this run belong to; None if no scheduler gives one.

    It becomes a folder name, so characters other than A-Z a-z 0-9 . _ - are replaced.
    """
    aws = env.get("AWS_BATCH_JOB_ID", "").partition(":")[0]  # a child of an array is "parent:index"
    for name in (aws, env.get("SLURM_ARRAY_JOB_ID"), env.get("BATCH_JOB_UID"), env.get("JOB_NAME")):
        clean = _clean(name or "")[:128]
        if clean:
            return clean
    return None


def _clean(name: str) -> str:
    return re.sub(r"[^A-Za-z0-9._-]+", "-", name).strip("-.")


def _parse(text: str) -> Shard:
    match = re.fullmatch(r"([0-9]{1,9})/([0-9]{1,9})", text.strip())
    if not match:
        raise ConfigInvalid(
            f"--shard {text!r} is not I/N", todo="Write for example --shard 0/4 (the first of four), or --shard any"
        )
    return Shard(int(match[1]), int(match[2]))


def _task_count(task: _ArrayTask, count: int | None) -> int:
    if task.count is None and count is None:
        raise ConfigInvalid(
            f"{task.scheduler} gives the index of this shard ({task.variables}), but not the number of shards",
            todo="Add --shard-count N, the number of tasks of the array",
        )
    if task.count is not None and count is not None and task.count != count:
        raise ConfigInvalid(
            f"--shard-count {count} contradicts {task.variables}",
            todo=f"Remove --shard-count, or set --shard {task.index}/{count}",
        )
    return task.count if task.count is not None else int(count or 0)


def _aws(env: Mapping[str, str]) -> _ArrayTask | None:
    """Read AWS_BATCH_JOB_ARRAY_INDEX (from 0) and AWS_BATCH_JOB_ARRAY_SIZE of an array's child job."""
    return _plain("AWS Batch", env, "AWS_BATCH_JOB_ARRAY_INDEX", "AWS_BATCH_JOB_ARRAY_SIZE")


def _kubernetes(env: Mapping[str, str]) -> _ArrayTask | None:
    """Read JOB_COMPLETION_INDEX (from 0) of a pod of an Indexed Job. Pods do not get the number of completions."""
    return _plain("Kubernetes Indexed Job", env, "JOB_COMPLETION_INDEX", None)


def _gcp(env: Mapping[str, str]) -> _ArrayTask | None:
    """Read BATCH_TASK_INDEX (from 0) and BATCH_TASK_COUNT of a task group."""
    return _plain("GCP Batch", env, "BATCH_TASK_INDEX", "BATCH_TASK_COUNT")


def _slurm(env: Mapping[str, str]) -> _ArrayTask | None:
    """Read SLURM_ARRAY_TASK_ID, which counts from _MIN in steps of _STEP (`--array=1-9:2`), for _COUNT tasks."""
    task = _number(env, "SLURM_ARRAY_TASK_ID")
    if task is None:
        return None
    first = _number(env, "SLURM_ARRAY_TASK_MIN") or 0
    step = _number(env, "SLURM_ARRAY_TASK_STEP") or 1
    count = _number(env, "SLURM_ARRAY_TASK_COUNT")
    names = ("SLURM_ARRAY_TASK_ID", "SLURM_ARRAY_TASK_MIN", "SLURM_ARRAY_TASK_STEP", "SLURM_ARRAY_TASK_COUNT")
    variables = " ".join(f"{name}={env[name]}" for name in names if env.get(name))
    if task < first or (task - first) % step:
        raise ConfigInvalid(
            f"{variables}: the task id does not fit the array's first id and step",
            todo="Use an array without gaps, or set --shard I/N",
        )
    return _ArrayTask("Slurm array", (task - first) // step, count, variables)


def _plain(scheduler: str, env: Mapping[str, str], index_name: str, count_name: str | None) -> _ArrayTask | None:
    index = _number(env, index_name)
    if index is None:
        return None
    count = _number(env, count_name) if count_name else None
    variables = " ".join(f"{name}={env[name]}" for name in (index_name, count_name) if name and env.get(name))
    return _ArrayTask(scheduler, index, count, variables)


def _number(env: Mapping[str, str], name: str) -> int | None:
    """Return the variable as a whole number; None if it is unset or empty."""
    value = env.get(name, "").strip()
    if not value:
        return None
    if not re.fullmatch(r"[0-9]{1,9}", value):
        raise ConfigInvalid(f"{name}={value!r} is not a whole number", todo="Unset it, or set --shard I/N")
    return int(value)

"""Shards: which share of the jobs is this process's, from a flag or from the scheduler that started it.

In:   `--shard`, `--shard-count`, an environment. Out: `Shard` or `AnyShard` and the reason in words; a run id that all
shards share.
Never: jobs' contents. A share is a pure function of (jobs, index, count), so array jobs need no coordinator. `AnyShard`
is the share of a runner that takes each job that no other runner holds a lease of.
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
            raise ConfigInvalid(f"{self.count} shards are none", todo="Give at least 1")
        if not 0 <= self.index < self.count:
            raise ConfigInvalid(
                f"shard {self.index} of {self.count} does not exist",
                todo=f"Shards count from 0: 0/{self.count} to {self.count - 1}/{self.count}",
            )

    @classmethod
    def named(cls, name: str) -> Self | None:
        """The share that has this name; None for another text."""
        numbers = re.fullmatch(r"(\d+)-of-(\d+)", name)
        return cls(int(numbers[1]), int(numbers[2])) if numbers and int(numbers[1]) < int(numbers[2]) else None

    def take(self, jobs: Sequence[T]) -> list[T]:
        """Every `count`-th job, from the `index`-th: neighbours, which often cost alike, go to different shards."""
        return list(jobs[self.index :: self.count])

    def arrange(self, jobs: Sequence[T]) -> list[T]:
        """The share's jobs in the order in which they are started: that of the manifest."""
        return list(jobs)

    @property
    def name(self) -> str:
        """`00003-of-00010`, for files: names of one run sort by index."""
        return f"{self.index:05d}-of-{self.count:05d}"

    def __str__(self) -> str:
        return f"{self.index}/{self.count}"


@dataclass(frozen=True)
class AnyShard:
    """All jobs, for one of any number of runners that share them by leases. `runner` is this one's HOST-PID."""

    runner: str

    @classmethod
    def here(cls) -> AnyShard:
        """That of this process."""
        return cls(f"{socket.gethostname()}-{os.getpid()}")

    def take(self, jobs: Sequence[T]) -> list[T]:
        """Every job, in the manifest's order."""
        return list(jobs)

    def arrange(self, jobs: Sequence[T]) -> list[T]:
        """The jobs in the order in which they are started: the manifest's, from a place that the runner's name gives.

        Runners that begin at different places seldom ask for a job at the same time.
        """
        if not jobs:
            return []
        first = int.from_bytes(hashlib.sha256(self.runner.encode()).digest()[:8], "big") % len(jobs)
        return [*jobs[first:], *jobs[:first]]

    @property
    def name(self) -> str:
        """HOST-PID, for files; a host's other characters than A-Z a-z 0-9 . _ - are replaced."""
        host, _, pid = self.runner.rpartition("-")
        return f"{_clean(host)[:64].strip('-.') or 'host'}-{pid}"

    def __str__(self) -> str:
        return ANY


@dataclass(frozen=True)
class _Told:
    """What one scheduler says; `count` None where it does not say how many there are."""

    scheduler: str
    index: int
    count: int | None
    variables: str  # for the reason and for complaints


def choose_shard(text: str | None, count: int | None, env: Mapping[str, str]) -> tuple[Shard | AnyShard, str]:
    """The shard, and why it is this one, in words.

    `text` ("I/N", from 0, or "any") goes over everything. Else AWS Batch, Kubernetes, GCP Batch or Slurm arrays say
    which share this is; `count` says how many there are where the scheduler does not (Kubernetes). Else: all jobs.
    Raises ConfigInvalid for what is malformed, out of range, incomplete or contradictory: a wrong share would render
    jobs twice, or never.
    """
    if text is not None and text.strip() == ANY:
        if count is not None:
            raise ConfigInvalid(
                f"--shard any and --shard-count {count} contradict each other",
                todo="Leave --shard-count out: with `any` the number of runners may change",
            )
        return AnyShard.here(), "--shard any"
    if text is not None:
        shard = _parse(text)
        if count is not None and count != shard.count:
            raise ConfigInvalid(
                f"--shard {text} and --shard-count {count} contradict each other", todo="Give one of them"
            )
        return shard, f"--shard {text}"
    if count is not None and count < 1:
        raise ConfigInvalid(f"--shard-count {count} is no number of shards", todo="Give at least 1")
    told = [said for ask in (_aws, _kubernetes, _gcp, _slurm) if (said := ask(env)) is not None]
    if not told:
        if count not in (None, 1):
            raise ConfigInvalid(
                f"--shard-count {count}, but nothing says which of them this is",
                todo=f"Give --shard I/{count}, or start this as an array job",
            )
        return Shard(0, 1), "all jobs: no --shard, and no array job in the environment"
    shards = {(said.index, _agreed(said, count)): said for said in told}
    if len(shards) > 1:
        raise ConfigInvalid(
            "the environment speaks of two array jobs: " + " and ".join(said.variables for said in told),
            todo="Give --shard I/N",
        )
    ((index, total),) = shards
    said = told[0]
    counted = "" if said.count is not None else f" and --shard-count {total}"
    try:
        return Shard(index, total), f"{said.scheduler}: {said.variables}{counted}"
    except ConfigInvalid as err:
        raise ConfigInvalid(
            f"{said.variables}{counted}: {err.what}", todo="Use an array without gaps, or give --shard I/N"
        ) from err


def run_id_from_env(env: Mapping[str, str]) -> str | None:
    """The id of the array job, or job, that every shard of this run belongs to; None where no scheduler gives one.

    It becomes a folder's name, so other characters than A-Z a-z 0-9 . _ - are replaced.
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
        raise ConfigInvalid(f"--shard {text!r} is not I/N", todo="Write e.g. --shard 0/4, the first of four, or any")
    return Shard(int(match[1]), int(match[2]))


def _agreed(said: _Told, count: int | None) -> int:
    if said.count is None and count is None:
        raise ConfigInvalid(
            f"{said.scheduler} says which shard this is ({said.variables}) and not how many there are",
            todo="Give --shard-count N, the number of tasks of the array",
        )
    if said.count is not None and count is not None and said.count != count:
        raise ConfigInvalid(
            f"--shard-count {count} contradicts {said.variables}",
            todo=f"Drop --shard-count, or give --shard {said.index}/{count}",
        )
    return said.count if said.count is not None else int(count or 0)


def _aws(env: Mapping[str, str]) -> _Told | None:
    """Array children have AWS_BATCH_JOB_ARRAY_INDEX, from 0, and AWS_BATCH_JOB_ARRAY_SIZE."""
    return _plain("AWS Batch", env, "AWS_BATCH_JOB_ARRAY_INDEX", "AWS_BATCH_JOB_ARRAY_SIZE")


def _kubernetes(env: Mapping[str, str]) -> _Told | None:
    """Pods of an Indexed Job have JOB_COMPLETION_INDEX, from 0; none of them is told `completions`."""
    return _plain("Kubernetes Indexed Job", env, "JOB_COMPLETION_INDEX", None)


def _gcp(env: Mapping[str, str]) -> _Told | None:
    """Tasks of a group have BATCH_TASK_INDEX, from 0, and BATCH_TASK_COUNT."""
    return _plain("GCP Batch", env, "BATCH_TASK_INDEX", "BATCH_TASK_COUNT")


def _slurm(env: Mapping[str, str]) -> _Told | None:
    """SLURM_ARRAY_TASK_ID runs from _MIN in steps of _STEP (`--array=1-9:2`), _COUNT tasks in all."""
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
            f"{variables}: the task is not one of the array's steps",
            todo="Use an array without gaps, or give --shard I/N",
        )
    return _Told("Slurm array", (task - first) // step, count, variables)


def _plain(scheduler: str, env: Mapping[str, str], index_name: str, count_name: str | None) -> _Told | None:
    index = _number(env, index_name)
    if index is None:
        return None
    count = _number(env, count_name) if count_name else None
    variables = " ".join(f"{name}={env[name]}" for name in (index_name, count_name) if name and env.get(name))
    return _Told(scheduler, index, count, variables)


def _number(env: Mapping[str, str], name: str) -> int | None:
    """The variable as a whole number; None where it is unset or empty."""
    value = env.get(name, "").strip()
    if not value:
        return None
    if not re.fullmatch(r"[0-9]{1,9}", value):
        raise ConfigInvalid(f"{name}={value!r} is not a whole number", todo="Unset it, or give --shard I/N")
    return int(value)

"""Task count: how many tasks finish a run within a given time, by the forecast of its jobs.

In:   forecast seconds of each job, in the order of the manifest. Out: `TaskCount`, with the reason in words;
ConfigInvalid where no number of tasks is enough. Never: how a job is forecast, what a platform allows.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from runner.errors import ConfigInvalid

__all__ = ["TaskCount", "count_tasks", "limit_tasks"]


@dataclass(frozen=True)
class TaskCount:
    """How many tasks, and why so many."""

    tasks: int
    reason: str


def limit_tasks(asked: int, jobs: int, gpus_per_task: int) -> TaskCount:
    """`asked`, or fewer where GPUs would get no job."""
    most = math.ceil(jobs / gpus_per_task)
    if asked <= most:
        return TaskCount(asked, f"--shards {asked}")
    each = "" if gpus_per_task == 1 else f" at {gpus_per_task} GPUs a task"
    return TaskCount(most, f"--shards {asked}, lowered: there {'is 1 job' if jobs == 1 else f'are {jobs} jobs'}{each}")


def count_tasks(
    seconds: Sequence[float],
    *,
    within_s: float,
    startup_s: float,
    gpus_per_task: int = 1,
    share: Literal["index", "any"] = "index",
    longest: str = "the longest job",
) -> TaskCount:
    """The fewest tasks that end within `within_s` seconds of their start, `startup_s` of them without a job.

    A GPU that takes every N-th job (`share` "index") gets at least the whole work divided by N; N is the first number
    at which no share is longer than the time. Where jobs are handed out as GPUs get free ("any", or several GPUs a
    task), the last job ends at the latest after work/N + longest·(1 - 1/N) seconds, in whatever order they start
    (Graham's bound of list scheduling). Raises ConfigInvalid, which names `longest`, where one job alone is too long.
    """
    room, most, work = within_s - startup_s, max(seconds), math.fsum(seconds)
    if most > room:
        raise ConfigInvalid(
            f"{longest} takes {_minutes(most)} by the forecast, and start-up {_minutes(startup_s)}: no number of tasks "
            f"ends within {_minutes(within_s)}",
            where="--within",
            todo=f"Give at least --within {math.ceil((most + startup_s) / 60)}m, or a faster --gpu or --recipe",
        )
    if gpus_per_task == 1 and share == "index":
        tasks = max(1, math.ceil(work / room - 1e-9))
        while (load := _longest_share(seconds, tasks)) > room:
            tasks += 1  # ends: with a task a job, the longest share is the longest job
    else:
        gpus = len(seconds) if most == room else math.ceil((work - most) / (room - most) - 1e-9)
        tasks = math.ceil(min(max(1, gpus), len(seconds)) / gpus_per_task)
        n = tasks * gpus_per_task
        load = most if n >= len(seconds) else work / n + most * (1 - 1 / n)
    return TaskCount(
        tasks,
        f"{_minutes(work)} of GPU time in {'1 job' if len(seconds) == 1 else f'{len(seconds)} jobs'} by the forecast; "
        f"the longest task takes {_minutes(startup_s + load)} of {_minutes(within_s)}, {_minutes(startup_s)} of them "
        "to start",
    )


def _longest_share(seconds: Sequence[float], tasks: int) -> float:
    return max(math.fsum(seconds[index::tasks]) for index in range(min(tasks, len(seconds))))


def _minutes(seconds: float) -> str:
    """`45 s`, `12 min`, `3.4 h`."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"

"""Task count: how many tasks finish a run within a given time, by the forecast of its jobs.

In:   forecast seconds of each job, in the order of the manifest. Out: `TaskCount`, with the reason in words, and the
order of the jobs in which shares by index take equally long; ConfigInvalid where no number of tasks is enough.
Never: how a job is forecast, what a platform allows.
"""

from __future__ import annotations

import heapq
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from runner.errors import ConfigInvalid

__all__ = ["TaskCount", "balance_shares", "count_tasks", "limit_tasks"]


@dataclass(frozen=True)
class TaskCount:
    """How many tasks, and why so many. `order`: places of the jobs in the manifest, as they go to the tasks; None: as
    written."""

    tasks: int
    reason: str
    order: tuple[int, ...] | None = None


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
    at which no share of the balanced order is longer than the time. Where jobs are handed out as GPUs get free ("any",
    or several GPUs a task), the last job ends at the latest after work/N + longest·(1 - 1/N) seconds, in whatever order
    they start (Graham's bound of list scheduling). Raises ConfigInvalid, which names `longest`, where one job alone is
    too long.
    """
    order: tuple[int, ...] | None = None
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
        while (load := _longest_share(seconds, order := balance_shares(seconds, tasks), tasks)) > room:
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
        order,
    )


def balance_shares(seconds: Sequence[float], tasks: int) -> tuple[int, ...]:
    """An order of the jobs in which every `tasks`-th of them, from any index, take nearly the same time together.

    Longest first, each to the share that has the least so far; a share has no more jobs than every `tasks`-th allows.
    """
    least, more = divmod(len(seconds), tasks)  # so many jobs has a share, and so many shares have one more
    shares: list[list[int]] = [[] for _ in range(tasks)]
    open_shares = [(0.0, share) for share in range(tasks)]
    for place in sorted(range(len(seconds)), key=lambda place: -seconds[place]):
        while True:
            so_far, share = heapq.heappop(open_shares)
            if len(shares[share]) < least:
                break
            if more:
                more -= 1
                break
        shares[share].append(place)
        if len(shares[share]) <= least:
            heapq.heappush(open_shares, (so_far + seconds[place], share))
    shares.sort(key=len, reverse=True)  # those with one more have the first indices
    return tuple(share[row] for row in range(len(shares[0])) for share in shares if row < len(share))


def _longest_share(seconds: Sequence[float], order: Sequence[int], tasks: int) -> float:
    return max(math.fsum(seconds[place] for place in order[index::tasks]) for index in range(min(tasks, len(seconds))))


def _minutes(seconds: float) -> str:
    """`45 s`, `12 min`, `3.4 h`."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"

"""Task count: computes how many tasks finish a run within a given time, from the forecast of its jobs.

In:   forecast seconds of each job, in the order of the manifest. Out: `TaskCount` with the reason in words, and an
order of the jobs in which the shares take equally long; ConfigInvalid if no number of tasks is enough.
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
    """The number of tasks and its reason.

    `order`: indices of the jobs in the manifest, in the order for the tasks; None: the manifest's order.
    """

    tasks: int
    reason: str
    order: tuple[int, ...] | None = None


def limit_tasks(requested: int, jobs: int, gpus_per_task: int) -> TaskCount:
    """Return `requested` tasks, or fewer if some GPUs would get no job."""
    most = math.ceil(jobs / gpus_per_task)
    if requested <= most:
        return TaskCount(requested, f"--shards {requested}")
    each = "" if gpus_per_task == 1 else f" at {gpus_per_task} GPUs a task"
    there = f"there {'is 1 job' if jobs == 1 else f'are {jobs} jobs'}"
    return TaskCount(most, f"--shards {requested}, lowered: {there}{each}")


def count_tasks(
    seconds: Sequence[float],
    *,
    within_s: float,
    startup_s: float,
    gpus_per_task: int = 1,
    share: Literal["index", "any"] = "index",
    longest: str = "the longest job",
) -> TaskCount:
    """Return the fewest tasks that end within `within_s` seconds, of which the start of a task takes `startup_s`.

    With `share` "index" each GPU takes every N-th job. N is the smallest number for which no share of the balanced
    order takes longer than the time. With `share` "any", or several GPUs per task, a GPU takes the next job when it is
    free. Then the last job ends after at most work/N + longest·(1 - 1/N) seconds, in any order of the jobs (Graham's
    bound of list scheduling). Raises ConfigInvalid, which names `longest`, if one job takes longer than the time.
    """
    order: tuple[int, ...] | None = None
    room, most, work = within_s - startup_s, max(seconds), math.fsum(seconds)
    if most > room:
        raise ConfigInvalid(
            f"by the forecast {longest} takes {_minutes(most)}, and start-up takes {_minutes(startup_s)}: the run "
            f"cannot end within {_minutes(within_s)} with any number of tasks",
            where="--within",
            todo=f"Give at least --within {math.ceil((most + startup_s) / 60)}m, or a faster --gpu or --recipe",
        )
    if gpus_per_task == 1 and share == "index":
        tasks = max(1, math.ceil(work / room - 1e-9))
        while (load := _longest_share(seconds, order := balance_shares(seconds, tasks), tasks)) > room:
            tasks += 1  # terminates: with one task per job, the longest share is the longest job
    else:
        gpus = len(seconds) if most == room else math.ceil((work - most) / (room - most) - 1e-9)
        tasks = math.ceil(min(max(1, gpus), len(seconds)) / gpus_per_task)
        n = tasks * gpus_per_task
        load = most if n >= len(seconds) else work / n + most * (1 - 1 / n)
    return TaskCount(
        tasks,
        f"forecast: {_minutes(work)} of GPU time in {'1 job' if len(seconds) == 1 else f'{len(seconds)} jobs'}; "
        f"the longest task takes {_minutes(startup_s + load)} of {_minutes(within_s)}, including {_minutes(startup_s)} "
        "to start",
        order,
    )


def balance_shares(seconds: Sequence[float], tasks: int) -> tuple[int, ...]:
    """Return an order of the jobs in which the shares (every `tasks`-th job from each index) take nearly equal time.

    The longest job comes first; each job goes to the share with the least time so far that still has room. The share
    sizes are fixed, because a share is every `tasks`-th job.
    """
    least, more = divmod(len(seconds), tasks)  # each share has `least` jobs, and `more` shares have one more
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
    shares.sort(key=len, reverse=True)  # shares with one more job have the first indices
    return tuple(share[row] for row in range(len(shares[0])) for share in shares if row < len(share))


def _longest_share(seconds: Sequence[float], order: Sequence[int], tasks: int) -> float:
    return max(math.fsum(seconds[place] for place in order[index::tasks]) for index in range(min(tasks, len(seconds))))


def _minutes(seconds: float) -> str:
    """`45 s`, `12 min`, `3.4 h`."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"

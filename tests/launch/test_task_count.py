"""Task count: whatever the jobs, no schedule of the chosen number of tasks is longer than the time."""

from __future__ import annotations

import heapq
from random import Random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from runner.batch.shards import Shard
from runner.errors import ConfigInvalid
from runner.launch.task_count import balance_shares, count_tasks, limit_tasks

SECONDS = st.lists(st.floats(0.5, 3000), min_size=1, max_size=60)


def list_schedule(seconds: list[float], gpus: int) -> float:
    """When the last job ends if each GPU takes the next job as soon as it is free."""
    free = [0.0] * gpus
    for job in seconds:
        heapq.heapreplace(free, free[0] + job)
    return max(free)


@given(SECONDS)
def test_count_tasks_gives_fewest_tasks_within_time(seconds):
    counted = count_tasks(seconds, within_s=3600, startup_s=600)
    found, ordered = counted.tasks, [seconds[place] for place in counted.order]
    loads = [sum(Shard(index, found).take(ordered)) for index in range(found)]
    assert max(loads) <= 3000 + 1e-6
    assert found <= len(seconds)
    if found > 1:
        ordered = [seconds[place] for place in balance_shares(seconds, found - 1)]
        fewer = [sum(Shard(index, found - 1).take(ordered)) for index in range(found - 1)]
        assert max(fewer) > 3000 - 1e-6


@given(SECONDS, st.integers(1, 70))
def test_balance_shares_has_each_job_once_and_differs_by_longest_at_most(seconds, tasks):
    order = balance_shares(seconds, tasks)
    assert sorted(order) == list(range(len(seconds)))
    shares = [Shard(index, tasks).take([seconds[place] for place in order]) for index in range(tasks)]
    assert max(map(sum, shares)) - min(map(sum, shares)) <= max(seconds) + 1e-6
    assert all(share == sorted(share, reverse=True) for share in shares)


def test_balance_shares_of_unequal_jobs_beats_manifest_order():
    """Log-normal jobs, as in bench/cluster_scale.py; the bound is the work divided by the shares."""
    random = Random(1)
    seconds = [random.lognormvariate(4.6, 0.7) for _ in range(1000)]
    bound = sum(seconds) / 50
    as_written = max(sum(seconds[index::50]) for index in range(50))
    ordered = [seconds[place] for place in balance_shares(seconds, 50)]
    balanced = max(sum(ordered[index::50]) for index in range(50))
    assert as_written > 1.6 * bound
    assert balanced < 1.05 * bound


@given(SECONDS, st.integers(1, 8), st.randoms(use_true_random=False))
def test_count_tasks_with_share_any_ends_in_time_in_any_order(seconds, gpus, random):
    found = count_tasks(seconds, within_s=3600, startup_s=600, gpus_per_task=gpus, share="any").tasks
    for _ in range(5):
        random.shuffle(seconds)
        assert list_schedule(seconds, found * gpus) <= 3000 + 1e-6
    assert (found - 1) * gpus < len(seconds)


@pytest.mark.parametrize(
    ("seconds", "how", "tasks"),
    [
        ([60.0] * 100, {}, 2),  # 6,000 s of work, 3,000 s of room
        ([60.0] * 101, {}, 3),
        ([10.0], {}, 1),
        ([2000.0, 10.0] * 10, {}, 10),  # a long job a task
        ([3000.0] * 4, {"share": "any"}, 4),
        ([60.0] * 100, {"gpus_per_task": 2}, 2),
    ],
)
def test_count_tasks_of_simple_jobs_gives_expected_count(seconds, how, tasks):
    assert count_tasks(seconds, within_s=3600, startup_s=600, **how).tasks == tasks


def test_count_tasks_reason_has_hours_jobs_and_minutes():
    found = count_tasks([60.0] * 100, within_s=3600, startup_s=600)
    assert found.reason == (
        "forecast: 1.7 h of GPU time in 100 jobs; the longest task takes 60 min of 60 min, including 10 min to start"
    )


def test_count_tasks_with_too_long_job_names_job_and_needed_time():
    with pytest.raises(ConfigInvalid, match=r"^--within: by the forecast job anna takes 51 min") as caught:
        count_tasks([10, 3060], within_s=3600, startup_s=600, longest="job anna")
    assert "Give at least --within 61m" in caught.value.message
    assert count_tasks([10, 3060], within_s=61 * 60, startup_s=600).tasks == 2


@pytest.mark.parametrize(
    ("asked", "jobs", "gpus", "tasks", "reason"),
    [
        (4, 4, 1, 4, "--shards 4"),
        (5, 4, 1, 4, "--shards 5, lowered: there are 4 jobs"),
        (2, 1, 1, 1, "--shards 2, lowered: there is 1 job"),
        (3, 17, 8, 3, "--shards 3"),
        (4, 17, 8, 3, "--shards 4, lowered: there are 17 jobs at 8 GPUs a task"),
    ],
)
def test_limit_tasks_gives_no_more_tasks_than_jobs(asked, jobs, gpus, tasks, reason):
    found = limit_tasks(asked, jobs, gpus)
    assert (found.tasks, found.reason) == (tasks, reason)

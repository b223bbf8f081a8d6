"""Job source: a shard's list."""

from __future__ import annotations

from dataclasses import replace

from runner.batch.job_source import ShardJobs
from runner.spec.manifest import Job
from runner.spec.options import JobOptions


def test_shard_jobs_come_in_order_and_are_known_at_the_start():
    jobs = [Job(name, "r.png", "v.mp4", None, "", JobOptions(), None) for name in "abc"]
    source = ShardJobs(jobs)
    assert source.jobs == tuple(jobs)
    assert [source.take().job for _ in jobs] == jobs
    for _ in jobs:
        source.settle()
    assert source.take() is None


def test_a_job_that_was_looked_at_comes_back_after_the_others():
    jobs = [Job(name, "r.png", "v.mp4", None, "", JobOptions(), None) for name in "abc"]
    source = ShardJobs(jobs)
    held = source.take()
    assert not held.looked
    assert source.put_back(replace(held, looked=True), delay_s=0.01)
    order = []
    while (todo := source.take()) is not None:
        order.append((todo.job.id, todo.looked))
        source.settle()
    assert order == [("b", False), ("c", False), ("a", True)]

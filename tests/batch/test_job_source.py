"""Job source: a shard's list, and a mailbox that a driver fills while the loop runs."""

from __future__ import annotations

import threading
import time
from dataclasses import replace

from runner.batch.job_source import ShardJobs, Todo
from runner.spec.manifest import Job
from runner.spec.options import JobOptions
from tests.batch.loop_bench import bench  # noqa: F401


class Mailbox(ShardJobs):
    """Knows no job at the start. `None` put into it says that no more will come."""

    def __init__(self) -> None:
        super().__init__(())
        self._sent_all = False

    def send(self, job: Job) -> None:
        with self._changed:
            self._ready.append(Todo(job))
            self._changed.notify_all()

    def end(self) -> None:
        with self._changed:
            self._sent_all = True
            self._changed.notify_all()

    def take(self) -> Todo | None:
        with self._changed:
            self._changed.wait_for(lambda: self._sent_all or self._ready or self._later or self._closed)
        return super().take()


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


def test_mailbox_feeds_a_running_loop(bench):  # noqa: F811
    """Jobs that nothing knew at the start are rendered, skipped where they are done, and stand in the summary."""
    mailbox, jobs = Mailbox(), [bench.job(name) for name in ("a", "b", "c")]
    assert bench.run(jobs[0], run_id="first") == 0

    def drive() -> None:
        for job in jobs:
            mailbox.send(job)
            time.sleep(0.05)
        mailbox.end()

    driver = threading.Thread(target=drive)
    driver.start()
    assert bench.run(run_id="second", source=mailbox) == 0
    driver.join()
    assert [(line["id"], line["status"]) for line in bench.summary["jobs"]] == [
        ("a", "skipped"),
        ("b", "succeeded"),
        ("c", "succeeded"),
    ]
    assert bench.summary["counts"] == {"total": 3, "succeeded": 2, "skipped": 1, "failed": 0, "not_run": 0}

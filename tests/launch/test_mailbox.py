"""Mailbox: a source that a driver fills while the loop runs, by itself and under the real batch loop."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from dataclasses import replace

import pytest

from runner.batch.job_source import JobSource, Todo
from runner.batch.ledger import Ledger
from runner.launch.mailbox import Mailbox
from runner.spec.manifest import Job
from runner.spec.options import JobOptions
from tests.batch.loop_bench import bench  # noqa: F401
from tests.hand_clock import HandClock


def make_job(name: str) -> Job:
    return Job(name, "r.png", "v.mp4", None, "", JobOptions(), None)


class Taking:
    """A thread that takes once. `wait_blocked` returns when it waits in `take`."""

    def __init__(self, mailbox: Mailbox) -> None:
        self.taken: list[Todo | None] = []
        self._mailbox = mailbox
        self._thread = threading.Thread(target=lambda: self.taken.append(mailbox.take()), daemon=True)
        self._thread.start()

    def wait_blocked(self) -> None:
        deadline = time.monotonic() + 60
        while not self._mailbox._changed._waiters and not self.taken:  # type: ignore[attr-defined]
            assert time.monotonic() < deadline
            time.sleep(0.001)
        assert not self.taken, "take did not wait"

    def result(self) -> str | None:
        self._thread.join(60)
        assert not self._thread.is_alive(), "take still waits"
        (todo,) = self.taken
        return todo.job.id if todo is not None else None


def test_new_mailbox_is_job_source_without_jobs():
    source: JobSource = Mailbox()
    assert list(source.jobs) == []


def test_take_of_empty_mailbox_waits_for_sent_job():
    mailbox = Mailbox()
    taking = Taking(mailbox)
    taking.wait_blocked()
    assert mailbox.send(make_job("a"))
    assert taking.result() == "a"


def test_take_with_all_jobs_settled_waits_until_end():
    """More jobs may be sent until the end; a shard's fixed list would end there."""
    mailbox = Mailbox()
    mailbox.send(make_job("a"))
    mailbox.take()
    mailbox.settle()
    taking = Taking(mailbox)
    taking.wait_blocked()
    mailbox.end()
    assert taking.result() is None


def test_job_sent_before_end_is_still_taken():
    mailbox = Mailbox()
    for name in "ab":
        mailbox.send(make_job(name))
    mailbox.end()
    for name in "ab":
        todo = mailbox.take()
        assert todo is not None and todo.job.id == name
        mailbox.settle()
    assert mailbox.take() is None


@pytest.mark.parametrize("last", ["settle", "put back"])
def test_take_after_end_waits_for_taken_job(last):
    """A taken job may be put back; take returns None only when no more job can come."""
    mailbox = Mailbox()
    mailbox.send(make_job("a"))
    todo = mailbox.take()
    assert todo is not None
    mailbox.end()
    taking = Taking(mailbox)
    taking.wait_blocked()
    if last == "settle":
        mailbox.settle()
        assert taking.result() is None
    else:
        assert mailbox.put_back(replace(todo, looked=True))
        assert taking.result() == "a"
        mailbox.settle()
        assert mailbox.take() is None


def test_delayed_job_does_not_block_later_job():
    clock = HandClock()
    mailbox = Mailbox(clock)
    mailbox.send(make_job("put off"))
    todo = mailbox.take()
    assert todo is not None
    mailbox.put_back(replace(todo, looked=True), 1e6)
    taking = Taking(mailbox)
    taking.wait_blocked()
    mailbox.send(make_job("sent"))
    assert taking.result() == "sent"
    mailbox.settle()
    clock.tick(1e6)
    back = mailbox.take()
    assert back is not None and (back.job.id, back.looked) == ("put off", True)


def test_close_wakes_take_and_returns_waiting_jobs():
    mailbox = Mailbox()
    mailbox.send(make_job("a"))
    todo = mailbox.take()
    assert todo is not None
    mailbox.put_back(todo, 1e6)
    taking = Taking(mailbox)
    taking.wait_blocked()
    assert [left.job.id for left in mailbox.close()] == ["a"]
    assert taking.result() is None
    assert not mailbox.send(make_job("b"))
    assert mailbox.close() == []


def test_send_after_end_is_refused():
    mailbox = Mailbox()
    mailbox.end()
    with pytest.raises(ValueError, match="no items can be added"):
        mailbox.send(make_job("a"))


def drive(mailbox: Mailbox, work: Callable[[], None]) -> threading.Thread:
    """Work of a driver beside the loop; `end` follows it."""

    def run() -> None:
        try:
            work()
        finally:
            mailbox.end()

    thread = threading.Thread(target=run)
    thread.start()
    return thread


def test_mailbox_feeds_jobs_to_running_loop(bench):  # noqa: F811
    """Jobs that nothing knew at the start are rendered, skipped where they are done, and stand in the summary."""
    mailbox, jobs = Mailbox(), [bench.job(name) for name in ("a", "b", "c")]
    assert bench.run(jobs[0], run_id="first") == 0

    def send_all() -> None:
        for job in jobs:
            mailbox.send(job)
            time.sleep(0.05)

    driver = drive(mailbox, send_all)
    assert bench.run(run_id="second", source=mailbox) == 0
    driver.join()
    assert [(line["id"], line["status"]) for line in bench.summary["jobs"]] == [
        ("a", "skipped"),
        ("b", "succeeded"),
        ("c", "succeeded"),
    ]
    assert bench.summary["counts"] == {"total": 3, "succeeded": 2, "skipped": 1, "failed": 0, "not_run": 0}


def test_job_leased_by_other_runner_does_not_block_next_job(bench):  # noqa: F811
    """The loop puts it off, renders the job that is sent after it, and then this one, when its lease is given back."""
    mailbox, other = Mailbox(), Ledger(bench.out)
    held, free = bench.job("held"), bench.job("free")
    decision = other.decide("held", "0" * 64, {})
    other.begin("held", decision, "0" * 64, "another run")

    def send_both() -> None:
        mailbox.send(held)
        mailbox.send(free)
        deadline = time.monotonic() + 60
        while bench.out.read_bytes("jobs/free/result.json") is None and time.monotonic() < deadline:
            time.sleep(0.01)
        other.abandon("held")

    driver = drive(mailbox, send_both)
    assert bench.run(run_id="r", source=mailbox) == 0
    driver.join()
    assert [(line["id"], line["status"]) for line in bench.summary["jobs"]] == [
        ("free", "succeeded"),
        ("held", "succeeded"),
    ]


def test_job_with_retryable_failure_is_retried_after_end(bench):  # noqa: F811
    mailbox = Mailbox()
    mailbox.send(bench.job("a", "flaky"))
    mailbox.end()
    assert bench.run(run_id="r", source=mailbox) == 0
    assert [(line["id"], line["status"]) for line in bench.summary["jobs"]] == [("a", "succeeded")]

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import pytest
from structlog.testing import capture_logs

from runner.errors import StorageDenied, StorageUnavailable
from runner.verbs.status_watch import RunUnknown, wait_for_end


@dataclass(frozen=True)
class Seen:
    """A status with so many jobs left of ten."""

    left: int
    run_id: str = "r"

    @property
    def counts(self) -> dict[str, int]:
        return {"total": 10, "succeeded": 10 - self.left, "failed": 0, "pending": self.left}


class Clock:
    """Time passes while it sleeps alone."""

    def __init__(self) -> None:
        self.now = 50.0
        self.pauses: list[float] = []

    def sleep(self, seconds: float) -> None:
        self.pauses.append(seconds)
        self.now += seconds


def wait(looks: list[Any], **how: Any) -> tuple[Seen, Clock, list[Seen], list[dict[str, Any]]]:
    """Wait with a reader that answers `looks` in turn: what returned, the clock, what was shown, the log."""
    clock, shown = Clock(), list[Seen]()
    answers: Iterator[Any] = iter(looks)

    def read() -> Seen:
        answer = next(answers)
        if isinstance(answer, Exception):
            raise answer
        return answer

    with capture_logs() as log:
        how = {"every_s": 10.0} | how
        found = wait_for_end(read, show=shown.append, sleep=clock.sleep, timer=lambda: clock.now, **how)
    return found, clock, shown, log


def test_wait_for_end_returns_when_no_job_is_left_and_logs_changes():
    found, clock, shown, log = wait([Seen(3), Seen(3), Seen(1), Seen(0)], every_s=7)
    assert (found, clock.pauses) == (Seen(0), [7, 7, 7])
    assert shown == [Seen(3), Seen(3), Seen(1), Seen(0)]
    assert [(line["event"], line["succeeded"]) for line in log] == [("waiting", 7), ("changed", 9), ("changed", 10)]
    assert "failed" not in log[0], "what is none is left out"


def test_wait_for_end_of_finished_run_returns_at_once():
    _, clock, shown, _ = wait([Seen(0)])
    assert (clock.pauses, shown) == ([], [Seen(0)])


def test_wait_for_end_after_timeout_returns_last_status_and_warns():
    found, clock, shown, log = wait([Seen(3)] * 9, timeout_s=25)
    assert (found, clock.pauses, len(shown)) == (Seen(3), [10, 10, 5], 4)
    assert log[-1] == {"event": "gave_up_waiting", "log_level": "warning", "run": "r", "after_s": 25, "left": 3}


def test_wait_for_end_with_timeout_0_reads_once():
    _, clock, shown, _ = wait([Seen(3)], timeout_s=0)
    assert (clock.pauses, shown) == ([], [Seen(3)])


def test_wait_for_end_continues_while_store_is_unavailable():
    away = StorageUnavailable("does not answer", where="s3://bucket")
    found, clock, shown, log = wait([Seen(3), away, away, Seen(0)])
    assert (found, len(clock.pauses), log[1]["event"]) == (Seen(0), 3, "not_read")
    assert shown == [Seen(3), Seen(3), Seen(3), Seen(0)]


@pytest.mark.parametrize("looks", [[StorageUnavailable("away")], [Seen(3), StorageDenied("no")]])
def test_wait_for_end_raises_error_of_first_read_or_permanent_error(looks):
    with pytest.raises(type(looks[-1])):
        wait(looks)


ABSENT = RunUnknown("there is no list of jobs of run r")


def test_wait_for_end_waits_for_run_that_is_missing():
    away = StorageUnavailable("does not answer", where="s3://bucket")
    found, clock, shown, log = wait([ABSENT, ABSENT, away, Seen(3), Seen(0)], every_s=7)
    assert (found, clock.pauses, shown) == (Seen(0), [7, 7, 7, 7], [Seen(3), Seen(0)])
    assert [line["event"] for line in log] == ["waiting_for_run", "not_read", "waiting", "changed"]


def test_wait_for_end_timeout_covers_both_waits():
    found, clock, _, log = wait([ABSENT, ABSENT, Seen(3), Seen(3)], timeout_s=25)
    assert (found, clock.pauses, log[-1]["event"]) == (Seen(3), [10, 10, 5], "gave_up_waiting")


@pytest.mark.parametrize(("timeout_s", "pauses"), [(25, [10, 10, 5]), (0, [])])
def test_wait_for_end_of_run_that_never_starts_raises_after_timeout(timeout_s, pauses):
    clock = Clock()

    def read() -> Seen:
        raise ABSENT

    with pytest.raises(RunUnknown):
        wait_for_end(read, every_s=10, timeout_s=timeout_s, sleep=clock.sleep, timer=lambda: clock.now)
    assert clock.pauses == pauses


def test_wait_for_end_raises_permanent_error_while_run_is_missing():
    with pytest.raises(StorageDenied):
        wait([ABSENT, StorageDenied("no")])

"""Status watch: looks at a run again and again until it is there and no job is left, or the time is over.

In:   a function that reads the status. Out: the last status; each look's status, for what shows it.
Never: how a status is read, printing.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from typing import Protocol, TypeVar

import structlog

from runner.errors import ConfigInvalid, RunnerError

__all__ = ["Look", "RunUnknown", "wait_for_end"]


class RunUnknown(ConfigInvalid):
    """The run that was named has not kept its jobs: it has not begun, or there is no such run."""


class Look(Protocol):
    """What is asked of a status."""

    @property
    def run_id(self) -> str | None: ...

    @property
    def counts(self) -> Mapping[str, int]: ...

    @property
    def left(self) -> int: ...


L = TypeVar("L", bound=Look)


def wait_for_end(
    read: Callable[[], L],
    *,
    every_s: float,
    timeout_s: float | None = None,
    show: Callable[[L], None] | None = None,
    sleep: Callable[[float], None] = time.sleep,
    timer: Callable[[], float] = time.monotonic,
) -> L:
    """Look every `every_s` seconds until no job is pending, running or lost; the status at the last look.

    After `timeout_s` seconds (None: never) the last status returns as it is, with a warning. The log gets a line at the
    beginning and whenever the counts have changed. A run that is not there yet is waited for, too. A look that fails
    with an error that may pass is repeated at the next turn, but for the first one. Raises what `read` raises;
    RunUnknown only after `timeout_s`.
    """
    log = structlog.get_logger()
    end = None if timeout_s is None else timer() + timeout_s
    found = _first_look(read, every_s, end, sleep, timer)
    log.info("waiting", run=found.run_id, every_s=every_s, timeout_s=timeout_s, **_counts(found))
    counts = _counts(found)
    while True:
        if show is not None:
            show(found)
        if not found.left:
            return found
        pause = every_s if end is None else min(every_s, end - timer())
        if pause <= 0:
            log.warning("gave_up_waiting", run=found.run_id, after_s=timeout_s, left=found.left)
            return found
        sleep(pause)
        try:
            found = read()
        except RunnerError as error:
            if not error.retryable:
                raise
            log.warning("not_read", reason=error.message, again_in_s=every_s)
            continue
        if _counts(found) != counts:
            counts = _counts(found)
            log.info("changed", run=found.run_id, **counts)


def _first_look(
    read: Callable[[], L],
    every_s: float,
    end: float | None,
    sleep: Callable[[float], None],
    timer: Callable[[], float],
) -> L:
    """What `read` returns once the run is there. `end`: by `timer`, when a run that is not there is an error."""
    log = structlog.get_logger()
    seen = False  # whether the store has answered
    while True:
        try:
            return read()
        except RunUnknown as error:
            if not seen:
                log.info("waiting_for_run", reason=error.message, every_s=every_s)
            seen, failure = True, error
        except RunnerError as error:
            if not (seen and error.retryable):
                raise
            log.warning("not_read", reason=error.message, again_in_s=every_s)
        pause = every_s if end is None else min(every_s, end - timer())
        if pause <= 0:
            raise failure
        sleep(pause)


def _counts(found: Look) -> dict[str, int]:
    return {name: count for name, count in found.counts.items() if count or name == "total"}

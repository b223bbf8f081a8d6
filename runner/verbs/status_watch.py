"""Status watch: reads the status of a run repeatedly until no job is left or the timeout has passed.

In:   a function that reads the status. Out: the last status; the status of each look, for a callback.
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
    """The named run has no list of jobs: it has not begun, or there is no such run."""


class Look(Protocol):
    """The fields of a status that are used here."""

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
    """Read the status every `every_s` seconds until no job is pending, running or lost; return the last status.

    After `timeout_s` seconds (None: never) the last status is returned, and a warning is logged. A line is logged at
    the start and whenever the counts have changed. A run that does not exist yet is waited for, too. A look that fails
    with a retryable error is repeated at the next turn; at the first look the error is raised. Raises what `read`
    raises; RunUnknown only after `timeout_s`.
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
    """Return the first status of the run. `end`: time of `timer` from which a missing run is an error."""
    log = structlog.get_logger()
    seen = False  # whether the store could be read
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

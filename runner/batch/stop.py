"""Stop: how a signal ends a run without losing what is done.

The first SIGINT or SIGTERM lets no new job start and gives the running one `drain_s` seconds; the second abandons it at
once. What is already generated is always encoded and published. An abandoned job leaves no record and runs again.
"""

from __future__ import annotations

import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from types import FrameType

__all__ = ["Abandoned", "PrefetchThread", "Stop", "leave"]


class PrefetchThread(threading.Thread):
    """Fetches and prepares. A run that was told to stop does not wait for it; `leave` looks for it."""


class Abandoned(Exception):
    """The running job is given up because the run was told to stop."""


class Stop:
    """Whether, and how urgently, the run has been told to stop. `clock` in seconds, monotonic."""

    def __init__(self, drain_s: float = 20.0, clock: Callable[[], float] = time.monotonic) -> None:
        self.drain_s = drain_s
        self.signal: int | None = None
        self.requested = threading.Event()
        self._clock = clock
        self._deadline = float("inf")

    def request(self, signum: int) -> None:
        """Told once: drain. Told again: now."""
        again = self.signal is not None
        self.signal = self.signal or signum
        self._deadline = self._clock() if again else self._clock() + self.drain_s
        self.requested.set()

    @property
    def draining(self) -> bool:
        return self.requested.is_set()

    @property
    def abandon(self) -> bool:
        """Whether the running job's time is up."""
        return self.draining and self._clock() >= self._deadline

    @property
    def exit_code(self) -> int:
        """130 for SIGINT, 143 for SIGTERM."""
        return 128 + (self.signal or 0)

    @property
    def name(self) -> str | None:
        return signal.Signals(self.signal).name if self.signal else None

    @contextmanager
    def listening(self, on_signal: Callable[[], None] = lambda: None) -> Iterator[Stop]:
        """Handle SIGINT and SIGTERM inside; only from the main thread. `on_signal` runs in the handler."""

        def handle(signum: int, frame: FrameType | None) -> None:
            self.request(signum)
            on_signal()

        before = {s: signal.signal(s, handle) for s in (signal.SIGINT, signal.SIGTERM)}
        try:
            yield self
        finally:
            for signum, handler in before.items():
                signal.signal(signum, handler)


def leave(code: int) -> None:
    """End the process with `code` at once if a preparation is still at work in it; else do nothing.

    The interpreter's own end stops such a thread where it comes back from native code (onnxruntime, torch), which C++
    takes for a fault: the process would die of SIGABRT, exit code 134, and look crashed to every scheduler.
    """
    if any(isinstance(thread, PrefetchThread) for thread in threading.enumerate()):
        for stream in (sys.stdout, sys.stderr):
            with suppress(OSError, ValueError):
                stream.flush()
        os._exit(code)

"""Stop: how a signal, or a notice that the machine is taken back, ends a run without losing what is done.

The first SIGINT or SIGTERM lets no new job start and gives the running one `drain_s` seconds; the second abandons it at
once. A notice does what the first signal does, with its own seconds. What is already generated is always encoded and
published. An abandoned job leaves no record and runs again.

A SIGTERM may arrive more than once: Slurm sends it to every process of a step, and Apptainer and tini pass theirs on to
this one. What follows the first within SAME_SIGNAL_S is the same signal.
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

SAME_SIGNAL_S = 1.0  # assumed: what is passed on arrives within milliseconds, who sends a second one has waited for it


class PrefetchThread(threading.Thread):
    """Fetches and prepares. A run that was told to stop does not wait for it; `leave` looks for it."""


class Abandoned(Exception):
    """The running job is given up because the run was told to stop."""


class Stop:
    """Whether, and how urgently, the run has been told to stop. `clock` in seconds, monotonic. Safe from any thread.

    `signal` decides the exit code: the first signal, or SIGTERM where a notice came before it. `reason` is what the
    first notice said, None where a signal came before it.
    """

    def __init__(self, drain_s: float = 20.0, clock: Callable[[], float] = time.monotonic) -> None:
        self.drain_s = drain_s
        self.signal: int | None = None
        self.reason: str | None = None
        self.requested = threading.Event()
        self._clock = clock
        self._deadline = float("inf")
        self._signalled = False
        self._terminated_at = float("-inf")  # when a SIGTERM that counted was received
        self._lock = threading.RLock()  # reentrant: the handler of a signal may interrupt a method of this thread

    def request(self, signum: int) -> None:
        """Note a signal. The first one: drain. The second: abandon the running job now.

        After a notice the first signal leaves the running job at most `drain_s`, and no more than the notice left.
        """
        with self._lock:
            seconds = 0.0 if self._signalled else self.drain_s
            self._signalled = True
            self.signal = self.signal or signum
            self._shorten(seconds)
        self.requested.set()

    def drain(self, reason: str, seconds: float | None = None) -> None:
        """Drain, as if SIGTERM had come: a notice says why (`reason`) and the running job has `seconds` (`drain_s`).

        While the run drains already, a notice can only shorten the time that is left.
        """
        with self._lock:
            if self.signal is None:
                self.signal, self.reason = signal.SIGTERM, reason
            self._shorten(self.drain_s if seconds is None else max(0.0, seconds))
        self.requested.set()

    def _shorten(self, seconds: float) -> None:
        self._deadline = min(self._deadline, self._clock() + seconds)

    @property
    def draining(self) -> bool:
        return self.requested.is_set()

    @property
    def abandon(self) -> bool:
        """Whether the running job's time is up."""
        return self.draining and self._clock() >= self._deadline

    def seconds_left(self) -> float:
        """Seconds until the running job's time is up, 0 or more; infinity while the run does not drain."""
        return max(0.0, self._deadline - self._clock())

    @property
    def exit_code(self) -> int:
        """130 for SIGINT, 143 for SIGTERM and for a notice."""
        return 128 + (self.signal or 0)

    @property
    def name(self) -> str | None:
        """Why the run stops: the reason that a notice gave, else the first signal's name; None while it does not."""
        return self.reason or (signal.Signals(self.signal).name if self.signal else None)

    @contextmanager
    def listening(self, on_signal: Callable[[], None] = lambda: None, wakeup_descriptor: int = -1) -> Iterator[Stop]:
        """Handle SIGINT and SIGTERM inside; only from the main thread. `on_signal` runs in the handler.

        `wakeup_descriptor`: a pipe that does not block, which the main thread polls. A signal that comes just before
        the poll, or to another thread, does not interrupt it: the handler would wait for the poll's end. A byte in this
        pipe ends it (`signal.set_wakeup_fd`).
        """

        waiting: list[int] = []

        def handle(signum: int, frame: FrameType | None) -> None:
            if signum == signal.SIGTERM:
                if self._clock() - self._terminated_at < SAME_SIGNAL_S:
                    return
                self._terminated_at = self._clock()
            waiting.append(signum)
            if len(waiting) > 1:  # the handler of another signal is interrupted, perhaps within a lock: it goes on
                return
            while waiting:
                self.request(waiting[0])
                on_signal()
                waiting.pop(0)

        before = {s: signal.signal(s, handle) for s in (signal.SIGINT, signal.SIGTERM)}
        descriptor_before = signal.set_wakeup_fd(wakeup_descriptor, warn_on_full_buffer=False)
        try:
            yield self
        finally:
            signal.set_wakeup_fd(descriptor_before)
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

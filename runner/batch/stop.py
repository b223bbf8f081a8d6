"""Stop: end a run after a signal, or a notice that the machine is taken back, without losing finished work.

After the first SIGINT or SIGTERM no new job starts, and the running job has `drain_s` seconds. The second signal
abandons it at once. A notice acts like the first signal, with its own seconds. Jobs that are already generated are
always encoded and published. An abandoned job leaves no record and runs again.

A SIGTERM may arrive more than once: Slurm sends it to every process of a step, and Apptainer and tini pass theirs on to
this process. Further SIGTERMs within SAME_SIGNAL_S count as the same signal.
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

SAME_SIGNAL_S = 1.0  # assumed: a copy arrives within milliseconds, a deliberate second signal later


class PrefetchThread(threading.Thread):
    """The thread that fetches and prepares. A run that stops does not wait for it; see `leave`."""


class Abandoned(Exception):
    """The running job is abandoned because the run stops."""


class Stop:
    """Whether the run must stop, and how soon. `clock`: seconds, monotonic. Safe from any thread.

    `signal` gives the exit code: the first signal, or SIGTERM if a notice came first. `reason`: the reason of the
    first notice, None if a signal came first.
    """

    def __init__(self, drain_s: float = 20.0, clock: Callable[[], float] = time.monotonic) -> None:
        self.drain_s = drain_s
        self.signal: int | None = None
        self.reason: str | None = None
        self.requested = threading.Event()
        self._clock = clock
        self._deadline = float("inf")
        self._signalled = False
        self._terminated_at = float("-inf")  # time of the last SIGTERM that counted
        self._lock = threading.RLock()  # reentrant: the handler of a signal may interrupt a method of this thread

    def request(self, signum: int) -> None:
        """Note a signal. The first drains the run; the second abandons the running job now.

        After a notice, the first signal leaves the running job at most `drain_s`, and not more than the notice did.
        """
        with self._lock:
            seconds = 0.0 if self._signalled else self.drain_s
            self._signalled = True
            self.signal = self.signal or signum
            self._shorten(seconds)
        self.requested.set()

    def drain(self, reason: str, seconds: float | None = None) -> None:
        """Drain after a notice, as after SIGTERM. The running job has `seconds` (None: `drain_s`).

        If the run drains already, a notice can only shorten the time left.
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
        """Why the run stops: the reason of a notice, else the first signal's name; None while it does not stop."""
        return self.reason or (signal.Signals(self.signal).name if self.signal else None)

    @contextmanager
    def listening(self, on_signal: Callable[[], None] = lambda: None, wakeup_descriptor: int = -1) -> Iterator[Stop]:
        """Handle SIGINT and SIGTERM while the block runs; only in the main thread. The handler calls `on_signal`.

        `wakeup_descriptor`: a non-blocking pipe that the main thread polls. A signal just before the poll, or to
        another thread, does not interrupt the poll, so the handler would only run after it. A byte in this pipe
        ends the poll (`signal.set_wakeup_fd`).
        """

        waiting: list[int] = []

        def handle(signum: int, frame: FrameType | None) -> None:
            if signum == signal.SIGTERM:
                if self._clock() - self._terminated_at < SAME_SIGNAL_S:
                    return
                self._terminated_at = self._clock()
            waiting.append(signum)
            if len(waiting) > 1:  # this interrupts another handler, which may hold a lock: let it continue
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
    """End the process with `code` at once if a preparation still runs in it; else do nothing.

    When the interpreter exits, it stops such a thread at its return from native code (onnxruntime, torch). C++ treats
    that as an error and aborts: the process would end with SIGABRT, exit code 134, like a crash.
    """
    if any(isinstance(thread, PrefetchThread) for thread in threading.enumerate()):
        for stream in (sys.stdout, sys.stderr):
            with suppress(OSError, ValueError):
                stream.flush()
        os._exit(code)

"""Timing: seconds and device memory by stage; the time of day as records write it, and a duration as people read it.

In:   named stages around work. Out: plain numbers (seconds, bytes). Never: jobs, files of a job, what a stage does.
Nothing here imports torch: a device that computes asynchronously is handed in as a `DeviceProbe`.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import Protocol

__all__ = ["CallTimer", "DeviceProbe", "StageTimer", "hours_and_minutes", "now", "unix_time"]


class DeviceProbe(Protocol):
    """A device whose work and memory can be waited for and read."""

    def synchronize(self) -> None:
        """Wait until all work queued on the device is done."""

    def reset_peak(self) -> None:
        """Start a new peak of allocated and reserved bytes."""

    def peak(self) -> dict[str, int]:
        """{"allocated": bytes, "reserved": bytes} at most since the last reset."""


@dataclass
class StageTimer:
    """Seconds by stage of one job; a test passes a clock that it ticks by hand.

    A stage entered twice adds up. Stages of the thread that owns the device (`probe`) are synchronised at both ends, so
    that a stage's seconds are its own, and leave the device's peak memory behind.
    """

    clock: Callable[[], float] = time.perf_counter
    probe: DeviceProbe | None = None
    seconds: dict[str, float] = field(default_factory=dict)
    steps: list[float] = field(default_factory=list)  # seconds of each model evaluation, in order
    peaks: dict[str, dict[str, int]] = field(default_factory=dict)  # stage -> bytes
    counters: dict[str, int] = field(default_factory=dict)  # e.g. cache hits
    forecast: dict[str, int] = field(default_factory=dict)  # stage -> bytes that the device was expected to hold
    gauges: dict[str, int] = field(default_factory=dict)  # e.g. bytes that a cache holds
    _lock: threading.Lock = field(default_factory=threading.Lock, repr=False)

    @contextmanager
    def stage(self, name: str, *, on_device: bool = False) -> Iterator[None]:
        """Time what runs inside as `name`. `on_device`: wait for the device before and after, and note its peak."""
        probe = self.probe if on_device else None
        if probe:
            probe.synchronize()
            probe.reset_peak()
        begin = self.clock()
        try:
            yield
        finally:
            if probe:
                probe.synchronize()
            elapsed = self.clock() - begin
            peak = probe.peak() if probe else {}
            with self._lock:
                self.seconds[name] = self.seconds.get(name, 0.0) + elapsed
                if peak:
                    before = self.peaks.setdefault(name, dict.fromkeys(peak, 0))
                    self.peaks[name] = {k: max(before.get(k, 0), v) for k, v in peak.items()}

    def step(self, seconds: float) -> None:
        """Note one model evaluation of a denoising step."""
        with self._lock:
            self.steps.append(seconds)

    def count(self, name: str, by: int = 1) -> None:
        """Add to a counter."""
        with self._lock:
            self.counters[name] = self.counters.get(name, 0) + by

    def gauge(self, name: str, value: int) -> None:
        """Note how much there is of something now; the last word counts."""
        with self._lock:
            self.gauges[name] = value


class CallTimer:
    """Seconds of each model evaluation of a window, for `StageTimer.step`.

    An evaluation lasts from its start to the next one's start or the end of its step, whichever is first, so that what
    the sampler calculates from it is part of it. The device is waited for at both ends.
    """

    def __init__(self, timer: StageTimer) -> None:
        self._timer = timer
        self._begin: float | None = None  # of the evaluation that has not been noted yet

    def start(self) -> None:
        """An evaluation begins."""
        self._begin = self._timer.clock() if self._begin is None else self._note(self._begin)

    def end_step(self) -> None:
        """The step is over: no further evaluation belongs to it."""
        if self._begin is not None:
            self._note(self._begin)
        self._begin = None

    def _note(self, begin: float) -> float:
        if self._timer.probe:
            self._timer.probe.synchronize()
        end = self._timer.clock()
        self._timer.step(end - begin)
        return end


def now() -> str:
    """UTC, ISO 8601, milliseconds."""
    return datetime.now(UTC).isoformat(timespec="milliseconds")


def unix_time(text: str) -> float | None:
    """Seconds since 1970 of a time in ISO 8601, of UTC where it names no zone; None for what is no time."""
    try:
        found = datetime.fromisoformat(text)
    except ValueError:
        return None
    return (found if found.tzinfo else found.replace(tzinfo=UTC)).timestamp()


def hours_and_minutes(seconds: float) -> str:
    """`0:01:12`, `12:34:56`; rounded to a second."""
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes // 60}:{minutes % 60:02d}:{rest:02d}"

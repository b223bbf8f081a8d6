"""Timing: seconds and device memory by stage, the time of day for records, durations for people.

In:   named stages around work. Out: plain numbers (seconds, bytes). Never: jobs, files of a job, the work of a stage.
This module does not import torch. An asynchronous device is passed in as a `DeviceProbe`.
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
    """Access to a device: wait for its queued work, read its peak memory."""

    def synchronize(self) -> None:
        """Wait until all work queued on the device is done."""

    def reset_peak(self) -> None:
        """Start a new peak of allocated and reserved bytes."""

    def peak(self) -> dict[str, int]:
        """Return the highest {"allocated": bytes, "reserved": bytes} since the last reset."""


@dataclass
class StageTimer:
    """Measure one job: seconds by stage, steps, peak memory, counters.

    A stage that is entered twice adds up. With `on_device`, the device (`probe`) is synchronised at both ends of a
    stage, so that the seconds contain only that stage's work; the device's peak memory is noted too. Tests pass
    their own clock.
    """

    clock: Callable[[], float] = time.perf_counter
    probe: DeviceProbe | None = None
    seconds: dict[str, float] = field(default_factory=dict)
    steps: list[float] = field(default_factory=list)  # seconds of each model evaluation, in order
    peaks: dict[str, dict[str, int]] = field(default_factory=dict)  # stage -> bytes
    counters: dict[str, int] = field(default_factory=dict)  # e.g. cache hits
    forecast: dict[str, int] = field(default_factory=dict)  # stage -> forecast device bytes
    gauges: dict[str, int] = field(default_factory=dict)  # e.g. bytes that a cache holds
    _lock: threading.Lock = field(default_factory=threading.Lock, repr=False)

    @contextmanager
    def stage(self, name: str, *, on_device: bool = False) -> Iterator[None]:
        """Add the time of the block to stage `name`. `on_device`: synchronise the device, and note its peak memory."""
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
        """Note the seconds of one model evaluation of a denoising step."""
        with self._lock:
            self.steps.append(seconds)

    def count(self, name: str, by: int = 1) -> None:
        """Add to a counter."""
        with self._lock:
            self.counters[name] = self.counters.get(name, 0) + by

    def gauge(self, name: str, value: int) -> None:
        """Note a current amount. The last value counts."""
        with self._lock:
            self.gauges[name] = value


class CallTimer:
    """Measure the seconds of each model evaluation of a segment, for `StageTimer.step`.

    An evaluation lasts from its start to the next one's start or to the end of its step, whichever comes first. So the
    sampler's calculation after it is included. The device is synchronised at both ends.
    """

    def __init__(self, timer: StageTimer) -> None:
        self._timer = timer
        self._begin: float | None = None  # start of the evaluation that is not noted yet

    def start(self) -> None:
        """Start an evaluation. A running one ends here."""
        self._begin = self._timer.clock() if self._begin is None else self._note(self._begin)

    def end_step(self) -> None:
        """End the step, and the evaluation that runs."""
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
    """Return the current time: UTC, ISO 8601, milliseconds."""
    return datetime.now(UTC).isoformat(timespec="milliseconds")


def unix_time(text: str) -> float | None:
    """Return the seconds since 1970 of an ISO 8601 time (UTC if it names no zone), or None for any other text."""
    try:
        found = datetime.fromisoformat(text)
    except ValueError:
        return None
    return (found if found.tzinfo else found.replace(tzinfo=UTC)).timestamp()


def hours_and_minutes(seconds: float) -> str:
    """Return seconds as `0:01:12` or `12:34:56`, rounded to a second."""
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes // 60}:{minutes % 60:02d}:{rest:02d}"

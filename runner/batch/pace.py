"""Pace: forecasts when the segment that is being generated, and its job, will be finished.

In:   the plan of a job, each model evaluation, the end of each segment. Out: seconds. Never: the decision what to do
with them.

A segment has three phases: what comes before its evaluations (conditions), the evaluations, and what comes after them
(decoding). Each phase is forecast from what it took earlier in the same job. The job's first segment says nothing about
the first phase: the prompt is encoded and kernels are compiled there. Where the evaluations have not been measured yet,
the plan's own forecast counts.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable

from runner.generation.protocol import SegmentPlan

__all__ = ["SegmentPace"]

KEPT_SEGMENTS = 4  # assumed: the newest segments show what the device does now, e.g. after it has throttled


class SegmentPace:
    """The pace of one attempt of one job. One thread calls all methods. `clock` in seconds, monotonic.

    Made right before `generate` is called. `first_segment` is the first that this attempt generates.
    """

    def __init__(self, plan: SegmentPlan, first_segment: int = 0, clock: Callable[[], float] = time.monotonic) -> None:
        self._plan, self._clock = plan, clock
        self._first = self._segment = first_segment
        self._done = first_segment * plan.evaluations  # evaluations of the whole job
        self._began = self._last = clock()  # the current segment; its last event
        self._first_step: tuple[int, float] | None = None  # of this segment: evaluations, seconds since it began
        self._steps: deque[tuple[int, float]] = deque(maxlen=max(2, plan.evaluations))  # (evaluations, seconds)
        self._first_steps: deque[tuple[int, float]] = deque(maxlen=KEPT_SEGMENTS)  # of earlier segments
        self._after: deque[float] = deque(maxlen=KEPT_SEGMENTS)  # seconds from the last evaluation to the end
        self._whole: deque[float] = deque(maxlen=KEPT_SEGMENTS)  # seconds of a segment

    def step(self, done: int) -> None:
        """Note that `done` evaluations of the whole job, those of earlier attempts included, have been made."""
        now = self._clock()
        made = done - self._done
        if self._first_step is None:
            self._first_step = made, now - self._began
        else:
            self._steps.append((made, now - self._last))
        self._done, self._last = done, now

    def segment_done(self) -> None:
        """Note that the current segment has been decoded; the next one begins."""
        now = self._clock()
        if self._first_step is not None:
            self._after.append(now - self._last)
        if self._segment == self._first + 1:  # better than the first, which the set-up of the job is part of
            self._whole.clear()
        self._whole.append(now - self._began)
        if self._first_step is not None and self._segment > self._first:
            self._first_steps.append(self._first_step)
        self._segment += 1
        self._done = self._segment * self._plan.evaluations
        self._began = self._last = now
        self._first_step = None

    def left_in_segment(self) -> float | None:
        """Seconds until the current segment has been decoded, 0 or more; None where nothing is known.

        After the last segment: 0.
        """
        if self._segment >= self._plan.segments:
            return 0.0
        now = self._clock()
        pace = self._evaluation_s()
        if pace is None:
            measured = self._mean(self._whole)
            return self._forecast_s() if measured is None else max(0.0, measured - (now - self._began))
        before, after = self._before_s(pace), self._after_s(pace)
        left = (self._segment + 1) * self._plan.evaluations - self._done
        since = now - self._last
        if self._first_step is None:  # the first phase and the first evaluation run
            return max(0.0, before + pace - since) + (left - 1) * pace + after
        if left:
            return max(0.0, pace - since) + (left - 1) * pace + after
        return max(0.0, after - since)

    def left_in_job(self) -> float | None:
        """Seconds until the last segment has been decoded, 0 or more; None where nothing is known."""
        this = self.left_in_segment()
        further = self._plan.segments - self._segment - 1
        if this is None or further <= 0:
            return this
        pace = self._evaluation_s()
        if pace is not None:
            return this + further * (self._before_s(pace) + self._plan.evaluations * pace + self._after_s(pace))
        whole = self._mean(self._whole) if self._whole else self._forecast_s()
        return None if whole is None else this + further * whole

    # -- what a phase takes, in seconds ---------------------------------------------------------------------------

    def _evaluation_s(self) -> float | None:
        made = sum(evaluations for evaluations, _ in self._steps)
        return sum(seconds for _, seconds in self._steps) / made if made else None

    def _before_s(self, pace: float) -> float:
        measured = self._mean([max(0.0, seconds - made * pace) for made, seconds in self._first_steps])
        if measured is not None:
            return measured
        after = self._mean(self._after)
        return 0.0 if after is None else max(0.0, self._beyond_s(pace) - after)  # else `_after_s` has it all

    def _after_s(self, pace: float) -> float:
        measured = self._mean(self._after)
        return self._beyond_s(pace) if measured is None else measured

    def _beyond_s(self, pace: float) -> float:
        """What the plan forecasts for a segment beyond its evaluations at `pace`; 0 without a forecast."""
        forecast = self._forecast_s()
        return 0.0 if forecast is None else max(0.0, forecast - self._plan.evaluations * pace)

    def _forecast_s(self) -> float | None:
        return None if self._plan.seconds is None else self._plan.seconds / self._plan.segments

    @staticmethod
    def _mean(values: deque[float] | list[float]) -> float | None:
        return sum(values) / len(values) if values else None

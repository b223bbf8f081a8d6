"""Pace: forecast when the segment that is being generated, and its job, will be finished.

In:   the plan of a job, each model evaluation, the end of each segment. Out: seconds. Never: decisions.

A segment has three phases: before its evaluations (conditions), the evaluations, and after them (decoding). Each phase
is forecast from its time in earlier segments of the job. The first segment is not used for the first phase, as it
also encodes the prompt and compiles kernels. Until evaluations have been measured, the plan's forecast counts.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable

from runner.generation.protocol import SegmentPlan

__all__ = ["SegmentPace"]

KEPT_SEGMENTS = 4  # assumed: the newest segments show the present speed, e.g. after the device has throttled


class SegmentPace:
    """The pace of one attempt of one job. One thread calls all methods. `clock`: seconds, monotonic.

    Create it right before `generate` is called. `first_segment`: the first segment that this attempt generates.
    """

    def __init__(self, plan: SegmentPlan, first_segment: int = 0, clock: Callable[[], float] = time.monotonic) -> None:
        self._plan, self._clock = plan, clock
        self._first = self._segment = first_segment
        self._done = first_segment * plan.evaluations  # evaluations of the whole job
        self._began = self._last = clock()  # of the current segment: its start, its last event
        self._first_step: tuple[int, float] | None = None  # of this segment: evaluations, seconds since it began
        self._steps: deque[tuple[int, float]] = deque(maxlen=max(2, plan.evaluations))  # (evaluations, seconds)
        self._first_steps: deque[tuple[int, float]] = deque(maxlen=KEPT_SEGMENTS)  # of earlier segments
        self._after: deque[float] = deque(maxlen=KEPT_SEGMENTS)  # seconds from the last evaluation to the end
        self._whole: deque[float] = deque(maxlen=KEPT_SEGMENTS)  # seconds of a segment

    def step(self, done: int) -> None:
        """Note that `done` evaluations of the whole job have been made, including those of earlier attempts."""
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
        if self._segment == self._first + 1:  # better than the first segment, which includes the set-up of the job
            self._whole.clear()
        self._whole.append(now - self._began)
        if self._first_step is not None and self._segment > self._first:
            self._first_steps.append(self._first_step)
        self._segment += 1
        self._done = self._segment * self._plan.evaluations
        self._began = self._last = now
        self._first_step = None

    def left_in_segment(self) -> float | None:
        """Return the seconds until the current segment has been decoded, 0 or more; None if unknown.

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
        """Return the seconds until the last segment has been decoded, 0 or more; None if unknown."""
        this = self.left_in_segment()
        further = self._plan.segments - self._segment - 1
        if this is None or further <= 0:
            return this
        pace = self._evaluation_s()
        if pace is not None:
            return this + further * (self._before_s(pace) + self._plan.evaluations * pace + self._after_s(pace))
        whole = self._mean(self._whole) if self._whole else self._forecast_s()
        return None if whole is None else this + further * whole

    # -- seconds of a phase --------------------------------------------------------------------------------------

    def _evaluation_s(self) -> float | None:
        made = sum(evaluations for evaluations, _ in self._steps)
        return sum(seconds for _, seconds in self._steps) / made if made else None

    def _before_s(self, pace: float) -> float:
        measured = self._mean([max(0.0, seconds - made * pace) for made, seconds in self._first_steps])
        if measured is not None:
            return measured
        after = self._mean(self._after)
        return 0.0 if after is None else max(0.0, self._outside_s(pace) - after)  # else all of it is in `_after_s`

    def _after_s(self, pace: float) -> float:
        measured = self._mean(self._after)
        return self._outside_s(pace) if measured is None else measured

    def _outside_s(self, pace: float) -> float:
        """Return the forecast seconds of a segment outside its evaluations at `pace`; 0 without a forecast."""
        forecast = self._forecast_s()
        return 0.0 if forecast is None else max(0.0, forecast - self._plan.evaluations * pace)

    def _forecast_s(self) -> float | None:
        return None if self._plan.seconds is None else self._plan.seconds / self._plan.segments

    @staticmethod
    def _mean(values: deque[float] | list[float]) -> float | None:
        return sum(values) / len(values) if values else None

"""Ahead: a job's windows drawn in a thread of their own, each while the window before it is denoised.

In:   a source of windows, the spans that will be asked for. Out: the same windows, mostly there already.
Never: what is in them. The source is used by one thread at a time; one window waits at most.
"""

from __future__ import annotations

from collections.abc import Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TYPE_CHECKING

from runner.generation.base import SegmentPlan
from runner.generation.segments import span_of

if TYPE_CHECKING:
    from runner.generation.windows import ConditionSource, ConditionWindow

__all__ = ["DrawnAhead", "spans_of"]

Span = tuple[int, int]  # frames first..last-1


def spans_of(plan: SegmentPlan) -> list[Span]:
    """What each of a plan's segments will ask its conditions for, in order."""
    step = plan.segment_frames - plan.overlap_frames
    starts = (index * step for index in range(plan.segments))
    return [span_of(start, start + plan.segment_frames, plan.frames) for start in starts]


class DrawnAhead:
    """Begins with the first span at once: for a job that waits, while the job before it is generated."""

    def __init__(self, source: ConditionSource, spans: Iterable[Span]) -> None:
        self._source, self._spans = source, iter(spans)
        self._pool: ThreadPoolExecutor | None = ThreadPoolExecutor(1, "draw")
        self._waiting: tuple[Span, Future[ConditionWindow]] | None = None
        self._begin()

    def window(self, start: int, stop: int) -> ConditionWindow:
        """Frames start..stop-1. Raises what drawing them raised; drawn now if they were not expected."""
        if self._pool is None:
            return self._source.window(start, stop)
        if self._waiting is None or self._waiting[0] != (start, stop):
            return self._pool.submit(self._source.window, start, stop).result()
        drawn = self._waiting[1].result()
        self._begin()
        return drawn

    def close(self) -> None:
        """Wait for what is being drawn and forget it. Idempotent."""
        pool, self._pool, self._waiting = self._pool, None, None
        if pool is not None:
            pool.shutdown(cancel_futures=True)

    def _begin(self) -> None:
        span = next(self._spans, None)
        assert self._pool is not None
        self._waiting = None if span is None else (span, self._pool.submit(self._source.window, *span))

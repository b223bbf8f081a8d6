"""Memory trend: measure how much the resident memory of a process grows per job.

In:   bytes at each job's end. Out: bytes at begin and end, and the slope of a straight line through them (least
squares). The first jobs are left out, as caches and the allocator fill in them. Never: how memory is read.
Only a few sums are kept, for any number of jobs.
"""

from __future__ import annotations

from runner.records.record import MemoryTrendRecord

__all__ = ["WARM_UP_JOBS", "MemoryTrend"]

WARM_UP_JOBS = 100


class MemoryTrend:
    """The memory trend of one process. `slope` is None with fewer than two jobs after the warm-up."""

    def __init__(self, warm_up: int = WARM_UP_JOBS) -> None:
        self.jobs = 0
        self.begin: int | None = None  # at the end of the first job after the warm-up
        self.end: int | None = None
        self._warm_up = warm_up
        # Integers, so that no sum is rounded.
        self._sum_x = self._sum_y = self._sum_xy = self._sum_xx = 0

    def add(self, rss_bytes: int) -> None:
        """Note the resident memory at one job's end."""
        self.jobs += 1
        x = self.jobs - self._warm_up - 1
        if x < 0:
            return
        if self.begin is None:
            self.begin = rss_bytes
        self.end = rss_bytes
        self._sum_x += x
        self._sum_y += rss_bytes
        self._sum_xy += x * rss_bytes
        self._sum_xx += x * x

    @property
    def slope(self) -> float | None:
        """Bytes per job."""
        n = self.jobs - self._warm_up
        if n < 2:
            return None
        return (n * self._sum_xy - self._sum_x * self._sum_y) / (n * self._sum_xx - self._sum_x**2)

    def record(self) -> MemoryTrendRecord | None:
        """Return the record for the summary; None while there is no slope."""
        if self.slope is None or self.begin is None or self.end is None:
            return None
        return MemoryTrendRecord(
            jobs=self.jobs - self._warm_up,
            rss_begin_bytes=self.begin,
            rss_end_bytes=self.end,
            rss_slope_bytes_per_job=round(self.slope, 1),
        )

from __future__ import annotations

import numpy as np
import pytest

from runner.batch.memory_trend import MemoryTrend


def test_the_slope_is_that_of_the_line_of_least_squares():
    rng = np.random.default_rng(1)
    samples = [int(v) for v in 10**9 + 3000 * np.arange(400) + rng.normal(0, 10**6, 400)]
    trend = MemoryTrend(warm_up=100)
    for value in [0] * 100 + samples:
        trend.add(value)
    assert trend.slope == pytest.approx(np.polyfit(np.arange(400), samples, 1)[0])
    assert (trend.jobs, trend.begin, trend.end) == (500, samples[0], samples[-1])


def test_growth_is_seen_and_a_warm_up_is_not_growth():
    trend = MemoryTrend(warm_up=10)
    for job in range(50):
        trend.add(min(job, 10) * 10**8 + 50_000 * job)
    assert trend.slope == pytest.approx(50_000)


@pytest.mark.parametrize("jobs", [0, 5, 6])
def test_too_few_jobs_have_no_slope(jobs):
    trend = MemoryTrend(warm_up=5)
    for _ in range(jobs):
        trend.add(1)
    assert trend.slope is None

"""Performance: slower and larger need a factor and a bound; what cannot be compared is not judged, with the reason."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from runner.records.record import MemoryRecord, ResultRecord
from runner.regression.findings import PerformanceFinding
from runner.regression.nights import Night, collect_nights
from runner.regression.performance import (
    JOB_BOUND_S,
    MEMORY_BOUND,
    SECONDS_MAX,
    STAGE_BOUND_S,
    WHOLE_JOB,
    judge_performance,
)
from runner.spec.regression_limits import RegressionLimits
from tests.regression.night_stores import make_record

LIMITS = RegressionLimits()
GB = 1 << 30


def render(run: int, host: int | None = None, stages: dict[str, int] | None = None, **more: Any) -> ResultRecord:
    """The job of one night; keyword arguments that are stages are its seconds."""
    seconds = {name: more.pop(name) for name in list(more) if isinstance(more[name], float)}
    memory = MemoryRecord(
        host_rss_peak_bytes=host, stages={name: {"allocated": nbytes} for name, nbytes in (stages or {}).items()}
    )
    return make_record(
        run_id=f"run{run}", finished_at=f"2026-01-{run:02d}T00:00:00+00:00", timings_s=seconds, memory=memory, **more
    )


def history(*records: ResultRecord) -> list[Night]:
    """Nights of these records, newest first."""
    return [collect_nights([(record, None)], record.run_id)[0] for record in reversed(records)]


def judge(new: ResultRecord, *before: ResultRecord, limits: RegressionLimits = LIMITS) -> dict[str, PerformanceFinding]:
    return {finding.name: finding for finding in judge_performance(new, history(*before), limits)}


@pytest.mark.parametrize(
    ("before", "now", "verdict"),
    [
        (10.0, 12.6, "slower"),
        (10.0, 11.9, "same"),  # the bound breaks, the factor does not
        (0.4, 0.89, "same"),  # the factor breaks, the bound does not
        (0.4, 0.91, "slower"),
        (10.0, 7.9, "better"),
        (10.0, 8.1, "same"),
        (0.6, 0.15, "same"),
        (0.0, 0.6, "slower"),
    ],
)
def test_stage_is_slower_only_above_factor_and_seconds(before, now, verdict):
    found = judge(render(9, denoise=now, publish=50.0), *(render(n, denoise=before, publish=50.0) for n in range(1, 6)))
    finding = found["seconds: denoise"]
    assert (finding.verdict, finding.new, finding.median, finding.nights, finding.unit) == (
        verdict,
        now,
        before,
        5,
        "s",
    )
    assert finding.ratio == pytest.approx(now / before if before else 1.0)
    assert found["seconds: publish"].verdict == "same"
    assert found[WHOLE_JOB].verdict == "same"


def test_whole_job_with_many_small_losses_is_slower():
    names = [f"stage{n}" for n in range(10)]
    before, now = dict.fromkeys(names, 1.0), dict.fromkeys(names, 1.4)
    found = judge(render(9, **now), render(1, **before))
    assert {finding.verdict for name, finding in found.items() if name != WHOLE_JOB} == {"same"}
    assert next(iter(found)) == WHOLE_JOB
    assert found[WHOLE_JOB].verdict == "slower"
    assert (found[WHOLE_JOB].new, found[WHOLE_JOB].median) == (pytest.approx(14.0), pytest.approx(10.0))


@pytest.mark.parametrize(
    ("before", "now", "verdict"),
    [
        (10 * GB, 12 * GB, "larger"),
        (10 * GB, 10 * GB + (900 << 20), "same"),  # the bound breaks, the factor does not
        (1 * GB, 1 * GB + (250 << 20), "same"),  # the factor breaks, the bound does not
        (1 * GB, 1 * GB + (260 << 20), "larger"),
        (10 * GB, 7 * GB, "better"),
    ],
)
def test_memory_is_larger_only_above_factor_and_bytes(before, now, verdict):
    found = judge(
        render(9, host=now, stages={"vae_decode": now}),
        *(render(n, host=before, stages={"vae_decode": before}) for n in (1, 2)),
    )
    for name in ("memory: host", "memory: vae_decode allocated"):
        assert (found[name].verdict, found[name].unit, found[name].nights) == (verdict, "bytes", 2)


def test_manifest_limits_replace_default_factors():
    strict = RegressionLimits(seconds_max="1.05x", memory_max="1.5x")
    new, old = render(9, denoise=11.0, host=12 * GB), render(1, denoise=10.0, host=10 * GB)
    found, usual = judge(new, old, limits=strict), judge(new, old)
    assert (found["seconds: denoise"].verdict, found["memory: host"].verdict) == ("slower", "same")
    assert (usual["seconds: denoise"].verdict, usual["memory: host"].verdict) == ("same", "larger")


def test_stage_is_compared_with_median_of_last_5_nights():
    seconds = (99.0, 99.0, 10.0, 10.0, 30.0, 10.0, 30.0)
    found = judge(render(9, denoise=11.0), *(render(n, denoise=s) for n, s in enumerate(seconds, 1)))
    assert (found["seconds: denoise"].median, found["seconds: denoise"].nights) == (10.0, 5)


def test_approved_record_counts_as_night_when_nights_are_few():
    new, approved = render(9, denoise=30.0), render(1, denoise=10.0)
    nights = history(render(2, denoise=20.0), render(3, denoise=21.0))
    (_, finding) = judge_performance(new, nights, LIMITS, baseline=approved)
    assert (finding.median, finding.nights) == (20.0, 3)
    (_, finding) = judge_performance(new, [], LIMITS, baseline=approved)
    assert (finding.median, finding.nights, finding.verdict) == (10.0, 1, "slower")
    (_, finding) = judge_performance(new, nights, LIMITS, baseline=render(2, denoise=1.0))  # that night is there
    assert finding.nights == 2
    five = history(*(render(n, denoise=20.0) for n in range(2, 7)))
    (_, finding) = judge_performance(new, five, LIMITS, baseline=approved)
    assert finding.nights == 5
    of_gpu = approved.model_copy(update={"engine": {"device": "cuda"}, "computed_by": {"device": "NVIDIA L4"}})
    (finding,) = judge_performance(new, [], LIMITS, baseline=of_gpu)
    assert finding.verdict == "not judged"


@pytest.mark.parametrize(
    ("new", "old", "why"),
    [
        ({"resumed_at_segment": 2}, {}, "an earlier attempt generated a part"),
        ({}, {"resumed_at_segment": 2}, "no earlier night has this job on cpu with fp4-distill"),
        ({}, {"recipe": "bf16"}, "no earlier night"),
        ({}, {"engine": {"device": "cuda"}}, "no earlier night"),
        ({}, {"job_id": "b"}, "no earlier night"),
        ({"run_id": "run1"}, {}, "no earlier night"),
        ({"steps_s": [1.0, 1.0]}, {"steps_s": [1.0]}, "other work: 1 evaluations → 2 evaluations"),
    ],
)
def test_render_that_is_not_comparable_is_not_judged(new, old, why):
    newer = render(9, denoise=30.0).model_copy(update=new)
    older = render(1, denoise=10.0).model_copy(update=old)
    (finding,) = judge_performance(newer, history(older), LIMITS)
    assert (finding.name, finding.verdict, finding.nights, finding.new) == (WHOLE_JOB, "not judged", 0, 30.0)
    assert why in finding.why


def test_stage_is_compared_with_nights_of_same_cache_hits():
    hit, miss = {"pose_cache_hits": 1}, {"pose_cache_misses": 1}
    old = [render(n, pose=0.1, denoise=10.0, caches=hit) for n in (1, 2, 3)]
    new = render(9, pose=8.0, denoise=10.0, caches=miss)
    found = judge(new, *old)
    assert (found["seconds: pose"].verdict, found["seconds: denoise"].verdict) == ("not judged", "same")
    assert "cache hits" in found["seconds: pose"].why
    without = found["seconds: all stages without those whose caches differ"]
    assert (without.verdict, without.new, without.nights) == ("same", 10.0, 3)
    found = judge(new, *old, render(4, pose=4.0, denoise=10.0, caches=miss))
    assert (found["seconds: pose"].verdict, found["seconds: pose"].nights) == ("slower", 1)
    assert found["seconds: denoise"].nights == 4
    found = judge(
        render(9, denoise=10.0, caches=hit), *(render(n, pose=8.0, denoise=10.0, caches=miss) for n in (1, 2))
    )
    assert WHOLE_JOB not in found  # the stage is gone by a hit, and that is no improvement


def test_new_stage_is_not_judged_and_counts_in_whole_job():
    found = judge(render(9, denoise=10.0, interpolate=5.0), render(1, denoise=10.0))
    assert found["seconds: interpolate"].verdict == "not judged"
    assert found[WHOLE_JOB].verdict == "slower"
    found = judge(render(9, denoise=10.0), render(1, denoise=10.0, interpolate=5.0))
    assert found[WHOLE_JOB].verdict == "better"


@given(st.floats(0, 1e5), st.floats(0, 1e5))
def test_seconds_verdict_is_slower_only_above_factor_and_bound(before, now):
    found = judge(render(9, denoise=now), render(1, denoise=before))
    for name, bound in ((WHOLE_JOB, JOB_BOUND_S), ("seconds: denoise", STAGE_BOUND_S)):
        slower = now > SECONDS_MAX * before and now - before > bound
        assert (found[name].verdict == "slower") == slower


@given(st.integers(0, 1 << 40), st.integers(0, 1 << 40))
def test_memory_verdict_is_larger_only_above_factor_and_bound(before, now):
    finding = judge(render(9, host=now), render(1, host=before))["memory: host"]
    assert (finding.verdict == "larger") == (now > 1.1 * before and now - before > MEMORY_BOUND)

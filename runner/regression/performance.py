"""Performance: judges the seconds and the memory of one job against the median of earlier nights, stage by stage.

In:   a record, the last nights, the approved record. Out: findings. Never: frames, storage.

A stage is slower or larger only if it exceeds both a factor and an absolute bound: short stages vary by large factors,
long ones by seconds. A stage is compared only with nights with the same cache hits, because a hit skips most of its
work.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from statistics import median
from typing import Literal

from runner.records.record import ResultRecord
from runner.regression.baseline_layout import device_folder, recipe_folder
from runner.regression.findings import PerformanceFinding
from runner.regression.nights import LAST_NIGHTS, Night, NightJob, summarize_job
from runner.spec.regression_limits import RegressionLimits

__all__ = [
    "BETTER",
    "JOB_BOUND_S",
    "MEMORY_BOUND",
    "MEMORY_MAX",
    "SECONDS_MAX",
    "STAGE_BOUND_S",
    "WHOLE_JOB",
    "judge_performance",
]

SECONDS_MAX, MEMORY_MAX = 1.2, 1.1  # default factors of the median
BETTER = 0.8  # of the median: a smaller value is reported as an improvement
# Assumed: a smaller difference costs a night of a hundred jobs less than a minute, or needs no other memory mode.
STAGE_BOUND_S = 0.5
JOB_BOUND_S = 1.0
MEMORY_BOUND = 256 << 20  # bytes
WHOLE_JOB = "seconds: all stages"

# Prefixes of the counters that show how much of a stage was skipped. A stage that is not here does the same work with
# every state of the caches.
_COUNTERS: Mapping[str, tuple[str, ...]] = {
    "decode": ("pose_cache", "mask_cache"),
    "detect": ("pose_cache", "mask_cache"),
    "pose": ("pose_cache", "mask_cache"),
    "segment": ("mask_cache",),
    "load_encoders": ("text_encoder_loads", "image_encoder_loads", "prompt_", "clip_cache"),
    "encode_prompt": ("prompt_",),
    "encode_image": ("clip_cache",),
    "encode_reference": ("reference_cache",),
    "encode_conditions": ("pose_latents_cache", "blank_cache", "scene_cache"),
    "warmup": ("compiled_graphs",),
}


def judge_performance(
    record: ResultRecord,
    nights: Sequence[Night],
    limits: RegressionLimits,
    *,
    baseline: ResultRecord | None = None,
) -> list[PerformanceFinding]:
    """Judge each stage's seconds, their sum, and each memory peak: slower, larger, better, same or not judged.

    `nights`: newest first. The first five nights with the record's device and recipe count in which this job was not
    resumed. If there are fewer, `baseline`, the approved record, counts as one more if it has the same device and
    recipe. Not judged, with a reason: a resumed job; a job that no night has, or that did other work; a stage whose
    cache hits differ from all nights. If the whole job is not judged, there is one finding.
    """
    job = summarize_job(record)
    where = device_folder(record), recipe_folder(record.recipe)
    history = _history(record, where, nights, baseline)
    same = [line for line in history if line.work == job.work]
    total = sum(job.seconds.values())
    if job.resumed:
        return [_not_judged(WHOLE_JOB, total, "an earlier attempt generated a part of this job")]
    if not history:
        return [_not_judged(WHOLE_JOB, total, f"no earlier night has this job on {where[0]} with {where[1]}")]
    if not same:
        return [_not_judged(WHOLE_JOB, total, f"the job did other work: {history[0].work} → {job.work}")]

    seconds_max = limits.seconds_max or SECONDS_MAX
    memory_max = limits.memory_max or MEMORY_MAX
    findings = []
    steady = []  # stages with the same cache hits in all nights
    for stage, seconds in job.seconds.items():
        alike = [line for line in same if _same_cache_hits(stage, line, job)]
        if len(alike) == len(same):
            steady.append(stage)
        name = f"seconds: {stage}"
        before = [line.seconds[stage] for line in alike if stage in line.seconds]
        if before:
            findings.append(_judge(name, "s", seconds, before, seconds_max, STAGE_BOUND_S))
        elif not alike:
            findings.append(_not_judged(name, seconds, "the earlier nights had other cache hits"))
        else:
            findings.append(_not_judged(name, seconds, "the earlier nights do not have this stage"))
    gone = {stage for line in same for stage in line.seconds} - job.seconds.keys()
    steady += [stage for stage in gone if all(_same_cache_hits(stage, line, job) for line in same)]

    def sum_steady(line: NightJob) -> float:
        return sum(line.seconds.get(stage, 0.0) for stage in steady)

    whole = not (job.seconds.keys() | gone) - set(steady)
    name = WHOLE_JOB if whole else "seconds: all stages without those whose caches differ"
    findings.insert(
        0, _judge(name, "s", sum_steady(job), [sum_steady(line) for line in same], seconds_max, JOB_BOUND_S)
    )
    for peak, nbytes in job.memory.items():
        stage = peak.partition(" ")[0]
        before = [line.memory[peak] for line in same if peak in line.memory and _same_cache_hits(stage, line, job)]
        name = f"memory: {peak}"
        if before:
            findings.append(_judge(name, "bytes", nbytes, before, memory_max, MEMORY_BOUND))
        else:
            findings.append(_not_judged(name, nbytes, "no earlier night has it with the same cache hits", "bytes"))
    return findings


def _history(
    record: ResultRecord, where: tuple[str, str], nights: Sequence[Night], baseline: ResultRecord | None
) -> list[NightJob]:
    """Return the entries of this job in the last nights before the record's run, newest first."""
    lines: list[NightJob] = []
    runs = {record.run_id}
    for night in nights:
        line = night.jobs.get(record.job_id)
        if (night.device, night.recipe) == where and night.run_id not in runs and line is not None:
            runs.add(night.run_id)
            lines.append(line)
    known = baseline is None or baseline.run_id in runs
    if baseline is not None and not known and (device_folder(baseline), recipe_folder(baseline.recipe)) == where:
        lines.append(summarize_job(baseline))
    return [line for line in lines if not line.resumed][:LAST_NIGHTS]


def _same_cache_hits(stage: str, one: NightJob, other: NightJob) -> bool:
    """Return whether this stage had the same cache hits in both."""
    beginnings = _COUNTERS.get(stage, ())

    def counts(line: NightJob) -> dict[str, int]:
        return {name: count for name, count in line.caches.items() if count and name.startswith(beginnings)}

    return not beginnings or counts(one) == counts(other)


def _judge(
    name: str, unit: Literal["s", "bytes"], new: float, before: Sequence[float], factor: float, bound: float
) -> PerformanceFinding:
    middle = median(before)
    verdict: Literal["slower", "larger", "better", "same"] = "same"
    if new > factor * middle and new - middle > bound:
        verdict = "slower" if unit == "s" else "larger"
    elif new < BETTER * middle and middle - new > bound:
        verdict = "better"
    ratio = new / middle if middle > 0 else 1.0
    return PerformanceFinding(
        name=name, unit=unit, new=new, median=middle, nights=len(before), ratio=ratio, verdict=verdict
    )


def _not_judged(name: str, new: float, why: str, unit: Literal["s", "bytes"] = "s") -> PerformanceFinding:
    return PerformanceFinding(
        name=name, unit=unit, new=new, median=new, nights=0, ratio=1.0, verdict="not judged", why=why
    )

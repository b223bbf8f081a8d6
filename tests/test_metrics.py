from __future__ import annotations

import threading

import pytest
from prometheus_client.parser import text_string_to_metric_families

from runner.errors import InputNotFound
from runner.metrics import MemorySampler, ProcessMemory, RunMetrics, StageTimer
from runner.record import ErrorRecord, JobLine
from tests.test_record import a_failure


class Clock:
    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


class Probe:
    """A device whose queued work takes effect when it is waited for."""

    def __init__(self, clock: Clock) -> None:
        self.clock, self.queued, self.bytes, self.log = clock, 0.0, 0, []

    def synchronize(self) -> None:
        self.log.append("wait")
        self.clock.now += self.queued
        self.queued = 0.0

    def reset_peak(self) -> None:
        self.log.append("reset")
        self.bytes = 0

    def peak(self) -> dict[str, int]:
        return {"allocated": self.bytes}


def test_stages_add_up_by_name():
    clock = Clock()
    timer = StageTimer(clock)
    for seconds in (1.0, 2.5):
        with timer.stage("decode"):
            clock.now += seconds
    assert timer.seconds == {"decode": 3.5}


def test_a_stage_that_fails_is_still_timed():
    clock = Clock()
    timer = StageTimer(clock)

    def draw() -> None:
        with timer.stage("draw"):
            clock.now += 2
            raise ValueError("x")

    with pytest.raises(ValueError, match="x"):
        draw()
    assert timer.seconds == {"draw": 2}


def test_work_queued_on_the_device_counts_for_its_own_stage():
    clock = Clock()
    probe = Probe(clock)
    timer = StageTimer(clock, probe)
    with timer.stage("denoise", on_device=True):
        probe.queued, probe.bytes = 7.0, 100
    with timer.stage("vae_decode", on_device=True):
        probe.bytes = 60
    with timer.stage("denoise", on_device=True):
        probe.bytes = 80
    assert timer.seconds == {"denoise": 7.0, "vae_decode": 0.0}
    assert timer.peaks == {"denoise": {"allocated": 100}, "vae_decode": {"allocated": 60}}
    assert probe.log[:3] == ["wait", "reset", "wait"]


def test_counters_and_steps_are_safe_from_threads():
    timer = StageTimer()

    def work() -> None:
        for _ in range(500):
            timer.count("hit")
            timer.step(1.0)

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert timer.counters == {"hit": 2000}
    assert len(timer.steps) == 2000


def test_a_window_sees_the_peak_while_it_is_open():
    readings = iter([(10, None), (10, None), (30, 5), (20, 9), *[(15, 1)] * 1000])
    sampler = MemorySampler(0.001, lambda: next(readings))
    window = sampler.window()
    with sampler:
        while window.gpu_peak != 9:
            pass
        late = sampler.window()
    assert (window.rss_peak, window.gpu_peak) == (30, 9)
    assert late.rss_peak is not None
    assert late.rss_peak <= 20


def test_this_process_has_memory_and_says_none_without_a_gpu():
    rss, gpu = ProcessMemory()()
    assert rss is not None
    assert rss > 10 * 2**20
    assert gpu is None or gpu >= 0


def test_prometheus_text_adds_up():
    metrics = RunMetrics()
    failed = JobLine(
        id="b", status="failed", reason="", error=ErrorRecord.of(InputNotFound("no"), "prepare"), seconds=1.5
    )
    record = a_failure(timings_s={"fetch": 0.5}, caches={"prompt_hits": 2}, memory={"host_rss_peak_bytes": 100})
    metrics.observe(JobLine(id="a", status="skipped", reason="done"), None)
    metrics.observe(failed, record)
    lower = record.memory.model_copy(update={"host_rss_peak_bytes": 60})
    metrics.observe(failed, record.model_copy(update={"memory": lower}))
    found = {
        (sample.name, *sorted(sample.labels.values())): sample.value
        for family in text_string_to_metric_families(metrics.text())
        for sample in family.samples
    }
    assert found["video_lab_jobs_total", "skipped"] == 1
    assert found["video_lab_jobs_total", "failed"] == 2
    assert found["video_lab_job_failures_total", "input.not_found"] == 2
    assert found["video_lab_stage_seconds_total", "fetch"] == 1.0
    assert found["video_lab_cache_lookups_total", "prompt_hits"] == 4
    assert found["video_lab_job_seconds_sum",] == 3.0
    assert found["video_lab_host_rss_peak_bytes",] == 100

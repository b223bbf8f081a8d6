from __future__ import annotations

from datetime import datetime
from typing import Any

from prometheus_client.parser import text_string_to_metric_families

from runner.errors import InputNotFound
from runner.records.prometheus import RunMetrics
from runner.records.record import ErrorRecord, JobLine, ProcessUsage, RunSummary, SpanRecord
from tests.records.test_record import a_failure

STARTED_AT, FINISHED_AT = "2026-01-01T00:00:00.250+00:00", "2026-01-01T01:00:00.000+00:00"
COMMON = {"run": "night", "shard": "0-of-2", "host": "node7", "recipe": "bf16", "device": "NVIDIA H200"}
FAILED = JobLine(id="b", status="failed", reason="", error=ErrorRecord.of(InputNotFound("no"), "prepare"), seconds=1.5)


def make_summary(**changes: Any) -> RunSummary:
    """Of a shard that runs. Labels are named as in COMMON."""
    labels = COMMON | {name: changes.pop(name) for name in COMMON if name in changes}
    process = ProcessUsage(
        host=labels["host"],
        device=labels["device"],
        pid=1,
        started_at=STARTED_AT,
        seconds=100.0,
        finished=False,
        work_s=60.0,
        loading=[SpanRecord(begin_s=1.0, end_s=11.0), SpanRecord(begin_s=20.0, end_s=25.0)],
    )
    values = {
        "run_id": labels["run"],
        "shard": labels["shard"],
        "recipe": labels["recipe"],
        "shard_reason": "",
        "manifest": "m.yaml",
        "started_at": STARTED_AT,
        "seconds": 100.0,
        "counts": {"total": 9, "succeeded": 4, "skipped": 0, "failed": 2, "not_run": 3},
        "jobs": [],
        "processes": [process.model_copy(update={"host": "another", "work_s": 7.0}), process],
        "environment": {},
    }
    return RunSummary(**(values | changes))


def read_samples(metrics: RunMetrics, summary: RunSummary | None = None, idle_s: float = 25.0) -> dict[tuple, float]:
    """By name and the values of the labels that not every sample has, in the order of the labels' names."""
    text = metrics.text(summary or make_summary(), idle_s=idle_s)
    return {
        (sample.name, *(value for name, value in sorted(sample.labels.items()) if name not in COMMON)): sample.value
        for family in text_string_to_metric_families(text)
        for sample in family.samples
    }


def test_observed_jobs_are_added_up():
    metrics = RunMetrics()
    record = a_failure(timings_s={"fetch": 0.5}, memory={"host_rss_peak_bytes": 100})
    metrics.observe(JobLine(id="a", status="skipped", reason="done"), None)
    metrics.observe(FAILED, record)
    lower = record.memory.model_copy(update={"host_rss_peak_bytes": 60})
    metrics.observe(FAILED, record.model_copy(update={"memory": lower}))
    found = read_samples(metrics)
    assert found["video_lab_job_failures_total", "input.not_found"] == 2
    assert found["video_lab_stage_seconds_total", "fetch"] == 1.0
    assert found["video_lab_job_seconds_sum",] == 3.0
    assert found["video_lab_host_rss_peak_bytes",] == 100


def test_every_sample_has_the_labels_of_its_shard():
    metrics = RunMetrics()
    metrics.observe(FAILED, a_failure(timings_s={"fetch": 0.5}, caches={"pose_cache_hits": 1, "text_encoder_loads": 1}))
    ended = make_summary(finished_at=FINISHED_AT, exit_code=1)
    families = list(text_string_to_metric_families(metrics.text(ended, idle_s=1.0)))
    samples = [sample for family in families for sample in family.samples]
    assert all(family.samples for family in families)
    assert len(samples) > 30
    assert all(sample.labels | COMMON == sample.labels for sample in samples)


def test_labels_hold_any_text_and_no_secret():
    odd = 'a "quoted" \\ back\nslash 踊る'
    url = "https://user:hunter2hunter2@host/x?X-Amz-Signature=abcdef"
    text = RunMetrics().text(make_summary(run=odd, recipe=url, host="bad\udcff"), idle_s=0.0)
    (jobs,) = (family for family in text_string_to_metric_families(text) if family.name == "video_lab_jobs")
    labels = jobs.samples[0].labels
    assert labels["run"] == odd
    assert labels["recipe"] == "https://user:***@host/x?X-Amz-Signature=***"
    assert labels["host"] == r"bad\udcff"
    assert "hunter2" not in text


def test_jobs_are_counted_by_state_and_every_state_is_there():
    found = read_samples(RunMetrics())
    jobs = {state: value for (name, *state), value in found.items() if name == "video_lab_jobs" for state in state}
    assert jobs == {"succeeded": 4, "failed": 2, "skipped": 0, "pending": 3}


def test_cache_lookups_tell_hits_from_misses():
    metrics = RunMetrics()
    caches = {"pose_cache_hits": 2, "pose_cache_misses": 1, "prompt_disk_cache_misses": 3, "text_encoder_loads": 1}
    for _ in range(2):
        metrics.observe(FAILED, a_failure(caches=caches))
    found = read_samples(metrics)
    lookups = {key[1:]: value for key, value in found.items() if key[0] == "video_lab_cache_lookups_total"}
    assert lookups == {("pose", "hit"): 4, ("pose", "miss"): 2, ("prompt_disk", "miss"): 6}
    operations = {key[1:]: value for key, value in found.items() if key[0] == "video_lab_engine_operations_total"}
    assert operations == {("text_encoder_loads",): 2}


def test_the_end_has_a_sample_only_after_it():
    metrics = RunMetrics()
    begin, end = (datetime.fromisoformat(when).timestamp() for when in (STARTED_AT, FINISHED_AT))
    running = read_samples(metrics)
    assert running["video_lab_run_start_time_seconds",] == begin
    assert ("video_lab_run_end_time_seconds",) not in running
    assert ("video_lab_run_exit_code",) not in running
    ended = read_samples(metrics, make_summary(finished_at=FINISHED_AT, exit_code=0))
    assert ended["video_lab_run_end_time_seconds",] == end
    assert ended["video_lab_run_exit_code",] == 0


def test_gpu_seconds_are_those_of_this_process():
    found = read_samples(RunMetrics(), idle_s=12.5)
    seconds = {key[1]: value for key, value in found.items() if key[0] == "video_lab_gpu_seconds_total"}
    assert seconds == {"work": 60.0, "loading": 15.0, "idle": 12.5}


def test_ten_thousand_jobs_make_as_many_samples_as_one():
    metrics = RunMetrics()
    sizes = []
    for number in range(10_000):
        name = f"job-{number}"
        record = a_failure(job_id=name, timings_s={"fetch": 0.5}, caches={"pose_cache_hits": 1})
        metrics.observe(FAILED.model_copy(update={"id": name}), record)
        if number in (0, 9999):
            text = metrics.text(make_summary(), idle_s=0.0)
            sizes.append(len(text.splitlines()))
            assert "job-" not in text
    assert sizes[0] == sizes[1]

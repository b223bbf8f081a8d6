from __future__ import annotations

from prometheus_client.parser import text_string_to_metric_families

from runner.errors import InputNotFound
from runner.records.prometheus import RunMetrics
from runner.records.record import ErrorRecord, JobLine
from tests.records.test_record import a_failure


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

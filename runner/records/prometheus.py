"""Prometheus: write a shard's totals as text for a textfile collector.

In:   records of ended jobs, the shard's summary. Out: Prometheus text. Never: files, clocks.
`docs/metrics.md` describes the families and their labels.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, cast

from runner.records.record import JobLine, ResultRecord, RunSummary
from runner.redact import redact
from runner.timing import unix_time

if TYPE_CHECKING:
    from prometheus_client import Metric
    from prometheus_client.registry import Collector

__all__ = ["RunMetrics"]

# Value of the label `state` → key in the counts of a summary.
STATES = {"succeeded": "succeeded", "failed": "failed", "skipped": "skipped", "pending": "not_run"}
CACHE_RESULTS = {"_cache_hits": "hit", "_cache_misses": "miss"}  # by the end of a counter's name in a record


class RunMetrics:
    """A shard's totals as Prometheus text, for a textfile collector. No label grows with the number of jobs.

    Every sample has the labels run, shard, host, recipe and device, so that files of several shards and runs can be in
    one folder.
    """

    def __init__(self) -> None:
        from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, disable_created_metrics

        disable_created_metrics()
        self.registry = CollectorRegistry()
        buckets = (1, 2, 5, 10, 20, 40, 60, 90, 120, 180, 300, 600, 1200, 3600)

        def counter(name: str, text: str, labels: tuple[str, ...] = ()) -> Counter:
            return Counter(f"video_lab_{name}", text, labels, registry=self.registry)

        self._failures = counter("job_failures", "failed jobs by error code", ("code",))
        self._stages = counter("stage_seconds", "seconds by stage, over all jobs", ("stage",))
        self._frames = counter("frames", "output frames delivered")
        self._denoised = counter("frames_denoised", "frames denoised, padding and overlap included")
        self._tflop = counter("tflop", "10^12 floating point operations, by the model's shape")
        self._caches = counter("cache_lookups", "lookups of what is reused across jobs", ("cache", "result"))
        self._operations = counter(
            "engine_operations", "encoders loaded, graphs compiled, codes of weights made", ("what",)
        )
        self._seconds = Histogram(
            "video_lab_job_seconds", "from fetch to publish", registry=self.registry, buckets=buckets
        )
        self._rss = Gauge("video_lab_host_rss_peak_bytes", "highest host memory of the process", registry=self.registry)
        self._gpu = Gauge("video_lab_gpu_peak_bytes", "highest GPU memory of the process, NVML", registry=self.registry)
        self._peaks = {self._rss: 0, self._gpu: 0}

    def observe(self, line: JobLine, record: ResultRecord | None) -> None:
        """Add one job that has ended."""
        if line.error is not None:
            self._failures.labels(line.error.code).inc()
        if record is None:
            return
        if line.seconds is not None:
            self._seconds.observe(line.seconds)
        for stage, seconds in record.timings_s.items():
            self._stages.labels(stage).inc(seconds)
        for counter, count in record.caches.items():
            self._add_counter(counter, count)
        if record.efficiency is not None and record.output is not None:
            self._frames.inc(record.output.frames)
            self._denoised.inc(record.efficiency.frames_denoised)
            self._tflop.inc(record.efficiency.tflop)
        peaks = ((self._rss, record.memory.host_rss_peak_bytes), (self._gpu, record.memory.process_gpu_peak_bytes))
        for gauge, peak in peaks:
            if peak is not None:
                self._peaks[gauge] = max(peak, self._peaks[gauge])
                gauge.set(self._peaks[gauge])

    def text(self, summary: RunSummary, *, idle_s: float) -> str:
        """Return the file's text.

        `summary`: the shard's present summary; its last process is this one.
        `idle_s`: seconds in which the device did nothing. It must not decrease from one call to the next.
        """
        from prometheus_client import generate_latest

        process = summary.processes[-1]
        labels = {
            "run": summary.run_id,
            "shard": summary.shard,
            "host": process.host,
            "recipe": summary.recipe,
            "device": process.device,
        }
        # Bytes of a path that are not UTF-8 are written as escapes, as in a record.
        public = {name: redact(value).encode(errors="backslashreplace").decode() for name, value in labels.items()}
        families = (*self.registry.collect(), *_families_of(summary, idle_s))
        return generate_latest(cast("Collector", _Labelled(families, public))).decode()

    def _add_counter(self, name: str, count: int) -> None:
        for end, result in CACHE_RESULTS.items():
            if name.endswith(end):
                self._caches.labels(name.removesuffix(end), result).inc(count)
                return
        self._operations.labels(name).inc(count)


@dataclass(frozen=True)
class _Labelled:
    """Families whose samples get `labels` in addition to their own labels."""

    families: Iterable[Metric]
    labels: Mapping[str, str]

    def collect(self) -> Iterator[Metric]:
        for family in self.families:
            family.samples = [sample._replace(labels={**self.labels, **sample.labels}) for sample in family.samples]
            yield family


def _families_of(summary: RunSummary, idle_s: float) -> Iterator[Metric]:
    """Yield the families from the summary. Those on the run's end have no sample before the end."""
    from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily

    jobs = GaugeMetricFamily("video_lab_jobs", "jobs of the shard by state", labels=("state",))
    for state, key in STATES.items():
        jobs.add_metric((state,), summary.counts[key])
    yield jobs

    process = summary.processes[-1]
    seconds = CounterMetricFamily(
        "video_lab_gpu_seconds", "seconds of the process by what its device did", labels=("kind",)
    )
    for kind, value in (("work", process.work_s), ("loading", process.loading_s), ("idle", idle_s)):
        seconds.add_metric((kind,), value)
    yield seconds

    start = GaugeMetricFamily("video_lab_run_start_time_seconds", "when the process began the shard, Unix time")
    end = GaugeMetricFamily("video_lab_run_end_time_seconds", "when the shard ended, Unix time; absent before")
    code = GaugeMetricFamily("video_lab_run_exit_code", "exit code of the shard; absent before its end")
    for family, moment in ((start, summary.started_at), (end, summary.finished_at)):
        seconds_since_1970 = unix_time(moment or "")
        if seconds_since_1970 is not None:
            family.add_metric((), seconds_since_1970)
    if summary.exit_code is not None:
        code.add_metric((), summary.exit_code)
    yield from (start, end, code)

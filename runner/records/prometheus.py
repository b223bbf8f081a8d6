"""Prometheus: a run's totals as text for a textfile collector.

In:   records of ended jobs. Out: Prometheus text. Never: files, clocks.
"""

from __future__ import annotations

from runner.records.record import JobLine, ResultRecord

__all__ = ["RunMetrics"]


class RunMetrics:
    """A run's totals as Prometheus text, for a textfile collector. No label grows with the number of jobs."""

    def __init__(self) -> None:
        from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, disable_created_metrics

        disable_created_metrics()
        self.registry = CollectorRegistry()
        buckets = (1, 2, 5, 10, 20, 40, 60, 90, 120, 180, 300, 600, 1200, 3600)

        def counter(name: str, text: str, labels: tuple[str, ...] = ()) -> Counter:
            return Counter(f"video_lab_{name}", text, labels, registry=self.registry)

        self._jobs = counter("jobs", "jobs by how they ended", ("status",))
        self._failures = counter("job_failures", "failed jobs by error code", ("code",))
        self._stages = counter("stage_seconds", "seconds by stage, over all jobs", ("stage",))
        self._frames = counter("frames", "output frames delivered")
        self._denoised = counter("frames_denoised", "frames denoised, padding and overlap included")
        self._tflop = counter("tflop", "10^12 floating point operations, by the model's shape")
        self._caches = counter("cache_lookups", "lookups of what is reused across jobs", ("what",))
        self._seconds = Histogram(
            "video_lab_job_seconds", "from fetch to publish", registry=self.registry, buckets=buckets
        )
        self._rss = Gauge("video_lab_host_rss_peak_bytes", "highest host memory of the process", registry=self.registry)
        self._gpu = Gauge("video_lab_gpu_peak_bytes", "highest GPU memory of the process, NVML", registry=self.registry)
        self._peaks = {self._rss: 0, self._gpu: 0}

    def observe(self, line: JobLine, record: ResultRecord | None) -> None:
        """Add one ended job."""
        self._jobs.labels(line.status).inc()
        if line.error is not None:
            self._failures.labels(line.error.code).inc()
        if record is None:
            return
        if line.seconds is not None:
            self._seconds.observe(line.seconds)
        for stage, seconds in record.timings_s.items():
            self._stages.labels(stage).inc(seconds)
        for what, count in record.caches.items():
            self._caches.labels(what).inc(count)
        if record.efficiency is not None and record.output is not None:
            self._frames.inc(record.output.frames)
            self._denoised.inc(record.efficiency.frames_denoised)
            self._tflop.inc(record.efficiency.tflop)
        peaks = ((self._rss, record.memory.host_rss_peak_bytes), (self._gpu, record.memory.process_gpu_peak_bytes))
        for gauge, peak in peaks:
            if peak is not None:
                self._peaks[gauge] = max(peak, self._peaks[gauge])
                gauge.set(self._peaks[gauge])

    def text(self) -> str:
        from prometheus_client import generate_latest

        return generate_latest(self.registry).decode()

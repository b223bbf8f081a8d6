"""Metrics: seconds and memory by stage, the process's peaks, and Prometheus text.

In:   named stages around work. Out: plain numbers (seconds, bytes). Never: jobs, files of a job, what a stage does.
Nothing here imports torch: a device that computes asynchronously is handed in as a `DeviceProbe`.
"""

from __future__ import annotations

import threading
import time
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Protocol

from runner.record import JobLine, ResultRecord

__all__ = ["DeviceProbe", "MemorySampler", "MemoryWindow", "ProcessMemory", "RunMetrics", "StageTimer"]


class DeviceProbe(Protocol):
    """A device whose work and memory can be waited for and read."""

    def synchronize(self) -> None:
        """Wait until all work queued on the device is done."""

    def reset_peak(self) -> None:
        """Start a new peak of allocated and reserved bytes."""

    def peak(self) -> dict[str, int]:
        """{"allocated": bytes, "reserved": bytes} at most since the last reset."""


@dataclass
class StageTimer:
    """Seconds by stage of one job; a test passes a clock that it ticks by hand.

    A stage entered twice adds up. Stages of the thread that owns the device (`probe`) are synchronised at both ends, so
    that a stage's seconds are its own, and leave the device's peak memory behind.
    """

    clock: Callable[[], float] = time.perf_counter
    probe: DeviceProbe | None = None
    seconds: dict[str, float] = field(default_factory=dict)
    steps: list[float] = field(default_factory=list)  # seconds of each denoising step, in order
    peaks: dict[str, dict[str, int]] = field(default_factory=dict)  # stage -> bytes
    counters: dict[str, int] = field(default_factory=dict)  # e.g. cache hits
    forecast: dict[str, int] = field(default_factory=dict)  # stage -> bytes that the device was expected to hold
    gauges: dict[str, int] = field(default_factory=dict)  # e.g. bytes that a cache holds
    _lock: threading.Lock = field(default_factory=threading.Lock, repr=False)

    @contextmanager
    def stage(self, name: str, *, on_device: bool = False) -> Iterator[None]:
        """Time what runs inside as `name`. `on_device`: wait for the device before and after, and note its peak."""
        probe = self.probe if on_device else None
        if probe:
            probe.synchronize()
            probe.reset_peak()
        begin = self.clock()
        try:
            yield
        finally:
            if probe:
                probe.synchronize()
            elapsed = self.clock() - begin
            peak = probe.peak() if probe else {}
            with self._lock:
                self.seconds[name] = self.seconds.get(name, 0.0) + elapsed
                if peak:
                    before = self.peaks.setdefault(name, dict.fromkeys(peak, 0))
                    self.peaks[name] = {k: max(before.get(k, 0), v) for k, v in peak.items()}

    def step(self, seconds: float) -> None:
        """Note one denoising step."""
        with self._lock:
            self.steps.append(seconds)

    def count(self, name: str, by: int = 1) -> None:
        """Add to a counter."""
        with self._lock:
            self.counters[name] = self.counters.get(name, 0) + by

    def gauge(self, name: str, value: int) -> None:
        """Note how much there is of something now; the last word counts."""
        with self._lock:
            self.gauges[name] = value


class MemoryWindow:
    """The process's highest memory use since the window was opened; bytes, None where it cannot be read."""

    def __init__(self) -> None:
        self.rss_peak: int | None = None
        self.gpu_peak: int | None = None

    def see(self, rss: int | None, gpu: int | None) -> None:
        self.rss_peak = rss if self.rss_peak is None else max(self.rss_peak, rss or 0)
        self.gpu_peak = gpu if self.gpu_peak is None else max(self.gpu_peak, gpu or 0)


class MemorySampler:
    """Reads host RSS (psutil) and this process's GPU memory (NVML) every `interval_s`, for all open windows.

    NVML counts what torch's own statistics leave out: the CUDA context, cuDNN and ONNX Runtime.
    """

    def __init__(
        self, interval_s: float = 0.2, read: Callable[[], tuple[int | None, int | None]] | None = None
    ) -> None:
        self._interval_s = interval_s
        self._read = read or ProcessMemory()
        self._windows: weakref.WeakSet[MemoryWindow] = weakref.WeakSet()
        self._stopped = threading.Event()
        self._lock = threading.Lock()
        self._thread: threading.Thread | None = None

    def window(self) -> MemoryWindow:
        """A new window; it is watched for as long as somebody holds it."""
        window = MemoryWindow()
        with self._lock:
            self._windows.add(window)
        window.see(*self._read())
        return window

    def __enter__(self) -> MemorySampler:
        self._thread = threading.Thread(target=self._sample, name="memory", daemon=True)
        self._thread.start()
        return self

    def __exit__(self, *exc: object) -> None:
        self._stopped.set()
        if self._thread is not None:
            self._thread.join()

    def _sample(self) -> None:
        while not self._stopped.wait(self._interval_s):
            now = self._read()
            with self._lock:
                for window in list(self._windows):
                    window.see(*now)


class ProcessMemory:
    """Call for (host RSS, GPU memory) of this process, bytes; None for a GPU that is not there."""

    def __init__(self) -> None:
        import psutil

        self._process = psutil.Process()
        self._devices: list[object] = []
        try:
            import pynvml

            pynvml.nvmlInit()
            self._nvml = pynvml
            self._devices = [pynvml.nvmlDeviceGetHandleByIndex(i) for i in range(pynvml.nvmlDeviceGetCount())]
        except Exception:  # no driver, no library, no permission: there is no GPU memory to report
            self._devices = []

    def __call__(self) -> tuple[int | None, int | None]:
        return self._process.memory_info().rss, self._gpu()

    def _gpu(self) -> int | None:
        used = None
        for device in self._devices:
            try:
                running = self._nvml.nvmlDeviceGetComputeRunningProcesses(device)
            except self._nvml.NVMLError:
                continue
            for process in running:
                # Inside a container the driver may report host process ids, or none: then this stays None.
                if process.pid == self._process.pid and process.usedGpuMemory is not None:
                    used = (used or 0) + process.usedGpuMemory
        return used


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

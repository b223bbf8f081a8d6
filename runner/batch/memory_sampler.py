"""Memory sampler: measure the highest host and GPU memory use of this process while a job runs.

Out:  bytes; None if they cannot be read. Never: jobs, torch.
"""

from __future__ import annotations

import threading
import weakref
from collections.abc import Callable

__all__ = ["MemorySampler", "MemoryWindow", "ProcessMemory"]


class MemoryWindow:
    """The highest memory use of the process since the window was opened: bytes, None if it cannot be read."""

    def __init__(self) -> None:
        self.rss_peak: int | None = None
        self.gpu_peak: int | None = None

    def add(self, rss: int | None, gpu: int | None) -> None:
        """Add one sample, bytes."""
        self.rss_peak = rss if self.rss_peak is None else max(self.rss_peak, rss or 0)
        self.gpu_peak = gpu if self.gpu_peak is None else max(self.gpu_peak, gpu or 0)


class MemorySampler:
    """Reads host RSS (psutil) and this process's GPU memory (NVML) every `interval_s`, for all open windows.

    NVML also counts the CUDA context, cuDNN and ONNX Runtime, which torch's statistics leave out.
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
        """Open a new window. It is updated while the caller keeps a reference to it."""
        window = MemoryWindow()
        with self._lock:
            self._windows.add(window)
        window.add(*self._read())
        return window

    def rss(self) -> int | None:
        """Return the resident host memory of the process now, bytes."""
        return self._read()[0]

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
                    window.add(*now)


class ProcessMemory:
    """A call returns (host RSS, GPU memory) of this process in bytes; None without a GPU."""

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
                # In a container the driver may report host process ids, or none: the result is then None.
                if process.pid == self._process.pid and process.usedGpuMemory is not None:
                    used = (used or 0) + process.usedGpuMemory
        return used

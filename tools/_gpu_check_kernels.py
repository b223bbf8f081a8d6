"""Kernel times of a function by kind: milliseconds from torch's profiler, grouped by kernel name."""

from __future__ import annotations

import re
import statistics
import time
from collections.abc import Callable, Iterable
from typing import Any

import torch

__all__ = ["GROUPS", "by_group", "copy_gb_s", "group_of", "milliseconds", "profile"]

# The first pattern that matches a kernel's name (on a CPU an operator's name) decides.
GROUPS: dict[str, re.Pattern[str]] = {
    "attention": re.compile(r"flash|fmha|sdpa|attention|attn|sage|softmax_", re.IGNORECASE),
    "dequantise": re.compile(r"_dequantize|index_select|fp4", re.IGNORECASE),
    "quantise": re.compile(r"(?<!de)quantize|rowwise", re.IGNORECASE),
    "products": re.compile(
        r"gemm|nvjet|cutlass|cublas|xmma|_mm\b|mm_|matmul|addmm|aten::mm|aten::bmm|igemm", re.IGNORECASE
    ),
    "elementwise": re.compile(
        r"triton_|elementwise|vectorized|reduce|norm|copy|memcpy|memset|cat|fill|aten::(mul|add|sub|div|pow|mean|stack|to)",
        re.IGNORECASE,
    ),
}
REPEATS = 5


def group_of(name: str) -> str:
    return next((group for group, pattern in GROUPS.items() if pattern.search(name)), "other")


def by_group(kernels: Iterable[tuple[str, float]]) -> dict[str, Any]:
    """(kernel's name, milliseconds) → milliseconds by group, and the slowest kernels without a group."""
    found: dict[str, float] = dict.fromkeys((*GROUPS, "other"), 0.0)
    strange: dict[str, float] = {}
    for name, spent in kernels:
        group = group_of(name)
        found[group] += spent
        if group == "other":
            strange[name[:80]] = strange.get(name[:80], 0.0) + spent
    longest = sorted(strange, key=strange.__getitem__, reverse=True)[:3]
    return {"ms": {group: round(spent, 4) for group, spent in found.items()}, "other_kernels": longest}


def profile(work: Callable[[], object], device: torch.device) -> dict[str, Any]:
    """Profile one run of `work` by kernel group; `work` must have run before."""
    from torch.profiler import ProfilerActivity
    from torch.profiler import profile as profiler

    cuda = device.type == "cuda"
    with profiler(activities=[ProfilerActivity.CUDA if cuda else ProfilerActivity.CPU]) as seen:
        work()
        wait(device)
    averages = seen.key_averages()
    spent = [
        (event.key, (event.self_device_time_total if cuda else event.self_cpu_time_total) / 1e3) for event in averages
    ]
    return by_group(spent)


def milliseconds(
    work: Callable[[], object], device: torch.device, repeats: int = REPEATS, *, warm: bool = True
) -> float:
    """Return the median of `repeats` runs, by CUDA events or a CPU's clock. `warm`: a first run is not counted."""
    taken = []
    for run in range(0 if warm else 1, repeats + 1):
        if device.type == "cuda":
            start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            start.record()
            work()
            end.record()
            torch.cuda.synchronize(device)
            spent = start.elapsed_time(end)
        else:
            begin = time.perf_counter()
            work()
            spent = (time.perf_counter() - begin) * 1e3
        if run:
            taken.append(spent)
    return statistics.median(taken)


def copy_gb_s(device: torch.device, size: int) -> float:
    """Return GB/s of a copy of `size` bytes on the device, read and written."""
    source = torch.empty(size, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    return 2 * size / milliseconds(lambda: target.copy_(source), device) / 1e6


def wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)

"""Device: pick the device that computes, and read its work and memory.

In:   the requested device: "auto", "cpu", "cuda" or "cuda:N". Out: a torch device with the reason in words; a
DeviceProbe. Never: a silent fallback: a requested CUDA device that is missing is an error.
"""

from __future__ import annotations

import os
import platform
import re
import traceback
from pathlib import Path
from typing import TYPE_CHECKING

from runner.errors import ConfigInvalid, OutOfMemory

if TYPE_CHECKING:
    import torch

__all__ = [
    "CudaProbe",
    "as_out_of_memory",
    "cudnn_problem",
    "cudnn_version",
    "device_name",
    "free_bytes",
    "free_host_bytes",
    "grow_segments",
    "hardware_model",
    "make_probe",
    "pick_device",
    "release",
]

# cuDNN versions whose 3D convolutions in 16 bits torch does not use: 9.8 up to, but without, 9.15, in cuDNN's number
# format. Their results were wrong (pytorch#163539). Source: ConvParams::use_cudnn of torch 2.9.1 and later.
AVOIDED_CUDNN = range(90_800, 91_500)
# Texts of torch, cuBLAS and cuDNN for out of memory, where the type of the exception does not show it.
EXHAUSTED = re.compile(r"out of memory|can't allocate memory|ALLOC_FAILED", re.IGNORECASE)


def pick_device(requested: str = "auto") -> tuple[torch.device, str]:
    """Return the device, and the reason in words. Raises ConfigInvalid if the requested device does not exist."""
    import torch

    if requested == "auto":
        if torch.cuda.is_available():
            return torch.device("cuda", 0), f"{torch.cuda.get_device_name(0)} is available"
        return torch.device("cpu"), f"no CUDA device: {_why_no_cuda()}"
    if not re.fullmatch(r"cpu|cuda(:\d+)?", requested):
        raise ConfigInvalid(f"no device {requested!r}", todo="Devices: auto, cpu, cuda, cuda:N")
    if requested == "cpu":
        return torch.device("cpu"), "asked for"
    if not torch.cuda.is_available():
        raise ConfigInvalid(
            f"device {requested!r} was asked for, but {_why_no_cuda()}",
            todo="Check the driver (nvidia-smi) and, in a container, --gpus all; or ask for --device cpu",
        )
    index = int(requested.partition(":")[2] or 0)
    if index >= torch.cuda.device_count():
        raise ConfigInvalid(f"no device {requested!r}: this machine has {torch.cuda.device_count()} CUDA device(s)")
    return torch.device("cuda", index), f"asked for; {torch.cuda.get_device_name(index)}"


def cudnn_version(number: int) -> str:
    """Return the version of a cuDNN 9 version number: 92001 → "9.20.1"."""
    return f"{number // 10_000}.{number // 100 % 100}.{number % 100}"


def cudnn_problem(number: int | None) -> str | None:
    """Return why 3D convolutions in 16 bits are slow with this cuDNN; None if they are not, or without cuDNN.

    This concerns the patch embedding, and the autoencoder in 16 bits (`+bf16-vae`, `+fp16-vae`, mode `minimal`).
    Measured for one convolution in bfloat16 on an A100 (pytorch#166643): 23 ms and 7.2 GB with 9.10, 8.6 ms and 0.4 GB
    with 9.15.
    """
    if number is None or number not in AVOIDED_CUDNN:
        return None
    return (
        f"torch does not use cuDNN {cudnn_version(number)} for 3D convolutions in 16 bits (9.8 to 9.14 compute them "
        "wrong), and its own kernels take several times the time and memory"
    )


def device_name(device: torch.device) -> str | None:
    """Return the name that the driver gives the device; None for the CPU."""
    import torch

    return torch.cuda.get_device_name(device) if device.type == "cuda" else None


def hardware_model(device: torch.device) -> str:
    """Return what decides the order of sums: the GPU's name, or the CPU's model, vector instructions and threads.

    "NVIDIA H200"; "Intel(R) Xeon(R) Platinum 8488C, AVX512, 8 threads".
    """
    import torch

    name = device_name(device)
    if name is not None:
        return name
    model = platform.processor() or platform.machine()
    try:
        found = re.search(r"^model name\s*:\s*(.+)$", Path("/proc/cpuinfo").read_text(), re.MULTILINE)
        model = found.group(1).strip() if found else model
    except OSError:
        pass  # not Linux: use the name that Python returns
    return f"{model}, {torch.backends.cpu.get_cpu_capability()}, {torch.get_num_threads()} threads"


def free_bytes(device: torch.device) -> int:
    """Return the free bytes of the GPU, or of the host (or of a container's limit, if that is lower)."""
    import torch

    return int(torch.cuda.mem_get_info(device)[0]) if device.type == "cuda" else free_host_bytes()


def free_host_bytes() -> int:
    """Return the free bytes of host memory, or of a container's limit if that is lower."""
    import psutil

    free = [psutil.virtual_memory().available]
    try:
        limit = Path("/sys/fs/cgroup/memory.max").read_text().strip()
        if limit.isdigit():
            free.append(int(limit) - int(Path("/sys/fs/cgroup/memory.current").read_text()))
    except (OSError, ValueError):
        pass  # no cgroup v2: only the machine's memory counts
    return max(0, min(free))


def grow_segments(device: torch.device) -> bool:
    """Let torch's allocator extend its segments, which avoids fragmentation. Return whether this was set.

    Call it before the first allocation. Environment variables that set the allocator take precedence.
    """
    import torch

    set_by_environment = "PYTORCH_ALLOC_CONF" in os.environ or "PYTORCH_CUDA_ALLOC_CONF" in os.environ
    if device.type != "cuda" or set_by_environment:
        return False
    torch._C._accelerator_setAllocatorSettings("expandable_segments:True")
    return True


def release(device: torch.device) -> None:
    """Return unused memory of torch's allocator to the driver."""
    import torch

    if device.type == "cuda":
        torch.cuda.empty_cache()


def _why_no_cuda() -> str:
    import torch

    if torch.version.cuda is None:
        return "this torch was built without CUDA"
    return f"torch (CUDA {torch.version.cuda}) finds no device or no usable driver"


class CudaProbe:
    """Wait for one CUDA device, and read torch's allocator: bytes allocated, bytes reserved."""

    def __init__(self, device: torch.device) -> None:
        self.device = device

    def synchronize(self) -> None:
        import torch

        torch.cuda.synchronize(self.device)

    def reset_peak(self) -> None:
        import torch

        torch.cuda.reset_peak_memory_stats(self.device)

    def peak(self) -> dict[str, int]:
        import torch

        return {
            "allocated": torch.cuda.max_memory_allocated(self.device),
            "reserved": torch.cuda.max_memory_reserved(self.device),
        }


def make_probe(device: torch.device) -> CudaProbe | None:
    """Return what a StageTimer needs to time `device`; None for the CPU, which computes synchronously."""
    return CudaProbe(device) if device.type == "cuda" else None


def as_out_of_memory(error: BaseException, device: torch.device, *, doing: str) -> OutOfMemory | None:
    """Return `error` as OutOfMemory if it means that, else None. Frees the memory of the failed work for a retry.

    Without that, the frames of the traceback keep the tensors of the failed call alive as long as the exception exists.
    """
    import torch

    known = isinstance(error, (torch.OutOfMemoryError, MemoryError))
    if not known and not (isinstance(error, RuntimeError) and EXHAUSTED.search(str(error))):
        return None
    first_line = str(error).splitlines()[0] if str(error) else "host memory"
    traceback.clear_frames(error.__traceback__)
    if device.type == "cuda":
        torch.cuda.empty_cache()
    return OutOfMemory(
        f"out of memory while {doing} ({first_line})",
        where=str(device),
        todo="Ask for a smaller size or fewer max_segment_frames, or use a device with more memory",
    )

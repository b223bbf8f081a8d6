"""Providers: choose the part of onnxruntime that runs a network, and the device of its inputs and outputs.

In:   the requested device, the providers of this onnxruntime, the run's options. Out: a `Choice`: providers in order,
      their options, and the reason; a session's number of threads; its opening errors as errors of this project.
Never: sessions, so that all of this works on any machine.

TensorRT is used only on request. It chooses its kernels by measuring them, so two machines of one kind may give
different bits. Its engines are built once in each cache folder and then reused.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from ctypes.util import find_library
from dataclasses import dataclass
from importlib import metadata
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Literal

from runner.errors import ConfigInvalid, OutOfMemory, WeightsCorrupt, WeightsMissing

__all__ = [
    "CPU",
    "CUDA",
    "OUT_OF_MEMORY",
    "TENSORRT",
    "Choice",
    "NetworkOptions",
    "Precision",
    "binding_device",
    "check_precision",
    "choose_providers",
    "has_tensorrt_libraries",
    "onnxruntime_remedy",
    "opening_failed",
    "usable_cpus",
]

CPU, CUDA, TENSORRT = "CPUExecutionProvider", "CUDAExecutionProvider", "TensorrtExecutionProvider"
Precision = Literal["fp32", "int8"]
TensorrtMode = Literal["off", "auto", "on"]
# Parts of error messages of the runtime's allocators, of CUDA and of its libraries. The third one comes from an arena
# at its limit.
OUT_OF_MEMORY = (
    "failed to allocate memory",
    "out of memory",
    "is smaller than requested bytes",
    "cuda_error_out_of_memory",
    "status_alloc_failed",
    "bad_alloc",
)


@dataclass(frozen=True)
class NetworkOptions:
    """A run's settings for its ONNX networks. No job has settings of its own."""

    pose_precision: Precision = "fp32"
    tensorrt: TensorrtMode = "off"
    folder: Path | None = None  # for files made from the models: int8 networks, TensorRT engines
    arena_bytes: int | None = None  # limit of GPU memory beside the weights, for a pair of networks; None: no limit


@dataclass(frozen=True)
class Choice:
    """Providers in order of preference. The session must have the first one; the others run what it cannot."""

    providers: tuple[tuple[str, dict[str, Any]], ...]
    reason: str

    @property
    def first(self) -> str:
        return self.providers[0][0]


def choose_providers(
    device: str,
    available: Sequence[str],
    options: NetworkOptions,
    *,
    tensorrt_libraries: bool,
    remedy: str = "",
    memory_limit: int | None = None,
    stream: int | None = None,
) -> Choice:
    """Choose the providers for "cpu", "cuda" or "cuda:N".

    available:          `onnxruntime.get_available_providers()`: providers of the build, whether or not they load.
    tensorrt_libraries: true if TensorRT's own libraries are installed.
    remedy:             what to install if CUDA is not available.
    memory_limit:       GPU bytes that the session may use, weights included.
    stream:             address of the CUDA stream to use.
    Raises ConfigInvalid if the device, or TensorRT with `--tensorrt on`, is not available.
    """
    kind, _, index = device.partition(":")
    if kind == "cpu" and not index:
        if options.tensorrt == "on":
            raise ConfigInvalid("--tensorrt on needs a GPU; the device is cpu", todo="Drop it, or use --device cuda")
        return Choice(((CPU, {}),), "the device asked for is cpu")
    if kind != "cuda" or not (index.isdigit() or not index):
        raise ConfigInvalid(f"no such preprocessing device: {device!r}", todo="Use cpu, cuda or cuda:N")
    if CUDA not in available:
        raise ConfigInvalid(
            f"device {device} was asked for, but this onnxruntime has only {list(available)}", todo=remedy
        )
    number = int(index or 0)
    cuda = (
        CUDA,
        {
            "device_id": number,
            "arena_extend_strategy": "kSameAsRequested",  # doubling would take memory that the transformer needs
            "cudnn_conv_algo_search": "HEURISTIC",  # EXHAUSTIVE chooses by measuring, so bits differ from run to run
            **({} if memory_limit is None else {"gpu_mem_limit": memory_limit}),
            **({} if stream is None else {"user_compute_stream": str(stream)}),
        },
    )
    reason = f"the device asked for is {device}"
    if options.tensorrt == "off":
        return Choice((cuda,), reason)
    missing = _missing_for_tensorrt(available, options.folder, tensorrt_libraries)
    if not missing:
        assert options.folder is not None
        return Choice(
            ((TENSORRT, _engine_options(number, options, stream)), cuda),
            f"{reason}, with TensorRT ({options.tensorrt})",
        )
    if options.tensorrt == "on":
        raise ConfigInvalid(
            f"TensorRT was asked for, but {missing}",
            todo="Install the TensorRT that this onnxruntime-gpu was built with, or use --tensorrt auto",
        )
    return Choice((cuda,), f"{reason}; no TensorRT: {missing}")


def _missing_for_tensorrt(available: Sequence[str], folder: Path | None, libraries: bool) -> str:
    """Return what is missing for TensorRT, as text; empty if nothing is."""
    if TENSORRT not in available:
        return "this onnxruntime was built without it"
    if not libraries:
        return "its libraries (libnvinfer) are not installed"
    return "" if folder else "there is no cache folder for its engines, which take minutes to build"


def _engine_options(number: int, options: NetworkOptions, stream: int | None) -> dict[str, Any]:
    assert options.folder is not None
    engines = str(options.folder / "tensorrt")
    return {
        "device_id": number,
        "trt_engine_cache_enable": True,
        "trt_engine_cache_path": engines,
        "trt_timing_cache_enable": True,  # measurements for one network are reused for the next
        "trt_timing_cache_path": engines,
        "trt_fp16_enable": False,  # half precision would move joints; the gain is from fused kernels only
        **({} if options.arena_bytes is None else {"trt_max_workspace_size": options.arena_bytes}),
        **({} if stream is None else {"user_compute_stream": str(stream)}),
    }


def binding_device(provider: str, device: str, *, torch_cuda: bool) -> str | None:
    """Return torch's name of the device on which inputs and outputs are bound; None: they stay plain arrays.

    On the CPU binding saves nothing: arrays are already where the network reads them. On a GPU the buffers are torch's,
    so that one allocator counts all memory. If torch has no CUDA, onnxruntime copies the arrays itself.
    """
    if provider not in (CUDA, TENSORRT) or not torch_cuda:
        return None
    _, _, index = device.partition(":")
    return f"cuda:{int(index or 0)}"


def check_precision(precision: Precision, device: str) -> None:
    """Raise ConfigInvalid if a network of this precision cannot run on `device`."""
    if precision == "int8" and device != "cpu":
        raise ConfigInvalid(
            f"int8 networks run on the CPU only, but the device is {device}",
            where="--pose-precision",
            todo="Use --pose-precision fp32, which is faster on a GPU",
        )


def has_tensorrt_libraries() -> bool:
    """Return True if TensorRT's libraries are installed, as wheels or in the system. Nothing is loaded."""
    return find_spec("tensorrt_libs") is not None or find_library("nvinfer") is not None


def usable_cpus(environment: Mapping[str, str] = os.environ, cgroup: Path = Path("/sys/fs/cgroup/cpu.max")) -> int:
    """Return the number of threads to start: OMP_NUM_THREADS, else the cores this process may use (affinity, quota)."""
    threads = environment.get("OMP_NUM_THREADS", "")
    if threads.isdigit() and int(threads) > 0:
        return int(threads)
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    try:
        quota, period = cgroup.read_text().split()
        if quota != "max":
            cores = min(cores, max(1, round(int(quota) / int(period))))
    except (OSError, ValueError):
        pass  # no cgroup v2 here, so no quota
    return cores


def onnxruntime_remedy() -> str:
    """Return what to install, by which of the two distributions of the module are installed."""
    installed = {name for name in ("onnxruntime", "onnxruntime-gpu") if _installed(name)}
    if installed == {"onnxruntime", "onnxruntime-gpu"}:
        return (
            "Both onnxruntime and onnxruntime-gpu are installed and overwrite each other: uninstall both, "
            "then install onnxruntime-gpu alone (the extra `gpu`)."
        )
    if installed == {"onnxruntime"}:
        return "Uninstall onnxruntime (CPU build), then install onnxruntime-gpu (the extra `gpu`)."
    if installed == {"onnxruntime-gpu"}:
        return (
            "onnxruntime-gpu is installed: check that its CUDA major version equals torch's and that the driver is "
            "new enough."
        )
    return "Install onnxruntime-gpu (the extra `gpu`)."


def _installed(distribution: str) -> bool:
    try:
        metadata.version(distribution)
    except metadata.PackageNotFoundError:
        return False
    return True


def opening_failed(err: Exception, file: Path, device: str) -> Exception:
    """Convert the runtime's exception into an error of this project, by its message: its types are private."""
    message = str(err)
    first = (message.splitlines() or [type(err).__name__])[0][:300]
    lower = message.lower()
    if any(part in lower for part in OUT_OF_MEMORY):
        return OutOfMemory(
            f"no memory to load the model on {device}", where=file, todo="Free memory on the device, or use another one"
        )
    if "external data path does not exist" in lower or "no such file" in lower:
        return WeightsMissing(
            f"the files with the graph's weights are missing ({first})",
            where=file,
            todo="Copy the whole folder, not only the .onnx file",
        )
    if device != "cpu" and any(part in lower for part in ("tensorrt", "nvinfer")):
        return ConfigInvalid(
            f"TensorRT did not start ({first})", where=file, todo="Reinstall it, or use --tensorrt off"
        )
    if device != "cpu" and any(part in lower for part in ("cuda", "cudnn")):
        return ConfigInvalid(f"CUDA did not start ({first})", where=file, todo=onnxruntime_remedy())
    size = file.stat().st_size
    return WeightsCorrupt(
        f"not a readable ONNX model of {size:,} bytes ({first})",
        where=file,
        todo="Fetch it again; a file of about 130 bytes is a Git LFS pointer, not the weights",
    )

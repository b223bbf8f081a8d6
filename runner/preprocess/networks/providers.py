"""Providers: which part of onnxruntime runs a network, and where its inputs and outputs lie, decided before opening.

In:   the device asked for, what this onnxruntime lists, what the run allows. Out: a `Choice`: providers in order, their
options, and why; the threads that a session gets; its opening errors as ours. Never: sessions: everything here can be
asked on any machine.

TensorRT is used only where a run asks for it. It picks its kernels by stopwatch, so that two machines of one kind would
give other bits; within one cache folder its engines are built once and stay.
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
# Words of the runtime's allocators, of CUDA and of its libraries; the third is that of an arena at its limit.
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
    """What a run says about its ONNX networks. Of the run, never of a job."""

    pose_precision: Precision = "fp32"
    tensorrt: TensorrtMode = "off"
    folder: Path | None = None  # for files made from the models: int8 networks, TensorRT engines
    arena_bytes: int | None = None  # GPU memory beside the weights, for a pair of networks; None: what they ask for


@dataclass(frozen=True)
class Choice:
    """Providers in order of preference. The session must have the first one; the rest takes what that cannot run."""

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
    """Providers for "cpu", "cuda" or "cuda:N".

    available: `onnxruntime.get_available_providers()`, which lists what a build could load, whether or not it does;
    tensorrt_libraries: are TensorRT's own libraries there; remedy: what to install where CUDA is not listed;
    memory_limit: GPU bytes that the session may hold, weights included; stream: address of the CUDA stream to use.
    Raises ConfigInvalid where the device, or the TensorRT that was insisted on, cannot be had.
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
            "cudnn_conv_algo_search": "HEURISTIC",  # EXHAUSTIVE picks by stopwatch: other bits on another day
            **({} if memory_limit is None else {"gpu_mem_limit": memory_limit}),
            **({} if stream is None else {"user_compute_stream": str(stream)}),
        },
    )
    reason = f"the device asked for is {device}"
    if options.tensorrt == "off":
        return Choice((cuda,), reason)
    lacking = _lacking(available, options.folder, tensorrt_libraries)
    if not lacking:
        assert options.folder is not None
        return Choice(
            ((TENSORRT, _engine_options(number, options, stream)), cuda),
            f"{reason}, with TensorRT ({options.tensorrt})",
        )
    if options.tensorrt == "on":
        raise ConfigInvalid(
            f"TensorRT was asked for, but {lacking}",
            todo="Install the TensorRT that this onnxruntime-gpu was built with, or use --tensorrt auto",
        )
    return Choice((cuda,), f"{reason}; no TensorRT: {lacking}")


def _lacking(available: Sequence[str], folder: Path | None, libraries: bool) -> str:
    """What TensorRT needs and is not there, in words; empty if it has all."""
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
        "trt_timing_cache_enable": True,  # what was measured for one network serves the next
        "trt_timing_cache_path": engines,
        "trt_fp16_enable": False,  # half precision would move joints; speed comes from fusing alone
        **({} if options.arena_bytes is None else {"trt_max_workspace_size": options.arena_bytes}),
        **({} if stream is None else {"user_compute_stream": str(stream)}),
    }


def binding_device(provider: str, device: str, *, torch_cuda: bool) -> str | None:
    """Where inputs and outputs are bound, as torch names it; None: arrays are handed over and come back.

    On the CPU there is nothing to gain: arrays are already where the network reads them. torch holds the buffers on the
    GPU, so that one allocator knows of all memory; where it has no CUDA, onnxruntime copies by itself.
    """
    if provider not in (CUDA, TENSORRT) or not torch_cuda:
        return None
    _, _, index = device.partition(":")
    return f"cuda:{int(index or 0)}"


def check_precision(precision: Precision, device: str) -> None:
    """Raises ConfigInvalid where a network of this precision cannot run on `device`."""
    if precision == "int8" and device != "cpu":
        raise ConfigInvalid(
            f"int8 networks run on the CPU only, and the device is {device}",
            where="--pose-precision",
            todo="Use --pose-precision fp32; a GPU is faster with it",
        )


def has_tensorrt_libraries() -> bool:
    """Are TensorRT's libraries installed, as wheels or in the system? Nothing is loaded."""
    return find_spec("tensorrt_libs") is not None or find_library("nvinfer") is not None


def usable_cpus(environment: Mapping[str, str] = os.environ, cgroup: Path = Path("/sys/fs/cgroup/cpu.max")) -> int:
    """Threads worth starting: OMP_NUM_THREADS if set, else the cores this process may use, by affinity and by quota."""
    asked = environment.get("OMP_NUM_THREADS", "")
    if asked.isdigit() and int(asked) > 0:
        return int(asked)
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    try:
        quota, period = cgroup.read_text().split()
        if quota != "max":
            cores = min(cores, max(1, round(int(quota) / int(period))))
    except (OSError, ValueError):
        pass  # no cgroup v2 here: the affinity is all there is to know
    return cores


def onnxruntime_remedy() -> str:
    """What to install, given which of the two distributions of the one module are there."""
    there = {name for name in ("onnxruntime", "onnxruntime-gpu") if _installed(name)}
    if there == {"onnxruntime", "onnxruntime-gpu"}:
        return (
            "Both onnxruntime and onnxruntime-gpu are installed and overwrite each other: uninstall both, "
            "then install onnxruntime-gpu alone (the extra `gpu`)."
        )
    if there == {"onnxruntime"}:
        return "Uninstall onnxruntime (CPU build), then install onnxruntime-gpu (the extra `gpu`)."
    if there == {"onnxruntime-gpu"}:
        return "onnxruntime-gpu is there: check that its CUDA major version is torch's and the driver new enough."
    return "Install onnxruntime-gpu (the extra `gpu`)."


def _installed(distribution: str) -> bool:
    try:
        metadata.version(distribution)
    except metadata.PackageNotFoundError:
        return False
    return True


def opening_failed(err: Exception, file: Path, device: str) -> Exception:
    """The runtime's exception as one of ours. Its types are private, its words are stable."""
    words = str(err)
    first = (words.splitlines() or [type(err).__name__])[0][:300]
    lower = words.lower()
    if any(w in lower for w in OUT_OF_MEMORY):
        return OutOfMemory(f"no memory to load the model on {device}", where=file, todo="Free the device")
    if "external data path does not exist" in lower or "no such file" in lower:
        return WeightsMissing(
            f"weights beside the graph are missing ({first})",
            where=file,
            todo="Copy the whole folder, not the .onnx alone",
        )
    if device != "cpu" and any(w in lower for w in ("tensorrt", "nvinfer")):
        return ConfigInvalid(
            f"TensorRT did not start ({first})", where=file, todo="Install it anew, or use --tensorrt off"
        )
    if device != "cpu" and any(w in lower for w in ("cuda", "cudnn")):
        return ConfigInvalid(f"CUDA did not start ({first})", where=file, todo=onnxruntime_remedy())
    size = file.stat().st_size
    return WeightsCorrupt(
        f"not a readable ONNX model of {size:,} bytes ({first})",
        where=file,
        todo="Fetch it again; a file of about 130 bytes is a Git LFS pointer, not the weights",
    )

from __future__ import annotations

import weakref
from pathlib import Path

import pytest
import torch
from structlog.testing import capture_logs

from runner.errors import ConfigInvalid, OutOfMemory
from runner.generation.runtime.device import (
    as_out_of_memory,
    cudnn_problem,
    cudnn_version,
    grow_segments,
    hardware_model,
    make_probe,
    pick_device,
)
from runner.generation.runtime.memory_plan import make_plan
from runner.generation.wan_animate.loading import check_cudnn
from runner.spec.recipes import get_recipe
from runner.timing import StageTimer

CPU = torch.device("cpu")
without_cuda = pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without CUDA")


@without_cuda
def test_auto_says_why_it_is_the_cpu():
    device, why = pick_device("auto")
    assert device.type == "cpu"
    assert "no CUDA device" in why


@without_cuda
@pytest.mark.parametrize("asked", ["cuda", "cuda:0"])
def test_cuda_is_never_quietly_the_cpu(asked):
    with pytest.raises(ConfigInvalid, match="was asked for, but"):
        pick_device(asked)


@pytest.mark.parametrize("asked", ["tpu", "cuda:x", "", "mps"])
def test_unknown_devices(asked):
    with pytest.raises(ConfigInvalid, match="auto, cpu, cuda"):
        pick_device(asked)


# As torch writes them: 90800 for 9.8.0. torch 2.9 to 2.13 go round those from 9.8 up to 9.14 (Convolution.cpp).
@pytest.mark.parametrize(
    ("number", "name", "avoided"),
    [
        (90_701, "9.7.1", False),
        (90_800, "9.8.0", True),
        (91_002, "9.10.2", True),
        (91_400, "9.14.0", True),
        (91_500, "9.15.0", False),
        (92_000, "9.20.0", False),
    ],
)
def test_a_cudnn_that_torch_avoids_has_a_reason(number, name, avoided):
    assert cudnn_version(number) == name
    problem = cudnn_problem(number)
    assert (problem is not None) == avoided
    assert not avoided or f"cuDNN {name} " in problem


def test_without_cudnn_there_is_nothing_to_say():
    assert cudnn_problem(None) is None


def test_a_model_on_a_gpu_says_which_cudnn_it_has(monkeypatch):
    """And warns where its convolutions have 16 bits: the patches' embedding always, the autoencoder where asked."""
    gpu, stream = torch.device("cuda", 0), make_plan("stream", get_recipe("fp4-distill"))
    for number, recipe, problem in (
        (91_002, "fp4-distill", True),
        (91_002, "fp32", False),
        (92_000, "fp4-distill+bf16-vae", False),
    ):
        monkeypatch.setattr(torch.backends.cudnn, "version", lambda number=number: number)
        with capture_logs() as events:
            said = check_cudnn(gpu, get_recipe(recipe), stream)
        assert said["cudnn"] == cudnn_version(number)
        assert said.get("cudnn_problem") == (cudnn_problem(number) if problem else None)
        assert [event["event"] for event in events] == ["cudnn_is_avoided"] * problem
    assert check_cudnn(CPU, get_recipe("fp4-distill"), stream) == {}


def test_the_cpu_when_asked_for():
    assert pick_device("cpu") == (CPU, "asked for")
    assert make_probe(CPU) is None


@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB\nmore"),
        MemoryError(),
        RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"),
        RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes"),
    ],
)
def test_exhausted_memory_is_known_in_every_form(error):
    found = as_out_of_memory(error, CPU, doing="rendering")
    assert isinstance(found, OutOfMemory)
    assert found.retryable
    assert "max_segment_frames" in found.message
    assert "\n" not in found.message


@pytest.mark.parametrize("error", [RuntimeError("shapes cannot be multiplied"), ValueError("out of memory")])
def test_other_errors_are_not(error):
    assert as_out_of_memory(error, CPU, doing="rendering") is None


def test_what_the_failed_call_held_is_let_go():
    held = []

    def fail() -> None:
        big = torch.zeros(4)
        held.append(weakref.ref(big))
        raise torch.OutOfMemoryError("CUDA out of memory")

    with pytest.raises(torch.OutOfMemoryError) as caught:
        fail()
    assert held[0]() is not None  # the traceback holds it
    as_out_of_memory(caught.value, CPU, doing="rendering")
    assert held[0]() is None


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
def test_the_probe_reads_the_allocator():
    device, _why = pick_device("cuda")
    timer = StageTimer(probe=make_probe(device))
    with timer.stage("small", on_device=True):
        torch.zeros(2**20, dtype=torch.uint8, device=device)
    with timer.stage("large", on_device=True):
        torch.zeros(2**26, dtype=torch.uint8, device=device)
    assert timer.peaks["large"]["allocated"] >= 2**26
    assert timer.peaks["small"]["allocated"] < timer.peaks["large"]["allocated"]
    assert timer.peaks["large"]["reserved"] >= timer.peaks["large"]["allocated"]


def test_segments_grow_unless_the_environment_sets_the_allocator(monkeypatch):
    """torch itself takes the word; there is no device that would act on it here."""
    for name in ("PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF"):
        monkeypatch.delenv(name, raising=False)
    device = torch.device("cuda", 0)
    try:
        assert not grow_segments(CPU)
        assert grow_segments(device)
        assert "expandable_segments:True" in torch._C._accelerator_getAllocatorSettings()
    finally:
        torch._C._accelerator_setAllocatorSettings("expandable_segments:False")
    monkeypatch.setenv("PYTORCH_CUDA_ALLOC_CONF", "max_split_size_mb:512")
    assert not grow_segments(device)


def test_the_hardware_is_the_gpu_or_the_cpu_with_its_instructions_and_threads(monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "NVIDIA H200")
    assert hardware_model(torch.device("cuda", 0)) == "NVIDIA H200"
    monkeypatch.setattr(torch, "get_num_threads", lambda: 3)
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: "AVX2")
    monkeypatch.setattr(Path, "read_text", lambda _: "processor\t: 0\nmodel name\t: Some CPU\nmodel name\t: B\n")
    assert hardware_model(torch.device("cpu")) == "Some CPU, AVX2, 3 threads"
    monkeypatch.setattr(Path, "read_text", lambda _: "Processor: none that has a name")
    monkeypatch.setattr("platform.processor", lambda: "aarch64")
    assert hardware_model(torch.device("cpu")) == "aarch64, AVX2, 3 threads"

"""Providers: what is chosen for every machine that can be described, without any of them."""

import pytest

from runner.errors import ConfigInvalid
from runner.preprocess.networks.providers import (
    CPU,
    CUDA,
    TENSORRT,
    NetworkOptions,
    binding_device,
    choose_providers,
    has_tensorrt_libraries,
    usable_cpus,
)

GPU_BUILD = [TENSORRT, CUDA, CPU]  # what the CUDA wheel lists, whether or not TensorRT is installed


def choose(device, available=GPU_BUILD, libraries=True, **options):
    return choose_providers(
        device, available, NetworkOptions(**options), tensorrt_libraries=libraries, remedy="Install onnxruntime-gpu"
    )


def test_the_cpu_is_taken_only_by_who_asks_for_it():
    choice = choose("cpu", tensorrt="auto")
    assert choice.providers == ((CPU, {}),)
    assert choice.reason == "the device asked for is cpu"
    with pytest.raises(ConfigInvalid, match=r"only \['CPUExecutionProvider'\].*Install onnxruntime-gpu"):
        choose("cuda", [CPU])


def test_cuda_is_deterministic_and_modest_and_alone():
    for device, number in (("cuda", 0), ("cuda:3", 3)):
        ((name, options),) = choose(device).providers  # no CPU behind it: what it cannot run is an error
        assert name == CUDA
        assert options["device_id"] == number
        assert options["cudnn_conv_algo_search"] == "HEURISTIC"
        assert options["arena_extend_strategy"] == "kSameAsRequested"


@pytest.mark.parametrize("mode", ["auto", "on"])
def test_tensorrt_keeps_its_engines_in_the_runs_folder_and_has_cuda_behind_it(tmp_path, mode):
    choice = choose("cuda:1", tensorrt=mode, folder=tmp_path)
    assert [name for name, _ in choice.providers] == [TENSORRT, CUDA]
    options = dict(choice.providers)[TENSORRT]
    assert options["device_id"] == dict(choice.providers)[CUDA]["device_id"] == 1
    assert options["trt_engine_cache_enable"] and options["trt_engine_cache_path"] == str(tmp_path / "tensorrt")
    assert not options["trt_fp16_enable"]
    assert f"TensorRT ({mode})" in choice.reason


@pytest.mark.parametrize(
    ("available", "libraries", "folder", "words"),
    [
        ([CUDA, CPU], True, "cache", "built without it"),
        (GPU_BUILD, False, "cache", "libnvinfer"),
        (GPU_BUILD, True, None, "no cache folder"),
    ],
)
def test_a_tensorrt_that_is_not_there_is_passed_by_or_an_error_and_either_says_why(available, libraries, folder, words):
    choice = choose("cuda", available, libraries, tensorrt="auto", folder=folder)
    assert choice.first == CUDA
    assert words in choice.reason
    with pytest.raises(ConfigInvalid, match=words):
        choose("cuda", available, libraries, tensorrt="on", folder=folder)
    assert "TensorRT" not in choose("cuda", available, libraries, folder=folder).reason  # nobody asked


def test_insisting_on_tensorrt_without_a_gpu():
    with pytest.raises(ConfigInvalid, match="needs a GPU"):
        choose("cpu", tensorrt="on")


@pytest.mark.parametrize("device", ["tpu", "cuda:x", "cpu:1", ""])
def test_no_such_device(device):
    with pytest.raises(ConfigInvalid, match="cuda:N"):
        choose(device)


@pytest.mark.parametrize(
    ("provider", "device", "torch_cuda", "where"),
    [
        (CPU, "cpu", False, None),
        (CPU, "cpu", True, None),
        (CUDA, "cuda", True, "cuda:0"),
        (CUDA, "cuda:2", True, "cuda:2"),
        (TENSORRT, "cuda", True, "cuda:0"),
        (CUDA, "cuda", False, None),
        ("CoreMLExecutionProvider", "cpu", False, None),
    ],
)
def test_where_inputs_and_outputs_are_bound(provider, device, torch_cuda, where):
    assert binding_device(provider, device, torch_cuda=torch_cuda) == where


def test_looking_for_tensorrts_libraries_loads_nothing(monkeypatch):
    from runner.preprocess.networks import providers

    monkeypatch.setattr(providers, "find_spec", lambda name: None)
    monkeypatch.setattr(providers, "find_library", lambda name: None)
    assert not has_tensorrt_libraries()
    monkeypatch.setattr(providers, "find_library", {"nvinfer": "libnvinfer.so.10"}.get)
    assert has_tensorrt_libraries()
    monkeypatch.setattr(providers, "find_library", lambda name: None)
    monkeypatch.setattr(providers, "find_spec", {"tensorrt_libs": object()}.get)
    assert has_tensorrt_libraries()


def test_threads_follow_affinity_quota_and_the_user(tmp_path):
    cores = usable_cpus({}, tmp_path / "none")
    assert cores >= 1
    assert usable_cpus({"OMP_NUM_THREADS": "3"}, tmp_path / "none") == 3
    (tmp_path / "cpu.max").write_text("100000 100000\n")
    assert usable_cpus({}, tmp_path / "cpu.max") == 1
    (tmp_path / "cpu.max").write_text("max 100000\n")
    assert usable_cpus({"OMP_NUM_THREADS": "auto"}, tmp_path / "cpu.max") == cores

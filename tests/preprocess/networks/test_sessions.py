"""Opening networks: the device that was asked for or an error, and damaged files."""

import subprocess
import sys
from dataclasses import replace

import numpy as np
import onnx
import onnxruntime
import pytest
import torch

from runner.errors import ConfigInvalid, OutOfMemory, WeightsCorrupt, WeightsMissing
from runner.preprocess.networks import providers, sessions
from runner.preprocess.networks.backends import open_backend
from runner.preprocess.networks.providers import NetworkOptions
from runner.preprocess.networks.sessions import open_network, open_session
from tests.preprocess.tiny_dwpose import build_simcc, build_yolox
from tests.preprocess.tiny_networks import build_detector, build_pose

NO_CUDA = "CUDAExecutionProvider" not in onnxruntime.get_available_providers()


def test_names_batch_and_reason_come_from_the_session(tmp_path):
    network = open_network(build_pose(tmp_path / "pose.onnx"))
    assert (network.input_name, network.output_name) == ("input", "heatmaps")
    assert network.batch is None
    assert network.output_shape == (None, 133, 64, 48)
    assert network.provider == "CPUExecutionProvider"
    assert "cpu" in network.reason
    assert open_network(build_detector(tmp_path / "d.onnx")).batch == 1


def test_a_folder_holds_end2end(tmp_path):
    build_pose(tmp_path / "vitpose_h_wholebody.onnx" / "end2end.onnx")
    network = open_network(tmp_path / "vitpose_h_wholebody.onnx")
    assert network.description["model"] == "vitpose_h_wholebody.onnx"


def test_missing(tmp_path):
    with pytest.raises(WeightsMissing, match=r"nowhere\.onnx.*process_checkpoint"):
        open_session(tmp_path / "nowhere.onnx")
    with pytest.raises(WeightsMissing, match=r"no end2end\.onnx"):
        open_session(tmp_path)


@pytest.mark.parametrize("content", [b"", b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n", None])
def test_corrupt(tmp_path, content):
    path = build_detector(tmp_path / "d.onnx")
    path.write_bytes(path.read_bytes()[:3000] if content is None else content)
    with pytest.raises(WeightsCorrupt, match="Fetch it again"):
        open_session(path)


def test_external_weights_missing_or_cut(tmp_path):
    plain = onnx.load(str(build_pose(tmp_path / "pose.onnx")))
    onnx.save(
        plain, str(tmp_path / "split.onnx"), save_as_external_data=True, location="weights.bin", size_threshold=1000
    )
    data = (tmp_path / "weights.bin").read_bytes()
    assert open_network(tmp_path / "split.onnx").input_name == "input"
    (tmp_path / "weights.bin").write_bytes(data[: len(data) // 2])
    with pytest.raises(WeightsCorrupt):
        open_session(tmp_path / "split.onnx")
    (tmp_path / "weights.bin").unlink()
    with pytest.raises(WeightsMissing, match="whole folder"):
        open_session(tmp_path / "split.onnx")


def test_no_such_device(tmp_path):
    path = build_detector(tmp_path / "d.onnx")
    for device in ("tpu", "cuda:x", "cpu:1"):
        with pytest.raises(ConfigInvalid, match="cuda:N"):
            open_session(path, device)


@pytest.mark.skipif(not NO_CUDA, reason="this onnxruntime has CUDA")
def test_cuda_on_a_cpu_build_is_an_error_not_a_slow_run(tmp_path):
    with pytest.raises(ConfigInvalid, match=r"only.*CPUExecutionProvider.*onnxruntime-gpu"):
        open_session(build_detector(tmp_path / "d.onnx"), "cuda")


@pytest.mark.skipif(not NO_CUDA, reason="this onnxruntime has CUDA")
@pytest.mark.filterwarnings("ignore:Specified provider")
def test_a_session_that_fell_back_is_found_out(tmp_path, monkeypatch):
    """As when the CUDA build is there but its libraries do not load: the runtime prints and goes on, on the CPU."""
    monkeypatch.setattr(onnxruntime, "get_available_providers", lambda: ["CUDAExecutionProvider"])
    with pytest.raises(ConfigInvalid, match="fell back to CPUExecutionProvider"):
        open_session(build_detector(tmp_path / "d.onnx"), "cuda:0")


@pytest.mark.parametrize(
    ("installed", "words"),
    [
        ({"onnxruntime", "onnxruntime-gpu"}, "overwrite each other"),
        ({"onnxruntime"}, r"Uninstall onnxruntime \(CPU build\)"),
        ({"onnxruntime-gpu"}, "CUDA major"),
        (set(), "Install onnxruntime-gpu"),
    ],
)
def test_the_remedy_knows_what_is_installed(monkeypatch, tmp_path, installed, words):
    monkeypatch.setattr(providers, "_installed", lambda name: name in installed)
    monkeypatch.setattr(onnxruntime, "get_available_providers", lambda: ["CPUExecutionProvider"])
    with pytest.raises(ConfigInvalid, match=words):
        open_session(build_detector(tmp_path / "d.onnx"), "cuda")


def test_a_constant_batch_is_filled_and_the_fill_dropped(tmp_path):
    images = np.random.default_rng(0).standard_normal((5, 3, 256, 192)).astype(np.float32)
    free = open_network(build_pose(tmp_path / "n.onnx")).run(images)
    for batch in (1, 2):
        fixed = open_network(build_pose(tmp_path / f"{batch}.onnx", batch)).run(images)
        assert fixed.shape == (5, 133, 64, 48)
        assert np.allclose(fixed, free, atol=1e-5)
    assert np.allclose(open_network(tmp_path / "n.onnx").run(images, most=2), free, atol=1e-5)


@pytest.mark.parametrize(("batch", "words"), [("N", "takes any number"), (1, "takes 1 at a time"), (2, "takes 2")])
def test_the_record_says_how_many_go_at_a_time(tmp_path, batch, words):
    for build in (build_pose, build_yolox, build_simcc):
        description = open_network(build(tmp_path / "n.onnx", batch)).description
        assert description["batch"] == (None if batch == "N" else batch)
        assert words in description["batching"]


def test_a_failing_run_is_not_repeated_on_another_provider(tmp_path):
    """The runtime's own fallback says so on stdout alone, and leaves a session on the CPU."""
    session, _ = open_session(build_pose(tmp_path / "n.onnx"))
    assert session._enable_fallback is False


def test_pictures_are_filled_into_memory_that_fits_the_device(tmp_path):
    images = open_network(build_pose(tmp_path / "n.onnx")).images(3, (3, 256, 192))
    assert (images.shape, images.dtype) == ((3, 3, 256, 192), np.float32)


@pytest.mark.filterwarnings("ignore:Specified provider")
def test_a_tensorrt_that_does_not_start_leaves_cuda_and_says_so(tmp_path, monkeypatch):
    """`auto`; with `on` it is an error. Which sessions start is told here; that CUDA is next in turn is asked for."""
    path, opened = build_pose(tmp_path / "n.onnx"), []
    real = onnxruntime.InferenceSession

    def start(file, settings, providers, **how):
        names = [name for name, _ in providers]
        opened.append(names)
        if names[0] == "TensorrtExecutionProvider":
            raise RuntimeError("Failed to load library libonnxruntime_providers_tensorrt.so")
        session = real(file, settings, providers=["CPUExecutionProvider"], **how)
        monkeypatch.setattr(session, "get_providers", lambda: names)
        return session

    monkeypatch.setattr(onnxruntime, "InferenceSession", start)
    monkeypatch.setattr(sessions, "has_tensorrt_libraries", lambda: True)
    listed = ["TensorrtExecutionProvider", "CUDAExecutionProvider", "CPUExecutionProvider"]
    monkeypatch.setattr(onnxruntime, "get_available_providers", lambda: listed)
    network = open_network(path, "cuda", NetworkOptions(tensorrt="auto", folder=tmp_path))
    assert network.provider == "CUDAExecutionProvider"
    assert "TensorRT did not start" in network.reason and "libonnxruntime_providers_tensorrt" in network.reason
    assert opened == [["TensorrtExecutionProvider", "CUDAExecutionProvider"], ["CUDAExecutionProvider"]]
    with pytest.raises(ConfigInvalid, match=r"libonnxruntime_providers_tensorrt.*--tensorrt off"):
        open_network(path, "cuda", NetworkOptions(tensorrt="on", folder=tmp_path))


def test_an_engine_is_shown_one_batch_size_only(tmp_path, monkeypatch):
    monkeypatch.setattr(sessions, "_started", lambda *_: onnxruntime.InferenceSession(str(path)))
    monkeypatch.setattr(onnxruntime, "get_available_providers", lambda: ["CUDAExecutionProvider"])
    monkeypatch.setattr(onnxruntime.InferenceSession, "get_providers", lambda _: ["TensorrtExecutionProvider"])
    path = build_pose(tmp_path / "n.onnx")
    images = np.random.default_rng(0).standard_normal((17, 3, 256, 192)).astype(np.float32)
    seen = []
    monkeypatch.setattr(sessions, "_bound", lambda *_: None)
    network = open_network(path, "cuda", at_once=16)
    assert network.batch == 16
    real = network.session.run
    monkeypatch.setattr(
        network.session, "run", lambda names, feeds: seen.append(len(feeds["input"])) or real(names, feeds)
    )
    assert network.run(images).shape[0] == 17
    assert seen == [16, 16]


class FewAtOnce:
    """A session that runs out of memory where it is given more than `most` images; `seen`: what it was given."""

    def __init__(self, session, most):
        self._session, self._most, self.seen = session, most, []

    def run(self, names, feeds):
        count = len(feeds["input"])
        self.seen.append(count)
        if count > self._most:
            raise RuntimeError("Available memory of 2451456 is smaller than requested bytes of 25165824")
        return self._session.run(names, feeds)


def test_where_memory_is_short_a_batch_is_halved(tmp_path):
    whole = replace(open_network(build_pose(tmp_path / "n.onnx")), at_once=16)
    images = np.random.default_rng(0).standard_normal((19, 3, 256, 192)).astype(np.float32)
    few = FewAtOnce(whole.session, 5)
    np.testing.assert_array_equal(replace(whole, session=few).run(images), whole.run(images))
    assert few.seen == [16, 8, 4, 4, 8, 4, 4, 3]
    with pytest.raises(OutOfMemory):
        replace(whole, session=FewAtOnce(whole.session, 0)).run(images[:3])
    fixed = open_network(build_pose(tmp_path / "2.onnx", 2))  # takes two and nothing else
    with pytest.raises(OutOfMemory):
        replace(fixed, session=FewAtOnce(fixed.session, 1)).run(images[:3])


ARENA = """
import sys
import numpy as np, onnxruntime
from dataclasses import replace
from onnxruntime.capi import _pybind_state as private
from pathlib import Path
from runner.errors import OutOfMemory
from runner.preprocess.networks.sessions import open_network

place = private.OrtMemoryInfo("Cpu", private.OrtAllocatorType.ORT_ARENA_ALLOCATOR, 0, private.OrtMemType.DEFAULT)
limit = {"max_mem": int(sys.argv[2]), "arena_extend_strategy": 1, "initial_chunk_size_bytes": 1 << 20}
onnxruntime.create_and_register_allocator(place, onnxruntime.OrtArenaCfg(limit))
network = replace(open_network(Path(sys.argv[1])), at_once=16)
settings = onnxruntime.SessionOptions()
settings.log_severity_level, settings.enable_mem_pattern = 4, False
settings.add_session_config_entry("session.use_env_allocators", "1")
session = onnxruntime.InferenceSession(sys.argv[1], settings, providers=["CPUExecutionProvider"])
images = np.random.default_rng(0).standard_normal((16, 3, 256, 192)).astype(np.float32)
try:
    same = np.array_equal(replace(network, session=session).run(images), network.run(images))
    print("same" if same else "other")
except OutOfMemory as error:
    print(error)
try:
    session.run(None, {"input": images})
except Exception as error:
    print(type(error).__name__)
"""


@pytest.mark.parametrize(("limit", "words"), [(20_000_000, "same"), (3_000_000, "n.onnx ran out of memory")])
def test_the_runtimes_own_arena_at_its_limit(tmp_path, limit, words):
    """The runtime's real exception and its real words, on the CPU: its arena is that of a GPU. In a process of its own,
    as the allocator that is registered is the process's."""
    path = build_pose(tmp_path / "n.onnx")
    done = subprocess.run(
        [sys.executable, "-c", ARENA, str(path), str(limit)], capture_output=True, text=True, timeout=120, check=False
    )
    assert words in done.stdout, done.stdout + done.stderr
    assert done.stdout.splitlines()[-1] == "Fail"  # a batch of 16 is more than the arena may hold


@pytest.mark.parametrize("words", ["CUDNN_STATUS_ALLOC_FAILED", "CUDA failure 2: out of memory ; GPU=0"])
def test_words_of_cudas_libraries_are_exhausted_memory_too(tmp_path, words):
    class Full:
        def run(self, *_):
            raise RuntimeError(f"Non-zero status code returned while running Conv node. {words}")

    network = open_network(build_detector(tmp_path / "d.onnx"))
    with pytest.raises(OutOfMemory):
        replace(network, session=Full()).run(np.zeros((1, 3, 640, 640), np.float32))


@pytest.fixture
def on_cuda(monkeypatch):
    """A machine on which CUDA sessions start, on the CPU: (file, choice, session options) of each."""
    started, real = [], onnxruntime.InferenceSession

    def start(file, settings, providers, **how):
        session = real(file, settings, providers=["CPUExecutionProvider"], **how)
        started.append((file, dict(providers), settings))
        monkeypatch.setattr(session, "get_providers", lambda: [name for name, _ in providers])
        return session

    monkeypatch.setattr(onnxruntime, "InferenceSession", start)
    monkeypatch.setattr(onnxruntime, "get_available_providers", lambda: ["CUDAExecutionProvider"])
    return started


def test_on_a_gpu_a_network_computes_on_a_stream_of_torchs_that_is_kept(tmp_path, on_cuda, monkeypatch):
    made = []

    class Stream:
        def __init__(self, device):
            made.append(self)
            self.device, self.cuda_stream = device, 4096 + len(made)

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "Stream", Stream)
    path = build_pose(tmp_path / "n.onnx")
    networks = [open_network(path, device) for device in ("cuda", "cuda:1")]
    assert [stream.device for stream in made] == ["cuda:0", "cuda:1"]
    for network, stream, (_, chosen, settings) in zip(networks, made, on_cuda, strict=True):
        assert network.session.stream is stream
        assert chosen["CUDAExecutionProvider"]["user_compute_stream"] == str(stream.cuda_stream)
        assert settings.enable_mem_pattern is False
    open_network(path)
    assert len(made) == 2


def test_both_networks_of_a_pair_stay_within_the_plan_on_a_gpu_and_take_their_batches(tmp_path, on_cuda):
    detector, pose = build_detector(tmp_path / "d.onnx"), build_pose(tmp_path / "p.onnx")
    pair = open_backend("vitpose", detector, pose, "cuda", NetworkOptions(arena_bytes=500_000_000))
    limits = [chosen["CUDAExecutionProvider"]["gpu_mem_limit"] for _, chosen, _ in on_cuda]
    assert sum(limits) == detector.stat().st_size + pose.stat().st_size + 500_000_000
    assert limits[1] - pose.stat().st_size == 300_000_000
    assert (pair.detector.network.at_once, pair.pose.network.at_once) == (1, 16)
    assert pair.description["pose"]["batching"] == "the graph takes any number, and gets 16 at a time"
    on_cuda.clear()
    open_backend("vitpose", detector, pose, "cuda")
    assert all("gpu_mem_limit" not in chosen["CUDAExecutionProvider"] for _, chosen, _ in on_cuda)


def test_on_the_cpu_one_image_goes_at_a_time(tmp_path):
    assert open_network(build_pose(tmp_path / "n.onnx"), at_once=16).at_once == 1


def test_exhausted_memory_has_its_code(tmp_path):
    network = open_network(build_detector(tmp_path / "d.onnx"))

    class Full:
        def run(self, *_):
            raise RuntimeError("BFCArena::AllocateRawInternal Failed to allocate memory for requested buffer of size 1")

    with pytest.raises(OutOfMemory, match=r"d\.onnx ran out of memory"):
        sessions.Network(**{**vars(network), "session": Full()}).run(np.zeros((1, 3, 640, 640), np.float32))

"""Opening networks: the device that was asked for or an error, and damaged files."""

import numpy as np
import onnx
import onnxruntime
import pytest

from runner.errors import ConfigInvalid, OutOfMemory, WeightsCorrupt, WeightsMissing
from runner.preprocess.networks import providers, sessions
from runner.preprocess.networks.providers import ENGINE_BATCH, NetworkOptions
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
    monkeypatch.setattr(onnxruntime.InferenceSession, "get_providers", lambda _: ["TensorrtExecutionProvider"])
    path = build_pose(tmp_path / "n.onnx")
    assert open_network(path).batch == ENGINE_BATCH
    images = np.random.default_rng(0).standard_normal((ENGINE_BATCH + 1, 3, 256, 192)).astype(np.float32)
    seen = []
    network = open_network(path)
    real = network.session.run
    monkeypatch.setattr(
        network.session, "run", lambda names, feeds: seen.append(len(feeds["input"])) or real(names, feeds)
    )
    assert network.run(images).shape[0] == ENGINE_BATCH + 1
    assert seen == [ENGINE_BATCH, ENGINE_BATCH]


def test_exhausted_memory_has_its_code(tmp_path):
    network = open_network(build_detector(tmp_path / "d.onnx"))

    class Full:
        def run(self, *_):
            raise RuntimeError("BFCArena::AllocateRawInternal Failed to allocate memory for requested buffer of size 1")

    with pytest.raises(OutOfMemory, match=r"d\.onnx ran out of memory"):
        sessions.Network(**{**vars(network), "session": Full()}).run(np.zeros((1, 3, 640, 640), np.float32))

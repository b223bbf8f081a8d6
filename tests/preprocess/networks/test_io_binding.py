"""Bound sessions: the same bits as the session's own `run`, on the CPU here, where binding works and gains nothing."""

from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import replace

import numpy as np
import pytest
import torch

from runner.preprocess.networks.io_binding import BoundSession, host_array, known_shape
from runner.preprocess.networks.providers import CUDA
from runner.preprocess.networks.rtmpose import SimccEstimator
from runner.preprocess.networks.sessions import Network, open_network
from runner.preprocess.networks.vitpose import PoseEstimator
from runner.preprocess.networks.yolov10 import Box, Detector
from tests.preprocess.tiny_dwpose import build_simcc, coloured_frame
from tests.preprocess.tiny_networks import build_detector, build_pose

CROP, INPUT = (3, 256, 192), (3, 384, 288)


def bound(network: Network) -> Network:
    return replace(network, session=BoundSession(network.session, "cpu"), host_device="cpu")


@pytest.fixture(scope="module")
def pose(tmp_path_factory) -> Network:
    return open_network(build_pose(tmp_path_factory.mktemp("bound") / "pose.onnx"))


def pictures(count: int, size: tuple[int, ...] = CROP, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal((count, *size)).astype(np.float32)


def test_bound_session_with_batches_of_any_size_gives_bits_of_run(pose):
    there = replace(bound(pose), at_once=16)
    for count in (2, 5, 1, 5, 8):  # the place grows twice, and is used in part twice
        images = pictures(count, seed=count)
        np.testing.assert_array_equal(there.run(images), pose.run(images))
    assert len(there.session._buffers["input"]) == 8


def test_bound_session_result_is_not_overwritten_by_next_run(pose):
    there = bound(pose)
    first = there.run(pictures(2))
    kept = first.copy()
    there.run(pictures(2, seed=1))
    np.testing.assert_array_equal(first, kept)


def test_bound_session_shared_by_threads_gives_right_results(pose):
    there, every = bound(pose), [pictures(1 + i % 3, seed=i) for i in range(12)]
    with ThreadPoolExecutor(4) as pool:
        got = list(pool.map(there.run, every))
    for images, found in zip(every, got, strict=True):
        np.testing.assert_array_equal(found, pose.run(images))


@pytest.mark.parametrize("how", [{}, {"swapped": True}, {"declared": False}, {"batch": 2}])
def test_bound_session_with_two_outputs_gives_results_of_run(tmp_path, how):
    """`declared: False`: the joints are counted when the graph runs, so that the runtime must allocate the output."""
    session = open_network(build_simcc(tmp_path / "simcc.onnx", **how)).session
    images, names = pictures(2, INPUT), ["simcc_y", "simcc_x"]
    there = BoundSession(session, "cpu")
    for got, expected in zip(there.run(names, {"input": images}), session.run(names, {"input": images}), strict=True):
        np.testing.assert_array_equal(got, expected)
    assert ("simcc_x" in there._buffers) == how.get("declared", True)


class FakeStream:
    """Stands for a torch.cuda.Stream: within `torch.cuda.stream` of it, what is done is noted."""

    def __init__(self):
        self.done: list[str] = []
        self.current = False

    @contextmanager
    def entered(self):
        self.current = True
        yield
        self.current = False

    def synchronize(self):
        assert self.current
        self.done.append("wait for the stream")


class WatchedSession:
    """The session's own, on the CPU; notes the run, and fails where the whole device would be waited for."""

    def __init__(self, session, stream):
        self._session, self._stream = session, stream

    def __getattr__(self, name):
        return getattr(self._session, name)

    def io_binding(self):
        binding = self._session.io_binding()
        binding.synchronize_inputs = binding.synchronize_outputs = not_called
        return binding

    def run_with_iobinding(self, binding):
        assert self._stream.current
        self._session.run_with_iobinding(binding)
        self._stream.done.append("run")


def not_called(*_):
    pytest.fail("waits for more than the network's own stream")


@pytest.mark.parametrize("declared", [True, False])
def test_bound_session_on_gpu_uses_and_waits_for_own_stream_only(tmp_path, monkeypatch, declared):
    """`declared: False`: the runtime allocates the output, and copies it to the host itself."""
    stream, copied = FakeStream(), torch.Tensor.copy_

    def copy(tensor, source, non_blocking=False):
        assert stream.current and non_blocking
        stream.done.append("copy")
        return copied(tensor, source)

    monkeypatch.setattr(torch.cuda, "stream", lambda chosen: chosen.entered())
    monkeypatch.setattr(torch.Tensor, "copy_", copy)
    for name in ("synchronize", "current_stream"):
        monkeypatch.setattr(torch.cuda, name, not_called)
    session = open_network(build_simcc(tmp_path / "simcc.onnx", declared=declared)).session
    there = BoundSession(WatchedSession(session, stream), "cpu", stream)
    feeds = {"input": pictures(2, INPUT)}
    found = there.run(["simcc_x", "simcc_y"], feeds)
    copies = ["copy"] * len([name for name in ("simcc_x", "simcc_y") if name in there._buffers])
    assert stream.done == ["copy", "run", *copies, "wait for the stream"]
    assert len(copies) == 2 * declared
    for got, expected in zip(found, session.run(["simcc_x", "simcc_y"], feeds), strict=True):
        np.testing.assert_array_equal(got, expected)


def test_finders_with_bound_session_give_same_results(tmp_path):
    frames = np.stack([coloured_frame((192, 144), [(60, 50), (80, 60), (60, 110), None])] * 3)
    boxes = [Box(40, 30, 100, 130, 0.9), None, Box(50, 30, 90, 120, 0.9)]
    networks = {
        Detector: open_network(build_detector(tmp_path / "d.onnx")),
        PoseEstimator: open_network(build_pose(tmp_path / "p.onnx", 2)),
        SimccEstimator: open_network(build_simcc(tmp_path / "s.onnx", 1)),
    }
    for kind, network in networks.items():
        ours, plain = kind(bound(network)), kind(network)
        if kind is Detector:
            np.testing.assert_array_equal(ours.rows(list(frames)), plain.rows(list(frames)))
        else:
            np.testing.assert_array_equal(ours.points(frames, boxes), plain.points(frames, boxes))


def test_bound_session_has_providers_inputs_and_outputs_of_session(pose):
    there = BoundSession(pose.session, "cpu")
    assert there.get_providers() == pose.session.get_providers()
    assert [item.name for item in there.get_inputs()] == ["input"]
    assert [item.name for item in there.get_outputs()] == ["heatmaps"]


@pytest.mark.parametrize(
    ("declared", "sizes", "shape"),
    [
        ((2, 133, 64), {}, (2, 133, 64)),
        (("n", 133, 64), {"n": 5}, (5, 133, 64)),
        (("m", 133), {"n": 5}, None),
        ((None, 133), {"n": 5}, None),
        (("n", -1), {"n": 5}, None),
        ((), {}, None),
        (None, {}, None),
    ],
)
def test_known_shape_with_unknown_size_is_none(declared, sizes, shape):
    assert known_shape(declared, sizes) == shape


def test_host_array_without_gpu_is_plain_array():
    for device in (None, "cpu"):
        array = host_array((2, *CROP), np.float32, device)
        assert (array.shape, array.dtype, array.flags.c_contiguous) == ((2, *CROP), np.float32, True)


@pytest.mark.gpu
def test_bound_session_on_gpu_gives_bits_of_run_from_page_locked_memory(tmp_path):
    import onnxruntime
    import torch

    if not (torch.cuda.is_available() and CUDA in onnxruntime.get_available_providers()):
        pytest.skip("no CUDA device, or an onnxruntime without CUDA")
    network = open_network(build_pose(tmp_path / "pose.onnx"), "cuda")
    assert isinstance(network.session, BoundSession) and network.provider == CUDA
    images = network.images(3, CROP)
    assert torch.from_numpy(images).is_pinned()
    for count in (3, 1, 2):
        images[:count] = pictures(count, seed=count)
        expected = network.session.session.run(None, {"input": images[:count]})[0]
        np.testing.assert_array_equal(network.run(images[:count]), expected)

"""Pose batches: the pose network gets full batches, however few pictures are decoded at once, and the points stay."""

from dataclasses import replace

import numpy as np
import pytest

from runner.preprocess import geometry
from runner.preprocess.networks.backends import POSE_BATCH, open_backend
from runner.preprocess.networks.providers import CUDA, NetworkOptions
from runner.preprocess.networks.rtmpose import SimccEstimator
from runner.preprocess.networks.sessions import open_network
from runner.preprocess.networks.vitpose import PoseEstimator
from runner.preprocess.networks.yolov10 import Box
from runner.preprocess.pose_batches import PoseBatches
from runner.preprocess.prepare import Preprocessor
from runner.spec.options import JobOptions
from tests.preprocess.conftest import HEIGHT, WIDTH, disc_frame
from tests.preprocess.tiny_dwpose import build_simcc, coloured_frame
from tests.preprocess.tiny_networks import build_detector, build_pose

FRAMES = 50
PLACES = [(30 + 2 * i, 64) for i in range(FRAMES)]


class CountedSession:
    """A session that notes how many images each run had."""

    def __init__(self, session):
        self._session, self.counts = session, []

    def run(self, names, feeds):
        self.counts.append(len(feeds["input"]))
        return self._session.run(names, feeds)


def on_a_gpu(estimator):
    """The same on the CPU, in batches as on a GPU; and its runs."""
    counted = CountedSession(estimator.network.session)
    network = replace(estimator.network, session=counted, at_once=POSE_BATCH)
    return type(estimator)(network), counted.counts


@pytest.mark.parametrize("given", [{}, {"parity": True}, {"detect_every": 7}], ids=str)
@pytest.mark.parametrize("frames", [1, 3, 4, 16])
def test_batches_are_full_whatever_the_window_of_decoding(
    preprocessor, reference, tmp_path, make_clip, monkeypatch, frames, given
):
    path = make_clip(tmp_path / "clip.mp4", PLACES)
    options = JobOptions(fps="source", size="240x160", preprocess=given)
    expected = preprocessor.prepare(reference, path, options).track.points
    monkeypatch.setattr(geometry, "WINDOW_BYTES", frames * WIDTH * HEIGHT * 3)
    assert geometry.frames_at_once(WIDTH, HEIGHT) == frames
    pose, counts = on_a_gpu(preprocessor.pose)
    found = Preprocessor(preprocessor.detector, pose).prepare(reference, path, options).track.points
    np.testing.assert_array_equal(found, expected)
    assert sum(counts) == FRAMES
    passes = 2 if len(counts) > 4 else 1  # a second one poses what the guess of the first one missed
    assert len([count for count in counts if count < POSE_BATCH]) <= passes
    if not given:
        assert counts == [16, 16, 16, 2]


@pytest.mark.parametrize("backend", ["vitpose", "dwpose"])
def test_points_are_those_of_one_call_and_crops_alone_are_held(tmp_path, backend):
    if backend == "vitpose":
        frames = np.stack([disc_frame(place) for place in PLACES])
        estimator = PoseEstimator(open_network(build_pose(tmp_path / "p.onnx")))
    else:
        frames = np.stack([coloured_frame((WIDTH, HEIGHT), [place] * 4) for place in PLACES])
        estimator = SimccEstimator(open_network(build_simcc(tmp_path / "p.onnx")))
    boxes = [Box(x - 20, y - 20, x + 20, y + 20, 0.9) if x % 3 else None for x, y in PLACES]
    points = np.full((FRAMES, 133, 3), np.nan, np.float32)
    batches = PoseBatches(estimator, points, bgr=True)
    for start in range(0, FRAMES, 3):
        window = frames[start : start + 3].copy()
        numbers = np.arange(start, start + len(window))[::-1]
        batches.add(numbers, window[::-1], boxes[start : start + 3][::-1])
        window[:] = 0  # the decoder's memory, used again
        assert np.isfinite(points[:, 0, 0]).sum() == (start + len(window)) // 16 * 16
    batches.finish()
    batches.finish()
    np.testing.assert_array_equal(points, estimator.points(frames, boxes, bgr=True))


@pytest.mark.parametrize(("batch", "size"), [(1, 16), (2, 16), (3, 15), (8, 16), (20, 20)])
def test_a_graph_of_constant_batch_gets_whole_batches(tmp_path, batch, size):
    estimator = PoseEstimator(open_network(build_pose(tmp_path / "p.onnx", batch)))
    assert PoseBatches(estimator, np.zeros((1, 133, 3), np.float32), bgr=False).size == size


@pytest.mark.gpu
def test_on_a_gpu_batches_give_the_same_points_and_wait_for_no_other_work(tmp_path):
    """Products are queued on torch's default stream, as a denoising is: the poses are there before they are done."""
    import onnxruntime
    import torch

    if not (torch.cuda.is_available() and CUDA in onnxruntime.get_available_providers()):
        pytest.skip("no CUDA device, or an onnxruntime without CUDA")
    networks = build_detector(tmp_path / "d.onnx"), build_pose(tmp_path / "p.onnx")
    estimator = open_backend("vitpose", *networks, "cuda", NetworkOptions(arena_bytes=500_000_000)).pose
    assert estimator.network.at_once == POSE_BATCH
    frames, boxes = np.stack([disc_frame(place) for place in PLACES]), [None] * FRAMES
    alone = PoseEstimator(replace(estimator.network, at_once=1)).points(frames, boxes)
    np.testing.assert_allclose(estimator.points(frames, boxes), alone, atol=1e-3)
    one = torch.ones(8192, 8192, device="cuda")
    one @ one
    torch.cuda.synchronize()
    for _ in range(100):  # 1.1 TFLOP each: a second or more in float32
        one @ one
    done = torch.cuda.Event()
    done.record()
    again = estimator.points(frames, boxes)
    assert not done.query(), "the poses came only after the products"
    np.testing.assert_allclose(again, alone, atol=1e-3)
    torch.cuda.synchronize()

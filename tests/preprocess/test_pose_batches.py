"""Pose batches: the pose network gets full batches, however few pictures are decoded at once, and the points stay."""

from dataclasses import replace

import numpy as np
import pytest

from runner.preprocess import geometry
from runner.preprocess.networks.backends import POSE_BATCH
from runner.preprocess.networks.rtmpose import SimccEstimator
from runner.preprocess.networks.sessions import open_network
from runner.preprocess.networks.vitpose import PoseEstimator
from runner.preprocess.networks.yolov10 import Box
from runner.preprocess.pose_batches import PoseBatches
from runner.preprocess.prepare import Preprocessor
from runner.spec.options import JobOptions
from tests.preprocess.conftest import HEIGHT, WIDTH, disc_frame
from tests.preprocess.tiny_dwpose import build_simcc, coloured_frame
from tests.preprocess.tiny_networks import build_pose

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

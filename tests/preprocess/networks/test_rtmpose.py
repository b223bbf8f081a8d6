"""RTMPose: bins worked by hand, and joints found through the crop and back to the pixel they were drawn at."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from runner.errors import WeightsCorrupt, WeightsMissing
from runner.preprocess.body.keypoints import Pose
from runner.preprocess.body.skeleton import THRESHOLD
from runner.preprocess.networks.rtmpose import MEAN, STD, SimccEstimator, confidence_of, decode_simcc, network_input
from runner.preprocess.networks.vitpose import Crop, crop_of
from runner.preprocess.networks.yolov10 import Box
from tests.preprocess.tiny_dwpose import X_PEAK, Y_PEAK, build_simcc, build_yolox, coloured_frame
from tests.preprocess.tiny_networks import build_pose

UNIT_CROP = Crop(144, 192, 288, 384)  # the input's pixels are the frame's


def peaks(x: int, y: int, x_peak: float = 1.0, y_peak: float = 1.0) -> tuple[np.ndarray, np.ndarray]:
    along_x, along_y = np.zeros((1, 1, 576), np.float32), np.zeros((1, 1, 768), np.float32)
    along_x[..., x], along_y[..., y] = x_peak, y_peak
    return along_x, along_y


@pytest.mark.parametrize(("x", "y"), [(0, 0), (575, 767), (101, 300)])
def test_two_bins_are_a_pixel(x, y):
    assert decode_simcc(*peaks(x, y), [UNIT_CROP])[0, 0].tolist() == [x / 2, y / 2, 1]


def test_bins_become_frame_pixels_with_the_unrounded_crop():
    got = decode_simcc(*peaks(10, 20), [Crop(100.25, 50.5, 576, 768)])[0, 0]
    assert got[:2].tolist() == [100.25 - 288 + 5 * 2, 50.5 - 384 + 10 * 2]


def test_each_crop_has_its_own_frame_of_reference():
    x, y = (np.concatenate([axis, axis]) for axis in peaks(288, 384))
    got = decode_simcc(x, y, [UNIT_CROP, Crop(10, 20, 72, 96)])
    assert got[:, 0, :2].tolist() == [[144, 192], [10, 20]]  # the middle stays the middle


def test_the_score_is_the_lower_peak_and_without_one_there_is_no_place():
    assert decode_simcc(*peaks(10, 20, 0.9, 0.3), [UNIT_CROP])[0, 0, 2] == pytest.approx(0.5)
    assert decode_simcc(*peaks(10, 20, 0.15, 2.0), [UNIT_CROP])[0, 0, 2] == pytest.approx(0.25)
    nothing = decode_simcc(-np.ones((1, 1, 576)), peaks(1, 5)[1], [UNIT_CROP])[0, 0]
    assert nothing[:2].tolist() == [-0.5, -0.5]
    assert nothing[2] < 0


@pytest.mark.parametrize(("score", "confidence"), [(0, 0), (0.15, 0.25), (0.3, 0.5), (0.65, 0.75), (1, 1), (1.7, 1.5)])
def test_the_scale_of_confidence(score, confidence):
    assert confidence_of(np.array(score)) == pytest.approx(confidence)


@given(st.floats(-2, 3, width=32), st.floats(-2, 3, width=32))
def test_the_same_joints_are_drawn_and_order_is_kept(first, second):
    """DWPose draws what is not below 0.3; we what is not below our threshold, in float32."""
    scores = np.array([first, second], np.float32)
    confidences = confidence_of(scores).astype(np.float32)
    assert ((confidences >= THRESHOLD) == (scores.astype(np.float64) >= 0.3)).all()
    if first < second:
        assert confidences[0] <= confidences[1]


def test_input_is_normalised_rgb_black_outside_and_swapped_for_bgr():
    frame = np.zeros((384, 144, 3), np.uint8)
    frame[:] = (255, 128, 0)
    image = network_input(frame, UNIT_CROP)  # the right half is outside
    assert image.shape == (3, 384, 288)
    assert image.dtype == np.float32
    assert image[:, 100, 50] == pytest.approx((np.array([255, 128, 0]) - MEAN) / STD, abs=1e-5)
    assert image[:, 100, 200] == pytest.approx(-MEAN / STD, abs=1e-5)
    swapped = network_input(frame, UNIT_CROP, bgr=True)
    assert swapped[:, 100, 50] == pytest.approx((np.array([0, 128, 255]) - MEAN) / STD, abs=1e-5)


def test_a_crop_of_the_inputs_size_is_a_copy():
    frame = np.random.default_rng(0).integers(0, 256, (400, 300, 3), np.uint8)
    image = network_input(frame, Crop(144 + 7, 192 + 11, 288, 384)).transpose(1, 2, 0)
    assert np.abs(image * STD + MEAN - frame[11 : 11 + 384, 7 : 7 + 288]).max() < 1e-3


@pytest.fixture(scope="module")
def estimator(tmp_path_factory) -> SimccEstimator:
    return SimccEstimator.load(build_simcc(tmp_path_factory.mktemp("simcc") / "dw-ll_ucoco_384.onnx"))


@pytest.mark.parametrize(
    ("size", "box"),
    [
        ((640, 360), Box(150, 20, 330, 340, 0.9)),  # landscape, an upright person
        ((360, 640), Box(60, 100, 300, 560, 0.9)),  # portrait
        ((640, 360), Box(40, 100.4, 600.7, 260, 0.9)),  # lying: the width sets the crop, which leaves the frame
        ((360, 640), Box(0, 0, 360, 640, 0.9)),
        ((360, 640), None),  # nobody was found: the whole frame
        ((192, 144), Box(30.3, 20.6, 121.1, 130.9, 0.9)),  # small: enlarged
    ],
)
def test_joints_are_found_where_they_were_drawn(estimator, size, box):
    """Discs at known pixels → crop → network → bins → pixels of the frame: within one pixel, from every crop."""
    x1, y1, x2, y2 = (box.x1, box.y1, box.x2, box.y2) if box else (0, 0, *size)
    shares = [(0.25, 0.2), (0.7, 0.3), (0.3, 0.8), (0.75, 0.7)]
    centres = [(round(x1 + a * (x2 - x1)), round(y1 + b * (y2 - y1))) for a, b in shares]
    points = estimator.points(coloured_frame(size, centres)[None], [box])
    assert points.shape == (1, 133, 3)
    assert points.dtype == np.float32
    expected = np.array([centres[k % 4] for k in range(133)])
    half_a_bin = crop_of(box, size).height / 768 / 2
    assert np.abs(points[0, :, :2] - expected).max() < min(1.0, half_a_bin + 0.3)
    assert points[0, :, 2] == pytest.approx(float(confidence_of(np.array(min(X_PEAK, Y_PEAK)))), abs=0.01)
    assert Pose.from_points(points[0]).body.shape == (20, 3)


def test_a_colour_that_is_not_there_is_not_confident(estimator):
    frame = coloured_frame((240, 320), [(80, 100), None, (150, 200)])
    points = estimator.points(frame[None], [Box(20, 20, 220, 300, 0.9)])[0]
    assert points[[0, 2], 2].min() > THRESHOLD
    assert points[[1, 3], 2].max() <= 0


def test_bgr_swaps_red_and_blue(estimator):
    red, blue = (80, 100), (150, 200)
    frame = coloured_frame((240, 320), [red, None, blue])
    box = [Box(20, 20, 220, 300, 0.9)]
    rgb, bgr = estimator.points(frame[None], box)[0], estimator.points(frame[None], box, bgr=True)[0]
    assert np.abs(rgb[[0, 2], :2] - [red, blue]).max() < 1
    assert np.abs(bgr[[0, 2], :2] - [blue, red]).max() < 1


@pytest.mark.parametrize("batch", [1, 2])
def test_a_graph_of_constant_batch_gives_the_same_and_says_so(tmp_path, estimator, batch):
    fixed = SimccEstimator.load(build_simcc(tmp_path / "fixed.onnx", batch))
    frames = np.stack([coloured_frame((192, 144), [(60 + 10 * i, 50), (100, 90 - 5 * i)]) for i in range(3)])
    boxes = [Box(30, 20, 140, 130, 0.9), None, Box(40, 20, 150, 110, 0.9)]
    assert np.array_equal(fixed.points(frames, boxes), estimator.points(frames, boxes))
    assert fixed.network.description["batch"] == batch
    assert estimator.network.description["batch"] is None


def test_missing_and_mistaken_files(tmp_path):
    with pytest.raises(WeightsMissing, match="dw-ll"):
        SimccEstimator.load(tmp_path / "dw-ll_ucoco_384.onnx")
    with pytest.raises(WeightsCorrupt, match=r"one output.*another model"):
        SimccEstimator.load(build_pose(tmp_path / "vitpose.onnx"))
    with pytest.raises(WeightsCorrupt, match="one output"):
        SimccEstimator.load(build_yolox(tmp_path / "yolox.onnx"))
    with pytest.raises(WeightsCorrupt, match=r"133, 576.*is needed"):
        SimccEstimator.load(build_simcc(tmp_path / "swapped.onnx", swapped=True))
    with pytest.raises(WeightsCorrupt, match=r"\[None, 17, 576\].*133, 576.*is needed"):
        SimccEstimator.load(build_simcc(tmp_path / "body_only.onnx", joints=17))


def test_outputs_of_undeclared_size_are_checked_when_they_come(tmp_path):
    frames = coloured_frame((96, 96), [(40, 40)])[None]
    right = SimccEstimator.load(build_simcc(tmp_path / "right.onnx", declared=False))
    assert right.points(frames, [None]).shape == (1, 133, 3)
    wrong = SimccEstimator.load(build_simcc(tmp_path / "body_only.onnx", joints=17, declared=False))
    with pytest.raises(WeightsCorrupt, match=r"1, 17, 576.*another model"):
        wrong.points(frames, [None])

"""Crops by hand, and the patch decode against its definition: blur whole maps, rescale, log, one Taylor step."""

import cv2
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from runner.preprocess.networks.vitpose import MEAN, STD, Crop, PoseEstimator, crop_of, decode_heatmaps, network_input
from runner.preprocess.networks.yolov10 import Box
from tests.preprocess.conftest import disc_frame
from tests.preprocess.tiny_networks import SHIFTS, build_pose

UNIT_CROP = Crop(24, 32, 48, 64)  # heatmap pixels are frame pixels


def defined(heatmap: np.ndarray) -> tuple[float, float]:
    """The definition, for one map [64, 48], in double precision and the long way."""
    y, x = divmod(int(heatmap.argmax()), 48)
    top = heatmap.max()
    if top <= 0:
        return -1, -1
    padded = np.zeros((64 + 10, 48 + 10))
    padded[5:-5, 5:-5] = heatmap
    blurred = cv2.GaussianBlur(padded, (11, 11), 0)[5:-5, 5:-5]
    f = np.log(np.maximum(blurred * (top / blurred.max()), 1e-10))
    if not (1 < x < 46 and 1 < y < 62):
        return x, y
    gradient = np.array([f[y, x + 1] - f[y, x - 1], f[y + 1, x] - f[y - 1, x]]) / 2
    dxx = (f[y, x + 2] - 2 * f[y, x] + f[y, x - 2]) / 4
    dyy = (f[y + 2, x] - 2 * f[y, x] + f[y - 2, x]) / 4
    dxy = (f[y + 1, x + 1] - f[y - 1, x + 1] - f[y + 1, x - 1] + f[y - 1, x - 1]) / 4
    hessian = np.array([[dxx, dxy], [dxy, dyy]])
    if np.linalg.det(hessian) == 0:
        return x, y
    step = -np.linalg.inv(hessian) @ gradient
    return (x + step[0], y + step[1]) if np.abs(step).max() <= 64 else (x, y)


def conditioned(heatmap: np.ndarray) -> bool:
    """Whether the Taylor step has a definite answer: float32 noise in the map would not move it by a millipixel."""
    rng = np.random.default_rng(0)
    noisy = [heatmap * (1 + 1e-6 * rng.standard_normal(heatmap.shape)).astype(np.float32) for _ in range(3)]
    here = np.array(defined(heatmap))
    return all(np.abs(np.array(defined(n)) - here).max() < 1e-4 for n in noisy)


def bump(x: float, y: float, sigma: float, height: float) -> np.ndarray:
    columns, rows = np.arange(48), np.arange(64)[:, None]
    return (height * np.exp(-((columns - x) ** 2 + (rows - y) ** 2) / (2 * sigma**2))).astype(np.float32)


bumps = st.tuples(st.floats(-3, 51), st.floats(-3, 67), st.floats(0.7, 5), st.floats(-0.5, 1.5))
backgrounds = hnp.arrays(np.float32, (8, 6), elements=st.floats(-0.125, 0.125, width=32))


@settings(max_examples=150, deadline=None)
@given(parts=st.lists(bumps, min_size=1, max_size=3), ground=backgrounds, rough=st.booleans())
def test_patch_decode_equals_the_definition(parts, ground, rough):
    heatmap = np.sum([bump(*p) for p in parts], axis=0)
    if rough:
        heatmap = heatmap + np.kron(ground, np.ones((8, 8), np.float32))
    got = decode_heatmaps(heatmap[None, None].astype(np.float32), [UNIT_CROP])[0, 0]
    if conditioned(heatmap):
        assert np.abs(got[:2] - defined(heatmap)).max() < 1e-3
    assert got[2] == heatmap.max()


def test_negative_surroundings_that_meet_the_clip():
    """A lone spike in a negative map: half of the window is clipped at 1e-10 after rescaling."""
    heatmap = np.full((64, 48), -0.02, np.float32)
    heatmap[30, 20], heatmap[30, 21] = 0.9, 0.5
    got = decode_heatmaps(heatmap[None, None], [UNIT_CROP])[0, 0]
    assert got[:2] == pytest.approx(defined(heatmap), abs=1e-3)


@pytest.mark.parametrize(("x", "y"), [(10.3, 20.6), (2.2, 2.4), (45.4, 60.9), (24, 32)])
def test_a_gaussian_is_found_at_its_centre(x, y):
    """Log of a Gaussian is a parabola: the Taylor step is exact, but for the map's borders."""
    got = decode_heatmaps(bump(x, y, 2, 0.9)[None, None], [UNIT_CROP])[0, 0]
    inner = 8 < x < 40 and 8 < y < 56
    assert got[:2] == pytest.approx((x, y), abs=0.01 if inner else 0.6)


@pytest.mark.parametrize(("x", "y"), [(0, 30), (1, 30), (46, 30), (47, 30), (20, 0), (20, 1), (20, 62), (20, 63)])
def test_peaks_near_the_border_are_not_refined(x, y):
    heatmap = np.zeros((64, 48), np.float32)
    heatmap[y, x], heatmap[min(y + 1, 63), min(x + 1, 47)] = 1, 1
    heatmap[y, x] = 2
    assert decode_heatmaps(heatmap[None, None], [UNIT_CROP])[0, 0].tolist() == [x, y, 2]


def test_an_empty_map_has_no_confidence_and_a_flat_one_no_offset():
    got = decode_heatmaps(np.stack([np.zeros((1, 64, 48)), -np.ones((1, 64, 48))]).astype(np.float32), [UNIT_CROP] * 2)
    assert got[:, 0].tolist() == [[-1, -1, 0], [-1, -1, -1]]
    assert np.isfinite(decode_heatmaps(np.ones((1, 1, 64, 48), np.float32), [UNIT_CROP])).all()


def test_heatmap_pixels_become_frame_pixels_with_the_unrounded_crop():
    heatmap = np.zeros((64, 48), np.float32)
    heatmap[0, 1] = 1.25  # at the border: not refined
    got = decode_heatmaps(heatmap[None, None], [Crop(100.25, 50.5, 96, 128)])[0, 0]
    assert got.tolist() == [100.25 - 48 + 1 * 2, 50.5 - 64, 1.25]


def test_the_published_crop():
    crop = crop_of(Box(400, 60, 700, 700, 0.9), (1280, 720))
    assert (crop.cx, crop.cy, crop.width, crop.height) == (550, 380, 600, 800)
    assert crop.corners == (250, -20, 850, 780)


def test_a_wide_box_sets_the_crop_by_its_width():
    crop = crop_of(Box(100, 100, 400, 200, 0.9), (640, 480))  # 1.25 * 300 * 4 / 3 = 500
    assert (crop.width, crop.height) == (375, 500)
    assert crop.corners == (62, -100, 438, 400)  # 62.5 and 437.5 round half to even


def official_corners(x1: float, y1: float, x2: float, y2: float) -> tuple[int, ...]:
    """The crop in units of 200 pixels, the matrix from frame to input, its inverse, the input's corners, rounded."""
    unit = 1.25 * (max((x2 - x1) * (256 / 192), y2 - y1) / 200)
    height = 200 * unit
    width = height / (256 / 192)
    there = np.zeros((3, 3))
    there[0, 0], there[1, 1], there[2, 2] = 192 / width, 256 / height, 1
    there[0, 2] = 192 * (-((x1 + x2) / 2) / width + 0.5)
    there[1, 2] = 256 * (-((y1 + y2) / 2) / height + 0.5)
    back = np.linalg.inv(there)
    return tuple(round(c) for corner in ((0, 0), (192, 256)) for c in (back @ np.array([*corner, 1.0]))[:2].tolist())


def test_crops_of_whole_boxes_end_where_the_official_arithmetic_puts_them():
    """A box of whole pixels often ends the crop halfway between two: the last bits of the official way decide."""
    rng = np.random.default_rng(0)
    at, size = rng.integers(0, 1200, (500, 2)), rng.integers(20, 700, (500, 2))
    boxes = np.concatenate([at, at + size], 1).astype(float).tolist()
    crops = [crop_of(Box(*box, 0.9), (1920, 1080)) for box in boxes]
    assert [crop.corners for crop in crops] == [official_corners(*box) for box in boxes]
    exact = [(round(c.cx - c.width / 2), round(c.cy - c.height / 2)) for c in crops]
    assert exact != [crop.corners[:2] for crop in crops]  # so the way there does matter


@pytest.mark.parametrize("box", [None, Box(10, 10, 200, 19, 0.9), Box(10, 10, 19.5, 200, 0.9), Box(0, 0, 99, 99, 0.0)])
def test_without_a_good_box_the_whole_frame_is_looked_at(box):
    crop = crop_of(box, (640, 480))
    assert (crop.cx, crop.cy, crop.width, crop.height) == pytest.approx((320, 240, 800, 3200 / 3))


boxes = st.tuples(st.floats(-60, 250), st.floats(-60, 250), st.floats(12, 400), st.floats(12, 400), st.booleans())


@settings(max_examples=60, deadline=None)
@given(box=boxes)
def test_input_is_the_resize_of_the_whole_crop_in_float(box):
    """OpenCV resizes the crop, black where it leaves the frame: what the contract says, and what we only sample."""
    x, y, w, h, bgr = box
    frame = np.random.default_rng(0).integers(0, 256, (300, 260, 3), np.uint8)
    crop = crop_of(Box(x, y, x + w, y + h, 0.9), (260, 300))
    x1, y1, x2, y2 = crop.corners
    canvas = np.zeros((y2 - y1, x2 - x1, 3), np.float32)
    inside = frame[max(y1, 0) : max(y2, 0), max(x1, 0) : max(x2, 0)]
    top, left = max(-y1, 0), max(-x1, 0)
    if inside.size:
        canvas[top : top + inside.shape[0], left : left + inside.shape[1]] = inside
    resized = cv2.resize(canvas, (192, 256), interpolation=cv2.INTER_LINEAR)
    expected = ((resized[..., ::-1] if bgr else resized) / 255 - MEAN) / STD
    got = network_input(frame, crop, bgr=bgr)
    assert got.dtype == np.float32
    assert np.abs(got - expected.transpose(2, 0, 1)).max() < 1e-5


def test_input_is_normalised_black_outside_and_swapped_for_bgr():
    frame = np.zeros((64, 48, 3), np.uint8)
    frame[:] = (255, 128, 0)
    image = network_input(frame, Crop(48, 32, 48, 64))  # the left half sees the frame's right half, the rest is outside
    assert image.shape == (3, 256, 192)
    inside, outside = image[:, 128, 20], image[:, 128, 170]
    assert inside == pytest.approx((np.array([1, 128 / 255, 0]) - MEAN) / STD, abs=1e-5)
    assert outside == pytest.approx(-MEAN / STD, abs=1e-5)
    swapped = network_input(frame, Crop(48, 32, 48, 64), bgr=True)
    assert swapped[:, 128, 20] == pytest.approx((np.array([0, 128 / 255, 1]) - MEAN) / STD, abs=1e-5)


@pytest.mark.parametrize("crop", [Crop(24, 32, 30, 40), Crop(3, 60, 480, 640), Crop(-40, 32, 48, 64)])
def test_input_can_be_made_in_place(crop):
    frame = np.random.default_rng(0).integers(0, 256, (64, 48, 3), np.uint8)
    batch = np.full((2, 3, 256, 192), np.nan, np.float32)
    assert network_input(frame, crop, out=batch[1]).base is batch
    assert (batch[1] == network_input(frame, crop)).all()
    assert np.isnan(batch[0]).all()


def test_a_crop_that_misses_the_frame_is_black_not_an_error():
    image = network_input(np.full((64, 48, 3), 255, np.uint8), Crop(500, 500, 48, 64))
    assert image[:, 0, 0] == pytest.approx(-MEAN / STD, abs=1e-5)


def test_a_map_is_decoded_alike_whatever_stands_beside_it():
    """To the bit: a clip in pieces meets other batches than the whole."""
    rng = np.random.default_rng(2)
    smooth = cv2.GaussianBlur(rng.random((64, 48, 90), np.float32), (0, 0), 2).transpose(2, 0, 1)
    maps = np.ascontiguousarray(smooth).reshape(3, 30, 64, 48)
    alone = [decode_heatmaps(maps[i : i + 1], [UNIT_CROP])[0] for i in range(3)]
    assert (decode_heatmaps(maps, [UNIT_CROP] * 3) == np.stack(alone)).all()


@pytest.mark.parametrize("batch", ["N", 1, 3])
def test_a_network_finds_the_joints_whatever_its_batch(tmp_path, batch):
    estimator = PoseEstimator.load(build_pose(tmp_path / "pose.onnx", batch))
    centres = [(60, 64), (100, 50), (131, 70), (80, 66)]
    boxes = [Box(x - 20, y - 20, x + 21, y + 21, 0.9) for x, y in centres]
    points = estimator.points(np.stack([disc_frame(c) for c in centres]), boxes)
    assert points.shape == (4, 133, 3)
    assert points.dtype == np.float32
    scale = crop_of(boxes[0], (192, 128)).width / 48
    for got, centre in zip(points, centres, strict=True):
        assert np.abs(got[:, :2] - (centre + SHIFTS * scale)).max() < 1.5
        assert got[:, 2].min() > 0.7

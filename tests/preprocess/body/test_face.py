"""Face boxes worked by hand, and which frame's face is shown when there is none."""

import cv2
import numpy as np
import pytest

from runner.preprocess.body.face import crop_face, face_box, official_box, plan_faces


def face(x1, y1, x2, y2, confidence=1.0) -> np.ndarray:
    """68 points that span a rectangle."""
    points = np.zeros((68, 3))
    points[:, 0] = np.linspace(x1, x2, 68)
    points[:, 1] = np.tile(np.linspace(y1, y2, 17), 4)
    points[:, 2] = confidence
    return points


def test_the_published_example():
    """56.7 x 81 at (611.65, 44.1): 7.009 % more on each side, 10.51 % above, 3.504 % below, truncated."""
    points = face(611.65, 44.1, 668.35, 125.1)
    assert official_box(points, 1280, 720) == (607, 672, 35, 127)
    assert face_box(points, 1280, 720) == (607, 672, 35, 127)


def test_half_out_on_the_left_is_clipped():
    """-50…50 wide, 100…200 high: grown to -57.009…57.009 and 89.487…203.504."""
    assert face_box(face(-50, 100, 50, 200), 400, 300) == (0, 57, 89, 203)
    assert official_box(face(-50, 100, 50, 200), 400, 300) == (0, 57, 89, 203)


def test_half_out_below_is_clipped():
    assert face_box(face(100, 250, 200, 350), 400, 300) == (92, 207, 239, 300)


def test_fully_off_the_left_the_official_box_wraps_around_and_ours_is_none():
    points = face(-500, 100, -380, 200)  # right end: -380 + .07009 * 120 = -371.6
    x1, x2, y1, y2 = official_box(points, 640, 300)
    assert (x1, x2, y1, y2) == (0, -371, 89, 203)
    frame = np.zeros((300, 640, 3), np.uint8)
    assert frame[y1:y2, x1:x2].shape[1] == 640 - 371  # slicing counts a negative end from the right: a wrong, wide crop
    assert face_box(points, 640, 300) is None


@pytest.mark.parametrize("box", [(700, 100, 800, 200), (100, 310, 200, 410), (100, -300, 200, -190)])
def test_fully_off_the_other_sides_is_no_face(box):
    assert face_box(face(*box), 640, 300) is None


def test_a_sliver_at_the_edge_is_no_face():
    assert face_box(face(-85, 100, 15, 200), 400, 300) is None  # 22 of 114 columns are in the frame
    assert face_box(face(-70, 100, 30, 200), 400, 300) is not None  # 37 of 114


def test_confidence_gates_points_and_face():
    assert face_box(face(100, 100, 200, 200, 0.29), 640, 480) is None
    half = face(100, 100, 200, 200)
    half[34:, 2] = 0.1
    half[34:, :2] = 600  # guesses far away do not widen the box
    box = face_box(half, 640, 480)
    assert box is not None
    assert box[1] < 170
    half[33, 2] = 0.1
    assert face_box(half, 640, 480) is None  # fewer than half of the points


def test_frames_without_a_face_keep_the_last_and_the_beginning_waits_for_the_first():
    seen, unseen = face(100, 100, 200, 200), face(100, 100, 200, 200, 0)
    later = face(120, 100, 220, 200)
    plan = plan_faces(np.stack([unseen, unseen, seen, unseen, later, unseen]), 640, 480)
    assert plan.sources.tolist() == [2, 2, 2, 2, 4, 4]
    assert plan.held == 4
    assert plan.boxes[0] == plan.boxes[3] == face_box(seen, 640, 480)
    assert plan.boxes[5] == face_box(later, 640, 480)


def test_no_face_at_all_says_so():
    plan = plan_faces(np.stack([face(0, 0, 9, 9, 0)] * 3), 640, 480)
    assert plan.sources.tolist() == [-1, -1, -1]
    assert not plan.seen
    assert plan.held == 3


def test_parity_crops_what_the_official_code_crops_and_holds_where_it_crashes():
    unsure, wrapped, crash = face(100, 100, 200, 200, 0), face(-500, 100, -380, 200), face(700, 100, 800, 200)
    plan = plan_faces(np.stack([unsure, wrapped, crash]), 640, 300, parity=True)
    assert plan.sources.tolist() == [0, 1, 1]
    assert plan.boxes[1] == (0, -371, 89, 203)


def test_a_crop_is_squashed_to_a_square():
    frame = np.zeros((100, 200, 3), np.uint8)
    frame[20:60, 50:150] = (10, 200, 30)
    out = crop_face(frame, (50, 150, 20, 60), 64)
    assert out.shape == (64, 64, 3)
    assert (out == (10, 200, 30)).all()


@pytest.mark.parametrize("box", [(50, 150, 20, 60), (-30, -5, 10, 90), (0, 200, 0, 100)])
def test_a_crop_can_be_made_in_place(box):
    frame = np.random.default_rng(0).integers(0, 256, (100, 200, 3), np.uint8)
    window = np.zeros((2, 64, 64, 3), np.uint8)
    assert np.shares_memory(crop_face(frame, box, 64, window[1]), window)
    x1, x2, y1, y2 = box
    assert (window[1] == cv2.resize(frame[y1:y2, x1:x2].copy(), (64, 64))).all()
    assert not window[0].any()


def clip_of_faces(n, tremble, seed=0):
    """A face of 100 x 100 that goes right by 3 pixels a frame; its box trembles by `tremble` pixels."""
    noise = np.random.default_rng(seed).normal(0, tremble, (n, 4))
    ends = np.array([[100 + 3 * i, 100, 200 + 3 * i, 200] for i in range(n)]) + noise
    return np.stack([face(*e) for e in ends]), ends


def test_boxes_are_steadied_over_time_without_lag():
    faces, _ = clip_of_faces(60, 3)
    times = np.arange(60) / 30
    loose = np.array(plan_faces(faces, 640, 480).boxes, float)
    plan = plan_faces(faces, 640, 480, times_s=times)
    steady = np.array(plan.boxes, float)
    assert plan.sources.tolist() == list(range(60))
    width, loose_width = steady[:, 1] - steady[:, 0], loose[:, 1] - loose[:, 0]
    assert np.diff(width).std() < 0.3 * np.diff(loose_width).std()
    centre = (steady[:, 0] + steady[:, 1]) / 2 - (150 + 3 * np.arange(60))
    assert np.abs(centre[5:-5]).max() < 3
    assert abs(centre[5:-5].mean()) < 0.7  # a causal filter would trail by several pixels
    assert centre[5:-5].std() < 0.8 * ((loose[:, 0] + loose[:, 1]) / 2 - (150 + 3 * np.arange(60)))[5:-5].std()


def test_one_box_that_slips_is_pulled_back():
    faces, _ = clip_of_faces(40, 0)
    faces[20] = face(140, 40, 300, 200)
    plan = plan_faces(faces, 640, 480, times_s=np.arange(40) / 30)
    still = plan_faces(clip_of_faces(40, 0)[0], 640, 480, times_s=np.arange(40) / 30)
    assert np.abs(np.array(plan.boxes[20]) - np.array(still.boxes[20])).max() <= 3


def test_a_cut_is_not_smoothed_over():
    faces = np.stack([face(100, 100, 200, 200)] * 20 + [face(400, 150, 460, 210)] * 20)
    plan = plan_faces(faces, 640, 480, times_s=np.arange(40) / 30)
    assert len(set(plan.boxes[:20])) == 1
    assert len(set(plan.boxes[20:])) == 1


def test_a_plan_for_repeated_pictures():
    seen, unseen = face(100, 100, 200, 200), face(100, 100, 200, 200, 0)
    plan = plan_faces(np.stack([seen, unseen]), 640, 480).repeated(np.array([0, 2]), np.array([0, 0, 1, 1]))
    assert plan.sources.tolist() == [0, 1, 0, 0]
    assert plan.held == 2
    nothing = plan_faces(np.stack([unseen]), 640, 480).repeated(np.array([0]), np.array([0, 0]))
    assert nothing.sources.tolist() == [-1, -1]
    assert not nothing.seen

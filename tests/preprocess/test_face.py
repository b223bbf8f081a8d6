"""Face boxes worked by hand, and which frame's face is shown when there is none."""

import numpy as np
import pytest

from runner.preprocess.face import crop_face, face_box, official_box, plan_faces


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

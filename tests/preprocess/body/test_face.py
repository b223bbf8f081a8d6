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


def test_the_official_box_is_clipped_on_one_side_of_each_axis():
    """Grown by 7.009 % of the width to each side, 10.51 % of the height upwards and 3.504 % downwards."""
    assert official_box(face(-500, -400, -380, -300), 640, 480) == (0, -371, 0, -296)
    assert official_box(face(700, 550, 800, 650), 640, 480) == (692, 640, 539, 480)


@pytest.mark.parametrize(("confidence", "seen"), [(0.3, True), (0.299, False)])
def test_a_point_is_sure_from_three_tenths_on(confidence, seen):
    assert (face_box(face(100, 100, 200, 200, confidence), 640, 480) is not None) == seen


@pytest.mark.parametrize(
    ("x2", "y2", "box"), [(11, 40, (7, 11, 4, 41)), (10.4, 40, None), (40, 11, (5, 42, 7, 11)), (40, 10.5, None)]
)
def test_a_face_is_at_least_four_pixels_wide_and_high(x2, y2, box):
    """From 8 on; the grown ends are cut to whole pixels: 7.79 to 11.21 are four, 7.83 to 10.57 are three."""
    assert face_box(face(8, 8, x2, y2), 640, 480) == box


def test_a_face_in_the_first_frame_is_seen():
    plan = plan_faces(face(100, 100, 200, 200)[None], 640, 480)
    assert plan.seen
    assert plan.held == 0


def test_without_a_face_each_frame_has_an_empty_box():
    assert plan_faces(np.stack([face(0, 0, 9, 9, 0)] * 3), 640, 480).boxes == [(0, 0, 0, 0)] * 3


def test_a_still_face_keeps_its_box_whatever_its_sides_are():
    """100 wide and 60 high, grown to 114.02 x 68.41, the height by three parts of four upwards."""
    plan = plan_faces(np.stack([face(300, 200, 400, 260)] * 20), 640, 480, times_s=np.arange(20) / 30)
    assert set(plan.boxes) == {(293, 407, 194, 262)}


def ends_of(plan) -> np.ndarray:
    return np.array(plan.boxes, float)


def wave(hz: float, n: int, fps: float) -> np.ndarray:
    return np.sin(2 * np.pi * hz * np.arange(n) / fps)


def amplitude(values: np.ndarray, hz: float, fps: float) -> float:
    """Of the sine of that frequency in the middle of `values`, by its Fourier coefficient."""
    middle = values[len(values) // 4 : len(values) // 4 + len(values) // 2]
    turn = np.exp(-2j * np.pi * hz * np.arange(len(middle)) / fps)
    return 2 * abs((middle * turn).mean())


def test_centres_are_averaged_over_a_twentieth_of_a_second():
    """A Gaussian of standard deviation s leaves exp(-2 (pi f s)^2) of a sine: 0.89 of 1.5 Hz for 0.05 s."""
    centres = 800 + 200 * wave(1.5, 240, 60)
    faces = np.stack([face(x - 150, 300 + (x - 800) / 2, x + 150, 600 + (x - 800) / 2) for x in centres])
    box = ends_of(plan_faces(faces, 1600, 900, times_s=np.arange(240) / 60))
    left = np.exp(-2 * (np.pi * 1.5 * 0.05) ** 2)
    assert amplitude((box[:, 0] + box[:, 1]) / 2, 1.5, 60) == pytest.approx(200 * left, rel=0.05)
    assert amplitude((box[:, 2] + box[:, 3]) / 2, 1.5, 60) == pytest.approx(100 * left, rel=0.05)


def test_sizes_are_averaged_over_a_quarter_of_a_second():
    """0.73 of a sine of half a hertz is left for 0.25 s."""
    sides = 300 + 100 * wave(0.5, 480, 60)
    faces = np.stack([face(800 - a / 2, 450 - a / 4, 800 + a / 2, 450 + a / 4) for a in sides])
    box = ends_of(plan_faces(faces, 1600, 900, times_s=np.arange(480) / 60))
    grown, left = np.sqrt(1.3), np.exp(-2 * (np.pi * 0.5 * 0.25) ** 2)
    assert amplitude(box[:, 1] - box[:, 0], 0.5, 60) == pytest.approx(100 * grown * left, rel=0.05)
    assert amplitude(box[:, 3] - box[:, 2], 0.5, 60) == pytest.approx(50 * grown * left, rel=0.05)


@pytest.mark.parametrize(("frames", "slip"), [(2, True), (3, False)])
def test_what_lasts_for_under_a_tenth_of_a_second_is_a_slip(frames, slip):
    """At 30 frames a second two frames on either side are compared: two of five are outvoted, three are not."""
    still, tall = face(300, 200, 400, 300), face(300, 200, 400, 400)
    faces = np.stack([tall if 20 <= i < 20 + frames else still for i in range(40)])
    box = ends_of(plan_faces(faces, 640, 480, times_s=np.arange(40) / 30))
    highest = (box[:, 3] - box[:, 2]).max()
    assert (highest <= 115) == slip  # grown, 114 of the still face


@pytest.mark.parametrize(("gap_s", "apart"), [(0.45, False), (0.55, True)])
def test_after_half_a_second_unseen_a_face_begins_anew(gap_s, apart):
    """Twice the span that sizes are averaged over: small before, large after."""
    faces = np.stack([face(300, 200, 400, 300)] * 10 + [face(250, 150, 450, 350)] * 10)
    times = np.concatenate([np.arange(10) / 30, 9 / 30 + gap_s + np.arange(10) / 30])
    box = ends_of(plan_faces(faces, 640, 480, times_s=times))
    sizes = box[:, 1] - box[:, 0]
    assert (np.ptp(sizes[:10]) <= 1 and np.ptp(sizes[10:]) <= 1) == apart


@pytest.mark.parametrize(("step", "apart"), [(110, False), (118, True)])
@pytest.mark.parametrize("axis", [0, 1])
def test_a_jump_of_more_than_a_face_is_a_cut(axis, step, apart):
    """114 pixels wide and high, grown. A step within that is followed smoothly by the frames around it."""
    place = np.zeros(2)
    place[axis] = step
    faces = np.stack([face(200, 200, 300, 300)] * 10 + [face(*(np.array([200, 200]) + place), *(300 + place))] * 10)
    box = ends_of(plan_faces(faces, 640, 480, times_s=np.arange(20) / 30))
    centre = (box[:, 2 * axis] + box[:, 2 * axis + 1]) / 2
    assert (np.ptp(centre[:10]) <= 1 and np.ptp(centre[10:]) <= 1) == apart


def test_a_box_that_would_leave_the_frame_by_steadying_stays_as_it_was_seen():
    """Large and 30 % inside for one frame, between small ones: steadied it would be as small, and outside."""
    small, large = face(-10, 200, 30, 240), face(-75, 170, 25, 270)
    faces = np.stack([small] * 6 + [large] + [small] * 6)
    times = np.arange(13) / 8  # an eighth of a second: each is alone among those that could outvote it
    loose = plan_faces(faces, 640, 480)
    assert loose.sources.tolist() == list(range(13))
    assert plan_faces(faces, 640, 480, times_s=times).boxes[6] == loose.boxes[6]

"""The drawing, pixel by pixel, on cases worked by hand."""

import numpy as np
import pytest

from runner.preprocess.body.keypoints import Pose
from runner.preprocess.body.skeleton import body_width, draw_skeleton, hand_width


def pose(body=None, left=None, right=None) -> Pose:
    """{joint: (x, y, confidence)} for each part; every other joint is unseen."""

    def part(count, joints):
        array = np.zeros((count, 3))
        for k, values in (joints or {}).items():
            array[k] = values
        return array

    return Pose(part(20, body), part(21, left), part(21, right), np.zeros((68, 3)))


def plus(x: int, y: int) -> set[tuple[int, int]]:
    """A filled circle of radius 1."""
    return {(x, y), (x - 1, y), (x + 1, y), (x, y - 1), (x, y + 1)}


def lit(image: np.ndarray, colour: tuple[int, int, int]) -> set[tuple[int, int]]:
    rows, columns = np.nonzero((image == colour).all(-1))
    return set(zip(columns.tolist(), rows.tolist(), strict=True))


@pytest.mark.parametrize(("side", "body", "hand"), [(480, 1, 1), (720, 2, 1), (1080, 4, 2), (2160, 9, 4), (64, 1, 1)])
def test_widths_by_canvas(side, body, hand):
    assert body_width(side, side * 2) == body_width(side * 2, side) == body
    assert hand_width(side, side * 2) == hand_width(side * 2, side) == hand


def test_a_limb_by_hand():
    """Neck (60,50) to right shoulder (40,50): centre (50,50), semi-axes 10 and 1, angle 0.

    Row 50 is the long axis, 40…60. Rows 49 and 51 hold what rounds to them: |sin| > .5, so from 31°, where
    50 ± 10·cos 31° = 58.57 → 59 and 41.43 → 41. Dots of radius 1 in full colour lie on the ends.
    """
    image = draw_skeleton(pose({1: (60, 50, 1), 2: (40, 50, 1)}), 100, 100)
    dots = plus(60, 50) | plus(40, 50)
    limb = {(x, 50) for x in range(40, 61)} | {(x, y) for x in range(41, 60) for y in (49, 51)}
    assert lit(image, (255, 85, 0)) == plus(60, 50)
    assert lit(image, (255, 170, 0)) == plus(40, 50)
    assert lit(image, (153, 0, 0)) == limb - dots  # int(.6 * 255)
    assert set(zip(*np.nonzero(image.any(-1))[::-1], strict=True)) == limb | dots


def test_a_standing_limb_by_hand():
    """Left hip (30,20) to left knee (30,60), limb 10: colour .6 * (0,170,255); angle of atan2(-40, 0): -90 degrees."""
    image = draw_skeleton(pose({11: (30, 20, 1), 12: (30, 60, 1)}), 100, 100)
    limb = lit(image, (0, 102, 153))
    assert {(30, y) for y in range(22, 59)} <= limb
    assert {x for x, _ in limb} == {29, 30, 31}
    assert lit(image, (0, 85, 255)) == plus(30, 20)
    assert lit(image, (0, 0, 255)) == plus(30, 60)


def test_coordinates_are_truncated_not_rounded():
    a = draw_skeleton(pose({1: (60.99, 50.99, 1), 2: (40.99, 50.99, 1)}), 100, 100)
    assert lit(a, (255, 85, 0)) == plus(60, 50)
    assert (40, 50) in lit(a, (255, 170, 0))


def test_a_joint_below_the_threshold_takes_its_limbs_with_it():
    joints = {2: (40, 50, 1), 3: (30, 60, 0.4999), 4: (20, 70, 1)}
    image = draw_skeleton(pose(joints), 100, 100)
    assert set(zip(*np.nonzero(image.any(-1))[::-1], strict=True)) == plus(40, 50) | plus(20, 70)
    assert lit(draw_skeleton(pose({3: (30, 60, 0.5)}), 100, 100), (255, 255, 0)) == plus(30, 60)


def test_a_joint_off_canvas_is_clipped_not_lost():
    image = draw_skeleton(pose({1: (10, 50, 1), 2: (-30, 50, 1)}), 100, 100)
    assert (image[50, :9] == (153, 0, 0)).all()  # the limb runs out at the left edge
    assert not lit(image, (255, 170, 0))
    assert not draw_skeleton(pose({0: (500, 500, 1), 1: (900, -700, 1)}), 100, 100).any()


def test_later_limbs_lie_over_earlier_ones_and_dots_over_all():
    crossing = {1: (50, 50, 1), 2: (30, 50, 1), 8: (50, 80, 1)}
    image = draw_skeleton(pose(crossing), 100, 100)
    assert tuple(image[50, 50]) == (255, 85, 0)  # the neck's dot
    assert tuple(image[65, 50]) == (0, 153, 0)  # neck to right hip


def test_toes_have_limbs_but_the_last_colour_only_a_dot():
    image = draw_skeleton(pose({10: (20, 80, 1), 19: (20, 90, 1), 13: (60, 80, 1), 18: (60, 90, 1)}), 100, 100)
    assert tuple(image[85, 60]) == (153, 0, 51)
    assert tuple(image[85, 20]) == (120, 120, 0)
    assert lit(image, (100, 100, 0)) == plus(20, 90)


def test_a_hand_by_hand():
    """Wrist (10,10), thumb (20,10), (30,10): lines one pixel wide, then blue dots over them, whatever the colour.

    Edge 1's hue is 1/20: green 255 * .3, which as a float is 76.50000000000001 and so rounds to 77.
    """
    image = draw_skeleton(pose(left={0: (10, 10, 1), 1: (20, 10, 1), 2: (30, 10, 1)}), 100, 100)
    assert lit(image, (255, 0, 0)) == {(x, 10) for x in range(12, 19)}
    assert lit(image, (255, 77, 0)) == {(x, 10) for x in range(22, 29)}
    assert lit(image, (0, 0, 255)) == plus(10, 10) | plus(20, 10) | plus(30, 10)


def test_finger_edges_start_at_the_wrist():
    fingers = {0: (50, 90, 1), **{4 * f + 1: (20 + 15 * f, 40, 1) for f in range(5)}}
    image = draw_skeleton(pose(right=fingers), 100, 100)
    middle = image[65, 50]  # on the straight line from wrist to the middle finger's base, edge 8, hue .4
    assert tuple(middle) == (0, 255, 102)


@pytest.mark.parametrize("edge", [(0.99, 10), (10, 0.99), (-5, 10)])
def test_hand_points_at_or_beyond_the_left_and_top_edge_are_not_drawn(edge):
    image = draw_skeleton(pose(left={0: (*edge, 1), 1: (20, 10, 1)}), 100, 100)
    assert set(zip(*np.nonzero(image.any(-1))[::-1], strict=True)) == plus(20, 10)
    assert draw_skeleton(pose(left={0: (1, 1, 1)}), 100, 100)[1, 1].tolist() == [0, 0, 255]


def test_the_right_hand_lies_over_the_left_and_both_over_the_body():
    image = draw_skeleton(
        pose({4: (20, 10, 1)}, left={0: (20, 10, 1)}, right={0: (20, 5, 1), 1: (20, 15, 1)}), 100, 100
    )
    assert tuple(image[10, 20]) == (255, 0, 0)


def test_the_face_is_not_drawn():
    empty = pose()
    face = Pose(empty.body, empty.left_hand, empty.right_hand, np.full((68, 3), 50.0))
    assert not draw_skeleton(face, 100, 100).any()


def test_it_can_be_drawn_where_it_goes():
    standing = pose({11: (30, 20, 1), 12: (30, 60, 1)}, left={0: (10, 10, 1), 1: (20, 10, 1)})
    window = np.zeros((2, 100, 100, 3), np.uint8)
    assert draw_skeleton(standing, 100, 100, window[1]).base is window
    assert (window[1] == draw_skeleton(standing, 100, 100)).all()
    assert not window[0].any()

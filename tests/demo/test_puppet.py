"""The puppet's table: colours that stay apart, and a lift that is a similarity of its parents."""

from __future__ import annotations

from itertools import combinations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from runner.demo.puppet import BONES, JOINTS, PALETTE, TINTS, WHITE, joint, lift, lift_matrix, lift_parents


def test_joints_are_coco_wholebody_in_order() -> None:
    # COCO's own order, written out by hand: a swap would turn the skeleton's left into its right.
    assert JOINTS[:5] == ("nose", "left_eye", "right_eye", "left_ear", "right_ear")
    assert [joint(f"{side}_{part}") for part in ("shoulder", "elbow", "wrist") for side in ("left", "right")] == [
        *range(5, 11)
    ]
    assert [joint(f"{side}_{part}") for part in ("hip", "knee", "ankle") for side in ("left", "right")] == [
        *range(11, 17)
    ]
    feet = ("left_big_toe", "left_small_toe", "left_heel", "right_big_toe", "right_small_toe", "right_heel")
    assert [joint(name) for name in feet] == [*range(17, 23)]


def test_colours_stay_apart() -> None:
    assert min(np.linalg.norm(a - b) for a, b in combinations(PALETTE, 2)) >= 0.5
    clothes = np.array([*TINTS.values(), WHITE])
    # 0.32 is the reach of the pose model's colour matching.
    assert min(np.linalg.norm(cloth - colour) for cloth in clothes for colour in PALETTE) > 0.32


def test_lift_keeps_the_joints_and_puts_each_hand_on_its_wrist() -> None:
    joints = np.random.default_rng(1).uniform(0, 500, (23, 2))
    points = lift(joints)
    np.testing.assert_allclose(points[:23], joints, atol=1e-3)
    np.testing.assert_allclose(points[91], joints[joint("left_wrist")], atol=1e-3)
    np.testing.assert_allclose(points[112], joints[joint("right_wrist")], atol=1e-3)


def test_lift_by_hand() -> None:
    joints = np.zeros((23, 2))
    joints[joint("left_eye")], joints[joint("right_eye")] = (120, 50), (80, 50)  # level, 40 apart, midway (100, 50)
    joints[joint("left_elbow")], joints[joint("left_wrist")] = (200, 100), (200, 140)  # hangs straight down
    points = lift(joints)
    np.testing.assert_allclose(points[23 + 8], (100, 50 + 1.6 * 40), atol=1e-3)  # the chin
    np.testing.assert_allclose(points[23 + 0], (100 - 1.15 * 40, 50 + 0.15 * 40), atol=1e-3)  # jaw, puppet's right end
    np.testing.assert_allclose(points[23 + 16], (100 + 1.15 * 40, 50 + 0.15 * 40), atol=1e-3)
    reach = points[91 + 12] - points[91]  # tip of the middle finger: 0.54 of the forearm, 6 degrees off its axis
    np.testing.assert_allclose(np.linalg.norm(reach), 0.54 * 40, rtol=1e-4)
    np.testing.assert_allclose(np.degrees(np.arctan2(reach[0], reach[1])), 6, atol=1e-2)


@given(angle=st.floats(-3.2, 3.2), scale=st.floats(0.2, 5), shift=st.tuples(st.floats(-900, 900), st.floats(-900, 900)))
def test_lift_commutes_with_turning_scaling_and_moving(angle: float, scale: float, shift: tuple[float, float]) -> None:
    turn = scale * np.array([[np.cos(angle), -np.sin(angle)], [np.sin(angle), np.cos(angle)]])
    joints = np.random.default_rng(2).uniform(0, 100, (23, 2))
    np.testing.assert_allclose(lift(joints @ turn.T + shift), lift(joints) @ turn.T + shift, atol=0.05)


def test_parents_are_the_only_joints_with_weight() -> None:
    weight = np.abs(lift_matrix().reshape(133, 2, 23, 2)).sum(axis=(1, 3))
    for point, (a, b) in enumerate(lift_parents()):
        others = np.delete(weight[point], [a, b])
        assert others.max() == 0
        assert weight[point, a] > 0 or weight[point, b] > 0


@pytest.mark.parametrize("side", ["left", "right"])
def test_bones_join_one_side(side: str) -> None:
    bones = [(JOINTS[a], JOINTS[b]) for a, b in BONES if JOINTS[a].startswith(side)]
    assert len(bones) == 7
    assert all(b.startswith(side) for _, b in bones)

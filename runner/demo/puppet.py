"""Puppet: define the demo's person: 23 joints, each a disc in its own colour, and the 133 points computed from them.

In:   joint positions in pixels. Out: the whole-body points, colours and tints that drawing and the tiny models share.
Never: images, files, motion. The tiny models have no trained weights: all their constants come from this table.
"""

from __future__ import annotations

from functools import cache

import numpy as np

__all__ = ["BONES", "JOINTS", "PALETTE", "TINTS", "WHITE", "joint", "lift", "lift_matrix", "lift_parents"]

# COCO's 17 body joints and the 6 feet points of COCO-WholeBody, in that order: index k is also point k of the 133.
# Each colour is a non-grey corner of the cube {0, 0.5, 1}^3, so that any two differ by at least 0.5: H.264 at ordinary
# quality changes a flat patch by less than a third of that. Left is cool, right is warm: swapped limbs are easy to see.
_JOINT_COLOURS: dict[str, tuple[float, float, float]] = {
    "nose": (1, 0, 0),
    "left_eye": (0, 0, 1),
    "right_eye": (0, 1, 0),
    "left_ear": (0, 1, 1),
    "right_ear": (1, 1, 0),
    "left_shoulder": (0, 0.5, 1),
    "right_shoulder": (1, 0.5, 0),
    "left_elbow": (0.5, 0, 1),
    "right_elbow": (1, 0, 0.5),
    "left_wrist": (0, 1, 0.5),
    "right_wrist": (0.5, 1, 0),
    "left_hip": (0, 0.5, 0.5),
    "right_hip": (0.5, 0.5, 0),
    "left_knee": (0.5, 0.5, 1),
    "right_knee": (1, 0.5, 0.5),
    "left_ankle": (0.5, 1, 1),
    "right_ankle": (1, 1, 0.5),
    "left_big_toe": (0, 0, 0.5),
    "left_small_toe": (0, 0.5, 0),
    "left_heel": (0.5, 0, 0.5),
    "right_big_toe": (0.5, 0, 0),
    "right_small_toe": (1, 0, 1),
    "right_heel": (1, 0.5, 1),
}
JOINTS = tuple(_JOINT_COLOURS)
PALETTE = np.array(list(_JOINT_COLOURS.values()), np.float32)  # [23, 3] RGB 0..1

WHITE = (0.99, 0.99, 0.99)
# Clothes: the centres of the cube's cells, 0.43 from every joint colour, and saturated enough for the detector.
TINTS: dict[str, tuple[float, float, float]] = {
    "brick": (0.75, 0.25, 0.25),
    "grass": (0.25, 0.75, 0.25),
    "indigo": (0.25, 0.25, 0.75),
    "mustard": (0.75, 0.75, 0.25),
    "orchid": (0.75, 0.25, 0.75),
    "teal": (0.25, 0.75, 0.75),
}


def joint(name: str) -> int:
    """Return the index of a joint in JOINTS and PALETTE, and of its point among the 133."""
    return JOINTS.index(name)


_LIMBS = "shoulder-elbow elbow-wrist hip-knee knee-ankle ankle-big_toe ankle-small_toe ankle-heel"
BONES = tuple(
    (joint(f"{side}_{a}"), joint(f"{side}_{b}"))
    for side in ("left", "right")
    for a, b in (limb.split("-") for limb in _LIMBS.split())
)

_FACE, _LEFT_HAND, _RIGHT_HAND, _POINTS = 23, 91, 112, 133  # COCO-WholeBody's layout


def _face_template() -> np.ndarray:
    """Return [68, 2] relative to the eyes: origin between them, unit their distance, x to the puppet's left, y down."""

    def ellipse(count: int, rx: float, ry: float) -> np.ndarray:
        angle = np.pi - np.arange(count) * 2 * np.pi / count
        return np.stack([rx * np.cos(angle), -ry * np.sin(angle)], axis=1)

    sweep = np.linspace(np.pi, 0, 17)
    jaw = np.stack([1.15 * np.cos(sweep), 0.15 + 1.45 * np.sin(sweep)], axis=1)
    right_brow = np.stack([np.linspace(-0.85, -0.25, 5), [-0.38, -0.48, -0.5, -0.46, -0.38]], axis=1)
    left_brow = right_brow[::-1] * [-1, 1]
    bridge = np.stack([np.zeros(4), np.linspace(0.05, 0.55, 4)], axis=1)
    nostrils = np.stack([np.linspace(-0.2, 0.2, 5), [0.66, 0.7, 0.72, 0.7, 0.66]], axis=1)
    eye, aside, mouth = ellipse(6, 0.2, 0.1), np.array([0.5, 0.0]), np.array([0.0, 1.1])
    lips = [ellipse(12, 0.45, 0.18) + mouth, ellipse(8, 0.3, 0.08) + mouth]
    return np.concatenate([jaw, right_brow, left_brow, bridge, nostrils, eye - aside, eye + aside, *lips])


def _hand_template() -> np.ndarray:
    """Return [21, 2] relative to the forearm: origin at the wrist, unit and x axis from elbow to wrist, thumb first."""
    points = [(0.0, 0.0)]
    for angle_deg, length in ((-55, 0.34), (-22, 0.5), (-6, 0.54), (10, 0.5), (26, 0.42)):
        angle = np.deg2rad(angle_deg)
        points += [(length * f * np.cos(angle), length * f * np.sin(angle)) for f in (0.45, 0.65, 0.83, 1.0)]
    return np.array(points)


@cache
def lift_matrix() -> np.ndarray:
    """Return float32 [266, 46]: the linear map from the 23 joints to the 133 points (x, y interleaved in both).

    The face is a similarity transform given by the two eyes, each hand one given by elbow and wrist. So one matrix
    product in the tiny pose model gives exactly the points that were drawn.
    """
    weights = np.zeros((_POINTS, 2, len(JOINTS), 2))
    same, quarter_turn = np.eye(2), np.array([[0, -1], [1, 0]])
    for k in range(len(JOINTS)):
        weights[k, :, k] = same
    left_eye, right_eye = joint("left_eye"), joint("right_eye")
    for i, (x, y) in enumerate(_face_template()):
        placed = x * same + y * quarter_turn
        weights[_FACE + i, :, left_eye] = 0.5 * same + placed
        weights[_FACE + i, :, right_eye] = 0.5 * same - placed
    for start, side, mirror in ((_LEFT_HAND, "left", 1), (_RIGHT_HAND, "right", -1)):
        for i, (x, y) in enumerate(_hand_template()):
            placed = x * same + mirror * y * quarter_turn
            weights[start + i, :, joint(f"{side}_wrist")] = same + placed
            weights[start + i, :, joint(f"{side}_elbow")] = -placed
    return weights.reshape(2 * _POINTS, 2 * len(JOINTS)).astype(np.float32)


@cache
def lift_parents() -> np.ndarray:
    """Return int64 [133, 2]: the two joints that each point depends on (for a joint: itself, twice)."""
    parents = np.repeat(np.arange(_POINTS)[:, None], 2, axis=1)
    parents[_FACE:_LEFT_HAND] = joint("left_eye"), joint("right_eye")
    parents[_LEFT_HAND:_RIGHT_HAND] = joint("left_wrist"), joint("left_elbow")
    parents[_RIGHT_HAND:] = joint("right_wrist"), joint("right_elbow")
    return parents


def lift(joints: np.ndarray) -> np.ndarray:
    """Return float32 [133, 2], whole-body points in COCO-WholeBody's order, for joints [23, 2]; all in pixels."""
    return (lift_matrix() @ np.asarray(joints, np.float32).reshape(-1)).reshape(_POINTS, 2)

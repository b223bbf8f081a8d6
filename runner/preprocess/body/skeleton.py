"""Skeleton: draw a pose as the generator's training data shows it.

In:   a `Pose` in pixels of the canvas. Out: uint8 RGB [H, W, 3]. Never: how the pose was found.
Bit-exact to the official drawing: ellipses for limbs, dots for joints, lines for fingers; no face. The order of
drawing, truncation toward zero, widths and the rounding of colours all matter for this.
"""

from __future__ import annotations

import colorsys
import math

import cv2
import numpy as np

from runner.preprocess.body.keypoints import Pose

__all__ = ["COLOURS", "HAND_EDGES", "LIMBS", "THRESHOLD", "body_width", "draw_skeleton", "hand_width"]

THRESHOLD = 0.5  # joints of less confidence are not drawn
LIMBS = [
    *[(1, 2), (1, 5), (2, 3), (3, 4), (5, 6), (6, 7), (1, 8), (8, 9), (9, 10), (1, 11)],
    *[(11, 12), (12, 13), (1, 0), (0, 14), (14, 16), (0, 15), (15, 17), (13, 18), (10, 19)],
]
COLOURS = [
    *[(255, 0, 0), (255, 85, 0), (255, 170, 0), (255, 255, 0), (170, 255, 0), (85, 255, 0), (0, 255, 0)],
    *[(0, 255, 85), (0, 255, 170), (0, 255, 255), (0, 170, 255), (0, 85, 255), (0, 0, 255), (85, 0, 255)],
    *[(170, 0, 255), (255, 0, 255), (255, 0, 170), (255, 0, 85), (200, 200, 0), (100, 100, 0)],
]
LIMB_COLOURS = [[int(0.6 * c) for c in colour] for colour in COLOURS]
HAND_EDGES = [(0 if k == 0 else 4 * finger + k, 4 * finger + k + 1) for finger in range(5) for k in range(4)]
HAND_COLOURS = [tuple(255 * c for c in colorsys.hsv_to_rgb(e / len(HAND_EDGES), 1, 1)) for e in range(len(HAND_EDGES))]
FINGERTIP = (0, 0, 255)


def body_width(width: int, height: int) -> int:
    """Return half the thickness of limbs, which is also the radius of joints, in pixels, for a canvas of this size."""
    return max(int(min(width, height) / 200) - 1, 1)


def hand_width(width: int, height: int) -> int:
    """Return the thickness of fingers, which is also the radius of their joints, in pixels."""
    return max(body_width(width, height) // 2, 1)


def draw_skeleton(pose: Pose, width: int, height: int, out: np.ndarray | None = None) -> np.ndarray:
    """Draw the pose on black: uint8 RGB [height, width, 3], into `out` if given (which must be black).

    Parts outside the canvas are clipped.
    """
    canvas = np.zeros((height, width, 3), np.uint8) if out is None else out
    _draw_body(canvas, pose.body, body_width(width, height))
    for hand in (pose.left_hand, pose.right_hand):
        _draw_hand(canvas, hand, hand_width(width, height))
    return canvas


def _draw_body(canvas: np.ndarray, body: np.ndarray, width: int) -> None:
    joints = np.asarray(body, np.float64).tolist()  # Python floats: the same arithmetic in a tenth of the time
    for (a, b), dark in zip(LIMBS, LIMB_COLOURS, strict=False):
        (xa, ya, sure_a), (xb, yb, sure_b) = joints[a], joints[b]
        if not (sure_a >= THRESHOLD and sure_b >= THRESHOLD):
            continue
        centre = int((xa + xb) / 2), int((ya + yb) / 2)
        length = ((ya - yb) ** 2 + (xa - xb) ** 2) ** 0.5
        angle = int(math.degrees(math.atan2(ya - yb, xa - xb)))
        outline = cv2.ellipse2Poly(centre, (int(length / 2), width), angle, 0, 360, 1)
        cv2.fillConvexPoly(canvas, outline, dark)
    for (x, y, sure), colour in zip(joints, COLOURS, strict=True):
        if sure >= THRESHOLD:
            cv2.circle(canvas, (int(x), int(y)), width, colour, thickness=-1)


def _draw_hand(canvas: np.ndarray, hand: np.ndarray, width: int) -> None:
    points = [(int(x), int(y), sure) for x, y, sure in np.asarray(hand, np.float64).tolist()]
    seen = [(x, y) if sure >= THRESHOLD and x >= 1 and y >= 1 else None for x, y, sure in points]
    for (a, b), colour in zip(HAND_EDGES, HAND_COLOURS, strict=True):
        start, end = seen[a], seen[b]
        if start and end:
            cv2.line(canvas, start, end, colour, thickness=width)
    for point in seen:
        if point:
            cv2.circle(canvas, point, width, FINGERTIP, thickness=-1)

"""Skeleton: a pose drawn the way the generator learned to read it.

In:   a `Pose` in pixels of the canvas. Out: uint8 RGB [H, W, 3]. Never: where the pose came from.
Bit-exact to the official drawing: ellipses for limbs, dots for joints, lines for fingers; no face.
Order, truncation toward zero, widths and the colours' rounding are all part of it.
"""

from __future__ import annotations

import colorsys
import math

import cv2
import numpy as np

from runner.preprocess.keypoints import Pose

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
HAND_EDGES = [(0 if k == 0 else 4 * finger + k, 4 * finger + k + 1) for finger in range(5) for k in range(4)]
HAND_COLOURS = [tuple(255 * c for c in colorsys.hsv_to_rgb(e / len(HAND_EDGES), 1, 1)) for e in range(len(HAND_EDGES))]
FINGERTIP = (0, 0, 255)


def body_width(width: int, height: int) -> int:
    """Half the thickness of limbs and the radius of joints, pixels, on a canvas of this size."""
    return max(int(min(width, height) / 200) - 1, 1)


def hand_width(width: int, height: int) -> int:
    """Thickness of fingers and the radius of their joints, pixels."""
    return max(body_width(width, height) // 2, 1)


def draw_skeleton(pose: Pose, width: int, height: int) -> np.ndarray:
    """The pose on black, uint8 RGB [height, width, 3]; what lies outside of the canvas is clipped."""
    canvas = np.zeros((height, width, 3), np.uint8)
    _draw_body(canvas, pose.body, body_width(width, height))
    for hand in (pose.left_hand, pose.right_hand):
        _draw_hand(canvas, hand, hand_width(width, height))
    return canvas


def _draw_body(canvas: np.ndarray, body: np.ndarray, width: int) -> None:
    body = np.asarray(body, np.float64)
    seen = body[:, 2] >= THRESHOLD
    for (a, b), colour in zip(LIMBS, COLOURS, strict=False):
        if not (seen[a] and seen[b]):
            continue
        (xa, ya), (xb, yb) = body[a, :2], body[b, :2]
        centre = int((xa + xb) / 2), int((ya + yb) / 2)
        length = ((ya - yb) ** 2 + (xa - xb) ** 2) ** 0.5
        angle = int(math.degrees(math.atan2(ya - yb, xa - xb)))
        outline = cv2.ellipse2Poly(centre, (int(length / 2), width), angle, 0, 360, 1)
        cv2.fillConvexPoly(canvas, outline, [int(0.6 * c) for c in colour])
    for (x, y, _), colour, visible in zip(body, COLOURS, seen, strict=True):
        if visible:
            cv2.circle(canvas, (int(x), int(y)), width, colour, thickness=-1)


def _draw_hand(canvas: np.ndarray, hand: np.ndarray, width: int) -> None:
    at = [(int(x), int(y)) for x, y in np.asarray(hand, np.float64)[:, :2]]
    seen = [p >= THRESHOLD and x >= 1 and y >= 1 for (x, y), p in zip(at, hand[:, 2], strict=True)]
    for (a, b), colour in zip(HAND_EDGES, HAND_COLOURS, strict=True):
        if seen[a] and seen[b]:
            cv2.line(canvas, at[a], at[b], colour, thickness=width)
    for point, visible in zip(at, seen, strict=True):
        if visible:
            cv2.circle(canvas, point, width, FINGERTIP, thickness=-1)

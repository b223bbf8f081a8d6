"""Keypoints: convert 133 whole-body points into the joints that are drawn and the face that is cropped.

In:   points float32 [133, 3] (x, y in pixels, confidence) of COCO-WholeBody. Out: `Pose` of one frame, `PoseTrack` of a
      clip (1.6 KB per frame). Never: pictures.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise

import numpy as np

__all__ = ["BODY_ROWS", "FACE", "LEFT_HAND", "RIGHT_HAND", "Pose", "PoseTrack", "body_of", "hold_lost_bodies"]

# COCO-WholeBody: 0–16 body, 17–22 feet, 23–90 face, 91–111 left hand, 112–132 right hand.
BODY_ROWS = slice(0, 23)
FACE = slice(23, 91)
LEFT_HAND = slice(91, 112)
RIGHT_HAND = slice(112, 133)
# A body joint is the mean of two points, confidence included; for most joints both are the same point. The neck is
# between the shoulders, a toe between big and small toe.
FIRST = [0, 6, 6, 8, 10, 5, 7, 9, 12, 14, 16, 11, 13, 15, 2, 1, 4, 3, 17, 20]
SECOND = [0, 5, 6, 8, 10, 5, 7, 9, 12, 14, 16, 11, 13, 15, 2, 1, 4, 3, 18, 21]


@dataclass(frozen=True, eq=False)
class Pose:
    """One person in one frame; every array is float [k, 3]: x, y in pixels, confidence."""

    body: np.ndarray  # [20, 3] nose, neck, R shoulder/elbow/wrist, L …, R hip/knee/ankle, L …, eyes, ears, toes
    left_hand: np.ndarray  # [21, 3]
    right_hand: np.ndarray  # [21, 3]
    face: np.ndarray  # [68, 3]

    @classmethod
    def from_points(cls, points: np.ndarray) -> Pose:
        """Make a pose from whole-body points [133, 3]. Raises ValueError for another shape."""
        if points.shape != (133, 3):
            raise ValueError(f"133 points of x, y, confidence are needed, not an array of {points.shape}")
        return cls(body_of(points), points[LEFT_HAND], points[RIGHT_HAND], points[FACE])

    def moved(self, transform: Callable[[np.ndarray], np.ndarray]) -> Pose:
        """Return the pose with `transform` applied to its coordinates [k, 2]. Confidences stay."""
        parts = (self.body, self.left_hand, self.right_hand, self.face)
        joints = np.concatenate(parts, dtype=np.float64)
        joints[:, :2] = transform(joints[:, :2])
        ends = np.cumsum([len(part) for part in parts]).tolist()
        return Pose(*(joints[a:b] for a, b in pairwise([0, *ends])))


@dataclass(frozen=True, eq=False)
class PoseTrack:
    """The poses of a clip, in pixels of frames of (width, height)."""

    points: np.ndarray  # float32 [n, 133, 3]
    width: int
    height: int

    def __len__(self) -> int:
        return len(self.points)

    def pose(self, index: int) -> Pose:
        return Pose.from_points(self.points[index])


def body_of(points: np.ndarray) -> np.ndarray:
    """Return the body joints [..., 20, 3] of whole-body points [..., 133, 3]."""
    return (points[..., FIRST, :] + points[..., SECOND, :]) / 2


def hold_lost_bodies(points: np.ndarray) -> np.ndarray:
    """Where every body joint has a negative coordinate, keep the body of the frame before, as in the official code.

    points [n, 133, 3] → a copy. Hands and face are not kept. The official code crashes if this is so in the first
    frame; here the first frame stays as it is.
    """
    held = points.copy()
    lost = (body_of(points)[..., :2].min(-1) < 0).all(-1)
    for i in np.flatnonzero(lost):
        if i:
            held[i, BODY_ROWS] = held[i - 1, BODY_ROWS]
    return held

"""Person boxes: the boxes around the drawn person and around the face in each frame.

In:   whole-body points of a clip in pixels of the output. Out: boxes, float64 [n, 4]: x1, y1, x2, y2; NaN where there
      is none. Never: pictures.
"""

from __future__ import annotations

import numpy as np

from runner.preprocess.body.face import FACE_CONFIDENCE, LEAST_POINTS, LEAST_SIDE, LEAST_VISIBLE
from runner.preprocess.body.keypoints import FACE, LEFT_HAND, RIGHT_HAND, body_of
from runner.preprocess.body.skeleton import THRESHOLD

__all__ = ["face_boxes", "person_boxes"]

NOSE, NECK = 0, 1
# Joints are inside the body: shoulders, hips and soles are a few per cent of a standing person's height further out.
MARGIN = 0.06  # of the longer side; assumed, checked by eye on a dancing man and a portrait
# From the nose to the crown is less than from the neck to the nose; the rest is hair.
CROWN = 0.9  # of the way from neck to nose, beyond the nose


def person_boxes(points: np.ndarray) -> np.ndarray:
    """Return the boxes around all drawn joints of points float [n, 133, 3] (x, y, confidence), with head and margin.

    A frame in which nothing of the body is drawn has none.
    """
    body = body_of(np.asarray(points, np.float64))
    faces = points[:, FACE]
    sure = _sure_faces(faces)
    crown = body[:, NOSE] + CROWN * (body[:, NOSE] - body[:, NECK])
    crown[:, 2] = np.minimum(body[:, NOSE, 2], body[:, NECK, 2])
    joints = np.concatenate([body, crown[:, None], points[:, LEFT_HAND], points[:, RIGHT_HAND]], 1)
    drawn = joints[..., 2] >= THRESHOLD
    kept = np.concatenate([drawn, sure], 1)
    kept[~drawn[:, : body.shape[1]].any(1)] = False
    boxes = _extents(np.concatenate([joints[..., :2], faces[..., :2]], 1), kept)
    margin = MARGIN * np.maximum(boxes[:, 2] - boxes[:, 0], boxes[:, 3] - boxes[:, 1])
    return boxes + margin[:, None] * (-1, -1, 1, 1)


def face_boxes(points: np.ndarray, width: int, height: int) -> np.ndarray:
    """Return the boxes around the 68 face points, from brows to chin.

    A frame has none if fewer than half of the points are confident, if the face is smaller than 4 pixels, or if less
    than a quarter of it is inside a picture of (width, height).
    """
    faces = np.asarray(points[:, FACE], np.float64)
    boxes = _extents(faces[..., :2], _sure_faces(faces))
    inside = np.clip(boxes, 0, (width, height, width, height))
    sides, seen = boxes[:, 2:] - boxes[:, :2], inside[:, 2:] - inside[:, :2]
    with np.errstate(invalid="ignore"):  # of frames without a face
        lost = (seen.min(1) < LEAST_SIDE) | (seen.prod(1) < LEAST_VISIBLE * sides.prod(1))
    boxes[lost] = np.nan
    return boxes


def _sure_faces(faces: np.ndarray) -> np.ndarray:
    """bool [n, 68]: the confident points, of faces with enough of them."""
    sure = faces[..., 2] >= FACE_CONFIDENCE
    return sure & (sure.sum(1) >= LEAST_POINTS)[:, None]


def _extents(xy: np.ndarray, kept: np.ndarray) -> np.ndarray:
    """Return the boxes around the points xy float [n, k, 2] where `kept` bool [n, k] is true."""
    low = np.where(kept[..., None], xy, np.inf).min(1)
    high = np.where(kept[..., None], xy, -np.inf).max(1)
    boxes = np.concatenate([low, high], 1)
    boxes[~kept.any(1)] = np.nan
    return boxes

"""Face: the square picture of the face that drives the expression, in every frame.

In:   68 face points a frame and native frames. Out: which box of which frame to show (`FacePlan`), and crops
uint8 [F, F, 3]. Never: how the points were found.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import cv2
import numpy as np

__all__ = ["FACE_CONFIDENCE", "FaceBox", "FacePlan", "crop_face", "face_box", "official_box", "plan_faces"]

FaceBox = tuple[int, int, int, int]  # x1, x2, y1, y2: the official order

GROWTH = math.sqrt(1.3) - 1  # 1.3 times the area
FACE_CONFIDENCE = 0.3  # a face point below this is a guess
LEAST_POINTS = 34  # of 68: half a face in profile still shows these
LEAST_SIDE = 4  # pixels: less holds no expression
LEAST_VISIBLE = 0.25  # of the box's area inside the frame: a thinner sliver, stretched to a square, is no face


@dataclass(frozen=True)
class FacePlan:
    """For frame i of a clip: crop `boxes[i]` out of frame `sources[i]`; a source of -1 says that no face was seen."""

    boxes: list[FaceBox]
    sources: np.ndarray  # int64 [n]

    @property
    def held(self) -> int:
        """Frames that show the face of another frame, or none."""
        return int((self.sources != np.arange(len(self.sources))).sum())

    @property
    def seen(self) -> bool:
        return bool((self.sources >= 0).any())


def official_box(face: np.ndarray, width: int, height: int) -> FaceBox:
    """x1, x2, y1, y2 around face points [68, ≥2], grown by 1.3 in area, three parts of four of the height upwards.

    Clipped on one side only, as the official code does: a face off the left or top edge gives negative ends.
    """
    x1, x2, y1, y2 = _grown(face)
    return int(max(x1, 0)), int(min(x2, width)), int(max(y1, 0)), int(min(y2, height))


def face_box(face: np.ndarray, width: int, height: int) -> FaceBox | None:
    """The same box around the points that are sure, [68, 3] with confidence, clipped on both sides.

    None when there is no face to show: too few sure points, too small, or mostly outside of the frame.
    """
    sure = face[face[:, 2] >= FACE_CONFIDENCE]
    if len(sure) < LEAST_POINTS:
        return None
    x1, x2, y1, y2 = _grown(sure)
    left, right = (int(min(max(x, 0), width)) for x in (x1, x2))
    top, bottom = (int(min(max(y, 0), height)) for y in (y1, y2))
    visible = max(right - left, 0) * max(bottom - top, 0)
    if min(right - left, bottom - top) < LEAST_SIDE or visible < LEAST_VISIBLE * (x2 - x1) * (y2 - y1):
        return None
    return left, right, top, bottom


def plan_faces(faces: np.ndarray, width: int, height: int, *, parity: bool = False) -> FacePlan:
    """Faces [n, 68, 3] of a clip whose frames are (width, height) → what to crop where.

    A frame without a face keeps the last one that was seen; before the first, the first is shown.
    In parity every frame is cropped as the official code would; where that crashes (nothing to crop), the last is kept.
    """
    boxes: list[FaceBox | None]
    if parity:
        boxes = [_if_croppable(official_box(face, width, height), width, height) for face in faces]
    else:
        boxes = [face_box(face, width, height) for face in faces]
    good = [i for i, box in enumerate(boxes) if box is not None]
    if not good:
        return FacePlan([(0, 0, 0, 0)] * len(boxes), np.full(len(boxes), -1, np.int64))
    last = np.searchsorted(good, np.arange(len(boxes)), side="right") - 1
    sources = np.array(good, np.int64)[np.maximum(last, 0)]
    return FacePlan([box for s in sources if (box := boxes[s]) is not None], sources)


def crop_face(frame: np.ndarray, box: FaceBox, size: int) -> np.ndarray:
    """uint8 RGB [H, W, 3] → uint8 [size, size, 3]: bilinear, aspect not kept, as the face encoder was trained."""
    x1, x2, y1, y2 = box
    return cv2.resize(np.ascontiguousarray(frame[y1:y2, x1:x2]), (size, size), interpolation=cv2.INTER_LINEAR)


def _grown(face: np.ndarray) -> tuple[float, float, float, float]:
    xy = np.asarray(face[:, :2], np.float64)
    (xmin, ymin), (xmax, ymax) = xy.min(0), xy.max(0)
    dw, dh = GROWTH * (xmax - xmin) / 2, GROWTH * (ymax - ymin) / 4
    return float(xmin - dw), float(xmax + dw), float(ymin - 3 * dh), float(ymax + dh)


def _if_croppable(box: FaceBox, width: int, height: int) -> FaceBox | None:
    """None where Python's slicing, negative ends counted from the far side, leaves nothing."""
    x1, x2, y1, y2 = box
    columns, rows = range(width)[x1:x2], range(height)[y1:y2]
    return box if len(columns) and len(rows) else None

"""Face: plan and cut the square picture of the face that drives the expression, for every frame.

In:   68 face points per frame, and frames at the video's size. Out: which box of which frame to show (`FacePlan`), and
      crops uint8 [F, F, 3]. Never: how the points were found.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import cv2
import numpy as np

from runner.preprocess.body.smooth import gaussian, median

__all__ = [
    "FACE_CONFIDENCE",
    "LEAST_POINTS",
    "LEAST_SIDE",
    "LEAST_VISIBLE",
    "FaceBox",
    "FacePlan",
    "crop_face",
    "face_box",
    "official_box",
    "plan_faces",
]

FaceBox = tuple[int, int, int, int]  # x1, x2, y1, y2: the official order

GROWTH = math.sqrt(1.3) - 1  # 1.3 times the area
FACE_CONFIDENCE = 0.3  # a face point below this is a guess
LEAST_POINTS = 34  # of 68: half a face in profile still shows these
LEAST_SIDE = 4  # pixels: a smaller face shows no expression
OUTLIER_S = 0.07  # a box that differs from all boxes within this time on both sides is a wrong detection
# Standard deviations of the averages over time. A head bounces twice a second and more, but its size does not change; a
# crop that changes its size looks like an expression.
CENTRE_S = 0.05
SIZE_S = 0.25
LEAST_VISIBLE = 0.25  # of the box's area inside the frame: a thinner sliver, stretched to a square, is no face


@dataclass(frozen=True)
class FacePlan:
    """For frame i of a clip: crop `boxes[i]` out of frame `sources[i]`. A source of -1 means that no face was seen."""

    boxes: list[FaceBox]
    sources: np.ndarray  # int64 [n]

    @property
    def held(self) -> int:
        """Frames that show the face of another frame, or none."""
        return int((self.sources != np.arange(len(self.sources))).sum())

    @property
    def seen(self) -> bool:
        return bool((self.sources >= 0).any())

    def repeated(self, first: np.ndarray, back: np.ndarray) -> FacePlan:
        """Return the plan of a longer clip with repeated pictures.

        back:  for each frame of the longer clip, the frame of this plan whose picture it shows.
        first: for each frame of this plan, the first frame of the longer clip that shows it.
        """
        sources = np.where(self.sources < 0, -1, first[self.sources])[back]
        same = self.sources[back] == back
        return FacePlan([self.boxes[b] for b in back], np.where(same, np.arange(len(back)), sources))


def official_box(face: np.ndarray, width: int, height: int) -> FaceBox:
    """Return the box (x1, x2, y1, y2) around face points [68, ≥2], its area grown by 1.3.

    Three quarters of the growth in height go upwards. It is clipped as in the official code, on one side only: a face
    beyond the left or top edge gives negative ends.
    """
    x1, x2, y1, y2 = _grown(face)
    return int(max(x1, 0)), int(min(x2, width)), int(max(y1, 0)), int(min(y2, height))


def face_box(face: np.ndarray, width: int, height: int) -> FaceBox | None:
    """Return the same box around the confident points of [68, 3], clipped on both sides.

    None where there is no face to show: too few confident points, too small, or mostly outside the frame.
    """
    ends = _sure_ends(face)
    return None if ends is None else _clipped(ends, width, height)


def plan_faces(
    faces: np.ndarray, width: int, height: int, *, parity: bool = False, times_s: np.ndarray | None = None
) -> FacePlan:
    """Plan the crops for faces [n, 68, 3] of a clip whose frames are (width, height).

    A frame without a face shows the last face before it; frames before the first face show the first. With `times_s`
    (float64 [n], increasing) boxes are smoothed over time without lag, centre and size separately.
    In parity mode every frame is cropped as in the official code. Where that crashes (nothing to crop), the last face
    is kept.
    """
    boxes: list[FaceBox | None]
    if parity:
        boxes = [_if_croppable(official_box(face, width, height), width, height) for face in faces]
    else:
        ends = [_sure_ends(face) for face in faces]
        boxes = [None if e is None else _clipped(e, width, height) for e in ends]
        if times_s is not None:
            seen = [i for i, box in enumerate(boxes) if box is not None]
            steady = _smooth_ends(np.array([ends[i] for i in seen]).reshape(-1, 4), times_s[seen])
            for i, smoothed in zip(seen, steady, strict=True):
                boxes[i] = _clipped(smoothed, width, height, whole=round) or boxes[i]
    good = [i for i, box in enumerate(boxes) if box is not None]
    if not good:
        return FacePlan([(0, 0, 0, 0)] * len(boxes), np.full(len(boxes), -1, np.int64))
    last = np.searchsorted(good, np.arange(len(boxes)), side="right") - 1
    sources = np.array(good, np.int64)[np.maximum(last, 0)]
    return FacePlan([box for s in sources if (box := boxes[s]) is not None], sources)


def crop_face(frame: np.ndarray, box: FaceBox, size: int, out: np.ndarray | None = None) -> np.ndarray:
    """Crop `box` from uint8 RGB [H, W, 3] and resize it to uint8 [size, size, 3], into `out` if given.

    Bilinear, without keeping the aspect, as in the face encoder's training.
    """
    x1, x2, y1, y2 = box
    return cv2.resize(frame[y1:y2, x1:x2], (size, size), dst=out, interpolation=cv2.INTER_LINEAR)


def _grown(face: np.ndarray) -> tuple[float, float, float, float]:
    xy = np.asarray(face[:, :2], np.float64)
    (xmin, ymin), (xmax, ymax) = xy.min(0), xy.max(0)
    dw, dh = GROWTH * (xmax - xmin) / 2, GROWTH * (ymax - ymin) / 4
    return float(xmin - dw), float(xmax + dw), float(ymin - 3 * dh), float(ymax + dh)


def _sure_ends(face: np.ndarray) -> tuple[float, float, float, float] | None:
    sure = face[face[:, 2] >= FACE_CONFIDENCE]
    return _grown(sure) if len(sure) >= LEAST_POINTS else None


def _clipped(ends: Sequence[float], width: int, height: int, whole: Callable[[float], int] = int) -> FaceBox | None:
    """Return the ends x1, x2, y1, y2 as whole pixels of the frame; None where too little of the face is in it."""
    x1, x2, y1, y2 = (float(end) for end in ends)
    left, right = (whole(min(max(x, 0.0), width)) for x in (x1, x2))
    top, bottom = (whole(min(max(y, 0.0), height)) for y in (y1, y2))
    visible = max(right - left, 0) * max(bottom - top, 0)
    if min(right - left, bottom - top) < LEAST_SIDE or visible < LEAST_VISIBLE * (x2 - x1) * (y2 - y1):
        return None
    return left, right, top, bottom


def _smooth_ends(ends: np.ndarray, times_s: np.ndarray) -> np.ndarray:
    """Smooth the box ends [n, 4] (x1, x2, y1, y2) of the frames that show a face."""
    if len(ends) < 3:
        return ends
    centre = np.stack([ends[:, :2].mean(1), ends[:, 2:].mean(1)], 1)
    size = np.stack([ends[:, 1] - ends[:, 0], ends[:, 3] - ends[:, 2]], 1)
    centre, size = median(centre, times_s, OUTLIER_S), median(size, times_s, OUTLIER_S)
    # A face that moves by its own width in one frame is in another shot. After a gap in time smoothing starts anew.
    moved = np.abs(np.diff(centre, axis=0)).max(1) > size[1:].max(1)
    jumps = np.concatenate([[False], moved | (np.diff(times_s) > 2 * SIZE_S)])
    centre, half = gaussian(centre, times_s, CENTRE_S, jumps), gaussian(size, times_s, SIZE_S, jumps) / 2
    low, high = centre - half, centre + half
    return np.stack([low[:, 0], high[:, 0], low[:, 1], high[:, 1]], 1)


def _if_croppable(box: FaceBox, width: int, height: int) -> FaceBox | None:
    """Return None where Python's slicing (negative ends count from the far side) gives an empty crop."""
    x1, x2, y1, y2 = box
    columns, rows = range(width)[x1:x2], range(height)[y1:y2]
    return box if len(columns) and len(rows) else None

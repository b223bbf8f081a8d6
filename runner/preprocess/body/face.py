"""Face: the square picture of the face that drives the expression, in every frame.

In:   68 face points a frame and native frames. Out: which box of which frame to show (`FacePlan`), and crops
uint8 [F, F, 3]. Never: how the points were found.
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
LEAST_SIDE = 4  # pixels: less holds no expression
OUTLIER_S = 0.07  # a box that differs from those this far on either side is the network's slip
CENTRE_S = 0.05  # standard deviations of what the box is averaged over: a head bounces twice a second and more,
SIZE_S = 0.25  # but does not grow; a crop that pumps reads as an expression
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

    def repeated(self, first: np.ndarray, back: np.ndarray) -> FacePlan:
        """The plan of a longer clip: its frame i shows picture `back[i]` of this one, first shown at `first`."""
        sources = np.where(self.sources < 0, -1, first[self.sources])[back]
        own = self.sources[back] == back
        return FacePlan([self.boxes[b] for b in back], np.where(own, np.arange(len(back)), sources))


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
    ends = _sure_ends(face)
    return None if ends is None else _clipped(ends, width, height)


def plan_faces(
    faces: np.ndarray, width: int, height: int, *, parity: bool = False, times_s: np.ndarray | None = None
) -> FacePlan:
    """Faces [n, 68, 3] of a clip whose frames are (width, height) → what to crop where.

    A frame without a face keeps the last one that was seen; before the first, the first is shown. With `times_s`
    (float64 [n], increasing) boxes are steadied over time, centre and size apart, without lag.
    In parity every frame is cropped as the official code would; where that crashes (nothing to crop), the last is kept.
    """
    boxes: list[FaceBox | None]
    if parity:
        boxes = [_if_croppable(official_box(face, width, height), width, height) for face in faces]
    else:
        ends = [_sure_ends(face) for face in faces]
        boxes = [None if e is None else _clipped(e, width, height) for e in ends]
        if times_s is not None:
            seen = [i for i, box in enumerate(boxes) if box is not None]
            steady = _steadied(np.array([ends[i] for i in seen]).reshape(-1, 4), times_s[seen])
            for i, smoothed in zip(seen, steady, strict=True):
                boxes[i] = _clipped(smoothed, width, height, whole=round) or boxes[i]
    good = [i for i, box in enumerate(boxes) if box is not None]
    if not good:
        return FacePlan([(0, 0, 0, 0)] * len(boxes), np.full(len(boxes), -1, np.int64))
    last = np.searchsorted(good, np.arange(len(boxes)), side="right") - 1
    sources = np.array(good, np.int64)[np.maximum(last, 0)]
    return FacePlan([box for s in sources if (box := boxes[s]) is not None], sources)


def crop_face(frame: np.ndarray, box: FaceBox, size: int, out: np.ndarray | None = None) -> np.ndarray:
    """uint8 RGB [H, W, 3] → uint8 [size, size, 3], in `out` if given.

    Bilinear, aspect not kept, as the face encoder was trained.
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
    """Ends x1, x2, y1, y2 in whole pixels of the frame; None where too little of a face is in it."""
    x1, x2, y1, y2 = (float(end) for end in ends)
    left, right = (whole(min(max(x, 0.0), width)) for x in (x1, x2))
    top, bottom = (whole(min(max(y, 0.0), height)) for y in (y1, y2))
    visible = max(right - left, 0) * max(bottom - top, 0)
    if min(right - left, bottom - top) < LEAST_SIDE or visible < LEAST_VISIBLE * (x2 - x1) * (y2 - y1):
        return None
    return left, right, top, bottom


def _steadied(ends: np.ndarray, times_s: np.ndarray) -> np.ndarray:
    """Box ends [n, 4] (x1, x2, y1, y2) of the frames that show a face → the same, without tremble."""
    if len(ends) < 3:
        return ends
    centre = np.stack([ends[:, :2].mean(1), ends[:, 2:].mean(1)], 1)
    size = np.stack([ends[:, 1] - ends[:, 0], ends[:, 3] - ends[:, 2]], 1)
    centre, size = median(centre, times_s, OUTLIER_S), median(size, times_s, OUTLIER_S)
    # A face that is a face's width away in the next frame is another shot's; after a gap in time it is a new beginning.
    moved = np.abs(np.diff(centre, axis=0)).max(1) > size[1:].max(1)
    jumps = np.concatenate([[False], moved | (np.diff(times_s) > 2 * SIZE_S)])
    centre, half = gaussian(centre, times_s, CENTRE_S, jumps), gaussian(size, times_s, SIZE_S, jumps) / 2
    low, high = centre - half, centre + half
    return np.stack([low[:, 0], high[:, 0], low[:, 1], high[:, 1]], 1)


def _if_croppable(box: FaceBox, width: int, height: int) -> FaceBox | None:
    """None where Python's slicing, negative ends counted from the far side, leaves nothing."""
    x1, x2, y1, y2 = box
    columns, rows = range(width)[x1:x2], range(height)[y1:y2]
    return box if len(columns) and len(rows) else None

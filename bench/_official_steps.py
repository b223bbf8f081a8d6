"""The official preprocessing steps in NumPy and OpenCV, one frame at a time, as the peer of `preprocessing.py`.

In:   uint8 RGB frames and the two networks. Out: skeletons, faces, points.

Written from the description of each step (strided colour swaps, float64 images, one map after the other), without
optimisations and without slowing anything down on purpose. Left out in its favour: keeping whole clips in memory, and
the colour swap before the pose network.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import cv2
import numpy as np

from runner.preprocess.body.face import official_box
from runner.preprocess.body.keypoints import FACE, Pose
from runner.preprocess.body.skeleton import draw_skeleton
from runner.preprocess.pictures.sizing import padding_resize

__all__ = ["Person", "choose_box", "crop_face", "decode", "detector_input", "draw", "pose_input"]

MEAN, STD = np.array([0.485, 0.456, 0.406]), np.array([0.229, 0.224, 0.225])


@dataclass(frozen=True)
class Person:
    """Centre and size of the pose network's input region, in pixels."""

    cx: float
    cy: float
    width: float
    height: float


def detector_input(frame: np.ndarray) -> np.ndarray:
    """uint8 RGB [H, W, 3] → float32 [1, 3, 640, 640]: swapped to BGR, resized, swapped back, divided in float64."""
    bgr = frame[..., ::-1]
    resized = cv2.resize(bgr, (640, 640), interpolation=cv2.INTER_LINEAR)
    image = resized[..., ::-1] / 255.0
    return np.transpose(image, (2, 0, 1)).astype(np.float32)[None]


def choose_box(rows: np.ndarray, width: int, height: int) -> tuple[int, int, int, int] | None:
    """float32 [300, 6] → x1, y1, x2, y2 of the largest person after suppression across all classes, or None."""
    boxes, scores, classes = [], [], []
    for x1, y1, x2, y2, score, kind in rows:
        if score >= 0.05:
            x, y = int(x1 * width / 640), int(y1 * height / 640)
            boxes.append([x, y, int((x2 - x1) * width / 640), int((y2 - y1) * height / 640)])
            scores.append(float(score))
            classes.append(int(kind))
    if not boxes:
        return None
    kept = np.asarray(cv2.dnn.NMSBoxes(boxes, scores, 0.05, 0.5)).reshape(-1)
    people = [boxes[i] for i in kept if classes[i] == 0]
    if not people:
        return None
    x, y, w, h = max(people, key=lambda box: box[2] * box[3])
    return x, y, x + w, y + h


def pose_input(frame: np.ndarray, box: tuple[int, int, int, int] | None) -> tuple[np.ndarray, Person]:
    """uint8 RGB [H, W, 3] and a box → float32 [1, 3, 256, 192], and where that lies in the frame."""
    height, width = frame.shape[:2]
    x1, y1, x2, y2 = box or (0, 0, width, height)
    tall = 1.25 * max((x2 - x1) * 256 / 192, y2 - y1)
    person = Person((x1 + x2) / 2, (y1 + y2) / 2, tall * 192 / 256, tall)
    left, top = round(person.cx - person.width / 2), round(person.cy - person.height / 2)
    right, bottom = round(person.cx + person.width / 2), round(person.cy + person.height / 2)
    canvas = np.zeros((bottom - top, right - left, 3), np.float32)
    inside = frame[max(top, 0) : min(bottom, height), max(left, 0) : min(right, width)]
    at_y, at_x = max(0, -top), max(0, -left)
    canvas[at_y : at_y + inside.shape[0], at_x : at_x + inside.shape[1]] = inside
    image = cv2.resize(canvas, (192, 256), interpolation=cv2.INTER_LINEAR)
    normal = (image / 255.0 - MEAN) / STD
    return normal.transpose(2, 0, 1).astype(np.float32)[None], person


def decode(heatmaps: np.ndarray, person: Person) -> np.ndarray:
    """float32 [133, 64, 48] → float64 [133, 3]: every map blurred whole, then one Newton step on its logarithm."""
    points = np.zeros((len(heatmaps), 3))
    for joint, heatmap in enumerate(heatmaps):
        score = heatmap.max()
        py, px = (int(v) for v in np.unravel_index(heatmap.argmax(), heatmap.shape))
        if score <= 0:
            px, py = -1, -1
        x, y = float(px), float(py)
        padded = np.zeros((64 + 10, 48 + 10))
        padded[5:-5, 5:-5] = heatmap
        blurred = cv2.GaussianBlur(padded, (11, 11), 0)[5:-5, 5:-5]
        if blurred.max() > 0:
            blurred = blurred * (score / blurred.max())
        log = np.log(np.maximum(blurred, 1e-10))
        if 1 < px < 46 and 1 < py < 62:
            dx, dy = newton_step(log, px, py)
            x, y = x + dx, y + dy
        points[joint] = (
            x * person.width / 48 + person.cx - person.width / 2,
            y * person.height / 64 + person.cy - person.height / 2,
            score,
        )
    return points


def newton_step(log: np.ndarray, px: int, py: int) -> tuple[float, float]:
    dx = 0.5 * (log[py, px + 1] - log[py, px - 1])
    dy = 0.5 * (log[py + 1, px] - log[py - 1, px])
    dxx = 0.25 * (log[py, px + 2] - 2 * log[py, px] + log[py, px - 2])
    dyy = 0.25 * (log[py + 2, px] - 2 * log[py, px] + log[py - 2, px])
    dxy = 0.25 * (log[py + 1, px + 1] - log[py - 1, px + 1] - log[py + 1, px - 1] + log[py - 1, px - 1])
    if dxx * dyy - dxy**2 == 0:
        return 0.0, 0.0
    step = -np.linalg.inv(np.array([[dxx, dxy], [dxy, dyy]])) @ np.array([dx, dy])
    return float(step[0]), float(step[1])


def draw(points: np.ndarray, frame: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """float [133, 3] → uint8 [H, W, 3]: drawn at the frame's size, then brought to `size` (width, height)."""
    drawn = draw_skeleton(Pose.from_points(points), frame.shape[1], frame.shape[0])
    return padding_resize(drawn, *size)


def crop_face(points: np.ndarray, frame: np.ndarray) -> np.ndarray:
    """float [133, 3] → uint8 [512, 512, 3]; black where the official code would crash."""
    x1, x2, y1, y2 = official_box(points[FACE], frame.shape[1], frame.shape[0])
    crop: Any = frame[y1:y2, x1:x2]
    return cv2.resize(crop, (512, 512)) if crop.size else np.zeros((512, 512, 3), np.uint8)

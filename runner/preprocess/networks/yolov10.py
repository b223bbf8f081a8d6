"""YOLOv10: find the boxes of people in a frame, and choose one of them.

In:   uint8 RGB frames and a network of the YOLOv10 contract. Out: candidate rows, and the `Box`es of people in a frame.
Never: time (`track` follows people from frame to frame).

Contract: [1, 3, 640, 640] float32 RGB/255, the frame stretched, → [1, 300, 6] rows x1, y1, x2, y2, score, class in
640-space (or YOLOv8's [1, 84, 8400]: centre, size, 80 class scores). Class 0 is a person.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import cv2
import numpy as np

from runner.preprocess.networks.sessions import Network, check_shape, open_network

__all__ = [
    "MIN_SCORE",
    "PARITY_MIN_SCORE",
    "Box",
    "Detector",
    "choose_person",
    "choose_person_parity",
    "network_input",
    "people",
]

SIDE = 640
PERSON = 0
PARITY_MIN_SCORE = 0.05
MIN_SCORE = 0.25  # the detector's own default; below it textures are detected as people in every clip
NMS_IOU = 0.5
FAR_SMALLER = 0.4  # official: boxes shorter than this share of the longest so far are skipped
# Divided in float64 and converted to float32, as in the official code; as a table it takes only a look-up.
UNIT = (np.arange(256) / 255.0).astype(np.float32)


@dataclass(frozen=True)
class Box:
    """A person in a frame: corners in pixels (x2, y2 exclusive) and the detector's score."""

    x1: float
    y1: float
    x2: float
    y2: float
    score: float

    @property
    def area(self) -> float:
        return (self.x2 - self.x1) * (self.y2 - self.y1)

    @property
    def height(self) -> float:
        return self.y2 - self.y1

    @property
    def centre(self) -> tuple[float, float]:
        return (self.x1 + self.x2) / 2, (self.y1 + self.y2) / 2

    def overlap(self, other: Box) -> float:
        """Intersection over union, 0…1."""
        width = min(self.x2, other.x2) - max(self.x1, other.x1)
        height = min(self.y2, other.y2) - max(self.y1, other.y1)
        common = max(width, 0.0) * max(height, 0.0)
        whole = self.area + other.area - common
        return common / whole if whole > 0 else 0.0


class Detector:
    """Finds people with a YOLOv10 network."""

    def __init__(self, network: Network) -> None:
        check_shape(network, input_tail=(3, SIDE, SIDE), output_tails=[(None, 6), (84, None)])
        self.network = network

    @classmethod
    def load(cls, path: Path, device: str = "cpu") -> Detector:
        return cls(open_network(path, device))

    def rows(self, frames: Sequence[np.ndarray]) -> np.ndarray:
        """Return float32 [n, rows, 6] for n frames uint8 RGB [H, W, 3]: x1, y1, x2, y2 in 640-space, score, class."""
        images = self.network.images(len(frames), (3, SIDE, SIDE))  # 5 MB per frame: filled in place, never copied
        for image, frame in zip(images, frames, strict=True):
            network_input(frame, image)
        return _as_rows(self.network.run(images))


def network_input(frame: np.ndarray, out: np.ndarray | None = None) -> np.ndarray:
    """Return the input for uint8 RGB [H, W, 3]: float32 [3, 640, 640] in 0…1, in `out` if given.

    The frame is stretched, not letterboxed, as in the contract.
    """
    image = np.empty((3, SIDE, SIDE), np.float32) if out is None else out
    planes = cv2.split(cv2.resize(frame, (SIDE, SIDE), interpolation=cv2.INTER_LINEAR))
    for plane, bytes_ in zip(image, planes, strict=True):
        cv2.LUT(bytes_, UNIT, dst=plane)
    return image


def people(rows: np.ndarray, size: tuple[int, int]) -> list[Box]:
    """Return all people in one frame, highest score first. `rows`: float [m, 6] as of `Detector.rows`; `size`: (width,
    height).

    It differs from the official rule in three points where that fails. Only people suppress each other (in the official
    code a surfboard with a higher score deletes its surfer). Boxes are not rounded. Scores below MIN_SCORE are dropped.
    """
    found = rows[(rows[:, 5].round() == PERSON) & (rows[:, 4] >= MIN_SCORE)]
    boxes = _scaled(found[:, :4], size)
    boxes = np.clip(boxes, 0, (*size, *size))
    boxes[:, 2:] -= boxes[:, :2]
    kept = _nms(boxes, found[:, 4], MIN_SCORE)
    every = [Box(x, y, x + w, y + h, float(found[i, 4])) for i in kept for x, y, w, h in [map(float, boxes[i])]]
    return [box for box in every if box.area > 0]


def choose_person(rows: np.ndarray, size: tuple[int, int]) -> Box | None:
    """Return the largest of `people`, or None. For a single frame (a reference)."""
    return max(people(rows, size), key=lambda box: box.area, default=None)


def choose_person_parity(rows: np.ndarray, size: tuple[int, int]) -> Box | None:
    """Return the official choice: whole pixels, suppression across all classes, then the largest box.

    Boxes are scanned by falling score. A box whose longer side is under 0.4 of a running maximum is skipped. This
    maximum is first the longest side of all, then that of the box accepted last.
    """
    rows = rows[rows[:, 4] >= PARITY_MIN_SCORE].astype(np.float32, copy=False)
    # In float32 as in the official code: near a whole pixel, float64 may be cut to another one.
    boxes = rows[:, :4] * np.array([size[0] / SIDE, size[1] / SIDE] * 2, np.float32)
    boxes[:, 2:] -= boxes[:, :2]
    boxes = boxes.astype(np.int32)
    kept = [i for i in _nms(boxes, rows[:, 4], PARITY_MIN_SCORE) if int(rows[i, 5]) == PERSON]
    longest = max((int(boxes[i, 2:].max()) for i in kept), default=0)
    best: Box | None = None
    for i in kept:
        x, y, w, h = (int(v) for v in boxes[i])
        if max(w, h) < FAR_SMALLER * longest:
            continue
        if best is None or w * h > best.area:
            best = Box(x, y, x + w, y + h, float(rows[i, 4]))
            longest = max(w, h)
    return best


def _as_rows(output: np.ndarray) -> np.ndarray:
    """Convert either layout to [n, m, 6]. YOLOv8's has centre, size and a score for each of 80 classes."""
    if output.shape[-1] == 6:
        return output
    columns = output.transpose(0, 2, 1)
    centre, half = columns[..., :2], columns[..., 2:4] / 2
    scores = columns[..., 4:]
    best = scores.argmax(-1)[..., None]
    parts = [centre - half, centre + half, np.take_along_axis(scores, best, -1), best.astype(np.float32)]
    return np.concatenate(parts, axis=-1)


def _scaled(corners: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    width, height = size
    return corners.astype(np.float64) * np.array([width, height, width, height]) / SIDE


def _nms(boxes_xywh: np.ndarray, scores: np.ndarray, least: float) -> list[int]:
    """Return the indices that non-maximum suppression keeps, highest score first."""
    if not len(boxes_xywh):
        return []
    kept = cv2.dnn.NMSBoxes(boxes_xywh.tolist(), scores.astype(float).tolist(), least, NMS_IOU)
    return [int(i) for i in np.asarray(kept).reshape(-1)]

"""YOLOX: find people with DWPose's person detector, in place of YOLOv10.

In:   uint8 RGB frames and a network of the YOLOX contract. Out: rows as of `yolov10.Detector.rows`, so that `people`,
      `choose_person` and the tracker work with both. Never: following people over time.

Contract (the published yolox_l.onnx): [n, 3, 640, 640] float32 BGR 0…255, the frame at the top left on grey 114, →
[n, 8400, 85]: a box, a score for an object, and a score for each of 80 classes. There is one candidate for each cell of
an 80x80, a 40x40 and a 20x20 grid (strides 8, 16, 32; row by row). In most exports the box is relative to its cell
(offset in cells, log of the size in cells), in some it is centre and size in pixels; both are read.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import cv2
import numpy as np

from runner.preprocess.networks.sessions import Network, check_shape, open_network

__all__ = ["CELLS", "YoloxDetector", "centres_and_sizes", "network_input", "person_rows"]

SIDE = 640
CLASSES = 80
GREY = 114
PERSON_SCORE = 5  # its column: centre, size and objectness come first
MIN_SCORE = 0.3  # DWPose's; its suppression starts from 0.1, but a lower score never deletes a higher one
NMS_IOU = 0.45
SAMPLED = 7  # every 7th candidate is used to find how boxes are written; 7 divides no grid's side: all columns count


def _cells() -> np.ndarray:
    grids = []
    for stride in (8, 16, 32):
        y, x = np.indices((SIDE // stride, SIDE // stride)).reshape(2, -1)
        grids.append(np.stack([x, y, np.full_like(x, stride)], 1))
    return np.concatenate(grids).astype(np.float32)


CELLS = _cells()  # float32 [8400, 3]: column, row and stride of each candidate's cell


class YoloxDetector:
    """Finds people with a YOLOX network; takes the place of `yolov10.Detector`."""

    def __init__(self, network: Network) -> None:
        check_shape(network, input_tail=(3, SIDE, SIDE), output_tails=[(len(CELLS), 5 + CLASSES)])
        self.network = network

    @classmethod
    def load(cls, path: Path, device: str = "cpu") -> YoloxDetector:
        """Open a file on "cpu", "cuda" or "cuda:N". Raises WeightsMissing, WeightsCorrupt, ConfigInvalid."""
        return cls(open_network(path, device))

    def rows(self, frames: Sequence[np.ndarray]) -> np.ndarray:
        """Return float32 [n, rows, 6] for n frames uint8 RGB [H, W, 3]: x1, y1, x2, y2, score, class; best first.

        Corners are in the space of the frame stretched to 640x640, as `Detector`'s. People only (class 0), after
        suppression. A frame with fewer people than others has rows of score 0 at its end.
        """
        images = self.network.images(len(frames), (3, SIDE, SIDE))
        for image, frame in zip(images, frames, strict=True):
            image[:] = network_input(frame)
        found = [
            person_rows(candidates, (frame.shape[1], frame.shape[0]))
            for candidates, frame in zip(self.network.run(images), frames, strict=True)
        ]
        table = np.zeros((len(found), max(map(len, found), default=0), 6), np.float32)
        for rows, people in zip(table, found, strict=True):
            rows[: len(people)] = people
        return table


def network_input(frame: np.ndarray) -> np.ndarray:
    """Return the input for uint8 RGB [H, W, 3]: [3, 640, 640], BGR 0…255, aspect kept, at the top left on grey 114."""
    width, height = _resized((frame.shape[1], frame.shape[0]))
    canvas = np.full((SIDE, SIDE, 3), GREY, np.uint8)
    canvas[:height, :width] = cv2.resize(frame, (width, height), interpolation=cv2.INTER_LINEAR)
    return canvas[..., ::-1].transpose(2, 0, 1)


def person_rows(candidates: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """Return float32 [people, 6], as of `rows`, for one frame's candidates float [8400, 85]. size: (width, height).

    A candidate's score is objectness times the person class, also if another class has a higher score.
    """
    scores = candidates[:, 4] * candidates[:, PERSON_SCORE]
    chosen = np.flatnonzero(scores > MIN_SCORE)  # a comparison with NaN is false
    if not len(chosen):
        return np.zeros((0, 6), np.float32)
    scores = scores[chosen]
    boxes = centres_and_sizes(candidates, chosen)
    # Undo the letterbox with the true factor of each side: sides are whole pixels, so it is not the exact ratio.
    boxes *= np.tile(SIDE / np.array(_resized(size), np.float64), 2)
    boxes[:, :2] -= boxes[:, 2:] / 2
    survivors = cv2.dnn.NMSBoxes(boxes.tolist(), scores.astype(float).tolist(), MIN_SCORE, NMS_IOU)
    kept = np.asarray(survivors, np.int64).reshape(-1)
    boxes[:, 2:] += boxes[:, :2]
    return np.concatenate([boxes[kept], scores[kept, None], np.zeros((len(kept), 1))], 1).astype(np.float32)


def centres_and_sizes(candidates: np.ndarray, chosen: np.ndarray) -> np.ndarray:
    """Return float64 [k, 4] of candidates[chosen]: x, y of the centre, width, height in pixels of the 640x640 input.

    The file does not declare which of the two forms boxes have. But nearly all candidates are close to their cell: read
    correctly they are within a cell or two of it, read in the other form half a picture away on average.
    """
    centres, cells = candidates[::SAMPLED, :2], CELLS[::SAMPLED]
    raw_error = np.median(np.abs(centres - 0.5))
    decoded_error = np.median(np.abs(centres / cells[:, 2:] - cells[:, :2] - 0.5))
    boxes = candidates[chosen, :4].astype(np.float64)
    if raw_error <= decoded_error:
        grid, stride = CELLS[chosen, :2], CELLS[chosen, 2:]
        boxes[:, :2] = (boxes[:, :2] + grid) * stride
        boxes[:, 2:] = np.exp(boxes[:, 2:]) * stride
    return boxes


def _resized(size: tuple[int, int]) -> tuple[int, int]:
    """Return (width, height) of a frame inside the input, cut to whole pixels as in the network's training."""
    ratio = min(SIDE / size[0], SIDE / size[1])
    width, height = (max(1, min(SIDE, int(side * ratio))) for side in size)
    return width, height

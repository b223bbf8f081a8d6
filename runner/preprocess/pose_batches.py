"""Pose batches: gather crops of pictures until they fill a batch of the pose network.

In:   pictures, a box each, a pose network. Out: points, written into the caller's array. Never: keeps frames; only
      crops are kept.

Windows of decoded frames are limited by bytes: 4 frames of 1080p, one of 4K. A batch of so few crops uses only a small
part of a GPU.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from runner.preprocess.networks.backends import POSE_BATCH, PointFinder
from runner.preprocess.networks.vitpose import Crop
from runner.preprocess.networks.yolov10 import Box

__all__ = ["PoseBatches"]


class PoseBatches:
    """Find the poses of pictures a full batch at a time. `finish` does the rest at the end."""

    def __init__(self, estimator: PointFinder, points: np.ndarray, *, bgr: bool) -> None:
        """points: float32 [n, 133, 3], a row for each picture of the clip, written when its pose is found."""
        self._estimator, self._points, self._bgr = estimator, points, bgr
        batch = estimator.network.batch or 1
        self.size = max(batch, POSE_BATCH - POSE_BATCH % batch)  # whole runs of a graph of constant batch
        self._images: np.ndarray | None = None  # float32 [size, *input_size], filled as far as there are crops
        self._crops: list[Crop] = []
        self._pictures: list[int] = []

    def add(self, pictures: np.ndarray, frames: np.ndarray, boxes: Sequence[Box | None]) -> None:
        """Add pictures by number: frames uint8 RGB [k, H, W, 3] and a box each. Full batches are computed at once."""
        for picture, frame, box in zip(pictures.tolist(), frames, boxes, strict=True):
            if self._images is None:
                self._images = self._estimator.network.images(self.size, self._estimator.input_size)
            out = self._images[len(self._crops)]
            self._crops.append(self._estimator.cut(frame, box, out=out, bgr=self._bgr))
            self._pictures.append(picture)
            if len(self._crops) == self.size:
                self.finish()

    def finish(self) -> None:
        """Find the poses of the pictures gathered so far."""
        if self._images is None or not self._crops:
            return
        output = self._estimator.network.run(self._images[: len(self._crops)])
        self._points[self._pictures] = self._estimator.decode(output, self._crops)
        self._crops, self._pictures = [], []

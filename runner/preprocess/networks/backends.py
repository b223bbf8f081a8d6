"""Backends: open a pair of a person detector and a pose network, and set the batch of each.

In:   a backend's name and its two files. Out: the opened pair. Never: the differences inside: the detectors of both
      pairs give candidate rows in the same space, and both pose networks give COCO-WholeBody's 133 points in pixels,
      with confidence.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from runner.errors import ConfigInvalid
from runner.preprocess.networks.providers import NetworkOptions, check_precision
from runner.preprocess.networks.rtmpose import SimccEstimator
from runner.preprocess.networks.sessions import Network, open_network
from runner.preprocess.networks.vitpose import Crop, PoseEstimator
from runner.preprocess.networks.yolov10 import Box, Detector
from runner.preprocess.networks.yolox import YoloxDetector

__all__ = ["BACKENDS", "POSE_BATCH", "Backend", "PersonDetector", "PointFinder", "open_backend"]

# Images in one run on a GPU. A crop of 256x192 is 192 tokens for ViTPose. One crop is too little work for a GPU's
# multiprocessors; 16 are enough (assumed, not measured), with 9 MB of inputs and 26 MB of heatmaps. A detector's image
# of 640x640 is enough work alone, and there are ten a second, so a detector takes one at a time.
POSE_BATCH = 16
DETECTOR_BATCH = 1
# The detector's share of the memory beside the weights. YOLOv10m's largest layers give 48 x 320 x 320 floats, 20 MB.
# Three of these are in memory at once, beside a convolution's workspace of up to 90 MB (Winograd): 150 MB. The largest
# layers of ViTPose-H give 5,120 x 192 floats per crop, 4 MB: three of these, for 16 crops, are 190 MB. Derived from
# shapes; cuDNN's own memory is not measured.
DETECTOR_SHARE = 0.4


class PersonDetector(Protocol):
    @property
    def network(self) -> Network: ...

    def rows(self, frames: Sequence[np.ndarray]) -> np.ndarray:
        """Return float32 [n, rows, 6] for n frames uint8 RGB [H, W, 3]: x1, y1, x2, y2 in 640-space, score, class."""
        ...


class PointFinder(Protocol):
    @property
    def network(self) -> Network: ...

    @property
    def input_size(self) -> tuple[int, int, int]:
        """Size of the network's input for one crop: channels, height, width."""
        ...

    def cut(self, frame: np.ndarray, box: Box | None, *, out: np.ndarray, bgr: bool = False) -> Crop:
        """Write the network's input for `box` (None: the whole frame) of uint8 RGB [H, W, 3] into `out`. Returns the
        crop."""
        ...

    def decode(self, output: np.ndarray, crops: Sequence[Crop]) -> np.ndarray:
        """Decode the network's output for `crops` to points float32 [n, 133, 3] in pixels of the frames."""
        ...

    def points(self, frames: np.ndarray, boxes: Sequence[Box | None], *, bgr: bool = False) -> np.ndarray:
        """Return points float32 [n, 133, 3] for frames uint8 RGB [n, H, W, 3] and boxes (None: the whole frame)."""
        ...


@dataclass(frozen=True, eq=False)
class Backend:
    """A detector and a pose network, open on one device."""

    name: str
    detector: PersonDetector
    pose: PointFinder

    @property
    def description(self) -> dict[str, Any]:
        """Plain values for the record: both models, their devices with reasons, their batch (None: any)."""
        return {
            "backend": self.name,
            "detector": self.detector.network.description,
            "pose": self.pose.network.description,
        }


# Value of `preprocess.pose` → detector and pose network: YOLOv10 and ViTPose, YOLOX and RTMPose.
BACKENDS: dict[str, tuple[type[Detector | YoloxDetector], type[PoseEstimator | SimccEstimator]]] = {
    "vitpose": (Detector, PoseEstimator),
    "dwpose": (YoloxDetector, SimccEstimator),
}


def open_backend(
    name: str, detector: Path, pose: Path, device: str = "cpu", options: NetworkOptions | None = None
) -> Backend:
    """Open both files for "vitpose" or "dwpose" on "cpu", "cuda" or "cuda:N".

    `options.pose_precision` is for the pose network. Detectors always compute in float32: they run on a few frames a
    second only, and their convolutions miss people in 8 bits and are not faster.

    Raises WeightsMissing, WeightsCorrupt (also if the files belong to the other backend), OutOfMemory, or ConfigInvalid
    if there is no such backend or the device is not available.
    """
    if name not in BACKENDS:
        raise ConfigInvalid(f"no such pose backend: {name!r}", todo=f"Use {' or '.join(BACKENDS)}")
    detector_class, pose_class = BACKENDS[name]
    options = options or NetworkOptions()
    check_precision(options.pose_precision, device)
    shares = options, options
    if options.arena_bytes is not None:
        detectors = round(DETECTOR_SHARE * options.arena_bytes)
        shares = (
            replace(options, arena_bytes=detectors),
            replace(options, arena_bytes=options.arena_bytes - detectors),
        )
    return Backend(
        name,
        detector_class(open_network(detector, device, shares[0], at_once=DETECTOR_BATCH)),
        pose_class(open_network(pose, device, shares[1], precision=options.pose_precision, at_once=POSE_BATCH)),
    )

"""Backends: pairs of a person detector and a pose network that can stand for each other, and the batch of each.

In:   a backend's name and its two files. Out: the opened pair. Never: what differs inside: both give candidate rows in
the same space and points of the same type, COCO-WholeBody's 133 in pixels with confidence.
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

# Images in one run on a GPU. A crop of 256x192 is 192 tokens for ViTPose, too few to fill a GPU's multiprocessors with
# one; 16 are (assumed, not measured), in 9 MB of inputs and 26 MB of heatmaps. One of a detector's, of 640x640, fills
# them alone, and there are ten a second: it takes one at a time.
POSE_BATCH = 16
DETECTOR_BATCH = 1
# Of the memory beside the weights. YOLOv10m's largest layers give 48 x 320 x 320 floats, 20 MB, and three such are
# held, beside a convolution's workspace, up to 90 MB where it is Winograd's: 150 MB. Those of ViTPose-H are 5,120 x 192
# floats a crop, 4 MB: of 16 crops three such are 190 MB. Derived from shapes; what cuDNN takes is not measured.
DETECTOR_SHARE = 0.4


class PersonDetector(Protocol):
    @property
    def network(self) -> Network: ...

    def rows(self, frames: Sequence[np.ndarray]) -> np.ndarray:
        """n frames uint8 RGB [H, W, 3] → float32 [n, rows, 6]: x1, y1, x2, y2 in 640-space, score, class."""
        ...


class PointFinder(Protocol):
    @property
    def network(self) -> Network: ...

    @property
    def input_size(self) -> tuple[int, int, int]:
        """Of one crop, as the network takes it: channels, height, width."""
        ...

    def cut(self, frame: np.ndarray, box: Box | None, *, out: np.ndarray, bgr: bool = False) -> Crop:
        """Write the network's input for `box` (None: the whole frame) of uint8 RGB [H, W, 3] into `out`; the crop."""
        ...

    def decode(self, output: np.ndarray, crops: Sequence[Crop]) -> np.ndarray:
        """The network's output for `crops` → points float32 [n, 133, 3] in pixels of the frames."""
        ...

    def points(self, frames: np.ndarray, boxes: Sequence[Box | None], *, bgr: bool = False) -> np.ndarray:
        """uint8 RGB [n, H, W, 3] and a box each (None: look at the whole frame) → float32 [n, 133, 3]."""
        ...


@dataclass(frozen=True, eq=False)
class Backend:
    """A detector and a pose network, open on one device."""

    name: str
    detector: PersonDetector
    pose: PointFinder

    @property
    def description(self) -> dict[str, Any]:
        """Plain values for the record: both models, where they run and why, and their batch (None: any)."""
        return {
            "backend": self.name,
            "detector": self.detector.network.description,
            "pose": self.pose.network.description,
        }


# Name as in `preprocess.pose` → detector and pose network: YOLOv10 and ViTPose, YOLOX and RTMPose.
BACKENDS: dict[str, tuple[type[Detector | YoloxDetector], type[PoseEstimator | SimccEstimator]]] = {
    "vitpose": (Detector, PoseEstimator),
    "dwpose": (YoloxDetector, SimccEstimator),
}


def open_backend(
    name: str, detector: Path, pose: Path, device: str = "cpu", options: NetworkOptions | None = None
) -> Backend:
    """Open both files for "vitpose" or "dwpose" on "cpu", "cuda" or "cuda:N".

    The precision that `options` asks for is the pose network's. Detectors consist of convolutions, which lose their
    people in 8 bits and gain no time, and look at a few frames a second only: they stay in float32.

    WeightsMissing, WeightsCorrupt (also where the files belong to the other backend), OutOfMemory, or ConfigInvalid
    where there is no such backend or the device cannot be had.
    """
    if name not in BACKENDS:
        raise ConfigInvalid(f"no such pose backend: {name!r}", todo=f"Use {' or '.join(BACKENDS)}")
    finds_people, finds_points = BACKENDS[name]
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
        finds_people(open_network(detector, device, shares[0], at_once=DETECTOR_BATCH)),
        finds_points(open_network(pose, device, shares[1], precision=options.pose_precision, at_once=POSE_BATCH)),
    )

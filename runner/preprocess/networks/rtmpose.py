"""RTMPose: find a person's 133 whole-body points with DWPose's pose network, in place of ViTPose.

In:   uint8 RGB frames, boxes and a network of the RTMPose contract. Out: points float32 [133, 3]: x, y in pixels of the
      frame, and a confidence on this project's scale. Never: choosing a person, other frames.

Contract (the published dw-ll_ucoco_384.onnx): [n, 3, 384, 288] float32 RGB, ImageNet-normalised, → simcc_x
[n, 133, 576] and simcc_y [n, 133, 768]. A joint's position is the highest bin in each of two rows of bins (SimCC), two
bins per pixel, so it is exact to half a pixel of the crop. The order of points is COCO-WholeBody's.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import cv2
import numpy as np

from runner.errors import WeightsCorrupt
from runner.preprocess.networks.sessions import Network, check_shape, open_network
from runner.preprocess.networks.vitpose import JOINTS, Crop, crop_of
from runner.preprocess.networks.yolov10 import Box

__all__ = ["SimccEstimator", "confidence_of", "decode_simcc", "network_input"]

WIDTH, HEIGHT = 288, 384  # 3:4 as ViTPose's 192x256, and boxes grow by the same quarter: `crop_of` works for both
BINS = 2  # per pixel
MEAN = np.array([123.675, 116.28, 103.53])
STD = np.array([58.395, 57.12, 57.375])
# [1, 256, 3]: each channel's 256 values, normalised; a look-up replaces float arithmetic on every pixel.
NORMALISED = ((np.arange(256)[None, :, None] - MEAN) / STD).astype(np.float32)
SEEN = 0.3  # DWPose draws joints from this score on
DRAWN = 0.5  # this project draws joints from this confidence on


class SimccEstimator:
    """Finds 133 points in each crop with an RTMPose network; takes the place of `vitpose.PoseEstimator`."""

    input_size = (3, HEIGHT, WIDTH)

    def __init__(self, network: Network) -> None:
        self.network = _with_both_axes(network)

    @classmethod
    def load(cls, path: Path, device: str = "cpu") -> SimccEstimator:
        """Open a file on "cpu", "cuda" or "cuda:N". Raises WeightsMissing, WeightsCorrupt, ConfigInvalid."""
        return cls(open_network(path, device))

    def points(self, frames: np.ndarray, boxes: Sequence[Box | None], *, bgr: bool = False) -> np.ndarray:
        """Return points float32 [n, 133, 3] for frames uint8 RGB [n, H, W, 3] and boxes (None: the whole frame).

        The network was trained on RGB. `bgr` exchanges red and blue, for comparisons with code that does so.
        """
        images = self.network.images(len(frames), self.input_size)
        crops = [self.cut(frame, box, out=out, bgr=bgr) for frame, box, out in zip(frames, boxes, images, strict=True)]
        return self.decode(self.network.run(images), crops)

    def cut(self, frame: np.ndarray, box: Box | None, *, out: np.ndarray, bgr: bool = False) -> Crop:
        """Write the network's input for `box` of uint8 RGB [H, W, 3] into `out`, float32 [3, 384, 288]. Returns the
        crop."""
        crop = crop_of(box, (frame.shape[1], frame.shape[0]))
        out[:] = network_input(frame, crop, bgr=bgr)
        return crop

    def decode(self, output: np.ndarray, crops: Sequence[Crop]) -> np.ndarray:
        """Decode the network's output for `crops` to points float32 [n, 133, 3] in pixels of the frames."""
        return decode_simcc(output[..., : BINS * WIDTH], output[..., BINS * WIDTH :], crops)


def network_input(frame: np.ndarray, crop: Crop, *, bgr: bool = False) -> np.ndarray:
    """Return the input for uint8 RGB [H, W, 3]: float32 [3, 384, 288], normalised, black outside the frame."""
    scale = WIDTH / crop.width
    to_input = np.array(
        [[scale, 0, WIDTH / 2 - scale * crop.cx], [0, scale, HEIGHT / 2 - scale * crop.cy]]  # centre to centre
    )
    image = cv2.warpAffine(frame, to_input, (WIDTH, HEIGHT), flags=cv2.INTER_LINEAR)
    if bgr:
        image = np.ascontiguousarray(image[..., ::-1])
    return cv2.LUT(image, NORMALISED).transpose(2, 0, 1)


def decode_simcc(x: np.ndarray, y: np.ndarray, crops: Sequence[Crop]) -> np.ndarray:
    """Decode x [n, J, 576] and y [n, J, 768] of the crops to points float32 [n, J, 3] in pixels of the frame.

    As in the published code: the highest bin of each axis (the codec's refinement is off in its training recipe). The
    score is the lower of the two peaks: a joint is found only if both axes have found it. A joint without a positive
    score has bin -1 on both axes.
    """
    bins = np.stack([x.argmax(-1), y.argmax(-1)], -1).astype(np.float64)
    score = np.minimum(x.max(-1), y.max(-1))
    bins[~(score > 0)] = -1
    size = np.array([[c.width, c.height] for c in crops])[:, None]
    centre = np.array([[c.cx, c.cy] for c in crops])[:, None]
    xy = bins / BINS * (size / (WIDTH, HEIGHT)) + centre - size / 2
    return np.concatenate([xy, confidence_of(score)[..., None]], -1).astype(np.float32)


def confidence_of(score: np.ndarray) -> np.ndarray:
    """Convert SimCC scores to the scale of ViTPose's heatmap peaks, on which all thresholds here are. float64.

    SimCC rows are trained towards peaks of 1, but have no fixed zero, and DWPose draws from 0.3 on. So 0 stays 0, 0.3
    becomes 0.5, 1 stays 1, and values between and beyond are on straight lines. The order is kept, and both projects
    draw the same joints.
    """
    score = score.astype(np.float64)
    return np.where(score < SEEN, score * (DRAWN / SEEN), DRAWN + (score - SEEN) * ((1 - DRAWN) / (1 - SEEN)))


@dataclass(frozen=True)
class _BothAxes:
    """A session with simcc_x and simcc_y side by side in one output, because `Network` has only one output."""

    session: Any
    names: tuple[str, str]
    path: Path

    def run(self, _: list[str], feeds: dict[str, np.ndarray]) -> list[np.ndarray]:
        x, y = self.session.run(list(self.names), feeds)
        if x.shape[1:] != (JOINTS, BINS * WIDTH) or y.shape[1:] != (JOINTS, BINS * HEIGHT):
            raise WeightsCorrupt(
                f"the graph gave {list(x.shape)} and {list(y.shape)} for {len(x)} crops, "
                f"not {JOINTS} rows of {BINS * WIDTH} and of {BINS * HEIGHT} bins each",
                where=self.path,
                todo="This is another model; check which file has this name",
            )
        return [np.concatenate([x, y], -1)]


def _with_both_axes(network: Network) -> Network:
    """Join both outputs to one, [n, 133, 576 + 768]. Raises WeightsCorrupt unless they are those of a SimCC network."""
    outputs = network.session.get_outputs()
    if len(outputs) < 2:
        raise WeightsCorrupt(
            f"the graph has one output, {list(network.output_shape)}, but simcc_x and simcc_y are needed",
            where=network.path,
            todo="This is another model; check which file has this name",
        )
    for output, side in zip(outputs, (WIDTH, HEIGHT), strict=False):
        sizes = tuple(size if isinstance(size, int) and size > 0 else None for size in output.shape or [])
        check_shape(
            replace(network, output_shape=sizes),
            input_tail=(3, HEIGHT, WIDTH),
            output_tails=[(JOINTS, BINS * side)],
        )
    both = _BothAxes(network.session, (outputs[0].name, outputs[1].name), network.path)
    return replace(network, session=both, output_shape=(network.batch, JOINTS, BINS * (WIDTH + HEIGHT)))

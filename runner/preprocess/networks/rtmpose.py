"""RTMPose: DWPose's pose network, in place of ViTPose: a person's box in, the same 133 whole-body points out.

In:   uint8 RGB frames, boxes and a network of the RTMPose contract. Out: points float32 [133, 3]: x, y in pixels of the
frame, and a confidence on this project's scale. Never: which person, or what came before.

Contract (the published dw-ll_ucoco_384.onnx): [n, 3, 384, 288] float32 RGB, ImageNet-normalised, → simcc_x
[n, 133, 576] and simcc_y [n, 133, 768]. A joint's place is not a peak in a picture but one in each of two rows of bins,
two bins a pixel: the highest bin is the answer, to half a pixel of the crop. The order of points is COCO-WholeBody's.
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

WIDTH, HEIGHT = 288, 384  # 3:4 as ViTPose's 192x256, and boxes grow by the same quarter: `crop_of` serves both
BINS = 2  # a pixel
MEAN = np.array([123.675, 116.28, 103.53])
STD = np.array([58.395, 57.12, 57.375])
# [1, 256, 3]: each channel's 256 values, normalised; a look-up in place of float arithmetic on every pixel.
NORMALISED = ((np.arange(256)[None, :, None] - MEAN) / STD).astype(np.float32)
SEEN = 0.3  # DWPose takes joints of a lower score for unseen
DRAWN = 0.5  # and this project those of a lower confidence


class SimccEstimator:
    """Finds 133 points in each crop with an RTMPose network; takes the place of `vitpose.PoseEstimator`."""

    input_size = (3, HEIGHT, WIDTH)

    def __init__(self, network: Network) -> None:
        self.network = _with_both_axes(network)

    @classmethod
    def load(cls, path: Path, device: str = "cpu") -> SimccEstimator:
        """Open a file on "cpu", "cuda" or "cuda:N". WeightsMissing, WeightsCorrupt, ConfigInvalid."""
        return cls(open_network(path, device))

    def points(self, frames: np.ndarray, boxes: Sequence[Box | None], *, bgr: bool = False) -> np.ndarray:
        """uint8 RGB [n, H, W, 3] and a box each (None: look at the whole frame) → float32 [n, 133, 3].

        The network was trained on RGB; `bgr` swaps, for comparisons with callers that do.
        """
        images = self.network.images(len(frames), self.input_size)
        crops = [self.cut(frame, box, out=out, bgr=bgr) for frame, box, out in zip(frames, boxes, images, strict=True)]
        return self.decode(self.network.run(images), crops)

    def cut(self, frame: np.ndarray, box: Box | None, *, out: np.ndarray, bgr: bool = False) -> Crop:
        """Write the network's input for `box` of uint8 RGB [H, W, 3] into `out`, float32 [3, 384, 288]; the crop."""
        crop = crop_of(box, (frame.shape[1], frame.shape[0]))
        out[:] = network_input(frame, crop, bgr=bgr)
        return crop

    def decode(self, output: np.ndarray, crops: Sequence[Crop]) -> np.ndarray:
        """The network's output for `crops` → points float32 [n, 133, 3] in pixels of the frames."""
        return decode_simcc(output[..., : BINS * WIDTH], output[..., BINS * WIDTH :], crops)


def network_input(frame: np.ndarray, crop: Crop, *, bgr: bool = False) -> np.ndarray:
    """uint8 RGB [H, W, 3] → float32 [3, 384, 288], normalised; outside of the frame is black before normalising."""
    scale = WIDTH / crop.width
    to_input = np.array(
        [[scale, 0, WIDTH / 2 - scale * crop.cx], [0, scale, HEIGHT / 2 - scale * crop.cy]]  # centre to centre
    )
    image = cv2.warpAffine(frame, to_input, (WIDTH, HEIGHT), flags=cv2.INTER_LINEAR)
    if bgr:
        image = np.ascontiguousarray(image[..., ::-1])
    return cv2.LUT(image, NORMALISED).transpose(2, 0, 1)


def decode_simcc(x: np.ndarray, y: np.ndarray, crops: Sequence[Crop]) -> np.ndarray:
    """x [n, J, 576], y [n, J, 768] and the crops they came from → points float32 [n, J, 3] in pixels of the frame.

    The published decode: the highest bin of each axis (the codec's refinement is off in its training recipe), and
    the lower of the two peaks as the score, since a joint is found only where both axes have found it. A joint
    without a positive score has bin -1 on both axes.
    """
    bins = np.stack([x.argmax(-1), y.argmax(-1)], -1).astype(np.float64)
    score = np.minimum(x.max(-1), y.max(-1))
    bins[~(score > 0)] = -1
    size = np.array([[c.width, c.height] for c in crops])[:, None]
    centre = np.array([[c.cx, c.cy] for c in crops])[:, None]
    xy = bins / BINS * (size / (WIDTH, HEIGHT)) + centre - size / 2
    return np.concatenate([xy, confidence_of(score)[..., None]], -1).astype(np.float32)


def confidence_of(score: np.ndarray) -> np.ndarray:
    """SimCC scores on the scale of ViTPose's heatmap peaks, which every threshold of this project is on. float64.

    Trained towards peaks of 1, a SimCC row has no fixed zero, and DWPose draws from 0.3. So 0 stays 0, its 0.3 becomes
    our 0.5, 1 stays 1, straight lines between and beyond: order is kept, and both draw the same joints.
    """
    score = score.astype(np.float64)
    return np.where(score < SEEN, score * (DRAWN / SEEN), DRAWN + (score - SEEN) * ((1 - DRAWN) / (1 - SEEN)))


@dataclass(frozen=True)
class _BothAxes:
    """A session whose one output is simcc_x and simcc_y side by side: `Network` knows of one output."""

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
                todo="This is another model; check which file stands under this name",
            )
        return [np.concatenate([x, y], -1)]


def _with_both_axes(network: Network) -> Network:
    """The network with both outputs as one, [n, 133, 576 + 768]. WeightsCorrupt unless they are those of a SimCC."""
    outputs = network.session.get_outputs()
    if len(outputs) < 2:
        raise WeightsCorrupt(
            f"the graph has one output, {list(network.output_shape)}, where simcc_x and simcc_y are needed",
            where=network.path,
            todo="This is another model; check which file stands under this name",
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

"""Face network: computes an embedding of a face, 128 numbers that are close together for one person.

In:   dlib's two networks (five points of a face; its embedding), a picture, the face's box. Out: float64 [128].
Never: finding faces. The box comes from the pose's 68 face points, from brows to chin: dlib's detectors miss most
faces of 480p clips.

dlib comes with the extra `faces`. According to dlib's author, two embeddings of one person are less than 0.6 apart.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from runner.errors import WeightsCorrupt

__all__ = ["FACE_FILES", "SAME_PERSON", "FaceNetwork", "cut_square"]

FACE_FILES = ("faces-5-points.dat", "faces-resnet.dat")
SAME_PERSON = 0.6  # Euclidean distance; stated by the network's author
CHIP = 256  # pixels per side of the picture in which the five points are searched
SURROUNDINGS = 1.6  # side of that picture, in sides of the box
# The five-point network was trained on boxes of dlib's detector. Of 1, 1.23 and 1.6 sides of our box, 1.23 separates a
# woman from the mean of a man's clip best: 0.49 apart, against 0.45 and 0.42 (two clips with faces of 33 pixels).
DETECTOR_SIDE = 1.6 / 1.3


class FaceNetwork:
    """Both networks. One embedding takes about 0.15 s on one CPU core."""

    def __init__(self, points: Any, embedding: Any) -> None:
        self._points, self._embedding = points, embedding

    @classmethod
    def open(cls, folder: Path) -> FaceNetwork:
        """Open FACE_FILES in `folder`. Raises ImportError without dlib, WeightsCorrupt for files dlib cannot read."""
        import dlib

        points, embedding = (folder / name for name in FACE_FILES)
        try:
            return cls(dlib.shape_predictor(str(points)), dlib.face_recognition_model_v1(str(embedding)))
        except RuntimeError as error:
            raise WeightsCorrupt(
                f"dlib cannot read {points.name} and {embedding.name} as its two face networks: {error}",
                where=folder,
                todo="Make them again: python tools/convert_faces.py",
            ) from error

    def embed(self, picture: np.ndarray, box: tuple[float, float, float, float]) -> np.ndarray:
        """Return float64 [128] of a face. `picture`: uint8 RGB [H, W, 3]; `box`: x1, y1, x2, y2 of its 68 points."""
        import dlib

        margin = CHIP * (1 - DETECTOR_SIDE / SURROUNDINGS) / 2
        low, high = round(margin), round(CHIP - margin) - 1
        chip = cut_square(picture, box)
        shape = self._points(chip, dlib.rectangle(low, low, high, high))
        return np.array(self._embedding.compute_face_descriptor(chip, shape), np.float64)


def cut_square(picture: np.ndarray, box: tuple[float, float, float, float]) -> np.ndarray:
    """Return uint8 [256, 256, 3]: the box and its surroundings, with its aspect; beyond the picture, edges repeat."""
    import cv2

    x1, y1, x2, y2 = (float(end) for end in box)
    scale = CHIP / (SURROUNDINGS * max(x2 - x1, y2 - y1))
    moved = np.array(
        [[scale, 0, CHIP / 2 - scale * (x1 + x2) / 2], [0, scale, CHIP / 2 - scale * (y1 + y2) / 2]], np.float64
    )
    how = cv2.INTER_CUBIC if scale > 1 else cv2.INTER_AREA
    return cv2.warpAffine(
        np.ascontiguousarray(picture), moved, (CHIP, CHIP), flags=how, borderMode=cv2.BORDER_REPLICATE
    )

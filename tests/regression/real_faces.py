"""Real faces that come with scikit-image: one portrait in colour, and small grey faces of others, enlarged."""

from __future__ import annotations

import sys
from pathlib import Path

import cv2
import numpy as np
import pytest

ASTRONAUT_BOX = (179, 84, 277, 179)  # of 68 face points, as the pose network finds them
TOOLS = Path(__file__).resolve().parents[2] / "tools"


@pytest.fixture(scope="session")
def face_networks(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A store's folder `metrics` with both face networks, of the installed package."""
    sys.path.append(str(TOOLS))
    from convert_faces import copy_networks, package_folder

    folder = tmp_path_factory.mktemp("store") / "metrics"
    copy_networks(package_folder(), folder)
    return folder


def astronaut() -> np.ndarray:
    """uint8 [512, 512, 3]; public domain."""
    return read("astronaut.png")


def other_people(count: int) -> list[tuple[np.ndarray, tuple[int, int, int, int]]]:
    """Pictures uint8 [512, 512, 3] and the boxes of their faces, about 100 pixels large."""
    import skimage

    small = np.load(Path(skimage.__file__).parent / "data" / "lfw_subset.npy")[:count]
    found = []
    for face in np.clip(small * 255, 0, 255).astype(np.uint8):
        large = cv2.resize(face, (125, 125), interpolation=cv2.INTER_CUBIC)
        picture = cv2.copyMakeBorder(large, 200, 187, 200, 187, cv2.BORDER_REPLICATE)
        found.append((cv2.cvtColor(picture, cv2.COLOR_GRAY2RGB), (212, 212, 312, 317)))
    return found


def read(name: str) -> np.ndarray:
    import skimage

    picture = cv2.imread(str(Path(skimage.__file__).parent / "data" / name), cv2.IMREAD_COLOR)
    return np.ascontiguousarray(picture[..., ::-1])


def resized(picture: np.ndarray, factor: float) -> np.ndarray:
    return cv2.resize(picture, None, fx=factor, fy=factor, interpolation=cv2.INTER_AREA)

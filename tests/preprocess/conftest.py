"""Clips of a bright disc, and the tiny networks that find it."""

from collections.abc import Callable
from fractions import Fraction
from pathlib import Path

import cv2
import numpy as np
import pytest

from runner.preprocess.prepare import Preprocessor
from runner.video import Mp4Writer
from tests.preprocess.tiny_networks import build_detector, build_pose

WIDTH, HEIGHT, DISC = 192, 128, 20


@pytest.fixture(scope="session")
def networks(tmp_path_factory) -> tuple[Path, Path]:
    folder = tmp_path_factory.mktemp("networks")
    return build_detector(folder / "detector.onnx"), build_pose(folder / "pose.onnx")


@pytest.fixture(scope="session")
def preprocessor(networks) -> Preprocessor:
    return Preprocessor.load(*networks)


def disc_frame(centre: tuple[int, int] | None, size: tuple[int, int] = (WIDTH, HEIGHT)) -> np.ndarray:
    frame = np.full((size[1], size[0], 3), 20, np.uint8)
    if centre is not None:
        cv2.circle(frame, centre, DISC, (250, 150 + centre[0] % 100, 250), -1)  # a tint that tells the place
    return frame


@pytest.fixture(scope="session")
def make_clip() -> Callable[..., Path]:
    """make_clip(path, centres, fps): a disc at each centre, or none where it is None."""

    def make(path: Path, centres: list[tuple[int, int] | None], fps: int = 16) -> Path:
        with Mp4Writer(path, WIDTH, HEIGHT, Fraction(fps), crf=6) as writer:
            writer.write(np.stack([disc_frame(c) for c in centres]))
        return path

    return make


@pytest.fixture(scope="session")
def reference(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("reference") / "ref.png"
    cv2.imwrite(str(path), np.full((208, 120, 3), 90, np.uint8))
    return path

"""Backends: the pipeline takes either pair, and a file of one is not taken for a file of the other."""

from fractions import Fraction

import numpy as np
import pytest

from runner.errors import ConfigInvalid, WeightsCorrupt
from runner.options import JobOptions
from runner.preprocess.backends import open_backend
from runner.preprocess.pipeline import Preprocessor
from runner.video import Mp4Writer
from tests.preprocess.tiny_dwpose import build_simcc, build_yolox, coloured_frame

SIZE = (192, 144)


@pytest.fixture(scope="module")
def dwpose(tmp_path_factory):
    folder = tmp_path_factory.mktemp("dwpose")
    return build_yolox(folder / "yolox_l.onnx"), build_simcc(folder / "dw-ll_ucoco_384.onnx", 1)


def test_a_clip_is_posed_by_dwpose_from_end_to_end(tmp_path, dwpose, reference):
    """Four discs walk to the right by 3 px a frame; video, detector, tracking, crop and decode bring them back."""
    places = [[(50 + 3 * i, 40), (80 + 3 * i, 60), (60 + 3 * i, 110), (75 + 3 * i, 90)] for i in range(9)]
    with Mp4Writer(tmp_path / "walk.mp4", *SIZE, Fraction(16), crf=6) as writer:
        writer.write(np.stack([coloured_frame(SIZE, centres) for centres in places]))
    backend = open_backend("dwpose", *dwpose)
    assert backend.description["backend"] == "dwpose"
    assert backend.description["pose"]["batch"] == 1
    assert backend.description["detector"]["batch"] is None
    preprocessor = Preprocessor(backend.detector, backend.pose)
    conditions = preprocessor.prepare(reference, tmp_path / "walk.mp4", JobOptions(size="192x144"), face_size=32)
    assert conditions.report["frames_without_person"] == 0
    assert conditions.report["detector"] == "yolox_l.onnx"
    points = conditions.track.points
    assert points.shape == (9, 133, 3)
    expected = np.array([[centres[k % 4] for k in range(133)] for centres in places])
    assert np.abs(points[..., :2] - expected).max() < 1.5  # H.264 keeps colour at half resolution
    assert points[..., 2].min() > 0.5
    assert conditions.window(0, 9).pose.any((1, 2, 3)).all()  # drawn in every frame
    conditions.close()


def test_vitpose_is_opened_by_name(networks):
    backend = open_backend("vitpose", *networks)
    assert backend.detector.network.path == networks[0]
    assert backend.pose.network.path == networks[1]


def test_files_of_the_other_backend_are_told_apart(networks, dwpose):
    with pytest.raises(WeightsCorrupt, match="another model"):
        open_backend("dwpose", networks[0], dwpose[1])
    with pytest.raises(WeightsCorrupt, match="another model"):
        open_backend("dwpose", dwpose[0], networks[1])
    with pytest.raises(WeightsCorrupt, match="another model"):
        open_backend("vitpose", *dwpose)


def test_there_is_no_third(dwpose):
    with pytest.raises(ConfigInvalid, match=r"openpose.*vitpose or dwpose"):
        open_backend("openpose", *dwpose)

"""Backends: the pipeline takes either pair, and a file of one is not taken for a file of the other."""

from fractions import Fraction

import numpy as np
import pytest

from runner.errors import ConfigInvalid, WeightsCorrupt, WeightsMissing
from runner.preprocess.networks.backends import open_backend
from runner.preprocess.prepare import Preprocessor
from runner.spec.options import JobOptions
from runner.video import Mp4Writer
from tests.preprocess.tiny_dwpose import build_simcc, build_yolox, coloured_frame

SIZE = (192, 144)


@pytest.fixture(scope="module")
def dwpose(tmp_path_factory):
    folder = tmp_path_factory.mktemp("dwpose")
    return build_yolox(folder / "yolox_l.onnx"), build_simcc(folder / "dw-ll_ucoco_384.onnx", 1)


PLACES = [[(50 + 3 * i, 40), (80 + 3 * i, 60), (60 + 3 * i, 110), (75 + 3 * i, 90)] for i in range(9)]
BY_DWPOSE = JobOptions(size="192x144", preprocess={"pose": "dwpose"})


@pytest.fixture(scope="module")
def walk(tmp_path_factory):
    """Four discs walk to the right by 3 px a frame."""
    path = tmp_path_factory.mktemp("walk") / "walk.mp4"
    with Mp4Writer(path, *SIZE, Fraction(16), crf=6) as writer:
        writer.write(np.stack([coloured_frame(SIZE, centres) for centres in PLACES]))
    return path


def test_a_job_that_asks_for_dwpose_is_posed_by_it_from_end_to_end(networks, dwpose, walk, reference):
    """Opened when first asked for; video, detector, tracking, crop and decode bring the discs back."""
    preprocessor = Preprocessor.load(*networks, dwpose=dwpose)
    assert "dwpose" not in preprocessor.description
    conditions = preprocessor.prepare(reference, walk, BY_DWPOSE, face_size=32)
    said = preprocessor.description["dwpose"]
    assert said["backend"] == "dwpose"
    assert said["pose"]["batch"] == 1
    assert said["detector"]["batch"] is None
    assert conditions.report["frames_without_person"] == 0
    assert conditions.report["detector"] == "yolox_l.onnx"
    points = conditions.track.points
    assert points.shape == (9, 133, 3)
    expected = np.array([[centres[k % 4] for k in range(133)] for centres in PLACES])
    assert np.abs(points[..., :2] - expected).max() < 1.5  # H.264 keeps colour at half resolution
    assert points[..., 2].min() > 0.5
    assert conditions.window(0, 9).pose.any((1, 2, 3)).all()  # drawn in every frame
    conditions.close()


def test_dwpose_without_its_files(networks, walk, reference, tmp_path):
    with pytest.raises(WeightsMissing, match="dwpose"):
        Preprocessor.load(*networks).prepare(reference, walk, BY_DWPOSE)
    absent = tmp_path / "yolox_l.onnx", tmp_path / "dw-ll_ucoco_384.onnx"
    with pytest.raises(WeightsMissing, match="yolox_l"):
        Preprocessor.load(*networks, dwpose=absent).prepare(reference, walk, BY_DWPOSE)


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

"""A real man, real networks: the skeleton follows him in every frame."""

from pathlib import Path

import numpy as np
import pytest

from runner.options import JobOptions
from runner.preprocess.detect import choose_person
from runner.preprocess.pipeline import Preprocessor
from runner.preprocess.skeleton import THRESHOLD
from runner.video import VideoReader

REAL = Path(__file__).parents[3] / "shared" / "data" / "real"
MAN = REAL / "man_480x480_30fps_110f.mp4"

pytestmark = [
    pytest.mark.real,
    pytest.mark.skipif(not MAN.is_file(), reason="the shared folder of real models and clips is not here"),
]


@pytest.fixture(scope="module")
def real() -> Preprocessor:
    return Preprocessor.load(REAL / "person_detector.onnx", REAL / "wholebody_pose_full.onnx")


def test_the_skeleton_follows_the_man(real):
    reference = REAL / "reference_woman_fullbody.png"
    conditions = real.prepare(reference, MAN, JobOptions(fps=4, size="480x480"), face_size=128)
    assert conditions.frames == 15  # 110 frames at 30 fps are 3.67 s
    assert conditions.report["frames_without_person"] == 0
    assert conditions.report["face_seen"]
    with VideoReader(MAN) as reader:
        frames = reader.read(conditions.indices)
    window = conditions.window(0, conditions.frames)
    joints_seen = (conditions.track.points[:, :23, 2] >= THRESHOLD).sum(1)
    assert joints_seen.min() >= 14  # of 23; a fast arm blurs
    assert joints_seen.mean() > 20
    for i, frame in enumerate(frames):
        box = choose_person(real._detector.rows([frame])[0], (480, 480))
        body = conditions.track.points[i, :23]
        seen = body[body[:, 2] >= THRESHOLD, :2]
        margin = 0.1 * (box.y2 - box.y1)
        inside = (seen > (box.x1 - margin, box.y1 - margin)) & (seen < (box.x2 + margin, box.y2 + margin))
        assert inside.all(1).mean() > 0.95
        # the drawing spans the man: as high as from eyes to toes, and stands where he stands
        rows, columns = np.nonzero(window.pose[i].any(-1))
        assert rows[-1] - rows[0] > 0.75 * (box.y2 - box.y1)
        assert box.x1 - margin < columns.mean() < box.x2 + margin
        face = window.face[i]
        assert face.std() > 10  # a picture, not a flat colour
    wrists = conditions.track.points[:, [9, 10], 1]
    shoulders = conditions.track.points[:, [5, 6], 1]
    assert (wrists < shoulders - 40).any(0).all()  # jumping jacks: hands go above the shoulders
    assert (wrists > shoulders + 60).any(0).all()  # and down again
    assert np.ptp(wrists, 0).min() > 3 * np.ptp(conditions.track.points[:, [11, 12], 1], 0).max() / 2
    conditions.close()


def test_an_upper_body_reference_sets_the_size_and_keeps_its_pixels(real):
    path = REAL / "reference_astronaut_upper_body.png"
    conditions = real.prepare(path, MAN, JobOptions(max_frames=2), face_size=128)
    assert (conditions.width, conditions.height) == (624, 624)
    assert conditions.reference.size == (512, 512)
    assert conditions.window(0, 2).pose.any((1, 2, 3)).all()
    conditions.close()


def test_the_face_crop_holds_the_face(real):
    """His nose and mouth corners, found by the same network, fall into the middle of every crop's box."""
    conditions = real.prepare(REAL / "reference_woman_fullbody.png", MAN, JobOptions(fps=2), face_size=64)
    for i in range(conditions.frames):
        x1, x2, y1, y2 = conditions.faces.boxes[i]
        nose = conditions.track.points[conditions.faces.sources[i], 0, :2]
        assert 0.2 < (nose[0] - x1) / (x2 - x1) < 0.8
        assert 0.2 < (nose[1] - y1) / (y2 - y1) < 0.8
        assert 15 < x2 - x1 < 80
    conditions.close()

"""The tiny pose model locates every joint in a crop, to a fraction of a pixel, and knows when it cannot."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from runner.demo.dances import Stage, dance
from runner.demo.drawing import draw
from runner.demo.puppet import joint, lift
from runner.demo.scenes import scene
from runner.demo.tiny_pose import build_tiny_pose
from tests.demo.conftest import Session, filmed

MEAN, DEVIATION = np.float32([0.485, 0.456, 0.406]), np.float32([0.229, 0.224, 0.225])


def crop_of(picture: np.ndarray, box: np.ndarray) -> tuple[np.ndarray, np.ndarray, float]:
    """float32 [3, 256, 192], the crop's corner and its pixels a crop pixel: 1.25 x the box in the crop's aspect."""
    import cv2

    x1, y1, x2, y2 = box
    tall = 1.25 * max((x2 - x1) * 256 / 192, y2 - y1)
    corner = np.array([(x1 + x2) / 2 - tall * 0.375, (y1 + y2) / 2 - tall / 2])
    scale = tall / 256
    inverse = np.float32([[1 / scale, 0, -corner[0] / scale], [0, 1 / scale, -corner[1] / scale]])
    crop = cv2.warpAffine(picture, inverse, (192, 256), flags=cv2.INTER_LINEAR)
    return ((crop / np.float32(255) - MEAN) / DEVIATION).transpose(2, 0, 1).astype(np.float32), corner, scale


def locate(pose: Session, picture: np.ndarray, box: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """[133, 2] points in the picture's pixels and [133] confidences.

    A gaussian's logarithm is a parabola: three samples a side give its top exactly.
    """
    crop, corner, scale = crop_of(picture, box)
    maps = pose(crop[None])[0]
    assert maps.shape == (133, 64, 48)
    points = np.zeros((133, 2))
    for k, heat in enumerate(maps):
        y, x = np.unravel_index(heat.argmax(), heat.shape)
        y, x = np.clip(y, 1, 62), np.clip(x, 1, 46)
        log = np.log(np.maximum(heat, 1e-30))
        for axis, (before, after) in enumerate([(log[y, x - 1], log[y, x + 1]), (log[y - 1, x], log[y + 1, x])]):
            bend = 2 * log[y, x] - before - after
            points[k, axis] = (x, y)[axis] + ((after - before) / (2 * bend) if bend > 1e-9 else 0)
    return points * 4 * scale + corner, maps.max(axis=(1, 2))


CLIPS = [
    ("portrait", (480, 832), [("jacks", "pip", 240, 760, 440)], "stage"),
    ("landscape", (832, 480), [("step", "anna", 416, 440, 380)], "street"),
    ("small", (320, 480), [("twist", "cato", 160, 430, 320)], "meadow"),
]


@pytest.mark.parametrize(("size", "people", "ground"), [case[1:] for case in CLIPS], ids=[case[0] for case in CLIPS])
def test_joints_to_a_pixel_and_derived_points_to_three(pose: Session, size, people, ground) -> None:
    errors, derived = [], []
    for sight in filmed(size, people, ground, frames=6):
        points, confidence = locate(pose, sight.picture, sight.boxes[0])
        assert confidence.min() > 0.5  # what skeleton drawing asks for
        error = np.linalg.norm(points - lift(sight.joints[0]), axis=1)
        errors.append(error[:23])
        derived.append(error[23:])
    assert np.mean(errors) < 1.0
    assert np.max(errors) < 2.0
    assert np.max(derived) < 3.0


def test_a_batch_is_its_members(pose: Session) -> None:
    sights = filmed((320, 480), [("wave", "bela", 160, 430, 320)], frames=3)
    crops = np.stack([crop_of(sight.picture, sight.boxes[0])[0] for sight in sights])
    np.testing.assert_allclose(pose(crops), np.concatenate([pose(crop[None]) for crop in crops]), atol=1e-5)


def test_heatmaps_are_gaussians_of_sigma_2(pose: Session) -> None:
    (sight,) = filmed((320, 480), [("wave", "pip", 160, 430, 320)], frames=1)
    heat = pose(crop_of(sight.picture, sight.boxes[0])[0][None])[0, joint("left_hip")].astype(np.float64)
    heat /= heat.sum()
    for axis, length in ((0, 48), (1, 64)):
        profile, place = heat.sum(axis=axis), np.arange(length)
        middle = (profile * place).sum()
        assert np.sqrt((profile * (place - middle) ** 2).sum()) == pytest.approx(2.0, abs=0.02)


def test_an_empty_crop_has_no_joint(pose: Session) -> None:
    for picture in (scene("studio", 192, 256), scene("street", 192, 256), np.zeros((256, 192, 3), np.uint8)):
        assert pose(crop_of(picture, np.array([19, 25, 173, 231]))[0][None]).max() < 0.05


def test_a_covered_joint_takes_its_hand_along(pose: Session) -> None:
    wrist, toe = joint("left_wrist"), joint("left_big_toe")
    joints = dance("jacks", 0.5, Stage(240, 440, 400))
    picture = draw(scene("studio", 480, 480), joints, 400, hide=(wrist, toe))
    span = np.concatenate([joints.min(axis=0) - 20, joints.max(axis=0) + 20])
    _, confidence = locate(pose, picture, span)
    assert confidence[[wrist, toe]].max() < 0.3
    assert confidence[91:112].max() < 0.3
    assert np.delete(confidence[:91], [wrist, toe]).min() > 0.5
    assert confidence[112:].min() > 0.5


def test_same_code_same_bytes(tmp_path: Path) -> None:
    build_tiny_pose(tmp_path / "a.onnx")
    build_tiny_pose(tmp_path / "b.onnx")
    assert (tmp_path / "a.onnx").read_bytes() == (tmp_path / "b.onnx").read_bytes()

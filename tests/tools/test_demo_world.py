"""World: an example's parts belong together, and look as they do when real clips are preprocessed."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from demo_world import example, skeletons

from runner.demo.dancers import backdrop
from runner.demo.scenes import SCENES
from runner.spec.options import JobOptions
from runner.timing import StageTimer

WIDTH, HEIGHT, FRAMES, FACE = 96, 144, 5, 32


def made(seed: int, *, replace: bool = False):
    return example(np.random.default_rng(seed), WIDTH, HEIGHT, FRAMES, FACE, replace=replace)


def test_shapes_and_the_same_seed() -> None:
    one, again, other = made(1), made(1), made(2)
    assert one.reference.shape == (HEIGHT, WIDTH, 3)
    assert one.pose.shape == one.truth.shape == (FRAMES, HEIGHT, WIDTH, 3)
    assert one.face.shape == (FRAMES, FACE, FACE, 3)
    assert one.silhouette.shape == (FRAMES, HEIGHT, WIDTH) and one.silhouette.dtype == bool
    assert one.background is None and one.mask is None
    for name in ("reference", "pose", "face", "truth"):
        assert np.array_equal(getattr(one, name), getattr(again, name))
        assert not np.array_equal(getattr(one, name), getattr(other, name))


@pytest.mark.parametrize("seed", range(4))
def test_the_truth_is_the_references_dancer_in_its_room_in_the_drivers_pose(seed: int) -> None:
    one = made(seed)
    room = backdrop(one.dancer, WIDTH, HEIGHT)
    for frame, shape in zip(one.truth, one.silhouette, strict=True):
        outside = (
            ~shape & ~np.roll(shape, 1, 0) & ~np.roll(shape, -1, 0) & ~np.roll(shape, 1, 1) & ~np.roll(shape, -1, 1)
        )
        assert (frame == room)[outside].mean() > 0.99
    assert one.dancer.torso in {tuple(p) for p in one.reference.reshape(-1, 3).tolist()}
    # The skeleton lies within the dancer: its own thickness and a small tremble aside.
    for pose, shape in zip(one.pose, one.silhouette, strict=True):
        drawn = pose.any(axis=2)
        assert (drawn & shape).sum() > 0.6 * drawn.sum()


@pytest.mark.parametrize("seed", range(4))
def test_replace_mode_shows_a_scene_with_a_hole_where_the_driver_was(seed: int) -> None:
    one = made(seed, replace=True)
    assert one.mask is not None and one.background is not None
    assert set(np.unique(one.mask)) == {0, 255}
    assert (one.background[one.mask > 0] == 0).all()
    kept = (one.mask == 0) & ~one.silhouette
    assert np.abs(one.background.astype(int) - one.truth)[kept].mean() < 2
    assert 0.05 < (one.mask > 0).mean() < 0.8
    assert len(SCENES) > 1


@pytest.mark.parametrize("clip", ["wave", "jacks"])
def test_training_sees_what_the_preprocessing_makes(clip: str, demo_media: Path, tmp_path: Path) -> None:
    """Skeletons from exact joints are those that the tiny networks lead to, but for a pixel here and there."""
    from runner.demo.tiny_detector import build_tiny_detector
    from runner.demo.tiny_pose import build_tiny_pose
    from runner.preprocess.prepare import Preprocessor

    build_tiny_detector(tmp_path / "det.onnx")
    build_tiny_pose(tmp_path / "pose.onnx")
    preprocessor = Preprocessor.load(tmp_path / "det.onnx", tmp_path / "pose.onnx")
    options = JobOptions(size=f"{WIDTH}x{HEIGHT}", fps=8, max_frames=9)
    found = preprocessor.prepare(
        demo_media / "references" / "mira.png",
        demo_media / "dances" / f"{clip}.mp4",
        options,
        face_size=FACE,
        timer=StageTimer(),
    )
    try:
        window = found.window(0, 9)
    finally:
        found.close()
    truth = json.loads((demo_media / "joints.json").read_text(encoding="utf-8"))["clips"][clip]
    joints = np.array([frame["joints"] for frame in truth["frames"][::3]][:9]) * HEIGHT / truth["height"]
    expected = skeletons(joints, WIDTH, HEIGHT)
    near = np.abs(window.pose.astype(int) - expected).max(axis=3) > 64
    drawn = (window.pose.any(axis=3) | expected.any(axis=3)).sum()
    assert near.sum() < 0.35 * drawn  # lines a pixel wide: half a pixel's shift recolours many of them
    assert window.pose.any(axis=3).mean() == pytest.approx(expected.any(axis=3).mean(), rel=0.1)
    # Faces: a face of another example is not nearer than it should be; colours and layout agree.
    mine = example(np.random.default_rng(3), WIDTH, HEIGHT, 1, FACE).face[0].astype(float)
    assert np.corrcoef(mine.ravel(), window.face[0].astype(float).ravel())[0, 1] > 0.6

"""Scenes: nothing in them may look like a puppet, and the same arguments give the same pixels."""

from __future__ import annotations

import numpy as np
import pytest

from runner.demo.scenes import SCENES, scene


@pytest.mark.parametrize("name", SCENES)
@pytest.mark.parametrize("size", [(320, 480), (641, 127)])
def test_muted_and_textured(name: str, size: tuple[int, int]) -> None:
    picture = scene(name, *size, seed=3)
    assert picture.shape == (size[1], size[0], 3)
    assert picture.dtype == np.uint8
    spread = picture.max(axis=2).astype(int) - picture.min(axis=2)
    assert spread.max() <= 0.21 * 255  # the detector calls 0.32 saturated
    assert picture.min(axis=2).max() < 0.78 * 255  # and 0.86 white
    assert picture.std() > 10


@pytest.mark.parametrize("name", SCENES)
def test_repeatable(name: str) -> None:
    assert (scene(name, 96, 64, seed=5) == scene(name, 96, 64, seed=5)).all()
    assert (scene(name, 96, 64, seed=5) != scene(name, 96, 64, seed=6)).any()


def test_scenes_differ() -> None:
    pictures = [scene(name, 64, 96).astype(int) for name in SCENES]
    for i, one in enumerate(pictures):
        for other in pictures[:i]:
            assert np.abs(one - other).mean() > 8

"""Cuts: the similarity against scikit-image's, and what is a cut on film, on drawings and in fades."""

from __future__ import annotations

from itertools import pairwise

import numpy as np
import pytest

from runner.video import VideoReader
from runner.video.cuts import SIDE, WINDOW, is_cut, similarity, thumbnail

RNG = np.random.default_rng(5)


def scene(seed: int, shift: int = 0) -> np.ndarray:
    """uint8 [96, 128, 3]: smooth shapes that move to the right."""
    rng = np.random.default_rng(seed)
    coarse = rng.uniform(0, 255, (6, 8, 3))
    picture = np.kron(coarse, np.ones((16, 16, 1)))
    return np.roll(picture, shift, axis=1).astype(np.uint8)


@pytest.mark.parametrize("noise", [0, 3, 60])
def test_the_similarity_is_that_of_scikit_image(noise):
    metrics = pytest.importorskip("skimage.metrics")
    one = thumbnail(scene(1))
    other = np.clip(one + RNG.normal(0, noise, one.shape), 0, 255).astype(np.float32)
    expected = metrics.structural_similarity(one, other, win_size=WINDOW, data_range=255)
    assert one.shape == (SIDE, SIDE)
    assert similarity(one, other) == pytest.approx(expected, abs=1e-6)


def test_scenes_change_at_a_cut_and_not_by_motion():
    assert is_cut(thumbnail(scene(1)), thumbnail(scene(2)))
    assert not is_cut(thumbnail(scene(1)), thumbnail(scene(1, shift=2)))
    assert not is_cut(thumbnail(scene(1)), thumbnail(scene(1)))


def test_plain_scenes_of_other_brightness_are_a_cut():
    dark, light = (np.full((96, 128, 3), level, np.uint8) for level in (60, 200))
    assert similarity(thumbnail(dark), thumbnail(light)) > 0.5  # structure alone does not tell
    assert is_cut(thumbnail(dark), thumbnail(light))


@pytest.mark.parametrize("target", ["black", "white", "another scene"])
def test_a_slow_fade_is_no_cut(target):
    end = {"black": np.zeros((96, 128, 3)), "white": np.full((96, 128, 3), 255.0), "another scene": scene(2)}[target]
    frames = [((1 - t) * scene(1) + t * end).astype(np.uint8) for t in np.linspace(0, 1, 24)]  # a second of film
    assert not any(is_cut(a, b) for a, b in pairwise(map(thumbnail, frames)))
    assert is_cut(thumbnail(frames[0]), thumbnail(frames[-1]))


def test_on_film_only_the_cut_is_one(real_data):
    """The man, then the woman; also with every third frame only, 10 a second."""
    from PIL import Image

    with VideoReader(real_data / "man_480x480_30fps_110f.mp4") as film:
        man = [thumbnail(frame) for frame in film.read(np.arange(film.info.frames))]
    for every in (1, 3):
        assert not any(is_cut(a, b) for a, b in pairwise(man[::every]))
    for name in ("reference_woman_fullbody.png", "reference_astronaut_upper_body.png"):
        other = thumbnail(np.asarray(Image.open(real_data / name).convert("RGB")))
        assert all(is_cut(frame, other) and is_cut(other, frame) for frame in man)

"""Drawing: discs are where the joints are, in their colours; the silhouette is exactly what was painted."""

from __future__ import annotations

import numpy as np
import pytest

from runner.demo.dances import Stage, dance
from runner.demo.drawing import CHARACTERS, box_of, draw, silhouette
from runner.demo.puppet import PALETTE, joint
from runner.demo.scenes import scene

SIZE = (320, 480)


def standing(character: str, height: float = 320.0) -> np.ndarray:
    return dance("jacks", 0.4, Stage(160, 430, height, CHARACTERS[character].build))


@pytest.mark.parametrize("character", CHARACTERS)
def test_every_joint_shows_its_colour(character: str) -> None:
    joints = standing(character)
    picture = draw(scene("studio", *SIZE), joints, 320, CHARACTERS[character])
    x, y = joints.round().astype(int).T
    np.testing.assert_allclose(picture[y, x] / 255, PALETTE, atol=0.01)


def test_a_hidden_joint_shows_no_disc() -> None:
    joints, wrist = standing("pip"), joint("left_wrist")
    shown = draw(np.zeros((480, 320, 3), np.uint8), joints, 320)
    hidden = draw(np.zeros((480, 320, 3), np.uint8), joints, 320, hide=(wrist,))
    x, y = joints[wrist].round().astype(int)
    np.testing.assert_allclose(shown[y, x] / 255, PALETTE[wrist], atol=0.01)
    assert hidden[y, x].min() > 250  # the white arm goes on
    changed = (shown != hidden).any(axis=2)
    assert np.hypot(*(np.argwhere(changed) - [joints[wrist][1], joints[wrist][0]]).T).max() < 0.035 * 320 + 2


@pytest.mark.parametrize("character", CHARACTERS)
def test_silhouette_covers_what_draw_changes(character: str) -> None:
    joints = standing(character)
    ground = np.full((480, 320, 3), (10, 60, 200), np.uint8)
    changed = (draw(ground.copy(), joints, 320, CHARACTERS[character]) != ground).any(axis=2)
    mask = silhouette((480, 320), joints, 320, CHARACTERS[character])
    assert not (mask & ~changed).any()
    # What changed but is not the puppet's is its antialiased edge: pixels less than half covered.
    edge = changed & ~mask
    beside = np.zeros_like(mask)
    beside[1:-1, 1:-1] = mask[:-2, 1:-1] | mask[2:, 1:-1] | mask[1:-1, :-2] | mask[1:-1, 2:]
    beside[1:-1, 1:-1] |= mask[:-2, :-2] | mask[:-2, 2:] | mask[2:, :-2] | mask[2:, 2:]
    assert (edge & ~beside).sum() <= 0.02 * edge.sum()


def test_box_by_hand() -> None:
    mask = np.zeros((10, 12), bool)
    mask[3, 4] = mask[6, 9] = True
    assert box_of(mask) == (4, 3, 10, 7)


def test_characters_look_different() -> None:
    pictures = [draw(np.zeros((480, 320, 3), np.uint8), standing(c), 320, CHARACTERS[c]) for c in CHARACTERS]
    for i, one in enumerate(pictures):
        for other in pictures[:i]:
            assert (one != other).any(axis=2).mean() > 0.02

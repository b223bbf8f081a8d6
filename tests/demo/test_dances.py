"""Dances: rigid bones, distinct motions, and nobody leaves the frame."""

from __future__ import annotations

from itertools import combinations

import numpy as np
import pytest

from runner.demo.build import CLIPS, PORTRAITS, stage_for
from runner.demo.dances import BEAT_S, DANCES, Build, Stage, dance
from runner.demo.puppet import BONES, joint, lift

STAGE = Stage(200, 450, 400)
MOMENTS = np.arange(0, 4 * BEAT_S, 0.1)


@pytest.mark.parametrize("name", DANCES)
def test_bones_are_rigid(name: str) -> None:
    lengths = np.array(
        [
            [np.linalg.norm(joints[a] - joints[b]) for a, b in BONES]
            for joints in (dance(name, t, STAGE) for t in MOMENTS)
        ]
    )
    np.testing.assert_allclose(lengths, np.broadcast_to(lengths[0], lengths.shape), rtol=1e-9)
    assert lengths[0, 0] == pytest.approx(1.45 * 40)  # upper arm: 1.45 tenths of the height


@pytest.mark.parametrize("name", DANCES)
def test_repeats_after_four_beats_and_moves_in_between(name: str) -> None:
    start = dance(name, 0.0, STAGE)
    np.testing.assert_allclose(dance(name, 4 * BEAT_S, STAGE), start, atol=1e-6)
    travel = max(np.linalg.norm(dance(name, t, STAGE) - start, axis=1).max() for t in MOMENTS)
    assert travel > 0.08 * STAGE.height


def test_a_moment_of_a_dance_tells_which_one_it_is() -> None:
    wrists = [joint("left_wrist"), joint("right_wrist")]
    spread = {name: np.array([dance(name, t, STAGE)[wrists] for t in MOMENTS]) for name in DANCES}
    for a, b in combinations(DANCES, 2):
        # Nearest moment of b to each moment of a: on average a clearly different place of the hands.
        apart = np.linalg.norm(spread[a][:, None] - spread[b][None], axis=-1).max(axis=-1).min(axis=1)
        assert apart.mean() > 0.06 * STAGE.height, (a, b)


@pytest.mark.parametrize("clip", CLIPS, ids=lambda clip: clip.name)
def test_demo_dancers_stay_in_frame(clip) -> None:
    stage = stage_for(clip.width, clip.height, clip.character)
    points = np.concatenate([lift(dance(clip.dance, i / clip.fps, stage)) for i in range(clip.frames)])
    assert points.min() > 0.02 * min(clip.width, clip.height)
    assert (points < np.array([clip.width, clip.height]) * 0.98).all()
    assert stage.height > 0.6 * clip.height


@pytest.mark.parametrize("portrait", PORTRAITS, ids=lambda portrait: portrait.name)
def test_portraits_show_the_whole_character(portrait) -> None:
    stage = stage_for(portrait.width, portrait.height, portrait.character)
    points = lift(dance(portrait.dance, portrait.time_s, stage))
    assert points.min() > 0
    assert (points < (portrait.width, portrait.height)).all()


def test_build_changes_proportions() -> None:
    def leg(build: Build) -> float:
        joints = dance("jacks", 0.2, Stage(0, 0, 100, build))
        return float(np.linalg.norm(joints[joint("left_hip")] - joints[joint("left_knee")]))

    assert leg(Build(legs=1.2)) == pytest.approx(1.2 * leg(Build()))

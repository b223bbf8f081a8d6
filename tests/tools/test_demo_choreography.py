"""Choreography: new dances are dances: they come round, stay on the floor, and differ."""

from __future__ import annotations

import numpy as np
from demo_choreography import random_choreography
from hypothesis import given, settings
from hypothesis import strategies as st

from runner.demo.dances import Stage, joints_of
from runner.demo.puppet import joint

STAGE = Stage(48, 132, 98)
SEEDS = st.integers(0, 2**32)


def joints(seed: int, beats: np.ndarray) -> np.ndarray:
    moves = random_choreography(np.random.default_rng(seed))
    return np.stack([joints_of(moves(beat), STAGE) for beat in beats])


@settings(max_examples=25, deadline=None)
@given(SEEDS)
def test_it_repeats_after_four_beats_and_moves_smoothly(seed: int) -> None:
    once = joints(seed, np.linspace(0, 4, 65))
    np.testing.assert_allclose(once, joints(seed, np.linspace(4, 8, 65)), atol=1e-6)
    assert np.ptp(once, axis=0).max() > 2  # it is a dance
    # In a sixteenth of a beat; the widest swings of arm, forearm, tilt and steps together come to no more.
    assert np.linalg.norm(np.diff(once, axis=0), axis=2).max() < 0.25 * STAGE.height


@settings(max_examples=25, deadline=None)
@given(SEEDS)
def test_the_body_stays_a_body(seed: int) -> None:
    at = joints(seed, np.linspace(0, 4, 17))
    for a, b, length in (("left_shoulder", "left_elbow", 1.45), ("right_knee", "right_ankle", 1.7)):
        bone = np.linalg.norm(at[:, joint(a)] - at[:, joint(b)], axis=1)
        np.testing.assert_allclose(bone, length * STAGE.height / 10, rtol=1e-6)
    assert (at[:, joint("left_hip"), 1] < at[:, joint("left_ankle"), 1]).all()
    assert (at[:, joint("nose"), 1] < at[:, joint("left_hip"), 1]).all()


def test_seeds_make_different_dances() -> None:
    beats = np.linspace(0, 4, 9)
    assert np.array_equal(joints(1, beats), joints(1, beats))
    assert not np.allclose(joints(1, beats), joints(2, beats), atol=3)

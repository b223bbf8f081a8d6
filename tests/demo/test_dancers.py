"""Dancers: what is painted is the silhouette and nothing else, in the colours that were said."""

from __future__ import annotations

import cv2
import numpy as np
import pytest

from runner.demo.dancers import DANCERS, backdrop, dancer_silhouette, draw_dancer, random_dancer
from runner.demo.dances import DANCES, Stage, dance
from runner.demo.puppet import joint

WIDTH, HEIGHT = 96, 144


@pytest.fixture(params=["mira", "otto", "juno", 1, 2])
def dancer(request):
    return DANCERS.get(request.param) or random_dancer(np.random.default_rng(request.param))


def joints_at(name: str, time_s: float) -> tuple[np.ndarray, float]:
    stage = Stage(WIDTH / 2, 0.92 * HEIGHT, 98.0)
    return dance(name, time_s, stage), stage.height


@pytest.mark.parametrize("name", sorted(DANCES))
def test_only_the_silhouette_is_painted(dancer, name: str) -> None:
    joints, tall = joints_at(name, 0.4)
    ground = backdrop(dancer, WIDTH, HEIGHT)
    changed = (draw_dancer(ground.copy(), joints, tall, dancer) != ground).any(axis=2)
    shape = dancer_silhouette((HEIGHT, WIDTH), joints, tall, dancer)
    assert 0.04 < shape.mean() < 0.4
    # The rim is antialiased: it is up to two pixels wide where less than half of a pixel is covered.
    around = cv2.dilate(shape.astype(np.uint8), np.ones((5, 5), np.uint8)) > 0
    assert not (changed & ~around).any()
    assert (changed & ~shape).mean() < 0.06
    assert (shape & ~changed).mean() < 0.001


def test_parts_have_their_colours(dancer) -> None:
    joints, tall = joints_at("jacks", 0.75)  # arms and legs spread
    picture = draw_dancer(backdrop(dancer, WIDTH, HEIGHT), joints, tall, dancer)

    def colour(*names: str) -> list[int]:
        x, y = joints[[joint(n) for n in names]].mean(0).round().astype(int)
        return picture[y, x].tolist()

    assert colour("left_knee", "left_ankle") == list(dancer.legs)
    assert colour("right_elbow", "right_wrist") == list(dancer.arms)
    assert colour("left_shoulder", "right_shoulder", "left_hip", "right_hip") == list(dancer.torso)


def test_a_seed_is_a_dancer() -> None:
    first, again, other = (random_dancer(np.random.default_rng(s)) for s in (3, 3, 4))
    assert first == again
    assert first != other


def test_random_dancers_are_told_apart_by_their_torso() -> None:
    rng = np.random.default_rng(0)
    for _ in range(50):
        one = random_dancer(rng)
        for part in (one.arms, one.legs, one.face):
            assert np.abs(np.subtract(part, one.torso)).max() > 40


def test_rooms_are_muted_and_the_floor_is_below(dancer) -> None:
    room = backdrop(dancer, WIDTH, HEIGHT).astype(int)
    assert (room == room[:, :1]).all()  # a wall that fades downwards, no more
    assert (room[-10:] == np.array(dancer.floor)).all()
    assert (room.max(axis=2) - room.min(axis=2)).max() < 100

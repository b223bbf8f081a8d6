"""Dancers: draw the characters of plain shapes that the trained demo model renders.

In:   joints in pixels (puppet.JOINTS), a dancer. Out: RGB uint8 pictures and exact silhouettes. Never: motion, files.
Dancers move like the puppet, but the tiny detector and pose model do not find them: only a puppet can drive, and any
dancer can be a reference.
"""

from __future__ import annotations

import colorsys
from dataclasses import dataclass

import numpy as np

from runner.demo.puppet import BONES, joint
from runner.demo.scenes import FLOOR

__all__ = ["DANCERS", "Colour", "Dancer", "backdrop", "dancer_silhouette", "draw_dancer", "random_dancer"]

Colour = tuple[int, int, int]
_SHIFT = 4  # fractional bits of cv2's fixed-point coordinates
_EYES: Colour = (20, 20, 20)


@dataclass(frozen=True)
class Dancer:
    """Looks of a dancer: colours RGB 0..255; `thick`: the limbs' width in tenths of the height; `head`: a factor."""

    arms: Colour
    legs: Colour
    torso: Colour
    face: Colour
    thick: float
    head: float
    wall: tuple[Colour, Colour]  # at the top, at the floor
    floor: Colour


# The demo's dancers. No training example shows one of them.
DANCERS: dict[str, Dancer] = {
    "mira": Dancer(
        arms=(240, 150, 40),
        legs=(60, 70, 200),
        torso=(200, 40, 60),
        face=(245, 205, 90),
        thick=0.62,
        head=1.15,
        wall=((96, 120, 128), (150, 166, 160)),
        floor=(92, 74, 62),
    ),
    "otto": Dancer(
        arms=(40, 190, 90),
        legs=(40, 190, 90),
        torso=(125, 50, 190),
        face=(70, 200, 225),
        thick=0.75,
        head=1.3,
        wall=((60, 52, 66), (104, 90, 96)),
        floor=(150, 140, 120),
    ),
    "juno": Dancer(
        arms=(235, 60, 160),
        legs=(235, 60, 160),
        torso=(235, 215, 60),
        face=(70, 95, 225),
        thick=0.5,
        head=1.0,
        wall=((190, 186, 172), (214, 206, 190)),
        floor=(84, 100, 84),
    ),
}


def random_dancer(rng: np.random.Generator) -> Dancer:
    """Return random looks: torso, limbs and head differ in hue, walls are muted."""
    hue = rng.uniform()
    hues = (hue + np.array([0.0, *rng.uniform(0.18, 0.82, 3)])) % 1
    torso, arms, legs, face = (_vivid(h, rng) for h in hues)
    if rng.uniform() < 0.5:
        legs = arms
    top, low, floor = (_muted(rng) for _ in range(3))
    return Dancer(arms, legs, torso, face, rng.uniform(0.45, 0.8), rng.uniform(0.9, 1.35), (top, low), floor)


def _vivid(hue: float, rng: np.random.Generator) -> Colour:
    return _rgb(colorsys.hsv_to_rgb(hue, rng.uniform(0.6, 1.0), rng.uniform(0.65, 1.0)))


def _muted(rng: np.random.Generator) -> Colour:
    return _rgb(colorsys.hsv_to_rgb(rng.uniform(), rng.uniform(0.0, 0.35), rng.uniform(0.15, 0.85)))


def _rgb(colour: tuple[float, float, float]) -> Colour:
    red, green, blue = (round(255 * v) for v in colour)
    return red, green, blue


def backdrop(dancer: Dancer, width: int, height: int) -> np.ndarray:
    """Draw the dancer's room, a wall with a vertical gradient and a floor: uint8 [height, width, 3]."""
    down = np.linspace(0, 1 / FLOOR, height)[:, None, None]
    wall = (1 - down) * np.array(dancer.wall[0]) + down * np.array(dancer.wall[1])
    rows = np.where(down <= 1, wall, np.array(dancer.floor, float))
    return np.repeat(np.clip(rows, 0, 255).round().astype(np.uint8), width, axis=1)


def draw_dancer(picture: np.ndarray, joints: np.ndarray, height: float, dancer: Dancer) -> np.ndarray:
    """Paint one dancer into `picture` (RGB uint8 [H, W, 3], in place, also returned).

    `joints` [23, 2] and `height` are in pixels of the picture. The thickness of limbs is relative to the height.
    """
    import cv2

    joints, unit = np.asarray(joints, float), height / 10
    thick = max(2, round(dancer.thick * unit))

    def line(a: np.ndarray, b: np.ndarray, colour: Colour) -> None:
        cv2.line(picture, _fixed(a), _fixed(b), colour, thick, cv2.LINE_AA, _SHIFT)

    def at(name: str) -> np.ndarray:
        return joints[joint(name)]

    for a, b in BONES:
        if a >= joint("left_hip"):
            line(joints[a], joints[b], dancer.legs)
    left, right, left_hip, right_hip = at("left_shoulder"), at("right_shoulder"), at("left_hip"), at("right_hip")
    line((left + right) / 2, at("nose"), dancer.torso)
    trunk = np.array([_fixed(p) for p in (left, right, right_hip, left_hip)], np.int32)
    cv2.fillConvexPoly(picture, trunk, dancer.torso, cv2.LINE_AA, _SHIFT)
    for one, other in ((left, right), (right, right_hip), (right_hip, left_hip), (left_hip, left)):
        line(one, other, dancer.torso)
    for a, b in BONES:
        if a < joint("left_hip"):
            line(joints[a], joints[b], dancer.arms)
    across = at("left_eye") - at("right_eye")
    size = float(np.linalg.norm(across)) * dancer.head
    centre = (at("left_eye") + at("right_eye")) / 2 + 0.42 * np.array([-across[1], across[0]])
    tilt = float(np.degrees(np.arctan2(across[1], across[0])))
    axes = _fixed(np.array([1.4 * size, 1.5 * size]))
    cv2.ellipse(picture, _fixed(centre), axes, tilt, 0, 360, dancer.face, -1, cv2.LINE_AA, _SHIFT)
    for name in ("left_eye", "right_eye"):
        cv2.circle(picture, _fixed(at(name)), int(max(1.0, 0.16 * unit) * 2**_SHIFT), _EYES, -1, cv2.LINE_AA, _SHIFT)
    return picture


def dancer_silhouette(shape: tuple[int, int], joints: np.ndarray, height: float, dancer: Dancer) -> np.ndarray:
    """Return bool [H, W]: the pixels that `draw_dancer` covers at least by half. It draws on black and on white."""
    over_black = draw_dancer(np.zeros((*shape, 3), np.uint8), joints, height, dancer)
    over_white = draw_dancer(np.full((*shape, 3), 255, np.uint8), joints, height, dancer)
    shows = over_white[..., 0].astype(np.int16) - over_black[..., 0]
    return shows < 128


def _fixed(point: np.ndarray) -> tuple[int, int]:
    return round(float(point[0]) * 2**_SHIFT), round(float(point[1]) * 2**_SHIFT)

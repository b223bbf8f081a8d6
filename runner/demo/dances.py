"""Dances: compute the puppet's joints at a time. Dances are pure functions of time, so every joint is known exactly.

In:   a dance's name, a time in seconds, a stage (place, height, proportions). Out: [23, 2] joints in pixels.
Never: colours, images, frame rates.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from runner.demo.puppet import JOINTS, joint

__all__ = ["BEAT_S", "DANCES", "PLAIN", "Build", "Stage", "Stance", "dance", "joints_of"]

BEAT_S = 0.75  # length of a beat: every dance repeats after two or four of them


@dataclass(frozen=True)
class Build:
    """Proportions, as factors relative to the plain puppet."""

    head: float = 1.0
    torso: float = 1.0
    arms: float = 1.0
    legs: float = 1.0


PLAIN = Build()


@dataclass(frozen=True)
class Stage:
    """A puppet's place: the point between its feet, and its height when upright, in pixels."""

    x: float
    floor: float
    height: float
    build: Build = PLAIN


@dataclass(frozen=True)
class Stance:
    """One pose. Angles in degrees: 0 points down, 90 outward, 180 up. Offsets in tenths of the height.

    Pairs are (puppet's left, puppet's right). `fore` and `shin` are absolute angles too.
    """

    shift: tuple[float, float] = (0.0, 0.0)  # of the hips, x to the image's right, y down
    sway: float = 0.0  # of the shoulders relative to the hips
    tilt: float = 0.0  # of the head, degrees
    arm: tuple[float, float] = (14.0, 14.0)
    fore: tuple[float, float] = (8.0, 8.0)
    thigh: tuple[float, float] = (6.0, 6.0)
    shin: tuple[float, float] = (3.0, 3.0)


def _wave(beat: float) -> Stance:
    """One hand high, greeting; the other rests on the hip."""
    rock = np.sin(np.pi * beat)
    return Stance(
        shift=(0.18 * rock, 0.0),
        sway=-0.15 * rock,
        tilt=7 * rock,
        arm=(128 + 6 * rock, 44.0),
        fore=(172 + 40 * rock, -26 + 5 * rock),
        thigh=(7 + 3 * rock, 7 - 3 * rock),
    )


def _step(beat: float) -> Stance:
    """Two steps to each side, arms swinging along, the trailing leg stretched."""
    side = np.sin(np.pi * beat / 2)
    lift_ = abs(np.sin(np.pi * beat))
    return Stance(
        shift=(1.1 * side, -0.16 * lift_),
        sway=0.3 * side,
        tilt=8 * side,
        arm=(54 + 36 * side, 54 - 36 * side),
        fore=(80 + 50 * side, 80 - 50 * side),
        thigh=(13 - 13 * side, 13 + 13 * side),
        shin=(9 - 14 * side, 9 + 14 * side),
    )


def _jacks(beat: float) -> Stance:
    """Jumping jacks: arms from the sides to overhead while the legs spread."""
    open_ = 0.5 - 0.5 * np.cos(2 * np.pi * beat / 2)
    hop = abs(np.sin(np.pi * beat))
    return Stance(
        shift=(0.0, -0.32 * hop),
        arm=(22 + 128 * open_,) * 2,
        fore=(16 + 144 * open_,) * 2,
        thigh=(4 + 23 * open_,) * 2,
        shin=(3 + 20 * open_,) * 2,
    )


def _twist(beat: float) -> Stance:
    """Knees bent and hips swinging, forearms pumping up and down in turn."""
    swing = np.sin(np.pi * beat)
    dip = 0.5 - 0.5 * np.cos(2 * np.pi * beat)
    return Stance(
        shift=(0.55 * swing, 0.35 * dip),
        sway=-0.5 * swing,
        tilt=-12 * swing,
        arm=(66 + 14 * swing, 66 - 14 * swing),
        fore=(120 + 55 * swing, 120 - 55 * swing),
        thigh=(27 + 9 * swing, 27 - 9 * swing),
        shin=(-9 + 9 * swing, -9 - 9 * swing),
    )


DANCES: dict[str, Callable[[float], Stance]] = {"wave": _wave, "step": _step, "jacks": _jacks, "twist": _twist}


def dance(name: str, time_s: float, stage: Stage) -> np.ndarray:
    """Return float64 [23, 2]: the joints of `stage`'s puppet at `time_s` of the dance `name`, in pixels."""
    return joints_of(DANCES[name](time_s / BEAT_S), stage)


def _direction(angle_deg: float, side: int) -> np.ndarray:
    angle = np.deg2rad(angle_deg)
    return np.array([side * np.sin(angle), np.cos(angle)])


def joints_of(stance: Stance, stage: Stage) -> np.ndarray:
    """Return the joints of a pose, float64 [23, 2] pixels, by forward kinematics: hips, then up to the head and down to
    the toes.

    A unit is a tenth of the height.
    """
    unit, build = stage.height / 10, stage.build
    joints = np.zeros((len(JOINTS), 2))
    hips = np.array([stance.shift[0], stance.shift[1] - 0.5 - 3.4 * build.legs])
    shoulders = hips + np.array([stance.sway, -2.4 * build.torso])
    head = shoulders + np.array([0.5 * stance.sway, -0.55 - 0.85 * build.head])

    turn = np.deg2rad(stance.tilt)
    rotation = np.array([[np.cos(turn), -np.sin(turn)], [np.sin(turn), np.cos(turn)]])
    for name, x, y in (
        ("nose", 0.0, 0.15),
        ("left_eye", 0.42, -0.35),
        ("right_eye", -0.42, -0.35),
        ("left_ear", 1.0, -0.05),
        ("right_ear", -1.0, -0.05),
    ):
        joints[joint(name)] = head + build.head * rotation @ np.array([x, y])

    for side, index, name in ((1, 0, "left"), (-1, 1, "right")):
        shoulder = shoulders + np.array([side * 1.05, 0.0])
        elbow = shoulder + 1.45 * build.arms * _direction(stance.arm[index], side)
        hip = hips + np.array([side * 0.62, 0.0])
        knee = hip + 1.75 * build.legs * _direction(stance.thigh[index], side)
        ankle = knee + 1.7 * build.legs * _direction(stance.shin[index], side)
        joints[joint(f"{name}_shoulder")] = shoulder
        joints[joint(f"{name}_elbow")] = elbow
        joints[joint(f"{name}_wrist")] = elbow + 1.35 * build.arms * _direction(stance.fore[index], side)
        joints[joint(f"{name}_hip")] = hip
        joints[joint(f"{name}_knee")] = knee
        joints[joint(f"{name}_ankle")] = ankle
        joints[joint(f"{name}_big_toe")] = ankle + np.array([side * 0.25, 0.55])
        joints[joint(f"{name}_small_toe")] = ankle + np.array([side * 0.75, 0.42])
        joints[joint(f"{name}_heel")] = ankle + np.array([-side * 0.42, 0.42])
    return joints * unit + np.array([stage.x, stage.floor])

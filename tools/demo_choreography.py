"""Choreography: random dances. Every angle of a stance swings about a random middle, within natural limits.

In:   a random generator. Out: a function of the beat that returns a `Stance`, as in dances.DANCES. Never: pixels.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from runner.demo.dances import Stance

__all__ = ["random_choreography"]

# lowest and highest middle, largest swing: degrees for limbs, tenths of the height for shifts
_ARM, _FORE, _THIGH, _SHIN = (15.0, 130.0, 55.0), (-30.0, 50.0, 60.0), (3.0, 24.0, 16.0), (-14.0, 6.0, 12.0)


def random_choreography(rng: np.random.Generator) -> Callable[[float], Stance]:
    """Return a new dance: limbs move together, in turn or independently; it repeats after four beats."""
    arms, fores = _pair(rng, _ARM), _pair(rng, _FORE)
    thighs, shins = _pair(rng, _THIGH), _pair(rng, _SHIN)
    sideways, sway, tilt = (_swing(rng, 0.0, most) for most in (0.8, 0.45, 11.0))
    hop = rng.uniform(0, 0.35)

    def stance(beat: float) -> Stance:
        arm = (arms[0](beat), arms[1](beat))
        thigh = (thighs[0](beat), thighs[1](beat))
        return Stance(
            shift=(sideways(beat), -hop * abs(np.sin(np.pi * beat))),
            sway=sway(beat),
            tilt=tilt(beat),
            arm=arm,
            fore=(arm[0] + fores[0](beat), arm[1] + fores[1](beat)),
            thigh=thigh,
            shin=(thigh[0] + shins[0](beat), thigh[1] + shins[1](beat)),
        )

    return stance


def _swing(rng: np.random.Generator, middle: float, most: float) -> Callable[[float], float]:
    """Return a wave of a quarter, half or whole turn per beat, with an overtone."""
    turns, phase, size = rng.choice([0.25, 0.5, 0.5, 1.0]), rng.uniform(0, 2 * np.pi), most * rng.uniform(0.2, 1.0)
    over, over_phase = 0.3 * size * rng.uniform(), rng.uniform(0, 2 * np.pi)

    def at(beat: float) -> float:
        angle = 2 * np.pi * turns * beat
        return float(middle + size * np.sin(angle + phase) + over * np.sin(2 * angle + over_phase))

    return at


def _pair(
    rng: np.random.Generator, bounds: tuple[float, float, float]
) -> tuple[Callable[[float], float], Callable[[float], float]]:
    """Return the waves of the left and right limb: mirrored, in turn, or different."""
    low, high, most = bounds
    middle = rng.uniform(low, high)
    left = _swing(rng, middle, most)
    kind = rng.choice(["mirrored", "in turn", "unlike"])
    if kind == "mirrored":
        return left, left
    if kind == "in turn":
        return left, lambda beat: 2 * middle - left(beat)
    return left, _swing(rng, rng.uniform(low, high), most)

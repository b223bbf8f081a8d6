"""Feet: find when a foot stands on the floor, and how much a figure must move so that it stays there.

In:   a driving skeleton, its stature. Out: `Footing`: floor, contact, weights; how far planted feet move.
Never: proportions. Times are in frames: at all frame rates in use, a planted foot is slow and a stepping foot is fast.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from runner.preprocess.body.retarget_limbs import TOES, Skeleton, median_of_five

__all__ = ["ANKLES", "Footing", "travel"]

ANKLES = (15, 16)
# Fractions of stature. A stepping foot moves by 0.04–0.16 per frame at 30–16 fps, pose noise by 0.003.
SLOW = 0.012  # per frame
LOW = 0.06  # above the floor; feet at different depths differ by less than this when seen from eye level
HELD, FREE = 0.08, 0.20  # a foot lower than HELD keeps all of its height, higher than FREE none, between a part
LEVEL = 0.015  # by this much the height of a planted foot varies
SHORTEST = 3  # frames of a contact
REACH = 15  # frames to each side in which the lowest foot marks the floor: a jump is shorter


@dataclass(frozen=True, eq=False)
class Footing:
    """The left and right foot of a clip, in driving pixels. Arrays are [n, 2] (left, right), unless noted."""

    sole: np.ndarray  # y of the lower of ankle and toes
    seen: np.ndarray  # bool
    floor: np.ndarray  # [n] y
    weight: np.ndarray  # 0…1: how much of its height above the floor a foot must keep; smooth in time
    planted: np.ndarray  # bool: low and slow, for SHORTEST frames or more

    @classmethod
    def of(cls, skeleton: Skeleton, stature: float) -> Footing | None:
        """Find floor and contacts in a clip. None if no foot is ever seen, or if the stature is 0."""
        seen = skeleton.seen[:, ANKLES]
        if not seen.any() or stature <= 0:
            return None
        sole = soles(skeleton.xy, skeleton.seen)
        steady = np.stack([_bridged(sole[:, k], seen[:, k]) for k in (0, 1)], 1)
        floor = _floor(steady[:, seen.any(0)].max(1))
        height = (floor[:, None] - steady) / stature
        weight = np.clip((FREE - height) / (FREE - HELD), 0, 1)
        weight = weight * weight * (3 - 2 * weight) * seen.any(0)
        speed = np.full(seen.shape, np.inf)
        for k in np.flatnonzero(seen.any(0)).tolist():
            path = np.stack([_bridged(skeleton.xy[:, ANKLES[k], axis], seen[:, k]) for axis in (0, 1)], 1)
            moves = np.gradient(path, axis=0) if len(path) > 1 else np.zeros_like(path)
            speed[:, k] = np.linalg.norm(moves, axis=1) / stature
        planted = seen & (speed < SLOW) & (height < LOW)
        for k in (0, 1):
            for start, stop in runs(planted[:, k]):  # a foot that leaves the floor slowly is planted only at first
                planted[start:stop, k] = steady[start:stop, k] > steady[start:stop, k].max() - LEVEL * stature
            for start, stop in runs(planted[:, k]):
                if stop - start < min(SHORTEST, len(planted)):
                    planted[start:stop, k] = False
        return cls(sole, seen, floor, weight, planted)

    def offsets(self, made: np.ndarray, factor: float) -> np.ndarray:
        """Return how far each foot of the figure must move down, pixels [n, 2]. `made`: the figure's soles [n, 2].

        A foot's y should be the driving foot's times `factor`. Frames in which a foot is not seen are interpolated.
        """
        lacking = np.zeros_like(made)
        for k in np.flatnonzero(self.seen.any(0)):
            lacking[:, k] = np.interp(
                np.arange(len(made)),
                np.flatnonzero(self.seen[:, k]),
                (factor * self.sole[:, k] - made[:, k])[self.seen[:, k]],
            )
        return lacking

    def floor_at(self, frame: int, stature: float) -> float:
        """Return the floor's y at a frame: that of the lower foot if it stands, else that of the frames around."""
        low = [self.sole[frame, k] for k in (0, 1) if self.seen[frame, k]]
        if low and self.floor[frame] - max(low) < LOW * stature:
            return float(max(low))
        return float(self.floor[frame])


def soles(xy: np.ndarray, seen: np.ndarray) -> np.ndarray:
    """Return float64 [n, 2]: the y of the lower of ankle and toes, or of the ankle if the toes are not seen."""
    ankles, toes = xy[:, ANKLES, 1], xy[:, TOES, 1]
    return np.where(seen[:, TOES], np.maximum(ankles, toes), ankles)


def travel(xy: np.ndarray, planted: np.ndarray) -> tuple[float, float]:
    """Return (across, down): the farthest that a foot `xy` [n, 2, 2] moves in one contact, pixels; 0 without one."""
    across, down = 0.0, 0.0
    for k in (0, 1):
        for start, stop in runs(planted[:, k]):
            x, y = np.ptp(xy[start:stop, k], axis=0)
            across, down = max(across, float(x)), max(down, float(y))
    return across, down


def runs(flags: np.ndarray) -> list[tuple[int, int]]:
    """[start, stop) of every run of true values."""
    edges = np.flatnonzero(np.diff(np.concatenate([[0], flags.astype(np.int8), [0]])))
    return [(int(a), int(b)) for a, b in zip(edges[::2], edges[1::2], strict=True)]


def _bridged(values: np.ndarray, seen: np.ndarray) -> np.ndarray:
    """[n]: interpolated over frames without the foot, single outliers removed; unchanged if it is never seen."""
    if not seen.any():
        return values
    at = np.flatnonzero(seen)
    return np.interp(np.arange(len(values)), at, median_of_five(values[at]))


def _floor(low: np.ndarray) -> np.ndarray:
    """[n]: the largest y within REACH frames, then averaged over REACH frames, so that it has no steps."""
    width = 2 * REACH + 1
    most = np.lib.stride_tricks.sliding_window_view(np.pad(low, REACH, mode="edge"), width).max(-1)
    return np.lib.stride_tricks.sliding_window_view(np.pad(most, REACH, mode="edge"), width).mean(-1)

"""Smooth: smooth values over time without lag. No lag is possible because the whole clip is known.

In:   values [n, …] at times_s float64 [n], seconds, increasing. Out: the same, smoother. Never: their meaning.
"""

from __future__ import annotations

import math

import numpy as np

__all__ = ["gaussian", "median", "one_euro", "smooth_joints"]

REACH = 3.0  # standard deviations
AT_ONCE = 1024  # frames computed at once: the neighbours of each are copied side by side, and a clip may last hours
# One-euro filter (Casiez, Roussel, Vogel 2012) for positions in body heights: the cutoff at rest, the increase per body
# height a second, and the cutoff of the speed itself. Noise of a resting joint is removed; a fast wrist keeps its path.
REST_HZ = 1.5
PER_SPEED_HZ = 12.0
SPEED_HZ = 1.0
SEEN = 0.3  # a joint of less confidence is a guess and does not influence others
AWAY_S = 0.25  # after a gap longer than this, the filter of a joint starts anew


def median(values: np.ndarray, times_s: np.ndarray, reach_s: float) -> np.ndarray:
    """Return the running median of [n, k] over the values within `reach_s` of each time, equally many on both sides."""
    out = np.array(values, np.float64)
    at = np.arange(len(out))
    before = at - np.searchsorted(times_s, times_s - reach_s, side="left")
    after = np.searchsorted(times_s, times_s + reach_s, side="right") - 1 - at
    sides = np.minimum(before, after)
    for side in np.unique(sides[sides > 0]).tolist():
        here = np.flatnonzero(sides == side)
        out[here] = np.median(np.asarray(values)[here[:, None] + np.arange(-side, side + 1)], axis=1)
    return out


def gaussian(values: np.ndarray, times_s: np.ndarray, sigma_s: float, jumps: np.ndarray | None = None) -> np.ndarray:
    """Fit a line around each time of [n, k] with Gaussian weights, and return its value at that time.

    Steady motion is not changed. jumps: bool [n], true at frame i if it does not continue frame i - 1 (a cut); no line
    is fitted across.
    """
    values = np.asarray(values, np.float64)
    out = values.copy()
    part = np.zeros(len(values)) if jumps is None else np.cumsum(jumps)
    for begin in range(0, len(values), AT_ONCE):
        now = slice(begin, begin + AT_ONCE)
        first = np.searchsorted(times_s, times_s[now] - REACH * sigma_s, side="left")
        last = np.searchsorted(times_s, times_s[now] + REACH * sigma_s, side="right")
        around = first[:, None] + np.arange((last - first).max())  # [m, most that are within reach of one of them]
        within = around < last[:, None]
        around = np.minimum(around, len(values) - 1)
        dt = times_s[around] - times_s[now, None]
        weight = np.exp(-0.5 * (dt / sigma_s) ** 2) * (within & (part[around] == part[now, None]))
        w, wt, wtt = weight.sum(1), (weight * dt).sum(1), (weight * dt * dt).sum(1)
        spread = w * wtt - wt * wt
        fits = spread > 1e-9 * w * w * sigma_s**2
        # Least squares, evaluated at dt = 0.
        line = weight * (wtt[:, None] - wt[:, None] * dt) / np.where(fits, spread, 1)[:, None]
        out[now][fits] = (line[:, None] @ values[around])[fits, 0]
    return out


def one_euro(
    values: np.ndarray,
    times_s: np.ndarray,
    known: np.ndarray,
    *,
    rest_hz: float = REST_HZ,
    per_speed_hz: float = PER_SPEED_HZ,
) -> np.ndarray:
    """Apply the one-euro filter to [n, j, d], forwards in time. known: bool [n, j]; unknown values are not changed.

    After a gap of AWAY_S, the filter of that joint starts anew.
    """
    out = np.array(values, np.float64)
    state, speed = out[0].copy(), np.zeros_like(out[0])
    last = np.full(known.shape[1], -math.inf)
    for i, now in enumerate(times_s):
        dt = np.minimum(now - last, 1e6)[:, None]
        fresh = dt > AWAY_S
        with np.errstate(divide="ignore", invalid="ignore"):
            new_speed = speed + _alpha(SPEED_HZ, dt) * ((out[i] - state) / dt - speed)
        cutoff = rest_hz + per_speed_hz * np.linalg.norm(new_speed, axis=-1, keepdims=True)
        filtered = state + _alpha(cutoff, dt) * (out[i] - state)
        use = known[i][:, None]
        state = np.where(use, np.where(fresh, out[i], filtered), state)
        speed = np.where(use, np.where(fresh, 0.0, new_speed), speed)
        out[i] = np.where(use, state, out[i])
        last = np.where(known[i], now, last)
    return out


def smooth_joints(points: np.ndarray, times_s: np.ndarray, heights: np.ndarray) -> np.ndarray:
    """Smooth whole-body points float32 [n, 133, 3] with the one-euro filter. Returns a copy.

    The result is the mean of a forward and a backward pass, so that there is no lag.
    heights: float64 [n], body height in pixels, so that the same motion is smoothed equally near and far.
    """
    out = np.array(points, np.float32)
    if len(points) < 2:
        return out
    unit = float(np.median(heights))
    xy, known = points[..., :2] / unit, points[..., 2] >= SEEN
    forth = one_euro(xy, times_s, known)
    back = one_euro(xy[::-1], times_s[-1] - times_s[::-1], known[::-1])[::-1]
    out[..., :2] = np.where(known[..., None], unit * (forth + back) / 2, points[..., :2])
    return out


def _alpha(cutoff_hz: np.ndarray | float, dt: np.ndarray) -> np.ndarray:
    """Return the share of a new value in a first-order low-pass filter."""
    turn = 2 * math.pi * cutoff_hz * dt
    return turn / (turn + 1)

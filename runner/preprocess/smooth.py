"""Smooth: what moves through a clip, without its tremble and without lag, because the whole clip is known.

In:   values [n, …] at times_s float64 [n], seconds, increasing. Out: the same, smoother. Never: what they are.
"""

from __future__ import annotations

import math

import numpy as np

__all__ = ["gaussian", "median", "one_euro", "smooth_joints"]

REACH = 3.0  # standard deviations
# One-euro (Casiez, Roussel, Vogel 2012), for positions in body heights: the cutoff at rest, what a body height a second
# adds to it, and the cutoff of the speed itself. A standing joint's tremble goes; a fast wrist keeps its way.
REST_HZ = 1.5
PER_SPEED_HZ = 12.0
SPEED_HZ = 1.0
SEEN = 0.3  # a joint less sure than this is a guess that others are not drawn towards
AWAY_S = 0.25  # a joint that was unseen for longer begins anew


def median(values: np.ndarray, times_s: np.ndarray, reach_s: float) -> np.ndarray:
    """The median of [n, k] over what lies within `reach_s` of each moment; equally many on both sides."""
    out = np.array(values, np.float64)
    n = len(out)
    for i in range(n):
        first = int(np.searchsorted(times_s, times_s[i] - reach_s, side="left"))
        last = int(np.searchsorted(times_s, times_s[i] + reach_s, side="right")) - 1
        side = min(i - first, last - i)
        if side:
            out[i] = np.median(values[i - side : i + side + 1], axis=0)
    return out


def gaussian(values: np.ndarray, times_s: np.ndarray, sigma_s: float, jumps: np.ndarray | None = None) -> np.ndarray:
    """A line fitted around each moment of [n, k] with Gaussian weights, at that moment: steady motion passes unchanged.

    `jumps` bool [n]: frame i has nothing to do with frame i - 1 (a cut); no line is fitted across.
    """
    values = np.asarray(values, np.float64)
    out = values.copy()
    part = np.zeros(len(values)) if jumps is None else np.cumsum(jumps)
    for i, now in enumerate(times_s):
        first = int(np.searchsorted(times_s, now - REACH * sigma_s, side="left"))
        last = int(np.searchsorted(times_s, now + REACH * sigma_s, side="right"))
        dt = times_s[first:last] - now
        weight = np.exp(-0.5 * (dt / sigma_s) ** 2) * (part[first:last] == part[i])
        w, wt, wtt = weight.sum(), (weight * dt).sum(), (weight * dt * dt).sum()
        spread = w * wtt - wt * wt
        if spread > 1e-9 * w * w * sigma_s**2:
            line = weight * (wtt - wt * dt) / spread  # least squares, evaluated at dt = 0
            out[i] = np.tensordot(line, values[first:last], 1)
    return out


def one_euro(
    values: np.ndarray,
    times_s: np.ndarray,
    known: np.ndarray,
    *,
    rest_hz: float = REST_HZ,
    per_speed_hz: float = PER_SPEED_HZ,
) -> np.ndarray:
    """The one-euro filter over [n, j, d] forwards in time. `known` bool [n, j]; unknown values pass as they are.

    A value unknown for AWAY_S starts the filter anew for itself.
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
    """One-euro over whole-body points float32 [n, 133, 3], forwards and backwards, their mean: no lag. A copy.

    `heights` float64 [n]: body height in pixels, so that the same motion is smoothed alike near and far.
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
    """The share of a new value in a first-order low pass."""
    turn = 2 * math.pi * cutoff_hz * dt
    return turn / (turn + 1)

"""Filters over time against what they must leave alone, what they must remove, and the published one-euro recursion."""

import math

import numpy as np
import pytest

from runner.preprocess.body.smooth import gaussian, median, one_euro, smooth_joints

TIMES = np.arange(90) / 30


def test_gaussian_passes_steady_motion_up_to_the_ends():
    line = np.stack([3 * TIMES + 1, -7 * TIMES], 1)
    assert gaussian(line, TIMES, 0.1) == pytest.approx(line)
    uneven = np.sort(np.random.default_rng(0).uniform(0, 3, 50))
    assert gaussian(uneven[:, None], uneven, 0.1) == pytest.approx(uneven[:, None])


def test_gaussian_has_no_lag_and_the_expected_gain():
    """Of a sine of 1 Hz a Gaussian of 0.1 s leaves exp(-(2 pi 0.1)^2 / 2) = 0.821, in phase."""
    wave = np.sin(2 * np.pi * TIMES)[:, None]
    smooth = gaussian(wave, TIMES, 0.1)[20:-20]
    assert smooth == pytest.approx(wave[20:-20] * math.exp(-((2 * np.pi * 0.1) ** 2) / 2), abs=0.01)


def test_gaussian_does_not_reach_across_a_jump():
    steps = np.where(np.arange(90) < 40, 0.0, 100.0)[:, None]
    jumps = np.arange(90) == 40
    assert gaussian(steps, TIMES, 0.1, jumps) == pytest.approx(steps)
    assert 0 < gaussian(steps, TIMES, 0.1)[39, 0] < 60


def test_moments_laid_out_side_by_side_are_those_of_one_at_a_time(monkeypatch):
    """Uneven times with a cut: the definitions, for each moment alone, whatever is worked on at once."""
    rng = np.random.default_rng(4)
    times = np.cumsum(rng.choice([1 / 30, 1 / 15, 0.4], 60))
    values, jumps = rng.uniform(0, 100, (60, 2)), np.arange(60) == 33
    part, sigma, reach = np.cumsum(jumps), 0.1, 0.12
    lines, middles = values.copy(), values.copy()
    for i, now in enumerate(times):
        near = (np.abs(times - now) <= 3 * sigma) & (part == part[i])
        if near.sum() > 1:
            root = np.exp(-(((times[near] - now) / sigma) ** 2) / 4)
            fit = np.polynomial.polynomial.polyfit(times[near] - now, values[near], 1, w=root)
            lines[i] = fit[0]
        side = 0
        while i - side > 0 and i + side < 59 and max(now - times[i - side - 1], times[i + side + 1] - now) <= reach:
            side += 1
        middles[i] = np.median(values[i - side : i + side + 1], axis=0)
    assert median(values, times, reach) == pytest.approx(middles)
    for at_once in (7, 1024):
        monkeypatch.setattr("runner.preprocess.body.smooth.AT_ONCE", at_once)
        assert gaussian(values, times, sigma, jumps) == pytest.approx(lines)


def test_median_removes_a_slip_and_keeps_an_edge():
    values = np.where(np.arange(90) < 40, 5.0, 9.0)[:, None]
    slipped = values.copy()
    slipped[[0, 20, 70]] += 50
    out = median(slipped, TIMES, 0.07)
    assert out[1:] == pytest.approx(values[1:])
    assert out[0] == 55  # an end has no other side


def test_one_euro_is_the_published_recursion():
    """Casiez et al. 2012, written out for one value: alpha = 1 / (1 + tau / T), tau = 1 / (2 pi cutoff)."""
    rng = np.random.default_rng(1)
    values = np.cumsum(rng.normal(0, 0.01, 90))

    def alpha(cutoff: float) -> float:
        return 1 / (1 + (1 / (2 * math.pi * cutoff)) * 30)

    x, dx, expected = values[0], 0.0, [values[0]]
    for value in values[1:]:
        dx = alpha(1.0) * ((value - x) * 30) + (1 - alpha(1.0)) * dx
        a = alpha(1.5 + 2.0 * abs(dx))
        x = a * value + (1 - a) * x
        expected.append(x)
    out = one_euro(values[:, None, None], TIMES, np.ones((90, 1), bool), rest_hz=1.5, per_speed_hz=2.0)
    assert out[:, 0, 0] == pytest.approx(expected)


def test_joints_tremble_less_at_rest_and_do_not_lag_in_motion():
    rng = np.random.default_rng(2)
    still, moving = np.full((90, 2), 200.0), np.stack([100 + 300 * TIMES, np.full(90, 50.0)], 1)
    points = np.full((90, 133, 3), 0.9, np.float32)
    points[:, :, :2] = still[:, None]
    points[:, 9, :2] = moving
    noise = rng.normal(0, 2, (90, 133, 2))
    points[..., :2] += noise
    before = points.copy()
    out = smooth_joints(points, TIMES, np.full(90, 400.0))
    assert (points == before).all()
    assert (out[..., 2] == points[..., 2]).all()
    rest = out[10:-10, 20, :2] - 200
    assert rest.std() < 0.6 * noise[10:-10, 20].std()
    assert (
        abs((out[10:-10, 9, :2] - moving[10:-10]).mean(0)).max() < 1
    )  # one way only, it would trail by several pixels


def test_unsure_joints_are_neither_moved_nor_pull():
    points = np.full((90, 133, 3), 0.9, np.float32)
    points[..., :2] = 100
    points[30:33, 5] = (400, 400, 0.1)
    points[50:, 7, :2] = 300
    points[40:50, 7, 2] = 0.0  # unseen for a third of a second: what comes after begins anew
    out = smooth_joints(points, TIMES, np.full(90, 400.0))
    assert (out[30:33, 5] == points[30:33, 5]).all()
    assert out[:30, 5, :2] == pytest.approx(100)
    assert out[:40, 7, :2] == pytest.approx(100)
    assert out[50:, 7, :2] == pytest.approx(300)

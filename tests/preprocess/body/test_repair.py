"""Repair on a figure whose true motion is known: what was broken comes back, what was not keeps its bits."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from runner.preprocess.body.repair import PAIRS, SLACK, SPEED, _percentile, body_heights, repair

HEIGHT = 400.0
# COCO body and feet of a standing figure 400 pixels tall, x and y as shares of that; left is on the picture's right.
FIGURE = np.array(
    [
        *[(0, 0.06), (0.02, 0.04), (-0.02, 0.04), (0.04, 0.05), (-0.04, 0.05)],
        *[(0.1, 0.18), (-0.1, 0.18), (0.14, 0.33), (-0.14, 0.33), (0.15, 0.48), (-0.15, 0.48)],
        *[(0.06, 0.5), (-0.06, 0.5), (0.07, 0.73), (-0.07, 0.73), (0.07, 0.95), (-0.07, 0.95)],
        *[(0.1, 1), (0.12, 0.99), (0.06, 0.98), (-0.1, 1), (-0.12, 0.99), (-0.06, 0.98)],
    ]
)


def dance(n: int, fps: float, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Points float32 [n, 133, 3] of a figure that walks, hops and swings arms and legs; and its times."""
    times = np.arange(n) / fps
    points = np.zeros((n, 133, 3))
    body = np.tile(FIGURE, (n, 1, 1))
    swing = np.sin(2 * np.pi * 1.2 * times)
    for side, sign in ((0, 1), (1, -1)):
        body[:, 7 + side, 0] += sign * 0.1 * (1 + swing)
        body[:, 9 + side] += np.stack([sign * 0.2 * (1 + swing), -0.3 * (1 + swing)], 1)
        for joint in (13, 15):
            body[:, joint + side, 0] += sign * 0.05 * (1 + swing)
        body[:, [17 + 3 * side, 18 + 3 * side, 19 + 3 * side], 0] += sign * 0.05 * (1 + swing)[:, None]
    body += np.stack([0.3 * times, -0.05 * np.abs(np.sin(2 * np.pi * 1.7 * times))], 1)[:, None]
    points[:, :23, :2] = 100 + HEIGHT * body
    for rows, wrist in ((slice(91, 112), 9), (slice(112, 133), 10)):
        points[:, rows, :2] = points[:, [wrist], :2] + 2 * np.stack([np.arange(21) % 4, np.arange(21)], 1)
    points[:, 23:91, :2] = points[:, [0], :2] + 5
    points[..., :2] += np.random.default_rng(seed).normal(0, 1, (n, 133, 2))
    points[..., 2] = 0.9
    return points.astype(np.float32), times


def heights(n: int) -> np.ndarray:
    return np.full(n, HEIGHT)


def steps(points: np.ndarray) -> np.ndarray:
    return np.linalg.norm(np.diff(points[:, :23, :2], axis=0), axis=-1) / HEIGHT


@pytest.mark.parametrize("fps", [12, 16, 24, 30, 60, 120])
def test_good_motion_keeps_every_bit(fps):
    points, times = dance(4 * fps, fps)
    result = repair(points, times, heights(len(points)))
    assert (result.points == points).all()
    assert (result.joints, result.frames, result.flipped) == (0, 0, 0)


@pytest.mark.parametrize("fps", [16, 30, 60])
def test_a_joint_that_jumps_away_is_put_back_however_sure_it_is(fps):
    points, times = dance(3 * fps, fps)
    broken = points.copy()
    for frame, joint, offset in [(10, 9, (150, 0)), (20, 15, (0, -140)), (21, 15, (10, -150)), (33, 5, (-130, 40))]:
        broken[frame, joint, :2] += offset
        broken[frame, joint, 2] = 0.99
    result = repair(broken, times, heights(len(points)))
    assert result.joints == 4
    assert result.frames == 0
    touched = (result.points != broken).any(-1)
    assert sorted(map(tuple, np.argwhere(touched))) == [(10, 9), (20, 15), (21, 15), (33, 5)]
    assert np.abs(result.points - points)[..., :2].max() < (20 if fps == 16 else 8)  # chords of a swinging arm
    assert result.points[touched][:, 2] == pytest.approx(0.9)


def test_of_two_frames_that_disagree_the_one_that_breaks_the_course_goes():
    """Frame 20 overshoots by just enough that 19 → 20 is too fast. Leaving out 19 would do as well, less smoothly."""
    points, times = dance(60, 30)
    points[:, 9, :2] = np.stack([100 + 4 * np.arange(60), np.full(60, 200)], 1)
    points[20, 9, 0] += 60
    result = repair(points, times, heights(60))
    assert np.flatnonzero((result.points != points).any((1, 2))).tolist() == [20]
    assert result.points[20, 9, 0] == pytest.approx(180, abs=0.01)


def test_a_blip_below_the_speed_limit_is_found_by_its_sharpness():
    points, times = dance(60, 30)
    broken = points.copy()
    broken[25, 13, :2] += (40, 0)  # a tenth of the body: slow enough to be true, were it not back at once
    result = repair(broken, times, heights(60))
    assert result.joints == 1
    assert np.abs(result.points[25, 13, :2] - points[25, 13, :2]).max() < 6


@pytest.mark.parametrize("frames", [[20], [20, 21], [20, 24, 40]])
def test_frames_with_sides_exchanged_are_exchanged_back_exactly(frames):
    points, times = dance(60, 30)
    broken = points.copy()
    for left, right in PAIRS:
        broken[np.ix_(frames, [left, right])] = points[np.ix_(frames, [right, left])]
    broken[frames, 91:112], broken[frames, 112:133] = points[frames, 112:133], points[frames, 91:112]
    result = repair(broken, times, heights(60))
    assert (result.flipped, result.frames, result.joints) == (len(frames), len(frames), 0)
    assert (result.points == points).all()


def test_legs_alone_are_exchanged_back():
    points, times = dance(60, 30)
    broken = points.copy()
    for left, right in PAIRS[5:]:
        broken[30, [left, right]] = points[30, [right, left]]
    result = repair(broken, times, heights(60))
    assert result.flipped == 1
    assert (result.points == points).all()


def test_a_person_who_turns_around_and_stays_so_is_believed():
    points, times = dance(60, 30)
    turned = points.copy()
    for left, right in PAIRS:
        turned[30:, [left, right]] = points[30:, [right, left]]
    result = repair(turned, times, heights(60))
    assert result.flipped == 0
    assert (result.points[32:] == turned[32:]).all()


def test_a_collapsed_frame_is_made_of_its_neighbours_and_shows_no_face():
    points, times = dance(60, 30)
    broken = points.copy()
    middle = points[30, 11:13, :2].mean(0)
    broken[30, :, :2] = middle + 0.2 * (points[30, :, :2] - middle)
    result = repair(broken, times, heights(60))
    assert (result.frames, result.flipped, result.joints) == (1, 0, 0)
    assert np.abs(result.points[30, :23, :2] - points[30, :23, :2]).max() < 8
    assert not result.points[30, 23:91, 2].any()
    others = np.arange(60) != 30
    assert (result.points[others] == broken[others]).all()


def test_short_dropouts_are_filled_and_long_ones_left_alone():
    points, times = dance(60, 30)
    broken = points.copy()
    for first, last in ((10, 12), (30, 45)):
        broken[first:last, 9] = (5, 5, 0.05)
    result = repair(broken, times, heights(60))
    assert result.joints == 2
    assert np.abs(result.points[10:12, 9, :2] - points[10:12, 9, :2]).max() < 8
    assert (result.points[30:45, 9] == broken[30:45, 9]).all()


@pytest.mark.parametrize("offset", [(500, 30), (120, 0), (-90, 150)])
def test_a_cut_stays_a_cut(offset):
    points, times = dance(60, 30)
    points[30:, :, :2] += offset
    result = repair(points, times, heights(60))
    assert (result.points == points).all()


def test_wrong_with_nothing_to_replace_it_is_hidden():
    """Seen in three frames, far apart: two agree over half a second and more, the odd one has no neighbour."""
    points, times = dance(60, 30)
    points[:, 9, 2] = 0.05
    points[[10, 20, 30], 9, 2] = 0.9
    points[[10, 20, 30], 9, :2] = [(100, 100), (390, 390), (100, 100)]
    points[20, 9, :2] = (900, 900)
    result = repair(points, times, heights(60))
    assert result.points[20, 9, 2] == 0
    assert result.points[20, 9, :2].tolist() == [900, 900]
    assert result.points[10, 9, 2] == pytest.approx(0.9)


@settings(max_examples=20, deadline=None)
@given(
    fps=st.sampled_from([16, 30, 60]),
    seed=st.integers(0, 10_000),
    spikes=st.lists(st.tuples(st.integers(5, 40), st.integers(0, 22), st.floats(-400, 400)), max_size=8),
)
def test_no_joint_is_faster_than_the_limit_afterwards(fps, seed, spikes):
    points, times = dance(46, fps, seed)
    for frame, joint, offset in spikes:
        points[frame, joint, :2] += (offset, -offset / 2)
    result = repair(points, times, heights(46))
    assert steps(result.points).max() <= SLACK + SPEED / fps + 1e-6
    assert np.isfinite(result.points).all()


def test_few_frames():
    for n in (1, 2, 3):
        points, times = dance(n, 30)
        assert (repair(points, times, heights(n)).points == points).all()


def test_body_heights_from_whole_bodies_torsos_shoulders_and_boxes():
    points, times = dance(40, 16)
    tall = body_heights(points, np.full(40, 300.0), times)
    assert tall == pytest.approx(HEIGHT, rel=0.05)
    points[:, 13:23, 2] = 0.1
    assert body_heights(points, np.full(40, 100.0), times) == pytest.approx(HEIGHT, rel=0.15)
    points[:, 11:13, 2] = 0.1
    assert body_heights(points, np.full(40, 100.0), times) == pytest.approx(HEIGHT, rel=0.25)
    points[:, :, 2] = 0.1
    assert (body_heights(points, np.full(40, 100.0), times) == 70).all()


def test_body_heights_follow_who_comes_nearer():
    points, times = dance(96, 16)
    grown = points.copy()
    grown[..., :2] *= np.linspace(1, 3, 96)[:, None, None]
    result = body_heights(grown, np.full(96, 10.0), times)
    assert result[0] == pytest.approx(1.2 * HEIGHT, rel=0.15)
    assert result[-1] == pytest.approx(2.8 * HEIGHT, rel=0.15)


@given(values=st.lists(st.floats(0, 5000), min_size=1, max_size=70), percent=st.sampled_from([50, 80]))
def test_percentiles_are_numpys(values, percent):
    assert _percentile(np.array(values), percent) == pytest.approx(np.percentile(values, percent))

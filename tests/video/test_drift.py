"""Drift: what was put into a made scene is measured, and nothing else."""

from __future__ import annotations

import tracemalloc

import cv2
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from skimage.color import rgb2lab

from runner.video.drift import DriftMeter, MeasuredDrift, fit_colour, reduce_picture, to_lab
from tests.moving_scene import apply_gain, make_scene

FRAMES, JOINTS = 60, (20, 40)


@pytest.fixture(scope="module")
def scene() -> np.ndarray:
    return make_scene(FRAMES)


@pytest.fixture(scope="module")
def again() -> np.ndarray:
    """The scene with other noise."""
    return make_scene(FRAMES, seed=1)


def run_meter(frames, baseline=None, joints=JOINTS, window=7) -> MeasuredDrift:
    meter = DriftMeter(joints, len(frames))
    for begin in range(0, len(frames), window):
        span = slice(begin, begin + window)
        meter.add(frames[span], None if baseline is None else baseline[span])
    return meter.result()


# --- colours ---


def test_lab_is_that_of_scikit_image():
    colours = np.random.default_rng(0).integers(0, 256, (2000, 3))
    assert np.abs(to_lab(colours) - rgb2lab(colours / 255)).max() < 0.01


def test_a_picture_is_reduced_by_its_area():
    picture = np.random.default_rng(0).integers(0, 256, (120, 160, 3), np.uint8)
    blocks = picture.reshape(30, 4, 40, 4, 3).mean(axis=(1, 3))
    assert np.abs(reduce_picture(picture, 1200) - blocks).max() < 1e-3
    assert reduce_picture(picture).shape == (104, 139, 3)
    assert reduce_picture(picture[:5, :3]).shape == (5, 3, 3)


@settings(max_examples=40, deadline=None)
@given(
    gains=st.tuples(*[st.floats(0.8, 1.25)] * 3),
    offsets=st.tuples(*[st.floats(-10, 10)] * 3),
    others=st.floats(0, 0.35),
    seed=st.integers(0, 1000),
)
def test_gain_and_offset_are_found_among_other_content(gains, offsets, others, seed):
    chance = np.random.default_rng(seed)
    before = chance.uniform(40, 180, (3000, 3))
    after = before * gains + offsets + chance.normal(0, 0.3, before.shape)
    changed = round(others * len(before))
    after[:changed] = chance.uniform(5, 250, (changed, 3))
    fit = fit_colour(before, after)
    assert np.abs(np.array(fit.gain) - gains).max() < 0.003
    assert np.abs(np.array(fit.offset) - offsets).max() < 0.4


def test_a_plain_background_gives_an_offset_alone():
    before = np.full((500, 3), (100.0, 120.0, 140.0)) + np.random.default_rng(0).normal(0, 0.5, (500, 3))
    fit = fit_colour(before, before * 1.02)
    assert fit.gain == (1, 1, 1)
    assert np.allclose(fit.offset, (2.0, 2.4, 2.8), atol=0.05)
    colours = np.array([[100, 120, 140], [102, 122.4, 142.8]]) / 255
    assert fit.delta_e == pytest.approx(np.linalg.norm(np.diff(rgb2lab(colours), axis=0)), rel=0.02)


def test_levels_that_are_cut_off_do_not_bend_the_gain():
    before = np.random.default_rng(0).uniform(0, 255, (3000, 3))
    assert np.allclose(fit_colour(before, np.clip(before * 1.2, 0, 255)).gain, 1.2, atol=1e-3)


# --- joints ---


def test_a_clean_pair_has_no_drift(scene, again):
    found = run_meter(scene, again)
    assert found.joint_drift < 0.03
    assert [(joint.frame, joint.step < 0.1, joint.still > 0.3) for joint in found.joints] == [
        (20, True, True),
        (40, True, True),
    ]
    assert [(segment.begin, segment.end) for segment in found.segments] == [(0, 20), (20, 40), (40, 60)]
    for segment in found.segments:
        assert np.abs(np.array(segment.gain) - 1).max() < 0.002
        assert np.abs(np.array(segment.offset)).max() < 0.3
        assert segment.delta_e < 0.4  # noise
        assert segment.within < 0.1
        assert segment.laplacian_ratio == pytest.approx(1, abs=0.02)
        assert segment.motion_ratio == pytest.approx(1, abs=0.02)


def test_a_gain_from_the_second_segment_on_is_found_at_its_joint(scene, again):
    drifted = make_scene(FRAMES, gains=[1.0] * 20 + [1.02] * 40)
    clean, found = run_meter(scene, again), run_meter(drifted, again)
    first, second = found.joints
    assert np.abs(np.array(first.gain) - 1.02).max() < 0.005
    assert found.joint_drift == first.excess > 10 * max(clean.joint_drift, 0.05)
    assert second.excess < 0.05
    still = scene[0][:20]  # above the dancer
    truth = np.linalg.norm(rgb2lab(still * 1.02 / 255) - rgb2lab(still / 255), axis=2).mean()
    assert first.step == pytest.approx(truth, rel=0.1)
    gains = np.array([segment.gain for segment in found.segments])
    assert np.abs(gains - [[1], [1.02], [1.02]]).max() < 0.005


def test_a_step_that_the_baseline_has_is_no_excess(scene, again):
    drifted, other = scene.copy(), again.copy()
    drifted[20:], other[20:] = apply_gain(drifted[20:], 1.04), apply_gain(other[20:], 1.03)
    alone, both = run_meter(drifted), run_meter(drifted, other)
    assert alone.joints[0].step == both.joints[0].step > 1.5
    assert alone.joint_drift == pytest.approx(alone.joints[0].step, abs=0.05)
    assert both.joint_drift == pytest.approx(alone.joint_drift / 4, rel=0.15)
    assert run_meter(other, other).joint_drift == 0


def test_a_change_that_goes_on_all_the_time_is_no_step_at_a_joint(scene):
    brighter = np.stack([apply_gain(frame, 1 + index / 200) for index, frame in enumerate(scene)])
    found = run_meter(brighter)
    assert found.joints[0].step > 0.5
    assert found.joint_drift < 0.2
    assert all(segment.within > 1 for segment in found.segments)


def test_a_drift_inside_one_segment_is_found_there(scene, again):
    drifted = scene.copy()
    for index in range(20, 40):
        drifted[index] = apply_gain(drifted[index], 1 + 0.05 * (index - 20) / 20, 3 * (index - 20) / 20)
    found = run_meter(drifted, again)
    assert found.segments[1].within > 1.5
    assert max(found.segments[0].within, found.segments[2].within) < 0.1
    assert found.segments[1].delta_e > 1


def test_another_dancer_is_no_drift(scene, again):
    other = make_scene(FRAMES, dancer=((30, 160, 60), (220, 210, 60)))
    found = run_meter(other, again)
    assert found.joint_drift < 0.03
    assert all(np.abs(np.array(segment.gain) - 1).max() < 0.004 for segment in found.segments)


@pytest.mark.parametrize("dancer", [False, True])
def test_a_plain_background(dancer):
    frames = np.full((40, 60, 80, 3), (90, 110, 130), np.uint8)
    if dancer:
        for index, frame in enumerate(frames):
            frame[10:50, index : index + 20] = (200, 40, 40)
    drifted = frames.copy()
    drifted[20:] = apply_gain(drifted[20:], 1.05)
    found = run_meter(drifted, frames, joints=[20])
    assert found.joints[0].gain == (1, 1, 1)
    assert np.allclose(found.joints[0].offset, (4.5, 5.5, 6.5), atol=0.6)
    assert found.joint_drift > 1.5


def test_without_a_still_pixel_the_whole_picture_is_measured():
    """A camera that pans over noise: no pixel keeps its value."""
    wide = np.random.default_rng(0).integers(40, 200, (30, 200, 3)).astype(np.uint8)
    wide = cv2.resize(wide, (1200, 180), interpolation=cv2.INTER_CUBIC)
    frames = np.stack([wide[:, 5 * index : 5 * index + 240] for index in range(40)])
    drifted = frames.copy()
    drifted[20:] = apply_gain(drifted[20:], 1.05)
    found = run_meter(drifted, frames, joints=[20])
    assert all(part.still < 0.05 for part in (*found.joints, *found.segments))
    assert np.abs(np.array(found.segments[1].gain) - 1.05).max() < 0.005


# --- texture and motion ---


def test_energies_are_plain_means(scene):
    found = run_meter(scene, joints=())
    grey = np.stack([cv2.cvtColor(frame, cv2.COLOR_RGB2GRAY) for frame in scene]).astype(np.float64)
    padded = np.pad(grey, ((0, 0), (1, 1), (1, 1)), "reflect")
    inner = padded[:, 1:-1, 1:-1]
    laplacian = padded[:, :-2, 1:-1] + padded[:, 2:, 1:-1] + padded[:, 1:-1, :-2] + padded[:, 1:-1, 2:] - 4 * inner
    assert found.segments[0].laplacian == pytest.approx(np.square(laplacian).mean())
    assert found.segments[0].motion == pytest.approx(np.square(np.diff(grey, axis=0)).mean())


def test_motion_across_a_joint_belongs_to_no_segment():
    frames = np.zeros((10, 16, 16, 3), np.uint8)
    frames[5:] = 200
    assert [segment.motion for segment in run_meter(frames, joints=[5]).segments] == [0, 0]
    assert run_meter(frames, joints=[]).segments[0].motion == pytest.approx(200**2 / 9)


def test_blur_takes_texture_and_a_frozen_video_motion(scene, again):
    blurred = scene.copy()
    blurred[40:] = [cv2.GaussianBlur(frame, (0, 0), 1) for frame in blurred[40:]]
    ratios = [segment.laplacian_ratio for segment in run_meter(blurred, again).segments]
    assert ratios[2] < 0.5
    assert min(ratios[:2]) > 0.95
    frozen = np.stack([scene[0]] * FRAMES)
    assert all(segment.motion_ratio < 0.01 for segment in run_meter(frozen, again).segments)
    same = run_meter(frozen, frozen).segments[0]
    assert (same.motion_ratio, same.laplacian_ratio) == (1, 1)


# --- as a stream ---


@settings(max_examples=15, deadline=None)
@given(window=st.integers(1, 50), joints=st.lists(st.integers(1, 29), max_size=4, unique=True).map(sorted))
def test_windows_and_joints_may_lie_anywhere(window, joints):
    frames = make_scene(30, 32, 48)
    other = make_scene(30, 32, 48, seed=1)
    found = run_meter(frames, other, joints, window)
    assert found == run_meter(frames, other, joints, 30)
    assert [joint.frame for joint in found.joints] == joints
    assert [segment.begin for segment in found.segments] == [0, *joints]


def test_one_frame_is_a_video():
    found = run_meter(make_scene(1), joints=())
    assert (found.joint_drift, found.joints, found.segments[0].within) == (0, [], 0)


def test_memory_does_not_grow_with_the_length():
    frames = np.random.default_rng(0).integers(0, 256, (8, 90, 160, 3), np.uint8)

    def peak(count: int) -> int:
        meter = DriftMeter([count // 2], count)
        tracemalloc.start()
        for _ in range(0, count, len(frames)):
            meter.add(frames, frames)
        meter.result()
        size = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        return size

    short, long = peak(48), peak(192)
    assert long < 1.05 * short + 100_000


def test_wrong_use_is_refused(scene):
    for joints in ([0], [60], [5, 5], [9, 3]):
        with pytest.raises(ValueError, match=r"within 1\.\.59"):
            DriftMeter(joints, 60)
    meter = DriftMeter([], 10)
    meter.add(scene[:5])
    with pytest.raises(ValueError, match="5 of 10 frames"):
        meter.result()
    with pytest.raises(ValueError, match="every window or with none"):
        meter.add(scene[:2], scene[:2])
    with pytest.raises(ValueError, match="follows frames"):
        meter.add(scene[:1, 1:])
    with pytest.raises(ValueError, match="more than 10"):
        meter.add(scene[:6])
    with pytest.raises(ValueError, match="has a baseline of"):
        DriftMeter([], 10).add(scene[:2], scene[:3])

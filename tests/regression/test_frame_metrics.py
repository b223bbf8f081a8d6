"""Frame metrics: numbers against closed forms, scikit-image and FFmpeg's filters; each kind of defect by its metric."""

from __future__ import annotations

import tracemalloc
from fractions import Fraction
from math import log10
from pathlib import Path

import av
import cv2
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from skimage.color import rgb2lab
from skimage.metrics import peak_signal_noise_ratio, structural_similarity

from runner.errors import InputUnreadable
from runner.regression.findings import Measurements
from runner.regression.frame_metrics import find_shift, measure, psnr, ssim
from runner.regression.outputs import RenderedFrames
from tests.moving_scene import DANCER, apply_gain, dancer_box, make_scene, write_mp4, write_pngs

COUNT, JOINTS = 36, (12, 24)
SIZE = {"width": 128, "height": 192}
OTHER_DANCER = ((30, 160, 60), (220, 210, 60))


class Boxes:
    """Where the dancer of the scene is; not known for some frames."""

    def __init__(self, unknown: tuple[int, ...] = ()) -> None:
        self.unknown, self.rates, self.asked = unknown, set(), []

    def person(self, frame: int, fps: Fraction | None = None) -> tuple[int, int, int, int] | None:
        self.rates.add(fps)
        self.asked.append(frame)
        return None if frame in self.unknown else dancer_box(frame, **SIZE)


@pytest.fixture(scope="module")
def scene() -> np.ndarray:
    return make_scene(COUNT, **SIZE)


@pytest.fixture(scope="module")
def baseline(scene, tmp_path_factory) -> RenderedFrames:
    return RenderedFrames(write_mp4(tmp_path_factory.mktemp("baseline") / "output.mp4", scene, crf=16))


@pytest.fixture
def run(baseline, tmp_path):
    """Measure frames, coded at crf 18, against the scene, coded at crf 16."""

    def measured(frames: np.ndarray, **options) -> Measurements:
        return measure(RenderedFrames(write_mp4(tmp_path / "output.mp4", frames)), baseline, joints=JOINTS, **options)

    return measured


# --- numbers ---


@pytest.mark.parametrize("difference", [1, 3, 40, 255])
def test_psnr_of_a_constant_difference(difference):
    dark = np.zeros((17, 23, 3), np.uint8)
    assert psnr(dark, dark + np.uint8(difference)) == pytest.approx(20 * log10(255 / difference), abs=1e-9)
    assert psnr(dark, dark) == 100


def test_psnr_is_at_most_that_of_equal_frames():
    large = np.zeros((2000, 2000, 3), np.uint8)
    other = large.copy()
    other[0, 0, 0] = 1
    assert psnr(other, large) == 100


@settings(max_examples=40, deadline=None)
@given(
    height=st.integers(11, 150),
    width=st.integers(11, 40),
    noise=st.floats(0.3, 80),
    smooth=st.booleans(),
    seed=st.integers(0, 1000),
)
def test_psnr_and_ssim_are_those_of_scikit_image(height, width, noise, smooth, seed):
    chance = np.random.default_rng(seed)
    one = chance.integers(0, 256, (height, width, 3)).astype(np.uint8)
    if smooth:
        one = cv2.GaussianBlur(one, (0, 0), 3)
    other = np.clip(one + chance.normal(0, noise, one.shape), 0, 255).astype(np.uint8)
    settings_ = {"gaussian_weights": True, "sigma": 1.5, "use_sample_covariance": False}
    truth = structural_similarity(one, other, channel_axis=2, data_range=255, **settings_)
    assert ssim(one, other) == pytest.approx(truth, abs=1e-5)
    if not np.array_equal(one, other):
        assert psnr(one, other) == pytest.approx(min(100, peak_signal_noise_ratio(one, other, data_range=255)))


def test_ssim_of_a_flat_picture_and_of_equal_ones():
    """No structure: (2ab + c1) / (a² + b² + c1) remains."""
    c1, a, b = 2.55**2, 100, 140
    flat = np.full((40, 30, 3), a, np.uint8)
    expected = (2 * a * b + c1) / (a * a + b * b + c1)
    assert ssim(flat, np.full_like(flat, b)) == pytest.approx(expected, abs=1e-5)
    assert ssim(flat, flat.copy()) == 1


def filter_frames(name: str, key: str, new: np.ndarray, baseline: np.ndarray) -> list[float]:
    """The values that one of FFmpeg's filters gives for pairs of frames, in RGB."""
    graph = av.filter.Graph()
    size = {"width": new.shape[2], "height": new.shape[1], "format": av.VideoFormat("gbrp")}
    sources = [graph.add_buffer(**size, time_base=Fraction(1, 16), name=side) for side in ("new", "baseline")]
    metric, sink = graph.add(name), graph.add("buffersink")
    for number, source in enumerate(sources):
        source.link_to(metric, 0, number)
    metric.link_to(sink)
    graph.configure()
    values = []
    for index, pair in enumerate(zip(new, baseline, strict=True)):
        for source, picture in zip(sources, pair, strict=True):
            frame = av.VideoFrame.from_ndarray(picture, format="rgb24").reformat(format="gbrp")
            frame.pts, frame.time_base = index, Fraction(1, 16)
            source.push(frame)
        values.append(float(sink.pull().metadata[key]))
    return values


def test_frames_are_valued_as_by_the_filters_of_ffmpeg(scene, baseline, tmp_path):
    coded = RenderedFrames(write_mp4(tmp_path / "output.mp4", scene))
    found = measure(coded, baseline, joints=JOINTS)
    new = np.concatenate(list(coded.windows(COUNT)))
    old = np.concatenate(list(baseline.windows(COUNT)))
    assert found.psnr is not None
    assert found.ssim is not None
    assert found.psnr.values == pytest.approx(filter_frames("psnr", "lavfi.psnr.psnr_avg", new, old), abs=0.002)
    # Its windows are plain blocks of 8x8.
    assert found.ssim.values == pytest.approx(filter_frames("ssim", "lavfi.ssim.All", new, old), abs=0.01)
    assert found.psnr.mean == pytest.approx(np.mean(found.psnr.values), abs=1e-3)
    assert found.psnr.p5 == pytest.approx(np.percentile(found.psnr.values, 5), abs=1e-3)
    assert found.psnr.worst == pytest.approx(min(found.psnr.values), abs=1e-3)
    assert found.ssim.worst_frame == int(np.argmin(found.ssim.values))
    largest = np.abs(new.astype(int) - old).reshape(COUNT, -1).max(axis=1)
    assert (found.largest_difference, found.largest_difference_frame) == (largest.max(), largest.argmax())


# --- each defect by its metric ---


def test_equal_videos(baseline):
    done: list[tuple[int, int]] = []
    found = measure(baseline, baseline, joints=JOINTS, progress=lambda *counts: done.append(counts))
    assert found.psnr is not None and found.ssim is not None and found.drift is not None
    assert (found.psnr.worst, found.psnr.worst_frame, found.ssim.worst) == (100, 0, 1)
    assert (found.largest_difference, found.colour, found.shift, found.misalignments) == (0, 0, None, [])
    assert (found.frames_new, found.frames_baseline, found.frames_compared) == (COUNT,) * 3
    assert found.drift.joint_drift == 0
    assert [joint.frame for joint in found.drift.joints] == list(JOINTS)
    assert done[-1] == (COUNT, COUNT)
    assert found.identity is None
    assert Measurements.model_validate_json(found.model_dump_json()) == found


def test_coding_at_another_rate_is_no_defect(scene, run):
    found = run(scene, people=Boxes())
    assert found.psnr.worst > 36
    assert found.ssim.worst > 0.95
    assert found.colour < 0.5
    assert (found.shift, found.misalignments) == (None, [])
    assert found.drift.joint_drift < 0.1
    assert all(0.85 < segment.laplacian_ratio < 1.15 for segment in found.drift.segments)
    assert all(0.9 < segment.motion_ratio < 1.1 for segment in found.drift.segments)


@pytest.mark.parametrize(("right", "down"), [(1, 0), (0, -1), (-3, 2)])
def test_one_frame_shifted_is_the_worst_and_its_shift_is_named(scene, run, right, down):
    shifted = scene.copy()
    shifted[17] = np.roll(shifted[17], (down, right), axis=(0, 1))
    found = run(shifted)
    assert found.psnr.worst_frame == found.ssim.worst_frame == 17
    assert found.shift == pytest.approx((right, down), abs=0.1)
    assert found.misalignments == []
    others = [value for frame, value in enumerate(found.psnr.values) if frame != 17]
    assert found.psnr.worst < min(others) - 3


def test_half_a_pixel_is_a_shift_too():
    large = cv2.GaussianBlur(make_scene(1, 384, 576)[0], (0, 0), 3)
    moved, still = (cv2.resize(np.roll(large, by, axis=1), (96, 144), interpolation=cv2.INTER_AREA) for by in (2, 0))
    assert find_shift(moved, still) == pytest.approx((0.5, 0), abs=0.2)


def test_other_content_is_no_shift(scene):
    assert find_shift(scene[8], scene[0]) is None
    assert find_shift(scene[0], scene[0]) is None
    noise = np.random.default_rng(0).integers(0, 256, (2, 64, 64, 3), np.uint8)
    assert find_shift(*noise) is None
    assert find_shift(np.zeros((64, 64, 3), np.uint8), np.full((64, 64, 3), 50, np.uint8)) is None


@pytest.mark.parametrize(
    ("indices", "told"),
    [
        ([*range(17), *range(18, COUNT)], ("dropped", 17, 1)),
        ([*range(17), 16, *range(17, COUNT)], ("repeated", 17, 1)),
        ([*range(17), 16, *range(18, COUNT)], ("repeated", 17, 1)),
    ],
    ids=["dropped", "repeated", "repeated in place of the next"],
)
def test_a_frame_dropped_or_repeated_is_named(scene, run, indices, told):
    found = run(scene[indices])
    assert [(entry.kind, entry.frame, entry.frames) for entry in found.misalignments] == [told]
    assert (found.frames_new, found.frames_compared) == (len(indices), min(len(indices), COUNT))
    assert found.psnr is not None and len(found.psnr.values) == found.frames_compared


def test_a_gain_from_the_second_segment_on_is_drift_at_that_joint(scene, run, tmp_path):
    frames = make_scene(COUNT, **SIZE, gains=[1.0] * 12 + [1.02] * 24)
    clean, coded = run(scene), run(frames)
    exact = measure(
        RenderedFrames(write_pngs(tmp_path / "new", frames)),
        RenderedFrames(write_pngs(tmp_path / "old", make_scene(COUNT, **SIZE, seed=1))),
        joints=JOINTS,
    )
    for found in (coded, exact):
        first, second = found.drift.joints
        assert first.frame == 12
        assert found.drift.joint_drift == first.excess > 10 * max(clean.drift.joint_drift, second.excess, 0.03)
        assert first.gain[1] == pytest.approx(1.02, abs=0.005)  # chroma is coded more coarsely
    assert exact.drift.joints[0].gain == pytest.approx((1.02,) * 3, abs=0.005)
    gains = np.array([segment.gain for segment in exact.drift.segments])
    assert np.abs(gains - [[1], [1.02], [1.02]]).max() < 0.005
    assert [segment.segment for segment in exact.drift.segments] == [1, 2, 3]


def test_a_drift_inside_a_segment(scene, run):
    drifted = scene.copy()
    for index in range(12, 24):
        drifted[index] = apply_gain(drifted[index], 1 + 0.05 * (index - 12) / 12, 3 * (index - 12) / 12)
    found = run(drifted)
    within = [segment.within for segment in found.drift.segments]
    assert within[1] > 1.5 > 5 * max(within[0], within[2])


def test_another_dancer_s_colours(run):
    """The person's box: the background, which is the same, would hide half of it."""
    boxed = run(make_scene(COUNT, **SIZE, dancer=OTHER_DANCER), people=Boxes())
    whole = run(make_scene(COUNT, **SIZE, dancer=OTHER_DANCER))
    means = [np.mean(rgb2lab(np.array([pair]) / 255), axis=(0, 1)) for pair in (DANCER, OTHER_DANCER)]
    assert boxed.colour == pytest.approx(np.linalg.norm(means[0] - means[1]), rel=0.1)
    assert boxed.colour > 4 * whole.colour > 4
    assert boxed.drift.joint_drift < 0.1


def test_a_frame_without_a_box_is_measured_whole(scene, baseline, tmp_path):
    tinted = scene.copy()
    tinted[9, :, :, 0] = np.minimum(255, tinted[9, :, :, 0] + np.int64(20))
    people = Boxes(unknown=(9,))
    opened = RenderedFrames(write_mp4(tmp_path / "output.mp4", tinted))
    found = measure(opened, baseline, joints=(), people=people)
    change = np.linalg.norm(rgb2lab(tinted[9] / 255).mean((0, 1)) - rgb2lab(scene[9] / 255).mean((0, 1)))
    assert found.colour_frame == 9
    assert found.colour == pytest.approx(change, rel=0.1)
    assert people.rates == {opened.fps}
    assert people.asked == list(range(COUNT))


def test_a_box_outside_the_picture_counts_as_none(scene, tmp_path):
    class Outside:
        def person(self, frame: int, fps: Fraction | None = None) -> tuple[int, int, int, int]:
            return (500, 500, 600, 600) if frame else (-20, -20, 5, 5)

    opened = RenderedFrames(write_pngs(tmp_path / "frames", scene[:3]))
    assert measure(opened, opened, joints=(), people=Outside()).colour == 0


def test_blur_and_a_frozen_video(scene, run):
    blurred = run(np.stack([cv2.GaussianBlur(frame, (0, 0), 1) for frame in scene]))
    assert all(segment.laplacian_ratio < 0.6 for segment in blurred.drift.segments)
    frozen = run(np.stack([scene[0]] * COUNT))
    assert all(segment.motion_ratio < 0.05 for segment in frozen.drift.segments)


# --- unequal videos, other files ---


def test_pngs_are_measured_without_loss(scene, tmp_path):
    new, old = RenderedFrames(write_pngs(tmp_path / "new", scene)), RenderedFrames(write_pngs(tmp_path / "old", scene))
    assert measure(new, old, joints=JOINTS).psnr.worst == 100
    changed = scene.copy()
    changed[30, 50, 60, 1] ^= 255
    new = RenderedFrames(write_pngs(tmp_path / "new", changed))
    found = measure(new, old, joints=JOINTS)
    assert found.largest_difference == abs(255 - 2 * int(scene[30, 50, 60, 1]))
    assert found.largest_difference_frame == found.psnr.worst_frame == found.ssim.worst_frame == 30
    mean = found.largest_difference**2 / scene[0].size
    assert found.psnr.worst == pytest.approx(10 * log10(255**2 / mean))


def test_another_size(scene, baseline, run):
    small = np.stack([cv2.resize(frame, (96, 144), interpolation=cv2.INTER_AREA) for frame in scene])
    found = run(small)
    assert (found.psnr, found.ssim, found.largest_difference, found.largest_difference_frame) == (None,) * 4
    assert (found.shift, found.frames_compared) == (None, COUNT)
    assert found.colour < 1
    assert found.drift.joint_drift < 0.1
    tinted = run(apply_gain(small, 1.1))
    assert np.abs(np.array(tinted.drift.segments[0].gain) - 1.1).max() < 0.02


@pytest.mark.parametrize("count", [1, 5, 12, 13, 29])
def test_a_shorter_video(scene, run, count):
    done: list[tuple[int, int]] = []
    found = run(scene[:count], progress=lambda *counts: done.append(counts))
    assert (found.frames_new, found.frames_baseline, found.frames_compared) == (count, COUNT, count)
    assert [joint.frame for joint in found.drift.joints] == [joint for joint in JOINTS if joint < count]
    assert [(entry.kind, entry.frame, entry.frames) for entry in found.misalignments] == [
        ("dropped", count, COUNT - count)
    ]
    assert done == [(min(begin + 8, COUNT), COUNT) for begin in range(0, COUNT, 8)]


def test_tiny_pictures_have_no_ssim(tmp_path):
    frames = np.random.default_rng(0).integers(0, 256, (4, 8, 10, 3), np.uint8)
    opened = RenderedFrames(write_pngs(tmp_path / "frames", frames))
    found = measure(opened, opened, joints=[2])
    assert found.ssim is None
    assert found.psnr.worst == 100


def test_a_damaged_video_is_said(scene, baseline, tmp_path):
    paths = write_pngs(tmp_path / "frames", scene)
    paths[20].write_bytes(paths[20].read_bytes()[:500])
    with pytest.raises(InputUnreadable, match="000020"):
        measure(RenderedFrames(paths), baseline, joints=JOINTS)


def test_memory_does_not_grow_with_the_length(tmp_path):
    scene = make_scene(16, **SIZE)
    paths: list[Path] = write_pngs(tmp_path / "frames", scene)

    def peak(count: int) -> int:
        frames = RenderedFrames([paths[index % 16] for index in range(count)])
        tracemalloc.start()
        measure(frames, frames, joints=[count // 2])
        size = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        return size

    short, long = peak(100), peak(220)
    assert long < short + 120 * 2 * 2048 + 2_000_000  # thumbnails; how two threads' pictures meet

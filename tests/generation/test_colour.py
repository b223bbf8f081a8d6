"""Colour: drift that is put into made segments is measured and taken out again; where there is none, nothing changes.

The scene is known. A made decoder continues the colours of what a window began from, as a gain and an offset that are
found from those pixels alone, and adds its own: so it drifts as a model does whose frames are fed back.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass

import cv2
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from skimage.color import rgb2lab

from runner.errors import InternalError
from runner.generation.colour import (
    GAIN_LIMITS,
    OFFSET_LIMIT,
    RAMP_FRAMES,
    Correction,
    SegmentColours,
    TrueBackground,
    correct_frames,
    correct_pixels,
    fit_correction,
    ramp,
    without_colours,
)
from runner.generation.protocol import ResumePoint
from runner.records.drift_record import DriftRecord
from runner.video.drift import reduce_picture

WIDTH, HEIGHT, WINDOW, SEGMENTS = 64, 96, 21, 12
GAIN, OFFSET = np.array([1.015, 1.01, 1.02]), np.array([0.8, -0.6, 0.3])  # of a window, on what it began from
RECOVERED, UNCHANGED = 0.3, 0.1  # delta E


def textured() -> np.ndarray:
    """float64 [H, W, 3]."""
    y, x = np.mgrid[0:HEIGHT, 0:WIDTH]
    waves = [(60, 90, 17, 29), (80, 70, 23, 13), (90, 60, 11, 31)]
    picture = np.stack([low + high * np.abs(np.sin(x / a) * np.cos(y / b)) for low, high, a, b in waves], axis=2)
    return picture + cv2.GaussianBlur(np.random.default_rng(9).normal(0, 30, (HEIGHT, WIDTH)), (0, 0), 2)[..., None]


def plain() -> np.ndarray:
    return np.full((HEIGHT, WIDTH, 3), (120.0, 130.0, 150.0))


@dataclass
class Scene:
    """`frame(i)`: float64 [H, W, 3], what is there in frame i; figure: side of a square that wanders, of the width."""

    background: np.ndarray
    figure: float = 0.3
    scrolls: int = 0  # pixels a frame

    def frame(self, index: int) -> np.ndarray:
        picture = np.roll(self.background, self.scrolls * index, axis=1)
        x1, y1, x2, y2 = self.box(index)
        picture[y1:y2, x1:x2] = (190, 70, 60)
        picture[y1 : (y1 + y2) // 2, x1:x2] = (60, 80, 170)
        cloth = np.random.default_rng(3).normal(0, 12, (y2 - y1, x2 - x1, 1))  # it moves with the figure
        picture[y1:y2, x1:x2] += cloth
        return picture

    def box(self, index: int) -> tuple[int, int, int, int]:
        wide, tall = round(self.figure * WIDTH), round(self.figure * HEIGHT)
        x = round((WIDTH - wide) * (0.5 + 0.5 * np.sin(index / 3)))
        y = round((HEIGHT - tall) * (0.5 + 0.5 * np.sin(index / 5)))
        return x, y, x + wide, y + tall

    def mask(self, frames: range) -> np.ndarray:
        found = np.zeros((len(frames), HEIGHT, WIDTH), np.uint8)
        for at, index in enumerate(frames):
            x1, y1, x2, y2 = self.box(index)
            found[at, y1:y2, x1:x2] = 255
        return found


def to_pixels(frames: np.ndarray) -> torch.Tensor:
    """float [n, H, W, 3] levels to float32 [1, 3, n, H, W] in [-1, 1]."""
    return torch.from_numpy((frames / 127.5 - 1).astype(np.float32)).permute(3, 0, 1, 2)[None].clamp(-1, 1)


def to_levels(pixels: torch.Tensor) -> np.ndarray:
    return (pixels[0].permute(1, 2, 3, 0).double().numpy() + 1) * 127.5


@dataclass
class Clip:
    published: list[np.ndarray]  # uint8 [n, H, W, 3] of each segment
    scene: list[np.ndarray]  # float64, alike
    drift: DriftRecord
    colours: SegmentColours

    def error(self, segment: int) -> float:
        """Delta E of the mean of a segment's frames behind the ramp against the scene's, in blocks of 8x8 pixels.

        Single pixels of a still picture differ by 0.3 delta E where levels are rounded.
        """
        found, expected = (clip[segment][RAMP_FRAMES:].mean(axis=0) for clip in (self.published, self.scene))
        return delta_e(*(reduce_picture(picture, WIDTH * HEIGHT // 64) for picture in (found, expected)))


def delta_e(one: np.ndarray, other: np.ndarray) -> float:
    return float(np.linalg.norm(rgb2lab(one / 255) - rgb2lab(other / 255), axis=-1).mean())


def decode(
    scene: Scene,
    colour: str,
    *,
    gain: np.ndarray = GAIN,
    offset: np.ndarray = OFFSET,
    overlap: int = 1,
    noise: float = 0.0,
    replace: bool = False,
    segments: int = SEGMENTS,
    between: Callable[[SegmentColours, int, torch.Tensor], SegmentColours] = lambda colours, done, tail: colours,
) -> Clip:
    """A clip of `segments` windows that drift. `between`: called after each segment, with the next one's beginning."""
    chance = np.random.default_rng(0)
    colours = SegmentColours(colour, segments, replace=replace)
    clip = Clip([], [], DriftRecord(colour="off", against="first segment", segments=[]), colours)
    began: torch.Tensor | None = None
    for index in range(segments):
        first = index * (WINDOW - overlap)
        shown = np.stack([scene.frame(first + i) for i in range(WINDOW)])
        drawn = shown + chance.normal(0, noise, shown.shape) if noise else shown.copy()
        if began is not None:
            seen, there = to_levels(began), shown[:overlap]
            for c in range(3):  # the colours that the window continues, and its own drift
                slope, intercept = np.polyfit(there[..., c].ravel(), seen[..., c].ravel(), 1)
                drawn[..., c] = (drawn[..., c] * slope + intercept) * gain[c] + offset[c]
        elif replace:
            drawn = drawn * gain + offset
        new = slice(overlap if began is not None else 0, None)
        frames = np.clip(np.rint(drawn[new]), 0, 255).astype(np.uint8)
        pixels, truth = to_pixels(drawn), None
        if replace:
            span = range(first + (new.start or 0), first + WINDOW)
            truth = TrueBackground(np.rint(shown[new]).clip(0, 255).astype(np.uint8), scene.mask(span))
        again = None if began is None else pixels[:, :, :overlap]
        tail = colours.finish(frames, pixels[:, :, -overlap:].clone(), began, again, truth)
        clip.published.append(frames)
        clip.scene.append(shown[new])
        began = tail
        colours = between(colours, index + 1, tail)
    assert colours.drift is not None
    clip.drift, clip.colours = colours.drift, colours
    return clip


FIGURES = {"none": 0.0, "small": 0.15, "60 % of the picture": 0.775}  # the square's side of the picture's


@pytest.mark.parametrize("figure", FIGURES.values(), ids=FIGURES)
@pytest.mark.parametrize("colour", ["seam", "anchor"])
def test_drift_is_taken_out(colour, figure):
    clip = decode(Scene(textured(), figure), colour)
    errors = [clip.error(index) for index in range(SEGMENTS)]
    assert max(errors) < RECOVERED, errors
    assert decode(Scene(textured(), figure), "off", segments=6).error(5) > 3  # it would be seen


@pytest.mark.parametrize("overlap", [1, 5])
def test_noise_does_not_bend_the_colours(overlap):
    for colour, limit in (("anchor", RECOVERED), ("seam", 2 * RECOVERED)):  # of a seam's fits the errors add up
        clip = decode(Scene(textured()), colour, overlap=overlap, noise=0.6)  # reduced, 3 levels at 480x832
        assert clip.error(SEGMENTS - 1) < limit, colour


@pytest.mark.parametrize("background", [textured, plain])
@pytest.mark.parametrize("colour", ["seam", "anchor"])
def test_without_drift_nothing_changes(colour, background):
    clip = decode(Scene(background()), colour, gain=np.ones(3), offset=np.zeros(3), noise=0.4)
    off = decode(Scene(background()), "off", gain=np.ones(3), offset=np.zeros(3), noise=0.4)
    for one, other in zip(clip.published, off.published, strict=True):
        assert delta_e(one.mean(axis=0), other.mean(axis=0)) < UNCHANGED
    assert clip.drift.warnings == off.drift.warnings == []


def test_a_plain_background_gets_its_colour_back():
    clip = decode(Scene(plain()), "anchor")
    room = (slice(None), slice(0, 4), slice(0, 4))  # a corner that the figure leaves soon
    last = np.median(clip.published[-1][room], axis=(0, 1, 2))
    assert delta_e(last, np.array([120.0, 130.0, 150.0])) < RECOVERED


def test_off_measures_and_changes_nothing():
    clip, tails = decode(Scene(textured()), "off", segments=4), []

    def between(colours: SegmentColours, done: int, tail: torch.Tensor) -> SegmentColours:
        tails.append(tail)
        return colours

    again = decode(Scene(textured()), "off", segments=4, between=between)
    scene = Scene(textured())
    first = np.rint(np.stack([scene.frame(i) for i in range(WINDOW)])).clip(0, 255).astype(np.uint8)
    assert np.array_equal(clip.published[0], first)
    assert torch.equal(tails[0], to_pixels(scene.frame(WINDOW - 1)[None]))
    second, third = again.drift.segments[1:3]
    for change in (second.overlap, second.joint, second.still):
        assert np.allclose(change.gain, GAIN, atol=0.004)
        assert np.allclose(change.offset, OFFSET, atol=0.4)
    assert np.allclose(third.still.gain, GAIN**2, atol=0.006)
    assert np.allclose(third.joint.gain, GAIN, atol=0.004)
    assert third.still.delta_e == third.remaining > 1.8 * second.still.delta_e
    assert all(one.correction is None for one in again.drift.segments)
    assert again.drift.segments[0].overlap is again.drift.segments[0].still is None


def test_a_tail_that_is_not_corrected_comes_back_itself():
    colours, tail = SegmentColours("off", 3, replace=False), torch.zeros(1, 3, 1, 16, 16)
    assert colours.finish(np.zeros((5, 16, 16, 3), np.uint8), tail) is tail


def test_published_frames_have_no_step_at_a_joint():
    """The mean colour of the room changes by no more than a ramp's step from frame to frame, and by less at a joint."""
    scene = Scene(textured(), figure=0.2)
    room = np.s_[:, :8, :8]
    for colour, limit in (("anchor", 0.35), ("seam", 0.25)):
        clip = decode(scene, colour, gain=1 + 2 * (GAIN - 1), segments=5)
        frames = np.concatenate(clip.published)
        covered = np.concatenate([scene.mask(range(len(frames)))])[room].any(axis=(1, 2))
        means = rgb2lab(frames[room].mean(axis=(1, 2)) / 255)
        steps = np.linalg.norm(np.diff(means, axis=0), axis=1)[~(covered[1:] | covered[:-1])]
        assert len(steps) > 20
        assert steps.max() < limit, colour
    jumps = decode(scene, "off", gain=1 + 2 * (GAIN - 1), segments=2).published
    assert delta_e(jumps[0][-1, :4, :4], jumps[1][0, :4, :4]) > 1


def test_the_ramp_goes_from_the_joint_to_the_anchor():
    start, end = Correction((1.02, 1, 1), (2, 0, 0)), Correction((0.98, 1, 1.08), (0, 4, 0))
    gains, offsets = ramp(start, end, 20)
    assert gains.shape == offsets.shape == (20, 3)
    steps = np.diff(np.vstack([start.gain, gains])[:, 0])
    assert np.allclose(steps, [-0.04 / RAMP_FRAMES] * RAMP_FRAMES + [0] * (20 - RAMP_FRAMES))
    assert np.allclose(gains[RAMP_FRAMES - 1 :], end.gain)
    assert np.allclose(offsets[RAMP_FRAMES - 1 :], end.offset)
    assert np.allclose(ramp(start, end, 3)[1][-1], end.offset)  # a short segment gets there too


def test_with_too_little_that_is_still_the_overlap_corrects():
    scene = Scene(textured(), scrolls=3)
    clip = decode(scene, "anchor")
    assert {one.correction.method for one in clip.drift.segments[1:]} == {"seam"}
    assert all(one.share < 0.05 and one.still is None and one.joint is None for one in clip.drift.segments[1:])
    assert max(clip.error(index) for index in range(SEGMENTS)) < RECOVERED


def test_other_content_is_no_drift():
    chance = np.random.default_rng(0)
    one, other = chance.uniform(20, 230, (2, 4000, 3))
    assert fit_correction(one, other) is None
    assert fit_correction(one, one) == Correction()


@pytest.mark.parametrize("scrolls", [0, 2])
def test_in_replace_the_driving_video_outside_the_mask_is_the_truth(scrolls):
    """Also where the camera moves, and from the first segment on: its colours need not be right either."""
    scene = Scene(textured(), figure=0.5, scrolls=scrolls)
    clip = decode(scene, "anchor", replace=True)
    assert max(clip.error(index) for index in range(SEGMENTS)) < RECOVERED
    assert clip.drift.against == "driving video"
    first = clip.drift.segments[0]
    assert first.correction.method == "anchor"
    assert np.allclose(first.still.gain, GAIN, atol=0.004)
    assert 0.4 < first.share < 0.75
    off = decode(scene, "off", replace=True, segments=2)
    assert off.error(0) > 1
    assert off.drift.segments[0].correction is None


def test_in_replace_a_mask_over_everything_leaves_the_seam():
    clip = decode(Scene(textured(), figure=0.99), "anchor", replace=True, segments=3)
    assert all(one.still is None for one in clip.drift.segments)
    assert {one.correction.method for one in clip.drift.segments if one.correction} == {"seam"}


def test_a_job_of_one_segment_is_measured_only_where_there_is_a_truth():
    assert SegmentColours("anchor", 1, replace=False).drift is None
    assert SegmentColours("off", 1, replace=True).drift is None
    clip = decode(Scene(textured()), "anchor", replace=True, segments=1)
    assert len(clip.drift.segments) == 1
    assert clip.error(0) < RECOVERED


# -- limits and arithmetic --------------------------------------------------------------------------------------------

triples = st.tuples(*[st.floats(0.7, 1.4)] * 3)
shifts = st.tuples(*[st.floats(-40, 40)] * 3)


@settings(max_examples=30, deadline=None)
@given(gain=triples, offset=shifts, seed=st.integers(0, 99))
def test_corrections_stay_within_their_limits_and_never_make_it_worse(gain, offset, seed):
    expected = np.random.default_rng(seed).uniform(60, 180, (500, 3))
    found = np.clip(expected * gain + offset, 0, 255)
    correction = fit_correction(found, expected)
    assert correction is not None
    assert all(GAIN_LIMITS[0] <= value <= GAIN_LIMITS[1] for value in correction.gain)
    assert all(abs(value) <= OFFSET_LIMIT + 1e-3 for value in correction.offset)
    corrected = np.clip(found * correction.gain + correction.offset, 0, 255)
    before, after = (np.square(np.minimum(np.abs(side - expected), 10)).mean(axis=0) for side in (found, corrected))
    assert (after <= before + 1e-9).all()


@settings(max_examples=30, deadline=None)
@given(
    gain=st.tuples(*[st.floats(0.9, 1.1)] * 3),
    offset=st.tuples(*[st.floats(-10.2, 10.2)] * 3),
    dtype=st.sampled_from([torch.float32, torch.bfloat16]),
)
def test_bytes_and_floats_get_the_same_correction(gain, offset, dtype):
    levels = np.random.default_rng(1).integers(0, 256, (3, 8, 8, 3), np.uint8)
    gains, offsets = ramp(Correction(), Correction(gain, offset), 3)
    frames = levels.copy()
    correct_frames(frames, gains, offsets)
    exact = np.clip(levels * gains[:, None, None] + offsets[:, None, None], 0, 255)
    assert np.array_equal(frames, np.rint(exact))
    pixels = to_pixels(levels.astype(float)).to(dtype)
    corrected = correct_pixels(pixels, gains, offsets)
    assert (corrected.dtype, corrected.stride()) == (dtype, pixels.stride())
    assert np.abs(to_levels(corrected) - exact).max() < (0.01 if dtype is torch.float32 else 1.5)


def test_all_black_and_one_frame_are_measured_without_a_number_that_is_none():
    colours = SegmentColours("anchor", 3, replace=False)
    tail = torch.full((1, 3, 1, 16, 16), -1.0)
    for began in (None, tail, tail):
        tail = colours.finish(np.zeros((1, 16, 16, 3), np.uint8), tail, began, began)
    json.dumps(colours.drift.model_dump(mode="json"), allow_nan=False)
    broken = torch.full_like(tail, float("nan"))
    colours.finish(np.zeros((1, 16, 16, 3), np.uint8), tail, tail, broken)
    assert colours.drift.segments[-1].overlap is None


# -- resuming ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("replace", [False, True])
def test_a_restored_state_goes_on_with_the_same_bits(replace):
    whole = decode(Scene(textured()), "anchor", noise=1.0, replace=replace, segments=5)
    sizes = []

    def save_and_load(colours: SegmentColours, done: int, tail: torch.Tensor) -> SegmentColours:
        own = ResumePoint(done, {"previous": np.zeros(3, np.uint8)}, {"dtype": "float32"})
        point = colours.add_state(own)
        sizes.append(sum(array.nbytes for array in point.arrays.values()))
        loaded = ResumePoint(done, dict(point.arrays), json.loads(json.dumps(point.values)))
        assert without_colours(loaded) == own
        if done == 5:
            assert set(point.arrays) == {"previous"}
            assert point.drift == colours.drift
            return colours
        fresh = SegmentColours("anchor", 5, replace=replace)
        fresh.restore(loaded)
        return fresh

    again = decode(Scene(textured()), "anchor", noise=1.0, replace=replace, segments=5, between=save_and_load)
    assert all(np.array_equal(a, b) for a, b in zip(whole.published, again.published, strict=True))
    assert whole.drift == again.drift
    assert len(set(sizes[:-1])) == 1  # it does not grow


def test_a_damaged_state_is_refused():
    colours = SegmentColours("anchor", 3, replace=False)
    colours.finish(np.zeros((4, 16, 16, 3), np.uint8), torch.zeros(1, 3, 1, 16, 16))
    point = colours.add_state(ResumePoint(1, {}, {}))
    for damaged in (
        ResumePoint(1, {}, point.values),
        ResumePoint(1, point.arrays, {}),
        ResumePoint(2, point.arrays, point.values),
        ResumePoint(1, {**point.arrays, "colour.mean": np.zeros(3, np.float32)}, point.values),
    ):
        with pytest.raises(InternalError, match="colours cannot be read"):
            SegmentColours("anchor", 3, replace=False).restore(damaged)
    SegmentColours("anchor", 3, replace=False).restore(point)

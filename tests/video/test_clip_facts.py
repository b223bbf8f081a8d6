"""Clip facts: of videos made so that each fact is known, and of the real clip."""

from __future__ import annotations

from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest

from runner.video import VideoReader, sample_by_time
from runner.video.clip_facts import ClipFacts, blur_effect, measure_clip
from tests.video.test_cuts import scene
from tests.video_files import make_clip, make_vfr, tone

CODED = {"crf": "14", "preset": "veryfast"}
SIZE = (128, 96)


def facts(path: Path) -> ClipFacts:
    with VideoReader(path) as reader:
        return measure_clip(reader)


def filmed(path: Path, pictures: list[np.ndarray], fps: int | Fraction = 24, **more) -> ClipFacts:
    height, width = pictures[0].shape[:2]
    return facts(make_clip(path, len(pictures), fps, size=(width, height), options=CODED, pixels=pictures, **more))


def moving(count: int, seed: int = 1) -> list[np.ndarray]:
    """Pictures that all differ: shapes that move by two pixels a picture."""
    return [scene(seed, shift=2 * i) for i in range(count)]


def test_size_length_and_sound_are_as_made(tmp_path):
    found = filmed(tmp_path / "a.mp4", moving(30), 25, rotation=90, audio=tone(1.2))
    info = found.info
    assert (info.width, info.height, info.frames, info.has_audio) == (96, 128, 30, True)
    assert info.rotation in (90, 270)
    assert (info.fps, found.measured_fps) == (25, pytest.approx(25))
    assert info.duration_s == pytest.approx(1.2)
    assert not found.variable and not found.cuts and not found.still
    assert (found.repeated_frames, found.repeats) == (0, None)


def test_a_variable_rate_is_seen_and_rounded_stamps_are_none(tmp_path):
    found = facts(make_vfr(tmp_path / "v.mkv", [0, 33, 67, 133, 167, 200], container="matroska"))
    assert found.variable
    assert (found.shortest_s, found.longest_s) == (pytest.approx(0.033, abs=1e-3), pytest.approx(0.066, abs=1e-3))
    rounded = facts(make_vfr(tmp_path / "c.mkv", [0, 33, 67, 100, 133, 167, 200], container="matroska"))
    assert not rounded.variable


def test_cuts_are_found_where_the_scene_changes(tmp_path):
    found = filmed(tmp_path / "cut.mp4", moving(20) + moving(15, seed=2) + moving(15, seed=3), 24)
    assert [cut.frame for cut in found.cuts] == [20, 35]
    assert [cut.seconds for cut in found.cuts] == [pytest.approx(20 / 24), pytest.approx(35 / 24)]


def test_a_flash_and_a_slow_fade_are_no_cuts(tmp_path):
    white = [np.full((96, 128, 3), 255, np.uint8)]
    assert filmed(tmp_path / "flash.mp4", moving(12) + white + moving(24)[13:]).cuts == ()
    fade = [(scene(1) * t).astype(np.uint8) for t in np.linspace(1, 0, 24)]
    assert filmed(tmp_path / "fade.mp4", moving(12)[::-1] + fade).cuts == ()
    # Between two scenes a white frame is one cut, not two.
    assert [cut.frame for cut in filmed(tmp_path / "two.mp4", moving(12) + white + moving(12, seed=2)).cuts] == [12]


@pytest.mark.parametrize(
    ("stored", "made", "fps"), [(30, 15, "15"), (30, 10, "10"), (30, 24, "24"), (25, 24, "24"), (60, 25, "25")]
)
def test_the_rate_at_which_a_video_was_made_is_found(tmp_path, stored, made, fps):
    """Stored at another rate by repeating frames, as a player would."""
    pictures = moving(8 * made)
    shown = sample_by_time(np.arange(8 * made) / made, 8.0, Fraction(stored))
    found = filmed(tmp_path / "r.mp4", [pictures[i] for i in shown], stored)
    assert found.repeats is not None
    assert found.repeats.fps == Fraction(fps)
    assert found.repeats.frames_a_picture == pytest.approx(stored / made, rel=0.02)
    assert found.repeated_frames == 8 * (stored - made)
    with VideoReader(tmp_path / "r.mp4") as reader:
        chosen = shown[reader.sample(found.repeats.fps, found.repeats.start_s).indices]
    inner = set(range(1, 8 * made - 1))  # the first and the last picture may be cut off
    assert found.repeats.covered == pytest.approx(len(inner & set(chosen.tolist())) / len(inner))
    assert found.repeats.covered >= 0.97
    assert (found.repeats.start_s > 0) == bool(stored % made)


@pytest.mark.parametrize("seed", [3, 4])
@pytest.mark.parametrize("share", [0.05, 0.2])
def test_frames_that_repeat_without_a_rule_are_counted_and_no_more(tmp_path, seed, share):
    rng = np.random.default_rng(seed)
    shown = np.repeat(np.arange(120), np.where(rng.random(120) < share, 2, 1))
    pictures = moving(120)
    found = filmed(tmp_path / "drops.mp4", [pictures[i] for i in shown], 30)
    assert (found.repeated_frames, found.repeats) == (len(shown) - 120, None)


def test_a_picture_that_stands_still_is_named_and_a_fade_is_none(tmp_path):
    pictures = moving(24)
    found = filmed(tmp_path / "s.mp4", [*pictures[:12], *[pictures[12]] * 36, *pictures[13:]], 24)
    (span,) = found.still
    assert (span.begin_s, span.end_s) == (pytest.approx(12 / 24), pytest.approx(48 / 24))
    assert found.repeats is None
    # A fade of two levels a frame moves no two neighbours apart, and the picture does not stand still.
    fade = [(scene(1) * t).astype(np.uint8) for t in np.linspace(1, 0, 120)]
    assert filmed(tmp_path / "f.mp4", fade).still == ()


def test_blur_is_the_measure_of_scikit_image():
    measure = pytest.importorskip("skimage.measure")
    cv2 = pytest.importorskip("cv2")
    for sigma in (0, 1.5, 4):
        picture = scene(7) if not sigma else cv2.GaussianBlur(scene(7), (0, 0), sigma)
        luma = cv2.cvtColor(picture, cv2.COLOR_RGB2GRAY).astype(np.float64)
        assert blur_effect(picture) == pytest.approx(measure.blur_effect(luma, h_size=11), abs=1e-3)
    assert blur_effect(np.full((64, 64, 3), 90, np.uint8)) == 1.0


def test_on_film_the_real_clip_and_what_was_made_of_it(tmp_path, real_data):
    cv2 = pytest.importorskip("cv2")
    with VideoReader(real_data / "man_480x480_30fps_110f.mp4") as film:
        whole = measure_clip(film)
        man = list(film.read(np.arange(0, 60, 2)))
    assert (whole.info.frames, whole.info.fps, whole.measured_fps) == (110, 30, pytest.approx(30))
    assert (whole.cuts, whole.repeated_frames, whole.repeats, whole.still, whole.variable) == ((), 0, None, (), False)
    twice = filmed(tmp_path / "twice.mp4", [frame for frame in man for _ in range(2)], 30)
    assert twice.repeats is not None and twice.repeats.fps == 15
    assert (twice.repeats.covered, twice.repeated_frames) == (1.0, 30)
    soft = filmed(tmp_path / "soft.mp4", [cv2.GaussianBlur(frame, (0, 0), 3) for frame in man[:6]], 15)
    assert whole.blur < 0.5
    assert soft.blur > 0.7


def test_memory_is_that_of_a_window_and_progress_is_told(tmp_path):
    path = make_clip(tmp_path / "big.mp4", 12, 30, size=(1920, 1080))
    windows: list[int] = []
    with VideoReader(path) as reader:
        sizes: list[int] = []
        read = reader.read
        reader.read = lambda indices: sizes.append(len(indices)) or read(indices)  # type: ignore[method-assign]
        measure_clip(reader, windows.append)
    assert max(sizes) * 1920 * 1080 * 3 <= 32 << 20
    assert windows[-1] == 12 and len(windows) == len(sizes)

"""The sheet of an inspection: which moments it shows, whose box is where, and that labels can be read."""

from __future__ import annotations

from itertools import combinations
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from runner.preprocess.body.people_found import NumberedPerson, PeopleFound
from runner.preprocess.networks.yolov10 import Box
from runner.records.inspection import CutRecord
from runner.verbs.inspection_sheet import choose_moments, draw_inspection_sheet, facts_line, measures, person_colour
from runner.video import VideoReader
from tests.records.test_inspection import make_inspection, make_person, make_video
from tests.video_files import make_clip

GREY = 128


def test_choose_moments_spreads_moments_and_prefers_most_people():
    looks = list(range(0, 100, 3))
    counts = [2 if look in (6, 33, 72) else 1 for look in looks]
    found = choose_moments(100, looks, counts, [], 10)
    frames = [moment.frame for moment in found]
    assert len(frames) == 10 and frames == sorted(set(frames))
    assert {6, 33, 72} <= set(frames) <= set(looks)
    assert max(np.diff(frames)) <= 21
    assert not any(moment.after_cut for moment in found)


def test_choose_moments_shows_both_sides_of_cut_and_marks_later_one():
    looks = list(range(0, 100, 4))
    found = choose_moments(100, looks, [1] * 25, [50, 77], 10)
    by_frame = {moment.frame: moment.after_cut for moment in found}
    assert (by_frame[48], by_frame[52]) == (False, True)
    assert (by_frame[76], by_frame[80]) == (False, True)
    assert len(found) == 10
    without = {moment.frame: moment.after_cut for moment in choose_moments(100, [], [], [50], 10)}
    assert (without[49], without[50]) == (False, True)


@pytest.mark.parametrize(("frames", "cuts"), [(2, []), (3, [1, 2]), (7, [3])])
def test_choose_moments_of_short_video_takes_all_frames(frames, cuts):
    found = [moment.frame for moment in choose_moments(frames, [], [], cuts, 10)]
    assert found == sorted(set(found))
    assert set(found) <= set(range(frames))
    assert len(found) == frames


def test_person_colours_differ_also_for_colour_blind():
    """They differ by luminance or by hue, also for an eye that does not tell red from green."""
    colours = [np.array(person_colour(number), float) for number in range(1, 8)]
    for one, other in combinations(colours, 2):
        assert np.abs(one - other).max() > 50
    confused = np.array([[0.625, 0.375, 0], [0.7, 0.3, 0], [0, 0.3, 0.7]])  # deuteranopia, a common approximation
    for one, other in combinations(colours[:4], 2):
        assert np.abs(confused @ one - confused @ other).max() > 35
    assert person_colour(8) == person_colour(1)


def person(number: int, box: Box, looks=tuple(range(0, 40, 4))) -> NumberedPerson:
    return NumberedPerson(number, looks, (box,) * len(looks), 1.0, 0.0, 1.0)


@pytest.fixture
def grey(tmp_path) -> Path:
    pixels = [np.full((240, 320, 3), GREY, np.uint8)] * 40
    return make_clip(tmp_path / "grey.mp4", 40, 25, size=(320, 240), pixels=pixels)


def count(sheet: np.ndarray, colour: tuple[int, int, int]) -> int:
    return int((sheet == np.array(colour)).all(-1).sum())


def test_inspection_sheet_has_box_colour_and_row_per_person(grey, tmp_path):
    boxes = [Box(20, 30, 110, 230, 0.9), Box(150, 60, 220, 230, 0.9), Box(240, 90, 318, 230, 0.9)]
    found = PeopleFound(
        tuple(person(n, box) for n, box in enumerate(boxes, 1)), (320, 240), tuple(range(0, 40, 4)), 0.16
    )
    video = make_video(frames=40, duration_s=1.6, width=320, height=240, cuts=[CutRecord(frame=20, at_s=0.8)])
    inspection = make_inspection(video=video, people=[make_person(n) for n in (1, 2, 3)])
    with VideoReader(grey) as reader:
        size = draw_inspection_sheet(reader, inspection, found, tmp_path / "deep" / "s.png")
        draw_inspection_sheet(reader, inspection, None, tmp_path / "without.png")
    image = Image.open(tmp_path / "deep" / "s.png")
    assert image.size == size and image.width == 1240 and image.height < 1400
    sheet, without = np.asarray(image), np.asarray(Image.open(tmp_path / "without.png"))
    scale = ((1200 + 10) // 4 - 10) / 320
    for number, box in enumerate(boxes, 1):
        around = 2 * scale * (box.x2 - box.x1 + box.height)
        pixels = count(sheet, person_colour(number)) - count(without, person_colour(number))
        assert 10 * 2 * around < pixels < 10 * 4.5 * around + 10 * 800  # lines of 3 pixels, and labels, ten times
    assert count(sheet, (185, 28, 28)) > 100  # the cut is marked


@pytest.mark.parametrize("size", [(32, 24), (1920, 1080)])
@pytest.mark.parametrize("box", [Box(0, 0, 1, 1, 0.9), Box(0.9, 0.9, 1, 1, 0.9), Box(0.3, 0.2, 0.6, 0.9, 0.9)])
def test_inspection_sheet_label_is_whole_at_any_video_size_and_box(tmp_path, size, box):
    """The label is drawn at the scale of the sheet, and is whole in every corner."""
    width, height = size
    clip = make_clip(tmp_path / "c.mp4", 2, 25, size=size, pixels=[np.full((height, width, 3), GREY, np.uint8)] * 2)
    placed = Box(box.x1 * width, box.y1 * height, box.x2 * width, box.y2 * height, 0.9)
    found = PeopleFound((person(12, placed, (0, 1)),), size, (0, 1), 0.04)
    video = make_video(frames=2, duration_s=0.08, width=width, height=height)
    with VideoReader(clip) as reader:
        draw_inspection_sheet(reader, make_inspection(video=video, people=[]), found, tmp_path / "s.png")
    sheet = np.asarray(Image.open(tmp_path / "s.png"))
    colour = (sheet == np.array(person_colour(12))).all(-1)
    # A row of the label's background is wider than the two lines of the box.
    rows = [row for row in colour if row.sum() >= 16]
    assert len(rows) >= 10


def test_facts_line_and_measures_show_unknown_values_as_dash():
    line = facts_line(make_inspection(video=make_video(cuts=[CutRecord(frame=5, at_s=0.2)], rotation_degrees=90)))
    assert line == "640x480 · 250 frames in 10.00 s · 25 fps · rotated by 90° · 1 cut · blur 0.30 · sound"
    unknown = measures(
        make_person(face_px=None, sharpness=None, hands_inside=None, fingers_seen=None, feet_inside=None)
    )
    assert [text for text in unknown.values() if text == "-"] == ["-"] * 5
    assert measures(make_person())["hands inside"] == "100%"

"""Numbers of people whose ways are known: their order, who gets none, and that a part of the video changes nothing."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from runner.preprocess.body.people_found import choose_numbered, number_people
from runner.preprocess.body.track import choose_subject, follow
from runner.preprocess.networks.yolov10 import Box
from tests.preprocess.body.test_track import person

SIZE = (1280, 720)


def numbered(seen, fps=30, every=3):
    """Looks at every third frame of 30 a second: `seen[frame]` are the boxes of all frames."""
    looks = list(range(0, len(seen), every))
    return number_people([seen[frame] for frame in looks], looks, np.array(looks) / fps, SIZE)


def test_one_is_whom_largest_follows_and_the_others_come_by_area():
    small, tall, wide = person(200, height=200), person(600, height=500), person(1000, width=130, height=300)
    seen = [[small, wide] + ([tall] if i >= 30 else []) for i in range(90)]
    found = numbered(seen)
    assert [p.boxes[0] for p in found.people] == [tall, wide, small]
    assert [p.number for p in found.people] == [1, 2, 3]
    times = np.arange(90) / 30
    assert choose_subject(follow(seen, times), "largest", SIZE, times).boxes[0] == tall
    first = found.people[0]
    assert first.looks == tuple(range(30, 90, 3))
    assert (first.begin_s, first.end_s) == (1.0, 2.9)
    assert first.seconds == pytest.approx(2.0)
    assert (found.looks[:3], found.look_s) == ((0, 3, 6), pytest.approx(0.1))


def test_neither_a_glimpse_nor_a_second_box_on_a_body_has_a_number():
    """Two of five hundred looks show a mistake; now and then the man's upper body or head has a box of its own."""
    man, mistake = person(400), person(1000, height=380)
    upper, head = Box(man.x1, man.y1, man.x2, man.y1 + 170, 0.9), Box(380, man.y1, 420, man.y1 + 60, 0.4)
    seen = [[man] + [upper] * (i % 9 < 4) + [head] * (i % 30 < 15) + [mistake] * (300 <= i < 306) for i in range(600)]
    assert [p.boxes[0] for p in numbered(seen).people] == [man]
    assert numbered([[], [], []]).people == ()
    assert len(numbered([[man, mistake]] * 4).people) == 2  # in a video of two looks one is enough


def test_who_leaves_and_comes_back_keeps_the_number():
    stander, guest = person(1100, height=450), person(300, height=350)
    seen = [[stander] + ([guest] if i < 60 or i >= 150 else []) for i in range(240)]
    found = numbered(seen)
    assert len(found.people) == 2
    assert found.people[1].looks == (*range(0, 60, 3), *range(150, 240, 3))
    assert found.people[1].seconds == pytest.approx(5.0)
    assert found.box_at(found.people[1], 58) is None  # after the last look of theirs: it is not known
    assert found.box_at(found.people[1], 100) is None
    assert found.box_at(found.people[1], 151).x1 == pytest.approx(guest.x1)


def test_between_looks_a_box_lies_on_the_line():
    found = numbered([[person(300 + 2 * i)] for i in range(30)])
    assert found.box_at(found.people[0], 7).centre[0] == pytest.approx(314)


@settings(max_examples=40, deadline=None)
@given(
    speeds=st.tuples(*[st.floats(-60, 60)] * 3),
    begin=st.integers(0, 200),
    length=st.integers(2, 100),
    every=st.integers(1, 7),
    seed=st.integers(0, 1000),
)
def test_a_number_means_the_same_person_in_any_part_at_any_rate(speeds, begin, length, every, seed):
    """Three rows of people, who never touch; one comes after 3 s, one is away for 2 s; a tenth of boxes is missed."""
    rng = np.random.default_rng(seed)

    def shown(frame):
        t = frame / 30
        rows = [person(640 + speeds[k] * t, (130, 360, 590)[k], 60 + 20 * k, 200) for k in range(3)]
        there = [True, frame >= 90, not 120 <= frame < 180]
        return [rows[k] for k in range(3) if there[k] and rng.random() > 0.1]

    def row(box):
        return round((box.centre[1] - 130) / 230)

    found = numbered([shown(frame) for frame in range(240)])
    who = {p.number: {row(box) for box in p.boxes} for p in found.people}
    assert sorted(next(iter(rows)) for rows in who.values() if len(rows) == 1) == [0, 1, 2]
    frames = np.arange(begin, min(begin + length, 240), every)
    seen = [shown(frame) for frame in frames]
    ways = follow(seen, frames / 30)
    for number, rows in who.items():
        chosen = choose_numbered(ways, number, found, frames)
        if chosen is None:
            there = [frame for frame, boxes in zip(frames, seen, strict=True) if rows & {row(box) for box in boxes}]
            assert not any(found.box_at(found.people[number - 1], int(frame)) for frame in there)
        else:
            assert {row(box) for box in chosen.boxes} == rows


def test_of_two_who_cross_the_numbered_one_is_followed_by_more_looks_than_numbered_them():
    """They cross within a part; the part is looked at frame by frame."""
    ways = [(200 + 6 * i, 1000 - 6 * i) for i in range(120)]
    seen = [[person(a, height=420), person(b, height=380)] for a, b in ways]
    found = numbered(seen)
    frames = np.arange(40, 100)
    for number, column in ((1, 0), (2, 1)):
        chosen = choose_numbered(follow([seen[i] for i in frames], frames / 30), number, found, frames)
        assert [box.centre[0] for box in chosen.boxes] == [ways[i][column] for i in frames]

"""Following people whose ways are known: crossings, absences, double boxes, and whom `subject` means."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from runner.preprocess.body.track import choose_subject, follow, whereabouts
from runner.preprocess.networks.yolov10 import Box

SIZE = (1280, 720)


def person(x: float, y: float = 360, width: float = 120, height: float = 400) -> Box:
    return Box(x - width / 2, y - height / 2, x + width / 2, y + height / 2, 0.8)


def at(fps: float, n: int) -> np.ndarray:
    return np.arange(n) / fps


def xs(boxes) -> list[float]:
    return [box.centre[0] for box in boxes]


@pytest.mark.parametrize("fps", [8, 16, 30, 60])
@pytest.mark.parametrize("hidden", [False, True])
def test_two_who_cross_stay_themselves(fps, hidden):
    """One walks right, one left, 200 pixels a second each; `hidden`: who is behind is not seen where they overlap."""
    n = 4 * fps
    times = at(fps, n)
    right, left = 200 + 200 * times, 1050 - 200 * times
    seen = []
    for a, b in zip(right, left, strict=True):
        boxes = [person(a), person(b, height=370)]
        behind = hidden and abs(a - b) < 80
        seen.append(
            boxes[:1] if behind else boxes[:: (-1 if len(seen) % 2 else 1)]
        )  # the detector's order tells nothing
    people = follow(seen, times)
    assert len(people) == 2
    ways = {round(p.boxes[0].centre[0], -1): p for p in people}
    assert xs(ways[200].boxes) == pytest.approx([right[i] for i in ways[200].looks])
    assert xs(ways[1050].boxes) == pytest.approx([left[i] for i in ways[1050].looks])
    for start, way in ((200, right), (1050, left)):
        box = (start - 60.0, 160.0, start + 60.0, 560.0)
        subject = choose_subject(people, box, SIZE, times)
        found = whereabouts(subject, seen, np.arange(n), times)
        assert xs(found.boxes) == pytest.approx(way, abs=2)  # bridged in a straight line, which is how they walk
        assert found.unseen.sum() == found.bridged == (0 if start == 200 or not hidden else n - len(subject.looks))


@settings(max_examples=30, deadline=None)
@given(
    speeds=st.tuples(st.floats(-250, 250), st.floats(-250, 250)),
    seed=st.integers(0, 1000),
)
def test_people_apart_are_never_mixed_up_whatever_the_tremble(speeds, seed):
    """Two rows of the picture: boxes never touch; 3 % of the height of noise, a tenth of the boxes missed."""
    rng, times = np.random.default_rng(seed), at(16, 48)
    seen, truth = [], []
    for t in times:
        row = [(0, person(640 + speeds[0] * t, 180, 80, 240)), (1, person(640 + speeds[1] * t, 560, 80, 240))]
        row = [(who, b) for who, b in row if rng.random() > 0.1]
        rng.shuffle(row)
        noise = rng.normal(0, 7, 2)
        seen.append([Box(b.x1 + noise[0], b.y1 + noise[1], b.x2 + noise[0], b.y2 + noise[1], b.score) for _, b in row])
        truth.append([who for who, _ in row])
    for p in follow(seen, times):
        assert len({truth[look][seen[look].index(box)] for look, box in zip(p.looks, p.boxes, strict=True)}) == 1


def test_whom_subject_means():
    times = at(16, 32)
    big_left, small_middle, late = person(200, width=160, height=500), person(640, height=300), person(1100, height=520)
    seen = [[small_middle, big_left] + ([late] if i >= 24 else []) for i in range(32)]
    people = follow(seen, times)
    assert len(people) == 3
    assert choose_subject(people, "largest", SIZE, times).boxes[0] == big_left
    assert choose_subject(people, "centre", SIZE, times).boxes[0] == small_middle
    assert choose_subject(people, (560.0, 200.0, 700.0, 500.0), SIZE, times).boxes[0] == small_middle
    assert choose_subject(people, (1000.0, 100.0, 1200.0, 620.0), SIZE, times) is None  # not there at the beginning
    assert choose_subject([], "largest", SIZE, times) is None


def test_a_mistake_in_the_middle_does_not_win_the_centre():
    times = at(16, 32)
    seen = [[person(300)] + ([person(640)] if i == 9 else []) for i in range(32)]
    assert choose_subject(follow(seen, times), "centre", SIZE, times).boxes[0] == person(300)


def test_who_comes_back_is_the_same_unless_seen_beside_the_other():
    """Away for 3 s; then one of the same size comes in elsewhere. A bystander, there all the time, is never taken."""
    times = at(10, 80)
    stander = person(1100, height=350)
    seen = [[stander] + ([person(300)] if i < 25 else [person(600)] if i >= 55 else []) for i in range(80)]
    subject = choose_subject(follow(seen, times), (240.0, 160.0, 360.0, 560.0), SIZE, times)
    assert subject.looks == [*range(25), *range(55, 80)]
    found = whereabouts(subject, seen, np.arange(80), times)
    assert found.unseen.sum() == 30
    assert found.bridged == 0
    assert xs(found.boxes[25:40]) == [300] * 15  # held, each half by what is nearer in time
    assert xs(found.boxes[41:55]) == [600] * 14


def test_a_second_box_on_the_same_body_is_no_second_person():
    times = at(16, 32)
    whole = [person(400 + 5 * i) for i in range(32)]
    upper = [Box(b.x1, b.y1, b.x2, b.y1 + 160, 0.9) for b in whole]
    seen = [[upper[i]] if i > 20 else [upper[i], whole[i]] if i > 10 else [whole[i]] for i in range(32)]
    subject = choose_subject(follow(seen, times), "largest", SIZE, times)
    assert subject.looks == list(range(32))
    assert [subject.boxes[i] for i in range(21)] == whole[:21]


@pytest.mark.parametrize("speed", [300, 150, 60])  # pixels a second: he is away for 1, 2, 5 s
def test_a_second_box_on_who_hides_the_subject_is_not_the_subject(speed):
    """She walks by before him and hides him; meanwhile, for two looks, she gets a second box of about his height."""
    times = at(20, 160)
    him, hers = person(640, width=100, height=350), [person(280 + speed * t, width=250, height=420) for t in times]
    seen, middle = [], [i for i, her in enumerate(hers) if abs(her.centre[0] - 640) < 60]
    for i, her in enumerate(hers):
        boxes = [her] if abs(her.centre[0] - 640) < 150 else [her, him]
        if i in middle[-2:]:
            boxes.append(Box(her.x1, her.y1, her.x2 - 60, her.y1 + 240, 0.3))
        seen.append(boxes)
    subject = choose_subject(follow(seen, times), (590.0, 185.0, 690.0, 535.0), SIZE, times)
    assert subject.looks == [i for i, boxes in enumerate(seen) if him in boxes]
    assert set(subject.boxes) == {him}


def test_who_walks_before_a_larger_one_is_missed_and_found_again():
    """A child crosses before a grown-up, in whose box hers lies for a while, and is not seen at every third look."""
    times = at(20, 80)
    grown, child = person(640, width=240, height=500), [person(400 + 120 * t, 450, 60, 200) for t in times]
    seen = [[grown, child[i]] if i % 3 else [grown] for i in range(80)]
    subject = choose_subject(follow(seen, times), (370.0, 350.0, 430.0, 550.0), SIZE, times)
    assert subject.boxes == [child[i] for i in range(80) if i % 3]


def test_a_box_that_loses_the_legs_for_a_moment_is_bridged():
    times = at(30, 40)
    boxes = [person(300 + 2 * i) for i in range(40)]
    cut = dict(enumerate(boxes))
    for i in (17, 18):
        cut[i] = Box(boxes[i].x1, boxes[i].y1, boxes[i].x2, boxes[i].y1 + 180, 0.9)
    seen = [[cut[i]] for i in range(40)]
    subject = choose_subject(follow(seen, times), "largest", SIZE, times)
    found = whereabouts(subject, seen, np.arange(40), times)
    for got, true in zip(found.boxes, boxes, strict=True):
        assert (got.y1, got.y2, got.centre[0]) == pytest.approx((true.y1, true.y2, true.centre[0]))
    assert not found.unseen.any()


def test_between_looks_boxes_lie_on_the_line():
    frames, looks = at(16, 30), np.arange(0, 30, 8)
    seen = [[person(100 + 20 * look)] for look in looks]
    subject = choose_subject(follow(seen, frames[looks]), "largest", SIZE, frames[looks])
    found = whereabouts(subject, seen, looks, frames)
    assert xs(found.boxes[:25]) == pytest.approx(100 + 20 * np.arange(25))
    assert xs(found.boxes[25:]) == [580] * 5  # after the last look it is held
    assert (found.looked, found.found, found.unseen.sum()) == (4, 4, 0)


def test_someone_else_in_an_unseen_subjects_place_is_doubted():
    times = at(10, 60)
    stander, passer = person(600), [person(1200 - 20 * i, height=380) for i in range(60)]
    seen = [[passer[i]] if 25 <= i <= 35 else [stander, passer[i]] for i in range(60)]
    subject = choose_subject(follow(seen, times), (540.0, 160.0, 660.0, 560.0), SIZE, times)
    found = whereabouts(subject, seen, np.arange(60), times)
    assert xs(found.boxes) == [600] * 60
    # 84 of the passer's 120 columns, and more, are shared where they are no further than 84 apart
    assert np.flatnonzero(found.doubtful).tolist() == [i for i in range(25, 36) if abs(passer[i].centre[0] - 600) <= 84]

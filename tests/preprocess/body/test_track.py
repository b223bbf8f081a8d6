"""Following people whose ways are known: crossings, absences, double boxes, and whom `subject` means."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from runner.preprocess.body.track import Person, choose_subject, follow, only_body, whereabouts
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


def moved(box: Box, dx: float = 0, dy: float = 0) -> Box:
    return Box(box.x1 + dx, box.y1 + dy, box.x2 + dx, box.y2 + dy, box.score)


START = person(640)  # 120 x 400 pixels


def taken(*boxes: Box, start: Box = START) -> Box | None:
    """Which of the next look's boxes someone at `start` is followed to; all are within reach of one another."""
    first = follow([[start], boxes], np.array([0.0, 0.1]))[0]
    return first.boxes[1] if len(first.boxes) > 1 else None


def wider(factor: float) -> Box:
    """At the same place and as tall: 1 - 1 / factor away, as it overlaps by 1 / factor."""
    return person(640, width=120 * factor)


@pytest.mark.parametrize(
    ("box", "distance"),
    [
        # Sideways by 30 of 120 pixels: 90 of 150 columns overlap; 30 / 400 of the height away.
        (person(670), 1 - 90 / 150 + 30 / 400),
        # Of other height at the same place: half of the logarithm of the ratio beside the overlap.
        (person(640, height=480), 1 - 400 / 480 + 0.5 * np.log(480 / 400)),
        (person(640, height=400 / 1.2), 1 - 1 / 1.2 + 0.5 * np.log(1.2)),
        # The way between centres counts in heights of the taller of the two boxes.
        (Box(580, 160, 700, 660, 0.8), 1 - 400 / 500 + 50 / 500 + 0.5 * np.log(500 / 400)),
        (Box(580, 160, 700, 480, 0.8), 1 - 320 / 400 + 40 / 400 + 0.5 * np.log(400 / 320)),
    ],
    ids=["aside", "taller", "shorter", "taller and lower", "shorter and higher"],
)
def test_the_nearest_box_by_overlap_way_and_height(box, distance):
    """Between one box of the distance that is worked out here and one a little nearer or a little further."""
    nearer, further = wider(1 / (1 - (distance - 0.01))), wider(1 / (1 - (distance + 0.01)))
    assert taken(box, nearer) == nearer
    assert taken(box, further) == box


def test_someone_is_found_up_to_half_a_height_aside():
    """Boxes that do not touch are 1 and the way apart, and up to 1.5 it is the same person."""
    assert taken(moved(START, dx=195)) is not None
    assert taken(moved(START, dx=200)) is not None
    assert taken(moved(START, dx=205)) is None


def test_a_guess_follows_the_estimated_velocity_for_half_a_second():
    """Of a steady walk the estimate reaches 1 - exp(-t / 0.15 s) after t: worked out, not followed step by step."""
    walker = Person()
    walker.see(0, START, 5.0)  # there is no look before the first
    assert walker.expected(0.4) == START
    for i in range(1, 4):
        walker.see(i, moved(START, 20 * i, -30 * i), 0.1)  # 200 pixels a second to the right, 300 upwards
    share, last = 1 - np.exp(-0.3 / 0.15), moved(START, 60, -90)
    for seconds, lead in ((0.1, 0.1), (0.4, 0.4), (0.7, 0.5), (5.0, 0.5)):
        found, wanted = walker.expected(seconds), moved(last, 200 * share * lead, -300 * share * lead)
        assert (found.x1, found.y1, found.x2, found.y2) == pytest.approx((wanted.x1, wanted.y1, wanted.x2, wanted.y2))
    walker.see(4, moved(START, 500), 0.0)  # two looks at one instant tell nothing of a speed
    assert walker.expected(0.1) == moved(moved(START, 500), 200 * share * 0.1, -300 * share * 0.1)


@pytest.mark.parametrize(("away", "people"), [(12, 1), (13, 2)])
def test_someone_away_for_over_one_and_a_half_seconds_is_someone_new(away, people):
    seen = [[START], *[[]] * (away - 1), [START]]
    assert len(follow(seen, at(8, len(seen)))) == people


@pytest.mark.parametrize(("dx", "missed", "people"), [(40, 0, 2), (40, 1, 2), (44, 1, 3), (44, 0, 2)])
def test_within_anothers_box_only_who_is_expected_there(dx, missed, people):
    """Someone of 120 pixels' width before a wall of a person: 80 of 160 columns overlap where they move by 40, half."""
    wall = person(640, width=500, height=600)
    seen = [[START, wall], *[[wall]] * missed, [moved(START, dx), wall]]
    assert len(follow(seen, at(10, len(seen)))) == people


def test_the_centre_counts_in_both_directions():
    times = at(10, 10)
    # 100, 300 and 283 pixels from the middle of 1280 x 720.
    near, low, aside = person(640, y=260, height=200), person(640, y=660, height=100), person(440, y=560, height=150)
    for boxes in ([near, low], [near, aside], [aside, low], [low, aside]):
        subject = choose_subject(follow([boxes] * 10, times), "centre", SIZE, times)
        assert subject.boxes[0] == min(boxes, key=[near, aside, low].index)
    # 640 x 360 would be the middle of no other size.
    wide = choose_subject(follow([[person(900, height=300), near]] * 10, times), "centre", (1800, 520), times)
    assert wide.boxes[0] == person(900, height=300)


@pytest.mark.parametrize(("looks", "middle"), [(5, True), (4, False)])
def test_the_centre_is_of_people_seen_for_a_quarter_of_the_longest(looks, middle):
    seen = [[person(200)] + ([person(640)] if i < looks else []) for i in range(20)]
    subject = choose_subject(follow(seen, at(10, 20)), "centre", SIZE, at(10, 20))
    assert (subject.boxes[0] == person(640)) == middle


@pytest.mark.parametrize(("width", "found"), [(1210, False), (1190, True)])
def test_a_subjects_box_overlaps_by_more_than_a_tenth(width, found):
    times, box = at(10, 10), person(640, width=width)  # around 120 pixels: 9.9 % and 10.1 %
    subject = choose_subject(follow([[START]] * 10, times), (box.x1, box.y1, box.x2, box.y2), SIZE, times)
    assert (subject is not None) == found


@pytest.mark.parametrize(("first", "found"), [(8, True), (9, False)])
def test_a_subjects_box_is_of_the_first_second(first, found):
    """From when anyone is seen: someone stands elsewhere from the beginning."""
    seen = [[person(200)] + ([person(900)] if i >= first else []) for i in range(20)]
    subject = choose_subject(follow(seen, at(8, 20)), (840.0, 160.0, 960.0, 560.0), SIZE, at(8, 20))
    assert (subject is not None) == found


@pytest.mark.parametrize(("height", "same"), [(250, True), (248, False), (1000, True), (1004, False)])
def test_who_comes_back_is_of_a_like_height(height, same):
    """From two fifths of the median height to two and a half of it, here of 400 pixels or of 625 before."""
    before = 625 if height < 600 else 400
    seen = [
        [person(300, height=before)] if i < 10 else [person(900, height=height)] if i > 30 else [] for i in range(60)
    ]
    subject = choose_subject(follow(seen, at(10, 60)), (240.0, 200.0, 360.0, 500.0), SIZE, at(10, 60))
    assert (len(subject.looks) == 10 + 29) == same


@pytest.mark.parametrize(("inside", "one"), [(84, True), (80, False)])
def test_two_boxes_are_of_one_body_from_seven_tenths_on(inside, one):
    """The smaller box, 120 pixels wide, lies with `inside` of them in the larger."""
    large = person(640, width=300, height=500)
    small = moved(person(0), large.x2 + 60 - inside, 360)
    small = Box(small.x1, 160, small.x2, 560, 0.8)
    assert only_body([small, large]) == (large if one else None)
    # Followed, the smaller one that is seen for longer is completed by the larger one.
    seen = [[small, large] if i < 5 else [small] for i in range(30)]
    subject = choose_subject(follow(seen, at(10, 30)), (small.x1, small.y1, small.x2, small.y2), SIZE, at(10, 30))
    assert subject.boxes[:5] == [large if one else small] * 5
    assert subject.boxes[5:] == [small] * 25


def test_the_only_body_of_none_and_of_one():
    assert only_body([]) is None
    assert only_body([START]) == START


def test_looks_that_follow_each_other_are_joined_by_a_line_however_far_apart():
    frames, looks = at(10, 41), np.array([0, 20, 40])
    seen = [[person(200)], [person(300)], [person(400)]]
    subject = Person([0, 1, 2], [boxes[0] for boxes in seen])
    assert xs(whereabouts(subject, seen, looks, frames).boxes) == pytest.approx(200 + 5 * np.arange(41))


@pytest.mark.parametrize(("missed", "line"), [(7, True), (8, False)])
def test_misses_of_up_to_a_second_are_bridged(missed, line):
    """At 8 looks a second: from one sighting to the next, 8 looks are a second and 9 are more."""
    end = missed + 1
    subject = Person([0, end], [person(100), person(500)])
    found = whereabouts(subject, [[person(100)], *[[]] * missed, [person(500)]], np.arange(end + 1), at(8, end + 1))
    held = [100] * (end // 2 + 1) + [500] * (end - end // 2)
    assert xs(found.boxes) == pytest.approx(np.linspace(100, 500, end + 1) if line else held)
    assert found.bridged == (missed if line else 0)


def test_the_middle_of_a_long_miss_is_the_later_sightings():
    subject = Person([0, 10], [person(100), person(500)])
    found = whereabouts(subject, [[]] * 11, np.arange(11), at(8, 11))
    assert xs(found.boxes) == [100] * 5 + [500] * 6


@pytest.mark.parametrize(("height", "short", "cut"), [(255, 3, True), (265, 3, False), (255, 5, False), (255, 2, True)])
def test_a_box_is_cut_below_two_thirds_of_what_is_around_it(height, short, cut):
    """65 % of the median of seven looks, three on either side at 10 a second: of a body out of view for half a second
    most of them are short, and the boxes are believed.
    """
    boxes = [Box(580, 160, 700, 160 + (height if 12 <= i < 12 + short else 400), 0.9) for i in range(30)]
    found = whereabouts(Person([*range(30)], boxes), [[box] for box in boxes], np.arange(30), at(10, 30))
    assert [box.height for box in found.boxes] == pytest.approx([400] * 30 if cut else [box.height for box in boxes])


def test_cuts_are_not_looked_for_at_the_ends_and_among_few():
    for heights in ([200, 400, 400, 400, 400, 400], [400, 400, 400, 400, 400, 200], [400, 200, 400, 400]):
        boxes = [Box(580, 160, 700, 160 + height, 0.9) for height in heights]
        n = len(boxes)
        found = whereabouts(Person([*range(n)], boxes), [[box] for box in boxes], np.arange(n), at(10, n))
        assert [box.height for box in found.boxes] == heights

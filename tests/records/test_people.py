"""People: boxes in whole pixels of the output, small on disk, found by frame or by time."""

from __future__ import annotations

import json
from fractions import Fraction

import jsonschema
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from runner.records.people import People, make_people
from runner.records.record import schemas

NONE = [np.nan] * 4


def people(boxes: list, faces: list | None = None, size: tuple[int, int] = (480, 832), fps: str = "16") -> People:
    faces = faces or [NONE] * len(boxes)
    return make_people(np.array(boxes, float), np.array(faces, float), *size, Fraction(fps))


def test_boxes_grow_to_whole_pixels_and_stay_in_the_picture() -> None:
    made = people(
        [[1.2, 2.0, 10.1, 20.9], [-5, -3, 600, 900], NONE, [500, 0, 600, 100]], [[3.5, 3.5, 4, 4]] + [NONE] * 3
    )
    assert made.people[0].boxes == [(1, 2, 11, 21), (0, 0, 480, 832), None, None]
    assert made.people[0].faces == [(3, 3, 4, 4), None, None, None]
    assert [made.person(i) for i in range(4)] == [(1, 2, 11, 21), (0, 0, 480, 832), None, None]
    assert (made.face(0), made.face(1)) == ((3, 3, 4, 4), None)


def test_what_is_not_finite_is_no_box() -> None:
    made = people([[0, 0, np.inf, 5], [-np.inf, 0, 4, 5], [0, np.nan, 4, 5], [0, 0, 4, 5]])
    assert made.people[0].boxes == [None, None, None, (0, 0, 4, 5)]


def test_it_survives_the_round_trip_and_fits_its_schema() -> None:
    made = people([[1, 2, 10, 20], NONE], fps="30000/1001")
    data = made.to_json()
    assert People.parse(data) == made
    jsonschema.validate(json.loads(data), schemas()["people.v1.schema.json"])
    assert json.loads(data) == {
        "schema_version": 1,
        "width": 480,
        "height": 832,
        "fps": "30000/1001",
        "people": [{"number": 1, "boxes": [[1, 2, 10, 20], None], "faces": [None, None]}],
    }


@pytest.mark.parametrize(
    ("box", "size", "most"), [((111, 112, 470, 831), (480, 832), 36), ((1111, 1112, 1900, 1999), (2000, 2000), 44)]
)
def test_ten_thousand_frames_stay_small(box: tuple[int, ...], size: tuple[int, int], most: int) -> None:
    made = people([box] * 10_000, [box] * 10_000, size)
    assert len(made.to_json()) <= most * 10_000 + 200
    assert People.parse(made.to_json()).person(9_999) == box


def test_an_output_of_another_rate_has_the_entry_nearest_in_time() -> None:
    made = people([[i, 0, i + 1, 1] for i in range(5)])
    assert [made.person(i)[0] for i in range(5)] == [0, 1, 2, 3, 4]
    assert [made.person(i, Fraction(32))[0] for i in range(9)] == [0, 1, 1, 2, 2, 3, 3, 4, 4]  # a tie: the later one
    assert [made.person(i, Fraction(8))[0] for i in range(3)] == [0, 2, 4]
    assert made.person(40)[0] == made.person(9, Fraction(32))[0] == 4
    with pytest.raises(IndexError):
        made.person(-1)


@given(
    frames=st.integers(1, 40),
    rates=st.tuples(st.integers(1, 60), st.integers(1, 60)),
    thousandth=st.booleans(),
)
def test_the_entry_is_never_further_than_half_an_interval(
    frames: int, rates: tuple[int, int], thousandth: bool
) -> None:
    own, out = Fraction(rates[0]), Fraction(rates[1] * 1000, 1001 if thousandth else 1000)
    made = people([[i, 0, i + 1, 1] for i in range(frames)], fps=str(own))
    for frame in range(int(Fraction(frames - 1) / own * out) + 1):
        entry = made.person(frame, out)[0]
        assert abs(Fraction(entry) / own - frame / out) <= 1 / own / 2


def test_another_size_of_the_same_pictures() -> None:
    made = people([[1, 2, 10, 20], NONE], [[1, 2, 3, 4], NONE])
    assert made.resized(480, 832) is made
    twice = made.resized(960, 1664)
    assert (twice.width, twice.height, twice.fps) == (960, 1664, "16")
    assert (twice.person(0), twice.face(0), twice.person(1)) == ((2, 4, 20, 40), (2, 4, 6, 8), None)
    assert made.resized(240, 416).person(0) == (0, 1, 5, 10)


def test_no_people_at_all() -> None:
    made = People(width=4, height=4, fps="16", people=[])
    assert (made.frames, made.person(0), made.face(3)) == (0, None, None)


@pytest.mark.parametrize(
    "change",
    [
        {"schema_version": 2},
        {"width": 9},  # a box is outside
        {"fps": "0"},
        {"fps": "16/0"},
        {"people": [{"number": 1, "boxes": [[5, 2, 5, 20]], "faces": [None]}]},
        {"people": [{"number": 1, "boxes": [[1, 2, 3, 4]], "faces": []}]},
        {"people": [{"number": 1, "boxes": [[1, 2, 3]], "faces": [None]}]},
    ],
    ids=str,
)
def test_what_is_no_people_json_is_refused(change: dict) -> None:
    data = json.loads(people([[1, 2, 10, 20]]).to_json())
    with pytest.raises(ValueError):  # noqa: PT011
        People.parse(json.dumps(data | change).encode())
    with pytest.raises(ValueError):  # noqa: PT011
        People.parse(b"\xff{")

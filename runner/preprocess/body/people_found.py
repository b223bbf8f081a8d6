"""People found: the people of a driving video, numbered from 1, with where and when each of them was seen.

In:   the boxes of everybody at looks over a whole video. Out: `PeopleFound`, and which of the people in a part of the
video has a number. Never: pixels, networks.

Number 1 is the person that `subject: largest` follows over the whole video; the others follow by the area of their
boxes, summed over the looks. Numbers are decided on the whole video, so that they are the same for every part of it.
"""

from __future__ import annotations

import math
from bisect import bisect_left
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from runner.preprocess.body.track import BRIDGE_S, Person, between, follow, is_within, join_pieces
from runner.preprocess.networks.yolov10 import Box

__all__ = ["NumberedPerson", "PeopleFound", "choose_numbered", "count_people", "group_people", "number_people"]

LEAST_LOOKS = 5  # seen at fewer, a person is a passer-by or a mistake: half a second at ten looks a second
LEAST_SHARE_OF_LOOKS = 0.25  # enough in a video of a few looks
PART = 0.8  # share of a way's looks within one person's box, from which on it is a second box on that body
LONG_S = 1.0  # on screen for so long, or for LONG of the clip, and not less than TALL of the first person's height,
LONG = 0.25  # a second person may be the one who was meant
TALL = 0.3
CLAIM = 0.1  # mean overlap with a numbered person's box, from which on a way through the video may be theirs


@dataclass(frozen=True)
class NumberedPerson:
    """One person of a video. The measures are None where `find_people` has not made them."""

    number: int  # from 1
    looks: tuple[int, ...]  # frame numbers of the video, increasing: the looks at which they were seen
    boxes: tuple[Box, ...]  # one a look, pixels of the video
    seconds: float  # on screen: looks at which they were seen, times the seconds between looks
    begin_s: float  # the first look at which they were seen
    end_s: float  # the last one
    measured: tuple[int, ...] = ()  # frame numbers among `looks` at which they were posed; the measures are of these
    face_pixels: float | None = (
        None  # median of the longer side of the face's 68 points, pixels; None: no face was seen
    )
    sharpness: float | None = (
        None  # median variance of the Laplacian (grey 0…255) of the box at SHARPNESS_HEIGHT pixels
    )
    hands_inside: float | None = None  # share of `measured` at which both wrists are seen inside the picture, 0…1
    fingers_seen: float | None = None  # the same of more than half of the points of each hand
    feet_inside: float | None = None  # the same of two of the three points of each foot


@dataclass(frozen=True)
class PeopleFound:
    """Everybody in a video of whom more than a glimpse was seen."""

    people: tuple[NumberedPerson, ...]  # in order of their numbers; empty: no person was seen
    size: tuple[int, int]  # width and height of the video, pixels
    looks: tuple[int, ...]  # frame numbers at which the detector looked, increasing
    look_s: float  # usual seconds between two looks

    def box_at(self, person: NumberedPerson, frame: int) -> Box | None:
        """Where `person` is in any frame of the video: as seen, or on the line between two looks that saw them.

        None before the first and after the last look of theirs, and where they are away for more than BRIDGE_S.
        """
        after = bisect_left(person.looks, frame)
        if after == len(person.looks):
            return None
        b = person.looks[after]
        if b == frame:
            return person.boxes[after]
        if after == 0:
            return None
        a = person.looks[after - 1]
        missed = bisect_left(self.looks, b) - bisect_left(self.looks, a) - 1
        if missed and (missed + 1) * self.look_s > BRIDGE_S:
            return None
        return between(person.boxes[after - 1], person.boxes[after], (frame - a) / (b - a))


def number_people(
    seen: Sequence[Sequence[Box]], looks: Sequence[int], times_s: np.ndarray, size: tuple[int, int]
) -> PeopleFound:
    """Everybody in a video of (width, height). `seen[i]`: the boxes at frame `looks[i]`, at `times_s[i]` seconds."""
    look_s = float(np.median(np.diff(times_s))) if len(times_s) > 1 else 0.0
    people = [
        NumberedPerson(
            number=number,
            looks=tuple(looks[look] for look in person.looks),
            boxes=tuple(person.boxes),
            seconds=len(person.looks) * look_s,
            begin_s=float(times_s[person.looks[0]]),
            end_s=float(times_s[person.looks[-1]]),
        )
        for number, person in enumerate(group_people(follow(seen, times_s), len(seen)), 1)
    ]
    return PeopleFound(tuple(people), size, tuple(looks), look_s)


def group_people(ways: Sequence[Person], looks: int) -> list[Person]:
    """The people that `follow` followed in a clip of `looks` looks, in order of their numbers, with all their pieces.

    People who are seen at too few looks are left out, and so are second boxes on one body.
    """
    left = list(ways)
    groups: list[Person] = []
    while left:
        person, pieces = join_pieces(max(left, key=lambda way: way.area), left, groups)
        groups.append(person)
        used = {id(piece) for piece in pieces}
        left = [way for way in left if id(way) not in used and not _is_part(way, person)]
    least = min(LEAST_LOOKS, math.ceil(LEAST_SHARE_OF_LOOKS * looks))
    lasting = [person for person in groups if len(person.looks) >= least]
    return lasting[:1] + sorted(lasting[1:], key=lambda p: (-p.area, p.looks[0], p.boxes[0].x1))


def count_people(ways: Sequence[Person], times_s: np.ndarray, duration_s: float) -> int:
    """How many people of a clip a job may be meant to follow: large and long enough beside the first.

    `times_s` float64: of each look, increasing, not everywhere equally far apart; `duration_s`: of the clip.
    """
    people = group_people(ways, len(times_s))
    if not people:
        return 0
    shown_s = np.diff(times_s, append=duration_s)  # by each look
    height = float(np.median([box.height for box in people[0].boxes]))
    others = [
        person
        for person in people[1:]
        if float(shown_s[person.looks].sum()) >= min(LONG_S, LONG * duration_s)
        and float(np.median([box.height for box in person.boxes])) >= TALL * height
    ]
    return 1 + len(others)


def choose_numbered(
    ways: Sequence[Person], number: int, found: PeopleFound, frames: Sequence[int] | np.ndarray
) -> Person | None:
    """Person `number` among the people that `follow` followed in a part of the video; None where they are not in it.

    `frames`: the frame of the video at each look of that part. A way through the part is of the person with whose boxes
    it overlaps most. A way that no number claims is joined to that of `number` as `join_pieces` does.
    """
    claims = [_claim(way, found, frames) for way in ways]
    own = {i: total for i, (who, total) in enumerate(claims) if who == number}
    if not own:
        return None
    strangers = [way for way, (who, _) in zip(ways, claims, strict=True) if who not in (None, number)]
    return join_pieces(ways[max(own, key=lambda i: own[i])], ways, strangers)[0]


def _claim(way: Person, found: PeopleFound, frames: Sequence[int] | np.ndarray) -> tuple[int | None, float]:
    """(the number of the person whose boxes a way overlaps most, or None; the overlap, summed over the looks)."""
    totals: dict[int, float] = {}
    for look, box in zip(way.looks, way.boxes, strict=True):
        for person in found.people:
            there = found.box_at(person, int(frames[look]))
            if there is not None:
                totals[person.number] = totals.get(person.number, 0.0) + box.overlap(there)
    number = max(totals, key=lambda n: totals[n], default=None)
    if number is None or totals[number] < CLAIM * len(way.looks):
        return None, 0.0
    return number, totals[number]


def _is_part(way: Person, person: Person) -> bool:
    """Whether a way is of a second box on a person's body."""
    boxes = dict(zip(person.looks, person.boxes, strict=True))
    inside = sum(look in boxes and is_within(box, boxes[look]) for look, box in zip(way.looks, way.boxes, strict=True))
    return inside >= PART * len(way.looks)

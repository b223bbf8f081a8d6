"""People found: number the people of a driving video from 1, with where and when each was seen.

In:   the boxes of all people at looks over a whole video. Out: `PeopleFound`, and the person with a given number in a
      part of the video. Never: pixels, networks.

A look is a frame on which the detector runs. A tracklet is a piece of a person's track without a gap.
Number 1 is the person that `subject: largest` follows over the whole video. The others are sorted by the area of their
boxes, summed over the looks. Numbers are decided on the whole video, so that they are the same for every part of it.
"""

from __future__ import annotations

import math
from bisect import bisect_left
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from runner.preprocess.body.track import BRIDGE_S, Person, between, follow, is_within, join_tracklets
from runner.preprocess.networks.yolov10 import Box

__all__ = ["NumberedPerson", "PeopleFound", "choose_numbered", "count_people", "group_people", "number_people"]

LEAST_LOOKS = 5  # a person seen at fewer is a passer-by or a mistake: half a second at ten looks per second
LEAST_SHARE_OF_LOOKS = 0.25  # is enough in a video of a few looks
PART = 0.8  # from this share of its looks within one person's box on, a tracklet is a second box on that body
# A second person may be the intended one if on screen for LONG_S, or for the share LONG of the clip, and at least TALL
# of the first person's height.
LONG_S = 1.0
LONG = 0.25
TALL = 0.3
CLAIM = 0.1  # from this mean overlap with a numbered person's boxes on, a tracklet may be that person's


@dataclass(frozen=True)
class NumberedPerson:
    """One person of a video. The measurements are None until `find_people` makes them."""

    number: int  # from 1
    looks: tuple[int, ...]  # frame numbers of the video, increasing: the looks at which the person was seen
    boxes: tuple[Box, ...]  # one per look, pixels of the video
    seconds: float  # on screen: number of looks at which the person was seen, times the seconds between looks
    begin_s: float  # time of the first of these looks
    end_s: float  # time of the last one
    measured: tuple[int, ...] = ()  # those of `looks` at which the pose was found; the measurements are of these
    face_pixels: float | None = (
        None  # median of the longer side of the face's 68 points, pixels; None: no face was seen
    )
    sharpness: float | None = (
        None  # median variance of the Laplacian (grey 0…255) of the box at SHARPNESS_HEIGHT pixels
    )
    hands_inside: float | None = None  # share of `measured` at which both wrists are seen inside the picture, 0…1
    fingers_seen: float | None = None  # share at which more than half of the points of each hand are
    feet_inside: float | None = None  # share at which two of the three points of each foot are


@dataclass(frozen=True)
class PeopleFound:
    """All people of a video who are seen at enough looks."""

    people: tuple[NumberedPerson, ...]  # in order of their numbers; empty: no person was seen
    size: tuple[int, int]  # width and height of the video, pixels
    looks: tuple[int, ...]  # frame numbers at which the detector looked, increasing
    look_s: float  # usual seconds between two looks

    def box_at(self, person: NumberedPerson, frame: int) -> Box | None:
        """Return the box of `person` in any frame: as seen, or interpolated between two looks.

        None before the person's first look, after the last one, and in gaps of more than BRIDGE_S.
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
    """Number the people of a video of (width, height).

    seen[i]: the boxes at frame `looks[i]`, at `times_s[i]` seconds.
    """
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


def group_people(tracklets: Sequence[Person], looks: int) -> list[Person]:
    """Join the tracklets of `follow` in a clip of `looks` looks to people, in the order of their numbers.

    People who are seen at too few looks are left out, and so are second boxes on one body.
    """
    left = list(tracklets)
    groups: list[Person] = []
    while left:
        person, joined = join_tracklets(max(left, key=lambda tracklet: tracklet.area), left, groups)
        groups.append(person)
        used = {id(tracklet) for tracklet in joined}
        left = [tracklet for tracklet in left if id(tracklet) not in used and not _is_part(tracklet, person)]
    least = min(LEAST_LOOKS, math.ceil(LEAST_SHARE_OF_LOOKS * looks))
    lasting = [person for person in groups if len(person.looks) >= least]
    return lasting[:1] + sorted(lasting[1:], key=lambda p: (-p.area, p.looks[0], p.boxes[0].x1))


def count_people(tracklets: Sequence[Person], times_s: np.ndarray, duration_s: float) -> int:
    """Count the people of a clip that a job may be meant to follow: the first, and others large and long enough.

    times_s:    float64, the time of each look, increasing; intervals may differ.
    duration_s: length of the clip.
    """
    people = group_people(tracklets, len(times_s))
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
    tracklets: Sequence[Person], number: int, found: PeopleFound, frames: Sequence[int] | np.ndarray
) -> Person | None:
    """Return person `number` in a part of the video, from the tracklets of `follow` there; None if not in it.

    frames: the frame of the video at each look of that part.
    A tracklet belongs to the person whose boxes it overlaps most. Tracklets without a number may be joined to those of
    `number`, by the rules of `join_tracklets`.
    """
    claims = [_claim(tracklet, found, frames) for tracklet in tracklets]
    totals = {i: total for i, (who, total) in enumerate(claims) if who == number}
    if not totals:
        return None
    strangers = [tracklet for tracklet, (who, _) in zip(tracklets, claims, strict=True) if who not in (None, number)]
    return join_tracklets(tracklets[max(totals, key=lambda i: totals[i])], tracklets, strangers)[0]


def _claim(tracklet: Person, found: PeopleFound, frames: Sequence[int] | np.ndarray) -> tuple[int | None, float]:
    """Return (the number of the person whose boxes it overlaps most, or None; the overlap, summed over the looks)."""
    totals: dict[int, float] = {}
    for look, box in zip(tracklet.looks, tracklet.boxes, strict=True):
        for person in found.people:
            there = found.box_at(person, int(frames[look]))
            if there is not None:
                totals[person.number] = totals.get(person.number, 0.0) + box.overlap(there)
    number = max(totals, key=lambda n: totals[n], default=None)
    if number is None or totals[number] < CLAIM * len(tracklet.looks):
        return None, 0.0
    return number, totals[number]


def _is_part(tracklet: Person, person: Person) -> bool:
    """Return True if it is a second box on the person's body."""
    boxes = dict(zip(person.looks, person.boxes, strict=True))
    inside = sum(
        look in boxes and is_within(box, boxes[look]) for look, box in zip(tracklet.looks, tracklet.boxes, strict=True)
    )
    return inside >= PART * len(tracklet.looks)

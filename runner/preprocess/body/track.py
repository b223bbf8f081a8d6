"""Track: choose the person that a clip is about, and find that person's box in every frame.

In:   the boxes of all people in the frames on which the detector ran, and the times of these frames. Out: one `Box`
      for every frame of the clip, and how each was found. Never: pixels, networks, joints.

A look is a frame on which the detector runs. A tracklet is a piece of a person's track without a gap.
All decisions are made on the whole clip: boxes are small, so all are kept (about 100 bytes per person and frame).
People are distinguished by overlap and by their motion, never by appearance.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Literal

import numpy as np

from runner.preprocess.networks.yolov10 import Box

__all__ = [
    "BRIDGE_S",
    "LIKE",
    "Person",
    "Subject",
    "Whereabouts",
    "between",
    "choose_subject",
    "follow",
    "is_within",
    "join_tracklets",
    "only_body",
    "whereabouts",
]

Subject = Literal["largest", "centre"] | tuple[float, float, float, float]  # of a box: x1, y1, x2, y2

COAST_S = 1.5  # a person unseen for longer gets a new tracklet
BRIDGE_S = 1.0  # in gaps up to this long, the box is interpolated on a straight line
SETTLE_S = 0.15  # time constant of the velocity estimate: a detector's boxes have noise from frame to frame
LEAD_S = 0.5  # an unseen person is expected to keep walking for this long, and then to stand still
GATE = 1.5  # limit of `_distance` (0: same place and size): beyond it, a box is of another person
EXPECTED = 0.5  # overlap with the expected box from which on a person is found again within another person's box
LOOK_S = 0.35  # half of the time over which the usual height of a box is measured
CUT = 0.65  # a box lower than this share of its neighbours' median height has lost the legs (or the head)
LIKE = (0.4, 2.5)  # bounds of a returning person's height, as a factor of the height before
FIRST_S = 1.0  # a `subject` box is compared with people for this long, from the first look with people
CLAIM = 0.1  # least overlap with the `subject` box
LASTING = 0.25  # `centre` considers people who are seen for this share of the longest seen
SAME = 0.7  # share of the smaller of two boxes in the larger, from which on both are of one body
ANOTHER = 0.3  # the same share, from which on another person stands in the place of an unseen subject


@dataclass
class Person:
    """One tracklet: a person's box at some of the looks, in order. Also a person whose tracklets were joined."""

    looks: list[int] = field(default_factory=list)
    boxes: list[Box] = field(default_factory=list)
    velocity: tuple[float, float] = (0.0, 0.0)  # of the centre, pixels a second

    @property
    def area(self) -> float:
        """Area of the boxes, summed over the looks, pixels. It is large for large people who are seen for long."""
        return sum(box.area for box in self.boxes)

    def expected(self, seconds: float) -> Box:
        """Return the expected box `seconds` after the last one."""
        last, lead = self.boxes[-1], min(seconds, LEAD_S)
        dx, dy = self.velocity[0] * lead, self.velocity[1] * lead
        return Box(last.x1 + dx, last.y1 + dy, last.x2 + dx, last.y2 + dy, last.score)

    def see(self, look: int, box: Box, seconds: float) -> None:
        """Add the box at `look`, `seconds` after the last look of this tracklet."""
        if self.boxes and seconds > 0:
            (x0, y0), (x1, y1) = self.boxes[-1].centre, box.centre
            new = 1 - math.exp(-seconds / SETTLE_S)
            vx, vy = self.velocity
            self.velocity = (
                vx + new * ((x1 - x0) / seconds - vx),
                vy + new * ((y1 - y0) / seconds - vy),
            )
        self.looks.append(look)
        self.boxes.append(box)


@dataclass(frozen=True)
class Whereabouts:
    """The subject in every frame of a clip of n."""

    boxes: list[Box | None]  # n; None only if there is no person in the whole clip
    unseen: np.ndarray  # bool [n]: the detector ran, but did not find the subject
    bridged: int  # number of unseen frames whose box is interpolated
    doubtful: np.ndarray  # bool [n]: the subject is unseen, and another person stands at the box
    looked: int  # number of looks
    found: int  # looks at which the subject was found


def follow(seen: Sequence[Sequence[Box]], times_s: np.ndarray) -> list[Person]:
    """Follow all people through the clip. Returns their tracklets.

    seen[i]: the boxes at look i, at `times_s[i]` seconds (increasing).
    Each box continues the tracklet whose expected box is closest, the closest pairs first. Other boxes start new
    tracklets. A box inside a larger one may be a second box on the body in front. So it continues a tracklet that was
    not seen at the look before only if it overlaps the expected box enough.
    """
    people: list[Person] = []
    active: list[Person] = []
    for look, boxes in enumerate(seen):
        now = float(times_s[look])
        active = [p for p in active if now - float(times_s[p.looks[-1]]) <= COAST_S]
        gone = [now - float(times_s[p.looks[-1]]) for p in active]
        guesses = [p.expected(s) for p, s in zip(active, gone, strict=True)]
        pairs = sorted(
            (distance, i, j)
            for i, guess in enumerate(guesses)
            for j, box in enumerate(boxes)
            if (distance := _distance(guess, box)) <= GATE
            if active[i].looks[-1] == look - 1
            or guess.overlap(box) >= EXPECTED
            or not any(is_within(box, other) for other in boxes)
        )
        taken: set[int] = set()
        placed: set[int] = set()
        for _, i, j in pairs:
            if i not in taken and j not in placed:
                taken.add(i)
                placed.add(j)
                active[i].see(look, boxes[j], gone[i])
        for j, box in enumerate(boxes):
            if j not in placed:
                newcomer = Person()
                newcomer.see(look, box, 0.0)
                people.append(newcomer)
                active.append(newcomer)
    return people


def choose_subject(
    people: Sequence[Person], subject: Subject, size: tuple[int, int], times_s: np.ndarray
) -> Person | None:
    """Return the person that `subject` names, in a clip of (width, height). None if there is no person, or none near
    the `subject` box.

    `follow` gives two tracklets for a person who leaves and comes back, or who has two boxes at once; they are joined
    here by `join_tracklets`.
    """
    if not people:
        return None
    main: Person | None
    if subject == "largest":
        main = max(people, key=lambda p: p.area)
    elif subject == "centre":
        lasting = LASTING * max(len(p.looks) for p in people)
        main = min((p for p in people if len(p.looks) >= lasting), key=lambda p: _off_centre(p, size))
    else:
        x1, y1, x2, y2 = subject
        main = _claimed(people, Box(x1, y1, x2, y2, 1.0), times_s)
    return None if main is None else join_tracklets(main, people)[0]


def join_tracklets(
    main: Person, people: Sequence[Person], strangers: Sequence[Person] = ()
) -> tuple[Person, list[Person]]:
    """Join `main` with the tracklets in `people` that are of the same person. Returns (the person, these tracklets).

    A tracklet that is seen while `main` is not, at about the same size, is of the same person. A tracklet that is ever
    seen beside `main` is not, and neither is a second box on the body of another person. `strangers` are tracklets that
    are known to be of other people.
    """
    course = dict(zip(main.looks, main.boxes, strict=True))
    height = float(np.median([box.height for box in main.boxes]))
    joined = [main]
    others: dict[int, list[Box]] = {}  # by look
    for stranger in strangers:
        for look, box in zip(stranger.looks, stranger.boxes, strict=True):
            others.setdefault(look, []).append(box)
    skipped = {id(person) for person in (main, *strangers)}
    for other in sorted((p for p in people if id(p) not in skipped), key=lambda p: -p.area):
        likeness = float(np.median([box.height for box in other.boxes])) / height
        theirs = dict(zip(other.looks, other.boxes, strict=True))
        common = course.keys() & theirs.keys()
        alike = LIKE[0] <= likeness <= LIKE[1] and all(_shared(course[look], theirs[look]) >= SAME for look in common)
        if not alike:
            for look, box in theirs.items():
                others.setdefault(look, []).append(box)
            continue
        joined.append(other)
        for look, box in theirs.items():
            if not any(is_within(box, another) for another in others.get(look, ())):
                # Of two boxes around one body, the larger one shows all of it.
                course[look] = max(box, course.get(look, box), key=lambda b: b.area)
    return Person(sorted(course), [course[look] for look in sorted(course)], main.velocity), joined


def whereabouts(subject: Person, seen: Sequence[Sequence[Box]], looks: np.ndarray, times_s: np.ndarray) -> Whereabouts:
    """Return the subject's box in every frame: as seen, else interpolated, else held.

    looks: int64, the frame of each look; times_s: float64 [n], the time of each frame.
    Boxes are interpolated between neighbouring looks, however far apart, and in gaps of up to BRIDGE_S. In longer gaps
    the box that is nearer in time is held; so are the first box before it and the last one after it.
    """
    n = len(times_s)
    found_at = _uncut(subject, times_s[looks])
    boxes: list[Box | None] = [None] * n
    on_line = np.zeros(n, bool)
    marks = [(int(looks[look]), box, look) for look, box in found_at]
    for (a, first, look_a), (b, last, look_b) in pairwise(marks):
        line = look_b == look_a + 1 or times_s[b] - times_s[a] <= BRIDGE_S
        for i in range(a, b):
            share = float((times_s[i] - times_s[a]) / (times_s[b] - times_s[a]))
            boxes[i] = between(first, last, share if line else float(share >= 0.5))
            on_line[i] = line
    head, head_box, _ = marks[0]
    tail, tail_box, _ = marks[-1]
    boxes[:head] = [head_box] * head
    boxes[tail:] = [tail_box] * (n - tail)
    unseen, doubtful = np.zeros(n, bool), np.zeros(n, bool)
    have = set(subject.looks)
    ends = [*looks[1:].tolist(), n]
    for look, (frame, end) in enumerate(zip(looks.tolist(), ends, strict=True)):
        unseen[frame] = look not in have
        here = boxes[frame]
        if look not in have and here is not None:
            # The person seen there is another one, also in the frames up to the next look.
            doubtful[frame:end] = any(_shared(here, other) >= ANOTHER for other in seen[look])
    return Whereabouts(boxes, unseen, int((unseen & on_line).sum()), doubtful, len(looks), len(have))


def only_body(boxes: Sequence[Box]) -> Box | None:
    """Return the largest box if all others are of the same body. None without boxes, or with another person's box."""
    largest = max(boxes, key=lambda box: box.area, default=None)
    return None if largest is None or any(_shared(largest, box) < SAME for box in boxes) else largest


def _distance(guess: Box, box: Box) -> float:
    """Return 0 for the same place and size. Boxes without overlap are within GATE up to half a box height apart."""
    (x0, y0), (x1, y1) = guess.centre, box.centre
    overlap = guess.overlap(box)
    away = math.hypot(x1 - x0, y1 - y0) / max(guess.height, box.height)
    return (1 - overlap) + away + 0.5 * abs(math.log(box.height / guess.height))


def _off_centre(person: Person, size: tuple[int, int]) -> float:
    """Return the mean distance from the middle of the frame, pixels."""
    x, y = size[0] / 2, size[1] / 2
    return float(np.mean([math.hypot(box.centre[0] - x, box.centre[1] - y) for box in person.boxes]))


def _claimed(people: Sequence[Person], box: Box, times_s: np.ndarray) -> Person | None:
    """Return the person that a `subject` box is around, at the beginning of the clip; None without one."""
    until = min(float(times_s[p.looks[0]]) for p in people) + FIRST_S
    best, most = None, CLAIM
    for person in people:
        early = [b for look, b in zip(person.looks, person.boxes, strict=True) if times_s[look] <= until]
        overlap = max((box.overlap(b) for b in early), default=0.0)
        if overlap > most:
            best, most = person, overlap
    return best


def _uncut(person: Person, times_s: np.ndarray) -> list[tuple[int, Box]]:
    """Return (look, box) without boxes that lose a part of the body for a short time. Such a look counts as a gap."""
    at = times_s[person.looks]
    heights = np.array([box.height for box in person.boxes])
    kept = []
    for i, (look, box) in enumerate(zip(person.looks, person.boxes, strict=True)):
        around = heights[np.searchsorted(at, at[i] - LOOK_S) : np.searchsorted(at, at[i] + LOOK_S, side="right")]
        inside = 0 < i < len(heights) - 1
        if not (inside and len(around) >= 5 and box.height < CUT * float(np.median(around))):
            kept.append((look, box))
    return kept


def between(a: Box, b: Box, share: float) -> Box:
    """Interpolate: return the box at `share` (0…1) between `a` and `b`."""
    if share <= 0 or share >= 1:
        return a if share <= 0 else b
    x1, y1, x2, y2 = ((1 - share) * p + share * q for p, q in zip(_corners(a), _corners(b), strict=True))
    return Box(x1, y1, x2, y2, min(a.score, b.score))


def _corners(box: Box) -> tuple[float, float, float, float]:
    return box.x1, box.y1, box.x2, box.y2


def is_within(box: Box, other: Box) -> bool:
    """Return True if nearly all of `box` is inside the larger `other`."""
    return box.area < other.area and _shared(box, other) >= SAME


def _shared(a: Box, b: Box) -> float:
    """Return the share of the smaller box that is in the larger one: detectors also put boxes around upper bodies."""
    width = min(a.x2, b.x2) - max(a.x1, b.x1)
    height = min(a.y2, b.y2) - max(a.y1, b.y1)
    return max(width, 0.0) * max(height, 0.0) / min(a.area, b.area)

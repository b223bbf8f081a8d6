"""Track: which of the people in a clip is the one it is about, and where they are in every frame.

In:   the boxes of everybody in the frames that the detector looked at, and when those were. Out: one `Box` for every
frame of the clip, and what is known about it. Never: pixels, networks, joints.

All decisions are made on the whole clip: boxes are small, so all are kept (about 100 bytes a person and frame).
People are told apart by overlap and by where their motion leads, never by how they look.
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
    "join_pieces",
    "only_body",
    "whereabouts",
]

Subject = Literal["largest", "centre"] | tuple[float, float, float, float]  # of a box: x1, y1, x2, y2

COAST_S = 1.5  # someone unseen for longer is someone new
BRIDGE_S = 1.0  # across this long a miss a straight line is a fair guess of where the person was
SETTLE_S = 0.15  # time constant of the velocity estimate: a detector's box trembles from frame to frame
LEAD_S = 0.5  # a person keeps walking for about this long unseen; further out the guess stands still
GATE = 1.5  # of `_distance`: 0 same place and size; beyond this it is another person
EXPECTED = 0.5  # overlap of guess and box that finds somebody again even within another's box
LOOK_S = 0.35  # half of the span that says how tall a box usually is around a moment
CUT = 0.65  # a box less tall than this share of its neighbours' median has lost its legs (or head)
LIKE = (0.4, 2.5)  # how much shorter or taller a person may come back after they were away
FIRST_S = 1.0  # a `subject` box is compared with people during this long, from when anyone is seen
CLAIM = 0.1  # least overlap with it
LASTING = 0.25  # `centre` considers people who are seen for this share of the longest seen
SAME = 0.7  # share of the smaller of two boxes that lies in the larger, where both are of one body
ANOTHER = 0.3  # the same, where someone else stands in an unseen subject's place


@dataclass
class Person:
    """One person as far as they can be followed: their box at some of the looks, in order."""

    looks: list[int] = field(default_factory=list)
    boxes: list[Box] = field(default_factory=list)
    velocity: tuple[float, float] = (0.0, 0.0)  # of the centre, pixels a second

    @property
    def area(self) -> float:
        """Summed over the clip: large and long seen."""
        return sum(box.area for box in self.boxes)

    def expected(self, seconds: float) -> Box:
        """Where they should be `seconds` after they were last seen."""
        last, lead = self.boxes[-1], min(seconds, LEAD_S)
        dx, dy = self.velocity[0] * lead, self.velocity[1] * lead
        return Box(last.x1 + dx, last.y1 + dy, last.x2 + dx, last.y2 + dy, last.score)

    def see(self, look: int, box: Box, seconds: float) -> None:
        """Note them at `look`, `seconds` after the look before (of theirs)."""
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

    boxes: list[Box | None]  # n; None only when there is nobody in the whole clip
    unseen: np.ndarray  # bool [n]: looked at, and the subject was not found
    bridged: int  # frames of those whose box lies between two sightings
    doubtful: np.ndarray  # bool [n]: unseen, and someone else stands where the box is
    looked: int  # frames that the detector looked at
    found: int  # looks at which the subject was found


def follow(seen: Sequence[Sequence[Box]], times_s: np.ndarray) -> list[Person]:
    """Everybody's way through the clip. `seen[i]`: the boxes at look i, at `times_s[i]` seconds (increasing).

    Each look's boxes go to the people whose motion leads there, the closest pairs first; the rest are new people. Who
    was not seen at the look before is found again in a box that lies in a larger one only where they are expected: it
    may be a second box on the body that hides them.
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
    """The one that `subject` means, of a clip of (width, height); None: nobody, or nobody near the box asked for.

    Someone who leaves and comes back is two people to `follow`, and so is someone who got two boxes at once:
    `join_pieces` joins them.
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
    return None if main is None else join_pieces(main, people)[0]


def join_pieces(
    main: Person, people: Sequence[Person], strangers: Sequence[Person] = ()
) -> tuple[Person, list[Person]]:
    """(`main` with the pieces of theirs, these pieces), of `people`; `strangers` are known to be others.

    A way that is seen while `main` is away, at about their size, is a piece of theirs. A way that is ever seen beside
    them is not, and neither is a second box on the body of another person or of a stranger.
    """
    course = dict(zip(main.looks, main.boxes, strict=True))
    height = float(np.median([box.height for box in main.boxes]))
    pieces = [main]
    others: dict[int, list[Box]] = {}  # by look
    for stranger in strangers:
        for look, box in zip(stranger.looks, stranger.boxes, strict=True):
            others.setdefault(look, []).append(box)
    apart = {id(person) for person in (main, *strangers)}
    for other in sorted((p for p in people if id(p) not in apart), key=lambda p: -p.area):
        likeness = float(np.median([box.height for box in other.boxes])) / height
        theirs = dict(zip(other.looks, other.boxes, strict=True))
        common = course.keys() & theirs.keys()
        alike = LIKE[0] <= likeness <= LIKE[1] and all(_shared(course[look], theirs[look]) >= SAME for look in common)
        if not alike:
            for look, box in theirs.items():
                others.setdefault(look, []).append(box)
            continue
        pieces.append(other)
        for look, box in theirs.items():
            if not any(is_within(box, another) for another in others.get(look, ())):
                # Of two boxes around the same body the larger is the whole of it.
                course[look] = max(box, course.get(look, box), key=lambda b: b.area)
    return Person(sorted(course), [course[look] for look in sorted(course)], main.velocity), pieces


def whereabouts(subject: Person, seen: Sequence[Sequence[Box]], looks: np.ndarray, times_s: np.ndarray) -> Whereabouts:
    """Their box in every frame: as seen, else on the line between two sightings, else held.

    `looks` int64: the frame of each look; `times_s` float64 [n]: of each frame. A line is drawn between neighbouring
    looks, however far apart, and across misses of up to BRIDGE_S. In longer ones each half holds the box that is
    nearer in time; before the first sighting and after the last one, that one is held.
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
            # What is seen there is someone else: also in the frames up to the next look.
            doubtful[frame:end] = any(_shared(here, other) >= ANOTHER for other in seen[look])
    return Whereabouts(boxes, unseen, int((unseen & on_line).sum()), doubtful, len(looks), len(have))


def only_body(boxes: Sequence[Box]) -> Box | None:
    """The largest box, if the others are of the same body; None where there is nobody, or somebody else too."""
    largest = max(boxes, key=lambda box: box.area, default=None)
    return None if largest is None or any(_shared(largest, box) < SAME for box in boxes) else largest


def _distance(guess: Box, box: Box) -> float:
    """0 for the same place and size; without any overlap within GATE up to half a box height away."""
    (x0, y0), (x1, y1) = guess.centre, box.centre
    overlap = guess.overlap(box)
    away = math.hypot(x1 - x0, y1 - y0) / max(guess.height, box.height)
    return (1 - overlap) + away + 0.5 * abs(math.log(box.height / guess.height))


def _off_centre(person: Person, size: tuple[int, int]) -> float:
    """Mean distance from the middle of the frame, pixels."""
    x, y = size[0] / 2, size[1] / 2
    return float(np.mean([math.hypot(box.centre[0] - x, box.centre[1] - y) for box in person.boxes]))


def _claimed(people: Sequence[Person], box: Box, times_s: np.ndarray) -> Person | None:
    """Whom a box drawn around someone at the beginning means."""
    until = min(float(times_s[p.looks[0]]) for p in people) + FIRST_S
    best, most = None, CLAIM
    for person in people:
        early = [b for look, b in zip(person.looks, person.boxes, strict=True) if times_s[look] <= until]
        overlap = max((box.overlap(b) for b in early), default=0.0)
        if overlap > most:
            best, most = person, overlap
    return best


def _uncut(person: Person, times_s: np.ndarray) -> list[tuple[int, Box]]:
    """(look, box) without boxes that lost a part of the body for a moment; such a look is bridged like a miss."""
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
    """The box that lies `share` (0…1) of the way from `a` to `b`."""
    if share <= 0 or share >= 1:
        return a if share <= 0 else b
    x1, y1, x2, y2 = ((1 - share) * p + share * q for p, q in zip(_corners(a), _corners(b), strict=True))
    return Box(x1, y1, x2, y2, min(a.score, b.score))


def _corners(box: Box) -> tuple[float, float, float, float]:
    return box.x1, box.y1, box.x2, box.y2


def is_within(box: Box, other: Box) -> bool:
    """Whether nearly all of a box lies in a larger one."""
    return box.area < other.area and _shared(box, other) >= SAME


def _shared(a: Box, b: Box) -> float:
    """The share of the smaller box that lies in the larger: detectors put boxes around upper bodies, too."""
    width = min(a.x2, b.x2) - max(a.x1, b.x1)
    height = min(a.y2, b.y2) - max(a.y1, b.y1)
    return max(width, 0.0) * max(height, 0.0) / min(a.area, b.area)

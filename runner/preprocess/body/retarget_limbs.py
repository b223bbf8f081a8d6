"""Limbs: measure a person's limbs in a clip, and the factor by which each must grow to the length of another person's.

In:   poses of a clip and of one picture. Out: `Proportions`: lengths, one factor per limb, which of them were bounded.
Never: places of people. A limb that points at the camera looks short, but never long. So a clip's length is a high
percentile. Left and right are equally long on a body, so they are measured together.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from runner.errors import NoPerson
from runner.preprocess.body.keypoints import PoseTrack

__all__ = ["HIGH", "LIMBS", "LOW", "NECK", "PELVIS", "TOES", "Proportions", "Skeleton", "compare", "median_of_five"]

SEEN = 0.4  # confidence from which a joint is measured: the official retarget's threshold for a visible joint
LONGEST = 95  # percentile of a clip's 2D lengths that is taken as the true length; the 5 % above it may be noise
OUTLIER = 0.15  # a length that differs by more than this share from its neighbours' median has a wrong joint
SHORTEST_PX = 1.0  # a driving limb shorter than this in the whole clip gives no factor
START = 24  # frames at a clip's start in which the person's size at the start is measured, about a second
NEARER = 1.15  # from this ratio of the size at the start to that of the clip on, the person has come nearer or gone

# Bounds of a limb's factor relative to the whole body's. Adults' limbs differ by a sixth; children and figures with
# large heads or short legs by up to two. Larger differences are limbs that point at the camera, or wrong joints.
LOW, HIGH = 0.5, 2.0
# Half widths of shoulders and hips: they look narrow on a person turned to the side, so their bounds are tighter.
WIDTHS = {"shoulder": (0.7, 1.5), "hip": (0.7, 1.5)}
# Upper arm and forearm, thigh and calf: on a figure both are short or none is, but a forearm that points at the camera
# is short alone. If their factors differ by more than this, the one farther from the body's factor is moved nearer.
MATES, APART = (("upper_arm", "forearm"), ("thigh", "calf")), 1 / 0.6
# The 2D length of a foot or hand depends on its direction more than on its size: bounds relative to the limb before it.
END_LOW, END_HIGH = 0.7, 1.4

# Rows of `Skeleton.xy`: COCO's 23, then the means of other points.
PELVIS, NECK, LEFT_TOE, RIGHT_TOE, LEFT_ROOT, RIGHT_ROOT, LEFT_PALM, RIGHT_PALM = range(23, 31)
TOES = (LEFT_TOE, RIGHT_TOE)
BETWEEN = {
    PELVIS: (11, 12),
    NECK: (5, 6),
    LEFT_TOE: (17, 18),
    RIGHT_TOE: (20, 21),
    LEFT_ROOT: (91,),
    RIGHT_ROOT: (112,),
    LEFT_PALM: (96, 100, 104, 108),  # the knuckles
    RIGHT_PALM: (117, 121, 125, 129),
}
LIMBS: dict[str, tuple[tuple[int, int], ...]] = {
    "spine": ((PELVIS, NECK),),
    "neck": ((NECK, 0),),
    "shoulder": ((NECK, 5), (NECK, 6)),
    "upper_arm": ((5, 7), (6, 8)),
    "forearm": ((7, 9), (8, 10)),
    "hip": ((PELVIS, 11), (PELVIS, 12)),
    "thigh": ((11, 13), (12, 14)),
    "calf": ((13, 15), (14, 16)),
    "foot": ((15, LEFT_TOE), (16, RIGHT_TOE)),
    "hand": ((LEFT_ROOT, LEFT_PALM), (RIGHT_ROOT, RIGHT_PALM)),
}
ENDS = {
    "foot": "calf",
    "hand": None,
}  # end of a limb -> the limb whose factor bounds its own; None: the whole body's factor
LEVELS = ([11, 12, PELVIS], [13, 14], [15, 16, LEFT_TOE, RIGHT_TOE, 17, 18, 19, 20, 21, 22])
BELIEVED, KNEES_ALONE = 0.5, 0.8
# Any two of nose, eyes and ears: the farthest pair is about a head's width, seen from the front or from the side.
HEAD = tuple((a, b) for a in range(5) for b in range(a + 1, 5))


@dataclass(frozen=True, eq=False)
class Skeleton:
    """A clip's joints that retargeting moves: xy float64 [n, 31, 2] in pixels, seen bool [n, 31]."""

    xy: np.ndarray
    seen: np.ndarray  # confident, and inside the picture: a joint outside is a guess, whatever its confidence

    @classmethod
    def of(cls, track: PoseTrack) -> Skeleton:
        points = track.points
        inside = (points[..., :2] >= 0) & (points[..., :2] <= (track.width, track.height))
        seen: np.ndarray = np.logical_and.reduce(np.concatenate([inside, points[..., 2:] >= SEEN], -1), axis=-1)
        rows = list(BETWEEN.values())
        xy = [points[:, :23, :2].astype(np.float64)]
        xy += [points[:, row, :2].mean(1, dtype=np.float64)[:, None] for row in rows]
        return cls(
            np.concatenate(xy, 1), np.concatenate([seen[:, :23], *(seen[:, r].all(1, keepdims=True) for r in rows)], 1)
        )

    def without_guesses(self, confidences: np.ndarray) -> Skeleton:
        """Return the skeleton with guessed hips, knees and ankles marked as unseen, from `confidences` [n, 133].

        For a picture cut at the waist the pose model still gives legs, squeezed into the picture and sometimes
        confident. So knees count only with hips, and ankles only with knees, each if the mean confidence of its two
        sides is BELIEVED or more. Knees without ankles count only from KNEES_ALONE on.
        """
        seen, standing = self.seen.copy(), np.ones(len(self.seen), bool)
        for rows in LEVELS:
            pair = rows[:2]
            standing = standing & seen[:, pair].any(1) & (confidences[:, pair].mean(1) >= BELIEVED)
            seen[:, rows] &= standing[:, None]
        sure = standing | (confidences[:, [13, 14]].mean(1) >= KNEES_ALONE)
        seen[:, [13, 14]] &= sure[:, None]
        return Skeleton(self.xy, seen)

    def lengths(self, pair: tuple[int, int], frames: slice = slice(None)) -> np.ndarray:
        """Return float64 [m]: the distance of two joints in the frames where both are seen, single outliers removed."""
        a, b = pair
        both = self.seen[frames, a] & self.seen[frames, b]
        found = np.linalg.norm(self.xy[frames, a] - self.xy[frames, b], axis=-1)[both]
        around = median_of_five(found)
        return np.where(np.abs(found - around) > OUTLIER * around, around, found)


@dataclass(frozen=True)
class Proportions:
    """The proportions of the reference relative to the driving person."""

    scale: float  # reference pixels per driving pixel, for the body as a whole
    factors: dict[str, float]  # for every name in LIMBS and "head": reference length over driving length
    driving: dict[str, float]  # lengths in driving pixels; a limb never seen is missing
    reference: dict[str, float]  # lengths in reference pixels, as measured
    bounded: dict[str, float]  # measured factors that were replaced by a bound, before that
    size_at_start: float  # the driving person's size at the start over that in the clip; 1 unless it differs by NEARER

    @property
    def motion(self) -> float:
        """Factor of distances travelled: that of the legs, so that a foot on the floor does not slide."""
        thigh, calf = (self.driving.get(name, 0.0) for name in ("thigh", "calf"))
        if not (thigh and calf) or not {"thigh", "calf"} & self.reference.keys():
            return self.scale
        return (self.factors["thigh"] * thigh + self.factors["calf"] * calf) / (thigh + calf)

    @property
    def stature(self) -> float:
        """Length of the stretched driving person from nose to ankle, pixels. Limbs that are never seen count as 0."""
        return sum(self.driving.get(name, 0.0) for name in ("neck", "spine", "thigh", "calf"))


def compare(driving: Skeleton, reference: Skeleton) -> Proportions:
    """Measure both skeletons and return the bounded factors.

    A limb that one of them does not show takes its neighbour's factor, or the body's. Raises NoPerson if no limb is
    seen in both.
    """
    start = _size_at_start(driving)
    ours = {name: length * start for name, length in _measure(driving).items() if length >= SHORTEST_PX}
    theirs = _measure(reference)
    both = [name for name in LIMBS if name in ours and name in theirs and name not in ENDS]
    head = _head(driving, reference, start)
    raw = {name: theirs[name] / ours[name] for name in both}
    if raw:
        scale = _weighted_median([raw[n] for n in both], [ours[n] for n in both])
    elif head is not None:
        scale = head
    else:
        raise NoPerson(
            "no limb is seen both in the reference and in the driving video, so their proportions cannot be compared",
            todo="Give a reference in which the person is well visible, or set preprocess.retarget to off",
        )
    raw |= {name: theirs[name] / ours[name] for name in ENDS if name in ours and name in theirs}
    if head is not None:
        raw["head"] = head
    factors = _bounded(raw, scale)
    bounded = {name: value for name, value in raw.items() if not np.isclose(value, factors[name], rtol=1e-9)}
    return Proportions(float(scale), factors, ours, theirs, bounded, start)


def _measure(skeleton: Skeleton) -> dict[str, float]:
    lengths = {}
    for name, pairs in LIMBS.items():
        sides = [np.percentile(found, LONGEST) for found in map(skeleton.lengths, pairs) if len(found)]
        if sides:
            lengths[name] = float(max(sides))
    return lengths


def _size_at_start(driving: Skeleton) -> float:
    """Return the driving person's size at the start of the clip, over the size that the clip's lengths have.

    The character starts at the reference's place and size. A person who walks towards the camera may double in size.
    Measured by the clip's longest lengths, the character would start at half of the reference's size.
    """
    first = int(np.argmax(driving.seen[:, NECK]))
    sizes = []
    for pairs in LIMBS.values():
        for pair in pairs:
            early, whole = driving.lengths(pair, slice(first, first + START)), driving.lengths(pair)
            if len(early) >= START // 2 and np.percentile(whole, LONGEST) >= SHORTEST_PX:
                sizes.append(np.percentile(early, LONGEST) / np.percentile(whole, LONGEST))
    size = float(np.median(sizes)) if sizes else 1.0
    return size if size > NEARER or size < 1 / NEARER else 1.0


def _head(driving: Skeleton, reference: Skeleton, start: float) -> float | None:
    """Return the head's factor, from the pairs of nose, eyes and ears that both show; None if there is none."""
    ours, theirs = [], []
    for pair in HEAD:
        mine, other = driving.lengths(pair), reference.lengths(pair)
        if len(mine) and len(other):
            ours.append(float(np.percentile(mine, LONGEST)) * start)
            theirs.append(float(other[0]))
    return max(theirs) / max(ours) if ours and max(ours) >= SHORTEST_PX else None


def _bounded(raw: dict[str, float], scale: float) -> dict[str, float]:
    factors = {}
    for name, value in raw.items():
        low, high = WIDTHS.get(name, (LOW, HIGH))
        factors[name] = float(np.clip(value, low * scale, high * scale))
    for pair in MATES:
        known = [name for name in pair if name in factors]
        if len(known) == 2:
            small, large = sorted(known, key=lambda name: factors[name])
            if factors[large] > APART * factors[small]:
                if factors[large] / scale > scale / factors[small]:
                    factors[large] = APART * factors[small]
                else:
                    factors[small] = factors[large] / APART
        elif known:
            factors |= dict.fromkeys(pair, factors[known[0]])
    for name in (*LIMBS, "head"):
        if name not in ENDS:
            factors.setdefault(name, float(scale))
    for name, parent in ENDS.items():
        base = factors[parent] if parent else float(scale)
        factors[name] = float(np.clip(factors.get(name, base), END_LOW * base, END_HIGH * base))
    return factors


def _weighted_median(values: list[float], weights: list[float]) -> float:
    """Return the weighted median, interpolated between two values."""
    order = np.argsort(values)
    ordered, heavy = np.asarray(values)[order], np.asarray(weights)[order]
    middle = (np.cumsum(heavy) - heavy / 2) / heavy.sum()
    return float(np.interp(0.5, middle, ordered))


def median_of_five(values: np.ndarray) -> np.ndarray:
    """Running median of five along the first axis, mirrored at the ends. Of fewer than five values, their median."""
    if len(values) < 5:
        return np.broadcast_to(np.median(values, 0), values.shape) if len(values) else values
    padded = np.concatenate([values[2:0:-1], values, values[-2:-4:-1]])
    return np.median(np.lib.stride_tricks.sliding_window_view(padded, 5, axis=0), axis=-1)

"""Repair: find wrong joints by comparing them with the frames around, and replace them.

In:   whole-body points [n, 133, 3] of one person, the time of each frame, the person's height in it.
Out:  the points with the wrong ones replaced, and how many these were. Never: pixels, choosing a person.

A network's confidence is as high for a leg on the wrong side as for a correct one. So confidence is used only to
choose the anchors that others are compared with. A joint that needs no repair keeps its bits. Three errors are
repaired, in this order: frames with left and right exchanged, frames that failed as a whole, single joints that jump
away and come back.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise

import numpy as np

from runner.preprocess.body.keypoints import BODY_ROWS, FACE, LEFT_HAND, RIGHT_HAND

__all__ = ["SLACK", "SPEED", "SURE", "Repaired", "body_heights", "repair"]

SURE = 0.3  # a point below this is a guess: it is no anchor for others, and is not repaired
# The farthest that a joint moves between two frames, in body heights: 3.75 a second, and 1.5 % for pose noise. Wrists
# in jumping jacks reach 3.4 a second; at 30 frames per second the limit is 14 % per frame.
SPEED = 3.75
SLACK = 0.015
REACH_S = 0.5  # positions further apart in time are not compared
BREAK_S = 0.3  # a joint that stays away for this long is no error of the network: a cut, or the true position
DROPOUT_S = 0.12  # a joint that the network loses for at most this long is filled in
SMOOTH = 0.25  # cost of a step at the speed limit; leaving out a position costs 1. From 1/2 on good ones are left out
TURN = 60.0  # body heights a second squared: more than limbs reach when they turn around
BLIP = 0.02  # body heights: this much is pose noise
FAILED = 0.4  # share of a frame's confident body joints that are wrong, from which on the frame is wrong as a whole
LEAST_JOINTS = 5
COLLAPSED = 0.5  # a body smaller than this share of its size just before and after has collapsed
FLIP_GAIN = 0.04  # body heights per joint by which a frame must fit better with its sides exchanged
FLIP_PRIOR = 0.01  # cost of exchanged sides: in doubt, sides are right
FLIP_STEP_S = 0.13  # frames further apart are not compared for exchanged sides
CUT = 0.2  # body heights that the median joint moves at a cut
FAR = 0.3  # body heights: larger distances count as this

PAIRS = np.array([(1, 2), (3, 4), (5, 6), (7, 8), (9, 10), (11, 12), (13, 14), (15, 16), (17, 20), (18, 21), (19, 22)])
ARMS, LEGS = PAIRS[:5], PAIRS[5:]
HANDS = slice(91, 133)
WATCHED = np.r_[BODY_ROWS, HANDS]  # all but the face, which is cropped, not drawn
STANDING = 1.12  # body height over nose to ankles
TORSO = 3.4  # over neck to hips
SHOULDERS = 4.5  # over shoulder to shoulder
LEAST_OF_BOX = 0.7
TALL_S = 1.0  # half of the time over which a height is measured: a person's height changes only with the distance
USUAL = 80  # percentile: bent, turned and foreshortened people look smaller, but never taller


@dataclass(frozen=True)
class Repaired:
    points: np.ndarray  # float32 [n, 133, 3]
    joints: int  # body and hand joints that were moved or given up, in frames that are not counted in `frames`
    frames: int  # frames whose sides were exchanged back, or that were interpolated as a whole
    flipped: int  # frames whose sides were exchanged back


def repair(points: np.ndarray, times_s: np.ndarray, heights: np.ndarray) -> Repaired:
    """Repair points float32 [n, 133, 3] at times_s float64 [n] (increasing), with body heights float64 [n] in pixels.

    A replaced joint lies on the line between its good neighbours in time, with the lower of their confidences. A wrong
    joint without good neighbours within REACH_S keeps its position with a confidence of 0, so that it is not drawn.
    Frames on two sides of a cut are not compared.
    """
    points = np.array(points, np.float32)
    ends = [0, *_cuts(points, times_s, heights), len(points)]
    shots = [_repair_shot(points[a:b], times_s[a:b], heights[a:b]) for a, b in pairwise(ends)]
    joints, frames, flipped = (sum(getattr(shot, name) for shot in shots) for name in ("joints", "frames", "flipped"))
    return Repaired(np.concatenate([shot.points for shot in shots]), joints, frames, flipped)


def _repair_shot(points: np.ndarray, times_s: np.ndarray, heights: np.ndarray) -> Repaired:
    if len(points) < 3:
        return Repaired(points, 0, 0, 0)
    flips = np.zeros(len(points), bool)
    for half in (ARMS, LEGS):  # one by one: the network may exchange only one of them
        here = _flipped(points, half, times_s, heights)
        points[here] = _exchanged(points[here], half)
        flips |= here
    watched = points[:, WATCHED].astype(np.float64)
    sure = watched[..., 2] >= SURE
    kept = _steady(watched, sure, times_s, heights)
    kept &= ~_blips(watched, kept, times_s, heights)
    body = slice(0, BODY_ROWS.stop)
    wrong = (sure & ~kept)[:, body].sum(1)
    failed = (wrong >= LEAST_JOINTS) & (wrong >= FAILED * sure[:, body].sum(1))
    failed |= _collapsed(watched[:, body], sure[:, body], times_s)
    kept &= ~failed[:, None]
    filled, changed = _filled(watched, sure, kept, times_s)
    points[:, WATCHED] = np.where(changed[..., None], filled, points[:, WATCHED])
    points[failed, FACE, 2] = 0  # so that the face of another frame is shown
    whole = flips | failed
    return Repaired(points, int(changed[~whole].sum()), int(whole.sum()), int(flips.sum()))


def body_heights(points: np.ndarray, box_heights: np.ndarray, times_s: np.ndarray) -> np.ndarray:
    """Return the person's standing height in pixels around each frame: float64 [n].

    It is measured from the joints of [n, 133, 3]; where too few are seen, from the box around the person.
    """
    body = points[:, BODY_ROWS].astype(np.float64)
    sure = body[..., 2] >= 0.5
    neck, hips, ankles = body[:, 5:7, :2].mean(1), body[:, 11:13, :2].mean(1), body[:, 15:17, :2].mean(1)
    guesses = np.stack(
        [
            STANDING * np.where(sure[:, [0, 15, 16]].all(1), _length(body[:, 0, :2] - ankles), np.nan),
            TORSO * np.where(sure[:, [5, 6, 11, 12]].all(1), _length(neck - hips), np.nan),
            SHOULDERS * np.where(sure[:, 5:7].all(1), _length(body[:, 5, :2] - body[:, 6, :2]), np.nan),
        ]
    )
    shown = ~np.isnan(guesses)
    heights = np.empty(len(points))
    firsts, lasts = _around(times_s, TALL_S)
    for i, (first, last) in enumerate(zip(firsts.tolist(), lasts.tolist(), strict=True)):
        # The first measurement that half of the frames around have. A box is as tall as the person, a third taller with
        # arms raised, or shows only a part of the person.
        heights[i] = LEAST_OF_BOX * _percentile(box_heights[first:last], 50)
        for guess, have in zip(guesses, shown, strict=True):
            if 2 * np.count_nonzero(have[first:last]) >= last - first:
                heights[i] = max(heights[i], _percentile(guess[first:last][have[first:last]], USUAL))
                break
    return np.maximum(heights, 1.0)


def _percentile(values: np.ndarray, percent: float) -> float:
    """As np.percentile, linear between neighbours. NumPy's checks take ten times as long as these few values."""
    ordered = np.sort(values)
    low, share = divmod((len(ordered) - 1) * percent / 100, 1)
    below, above = ordered[int(low)], ordered[min(int(low) + 1, len(ordered) - 1)]
    return float(below + (above - below) * share)


def _cuts(points: np.ndarray, times_s: np.ndarray, heights: np.ndarray) -> list[int]:
    """Return the frames at which the whole body moves to another place and stays there."""
    body = points[:, BODY_ROWS].astype(np.float64)
    sure = body[..., 2] >= SURE

    def away(i: int, others: range) -> float:
        """Return the smallest of the median joint's distances from frame i to the others, body heights."""
        far = [_length(body[i, both, :2] - body[k, both, :2]) for k in others for both in [sure[i] & sure[k]]]
        return min((float(np.median(d)) / heights[i] for d in far if len(d) >= LEAST_JOINTS), default=0.0)

    both = sure[1:] & sure[:-1]
    step = np.where(both, _length(body[1:, :, :2] - body[:-1, :, :2]), np.nan)
    enough = both.sum(1) >= LEAST_JOINTS
    step = np.nanmedian(np.where(enough[:, None], step, 0), axis=1) / heights[1:]
    cuts: list[int] = []
    for i in (np.flatnonzero(step > CUT) + 1).tolist():
        before = range(int(np.searchsorted(times_s, times_s[i - 1] - BREAK_S)), i)
        after = range(i, int(np.searchsorted(times_s, times_s[i] + BREAK_S, side="right")))
        settled = min(len(before), len(after)) >= 3
        if settled and away(i, before) > CUT and away(i - 1, after) > CUT:
            cuts.append(i)
    return cuts


def _around(times_s: np.ndarray, reach_s: float) -> tuple[np.ndarray, np.ndarray]:
    """For each frame, [first, last) of the frames within `reach_s` seconds."""
    firsts = np.searchsorted(times_s, times_s - reach_s, side="left")
    return firsts, np.searchsorted(times_s, times_s + reach_s, side="right")


def _length(xy: np.ndarray) -> np.ndarray:
    return np.hypot(xy[..., 0], xy[..., 1])


def _exchanged(points: np.ndarray, pairs: np.ndarray) -> np.ndarray:
    """Exchange left and right of the pairs, and with the arms the hands."""
    out = points.copy()
    out[:, pairs] = points[:, pairs[:, ::-1]]
    if pairs is ARMS:
        out[:, LEFT_HAND], out[:, RIGHT_HAND] = points[:, RIGHT_HAND], points[:, LEFT_HAND]
    return out


def _flipped(points: np.ndarray, pairs: np.ndarray, times_s: np.ndarray, heights: np.ndarray) -> np.ndarray:
    """bool [n]: frames that fit their neighbours on both sides much better with left and right exchanged.

    Viterbi over two states per frame: as found, exchanged. Runs of BREAK_S and longer stay as found.
    """
    n = len(points)
    rows = pairs.ravel()
    as_found = points[:, rows, :2].astype(np.float64)
    turned = points[:, pairs[:, ::-1].ravel(), :2].astype(np.float64)
    sure = (points[:, pairs, 2] >= SURE).all(-1).repeat(2, axis=1)
    both = sure[1:] & sure[:-1]
    count = np.maximum(both.sum(1), 1)
    scale = heights[1:, None]
    same = np.where(both, np.minimum(_length(as_found[1:] - as_found[:-1]) / scale, FAR), 0).sum(1) / count
    other = np.where(both, np.minimum(_length(turned[1:] - as_found[:-1]) / scale, FAR), 0).sum(1) / count
    mute = (both.sum(1) < len(rows) // 2) | (np.diff(times_s) > FLIP_STEP_S)
    same[mute] = other[mute] = 0
    cost = np.zeros(2)
    came_from = np.zeros((n, 2), np.int64)
    for i in range(1, n):
        stay, change = same[i - 1], other[i - 1]
        options = np.array([[cost[0] + stay, cost[1] + change], [cost[0] + change, cost[1] + stay]])
        options[1] += FLIP_PRIOR
        came_from[i] = options.argmin(1)
        cost = options.min(1)
    state = np.empty(n, np.int64)
    state[-1] = cost.argmin()
    for i in range(n - 1, 0, -1):
        state[i - 1] = came_from[i, state[i]]
    flipped = state == 1
    for first, last in _runs(flipped):
        gains = [same[k] - other[k] for k in (first - 1, last - 1) if 0 <= k < n - 1]
        isolated = first > 0 and last < n and times_s[last] - times_s[first] < BREAK_S
        if not (isolated and sum(gains) >= FLIP_GAIN * len(gains)):
            flipped[first:last] = False
    return flipped


def _runs(flags: np.ndarray) -> list[tuple[int, int]]:
    """[first, last) of each run of True."""
    edges = np.flatnonzero(np.diff(np.concatenate([[0], flags.astype(np.int8), [0]])))
    return [(int(a), int(b)) for a, b in zip(edges[::2], edges[1::2], strict=True)]


def _steady(points: np.ndarray, sure: np.ndarray, times_s: np.ndarray, heights: np.ndarray) -> np.ndarray:
    """bool [n, J]: for each joint, the longest path of confident positions below the speed limit.

    A position that is left out costs 1. A jump within the path costs as much as the positions in BREAK_S, a fast step a
    little. Dynamic programming finds the cheapest path, for all joints at once.
    """
    n, joints = sure.shape
    xy = points[..., :2]
    dt = float(np.median(np.diff(times_s)))
    jump = max(2.0, round(BREAK_S / dt))
    passed = np.cumsum(sure, axis=0)  # confident positions up to and including frame i
    cost = np.full((n, joints), np.inf)
    parent = np.full((n, joints), -1)
    far_cost, far_parent = np.full(joints, np.inf), np.full(joints, -1)  # of frames beyond REACH_S: cost minus `passed`
    oldest = 0
    for i in range(n):
        while times_s[i] - times_s[oldest] > REACH_S:
            reachable = cost[oldest] - passed[oldest]
            nearer = reachable <= far_cost
            far_cost, far_parent = np.where(nearer, reachable, far_cost), np.where(nearer, oldest, far_parent)
            oldest += 1
        best = passed[i] - 1.0  # this one is the first of its path
        chosen = np.full(joints, -1)
        far = far_cost + passed[i] - 1
        best, chosen = np.where(far < best, far, best), np.where(far < best, far_parent, chosen)
        if i > oldest:
            away = _length(xy[i] - xy[oldest:i]) / heights[i]
            allowed = SLACK + SPEED * (times_s[i] - times_s[oldest:i])
            # If either of two positions can be left out, the one that makes the path smoother stays.
            pace = away / allowed[:, None]
            link = np.where(pace <= 1, SMOOTH * pace**2, jump)
            near = cost[oldest:i] - passed[oldest:i] + passed[i] - 1 + link
            k = len(near) - 1 - near[::-1].argmin(0)  # of equal costs, the latest
            least = near[k, np.arange(joints)]
            best, chosen = np.where(least <= best, least, best), np.where(least <= best, k + oldest, chosen)
        cost[i] = np.where(sure[i], best, np.inf)
        parent[i] = chosen
    total = cost + (passed[-1] - passed)
    at = np.where(np.isfinite(total).any(0), n - 1 - total[::-1].argmin(0), -1)
    kept = np.zeros((n, joints), bool)
    for j in range(joints):
        i = int(at[j])
        while i >= 0:
            kept[i, j] = True
            i = int(parent[i, j])
    return kept


def _blips(points: np.ndarray, kept: np.ndarray, times_s: np.ndarray, heights: np.ndarray) -> np.ndarray:
    """bool [n, J]: positions below the speed limit that leave and return within one frame, faster than limbs can."""
    xy = points[..., :2]
    out = np.zeros(kept.shape, bool)
    before, after = times_s[1:-1] - times_s[:-2], times_s[2:] - times_s[1:-1]
    share = (before / (before + after))[:, None, None]
    off = _length(xy[1:-1] - ((1 - share) * xy[:-2] + share * xy[2:])) / heights[1:-1, None]
    across = _length(xy[2:] - xy[:-2]) / heights[1:-1, None]
    limit = BLIP + TURN * (before * after / 2)[:, None]
    known = kept[1:-1] & kept[:-2] & kept[2:]
    off = np.where(known, off, 0)
    peak = off > np.pad(off, ((1, 1), (0, 0)))[:-2]
    peak &= off >= np.pad(off, ((1, 1), (0, 0)))[2:]
    out[1:-1] = known & peak & (off > limit) & (across < off)
    return out


def _collapsed(body: np.ndarray, sure: np.ndarray, times_s: np.ndarray) -> np.ndarray:
    """bool [n]: the body's confident joints lie close together, but not shortly before and after."""
    lowest, highest = (
        np.where(sure[..., None], body[..., :2], np.inf),
        np.where(sure[..., None], body[..., :2], -np.inf),
    )
    enough = sure.sum(1) >= LEAST_JOINTS
    span = np.where(enough, _length(np.where(enough[:, None], highest.max(1) - lowest.min(1), 0)), np.nan)
    heap = np.zeros(len(body), bool)
    firsts, lasts = _around(times_s, REACH_S)
    for i in np.flatnonzero(enough):
        around = span[firsts[i] : lasts[i]]
        around = around[~np.isnan(around)]
        heap[i] = len(around) >= 5 and span[i] < COLLAPSED * np.median(around)
    for first, last in _runs(heap):
        if times_s[min(last, len(body) - 1)] - times_s[first] >= BREAK_S:
            heap[first:last] = False
    return heap


def _filled(
    points: np.ndarray, sure: np.ndarray, kept: np.ndarray, times_s: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Return (points [n, J, 3] with those not `kept` replaced or given up, bool [n, J] where this was done)."""
    filled, changed = points.copy(), np.zeros(kept.shape, bool)
    for j in np.flatnonzero(~kept.all(0)):
        anchors = np.flatnonzero(kept[:, j])
        missing = np.flatnonzero(~kept[:, j])
        after = np.searchsorted(anchors, missing)
        for i, k in zip(missing.tolist(), after.tolist(), strict=True):
            a = int(anchors[k - 1]) if k > 0 else None
            b = int(anchors[k]) if k < len(anchors) else None
            known = _neighbours(points[:, j], times_s, i, a, b, REACH_S if sure[i, j] else DROPOUT_S)
            if known is not None:
                filled[i, j], changed[i, j] = known, True
            elif sure[i, j]:
                filled[i, j, 2], changed[i, j] = 0, True
    return filled, changed


def _neighbours(
    course: np.ndarray, times_s: np.ndarray, i: int, a: int | None, b: int | None, reach_s: float
) -> np.ndarray | None:
    """Interpolate one joint's path [n, 3] at frame i between the anchors a < i < b.

    With one anchor only, its value is held for up to BREAK_S. None if the anchors are too far away in time.
    """
    if a is not None and b is not None and times_s[b] - times_s[a] <= reach_s:
        share = (times_s[i] - times_s[a]) / (times_s[b] - times_s[a])
        value = (1 - share) * course[a] + share * course[b]
        value[2] = min(course[a, 2], course[b, 2])
        return value
    ends = [end for end in (a, b) if end is not None]
    if len(ends) == 1 and reach_s == REACH_S and abs(times_s[i] - times_s[ends[0]]) <= BREAK_S:
        return course[ends[0]].copy()
    return None

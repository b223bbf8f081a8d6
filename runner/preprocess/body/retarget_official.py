"""Official retarget: the arithmetic of the official preprocessing, with its defects, for parity mode.

In:   the poses of a clip, the pose of the area-resized reference. Out: poses in the reference's pixels.
Never: FLUX edits. Every limb is measured in the first frame only, whatever its confidence, and no factor is bounded.

Where the official code divides by zero, the result here is defined. A body height of zero counts as not seen, so that
the scale is found in the next way. A limb of length zero in the first frame has factor 1. A limb of length zero in any
frame stays a point.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from runner.preprocess.body.keypoints import FACE, LEFT_HAND, RIGHT_HAND, PoseTrack, body_of
from runner.preprocess.body.retarget import Framing, Retargeted, on_canvas, zoom_warning
from runner.preprocess.body.skeleton import LIMBS
from runner.preprocess.pictures.sizing import place

__all__ = ["forward", "framing_of", "global_scale", "limb_factors", "retarget_official", "symmetrised"]

# Joints of the body's twenty.
NOSE, NECK, RIGHT_WRIST, LEFT_WRIST = 0, 1, 4, 7
HIPS, ANKLES = [8, 11], [10, 13]
FEET = [(10, 19), (13, 18)]  # ankle, toe
# Confidences: of the ends of a height (above this), of joints for the framing, of a hand's points (from this on).
HEIGHT_SEEN, SHOWN, HAND_SEEN = 0.5, 0.4, 0.4
# Limbs by their number in LIMBS.
LIKE_LARGER = [(0, 1), (2, 4), (3, 5), (6, 9), (7, 10), (8, 11), (17, 18)]
LIKE_MEAN = [(13, 15), (14, 16)]
FOOT_OF_CALF = {18: 8, 17: 11}  # foot -> calf: a foot is at most half as long as its calf
# Joint of the twenty → the points whose mean it is; the two points of a toe move together.
# fmt: off
POINTS_OF = {
    0: [0], 2: [6], 3: [8], 4: [10], 5: [5], 6: [7], 7: [9], 8: [12], 9: [14], 10: [16], 11: [11], 12: [13],
    13: [15], 14: [2], 15: [1], 16: [4], 17: [3], 18: [17, 18], 19: [20, 21],
}
# fmt: on
HEELS = {19: 13, 22: 10}  # point → the ankle that it follows; neither is drawn


def retarget_official(track: PoseTrack, reference: PoseTrack, *, canvas: tuple[int, int]) -> Retargeted:
    """Put the clip `track` on the body of `reference` (one frame) as the official preprocessing does, without edits.

    The official canvas is the area-resized reference. Body joints are exact to float32; confidences are kept. Hands are
    in whole pixels; their points of confidence under 0.4 are at 0 with confidence 0. As in the official code, the rows
    of the left hand have the person's right hand, so that hands are drawn in the official order. The face is neither
    retargeted nor drawn; it follows the nose.

    Raises ValueError for an empty clip or a reference of more than one frame.
    """
    reference = on_canvas(track, reference, canvas)
    bodies = body_of(track.points.astype(np.float64))
    model = body_of(reference.points[0].astype(np.float64))
    first = bodies[0]
    scale = global_scale(first, model, (track.width, track.height), canvas)
    sides = np.array([int(scale * canvas[0]), int(scale * canvas[1])])
    scaled = model.copy()
    scaled[:, :2] = model[:, :2] / canvas * sides
    framing = min(framing_of(first, track.height), framing_of(model, canvas[1]), key=_LEAST.index)
    factors = symmetrised(limb_factors(scaled, first))
    anchor = _anchor(forward(first[None, :, :2], factors)[0], scaled, framing)
    made = (forward(bodies[..., :2], factors, cap_feet=True) - anchor) / scale

    points = track.points.astype(np.float64)
    for joint, rows in POINTS_OF.items():
        points[:, rows, :2] += (made[:, joint] - bodies[:, joint, :2])[:, None]
    for row, ankle in HEELS.items():
        points[:, row, :2] += made[:, ankle] - bodies[:, ankle, :2]
    points[:, FACE, :2] = made[:, None, NOSE] + (track.points[:, FACE, :2] - bodies[:, None, NOSE, :2]) / scale
    exchanged = _hands(track, bodies, made, max(factors[0], factors[1]) / scale, points)

    report: dict[str, Any] = {
        "method": "official",
        "framing": framing,
        "scale": round(1 / scale, 4),
        "factors": [round(float(f / scale), 4) for f in factors],
        "frames_hands_exchanged": exchanged,
    }
    warnings = []
    if framing != "full":
        shown = framing_of(model, canvas[1])
        if shown != "full":
            _, _, width, _ = place((track.width, track.height), canvas).target
            warnings.append(zoom_warning(shown, track.width / width / scale))
    return Retargeted(PoseTrack(points.astype(np.float32), *canvas), report, warnings)


_LEAST: list[Framing] = ["half", "three_quarter", "full"]


def global_scale(first: np.ndarray, model: np.ndarray, video: tuple[int, int], picture: tuple[int, int]) -> float:
    """Return the driving pixels per reference pixel: from nose to ankles, else to hips, else from the pictures' areas.

    first, model: bodies [20, 3] of driving frame 0 and of the reference; video, picture: sizes (width, height). Joints
    count if their confidence is above 0.5 in both bodies.
    """
    for pair in (ANKLES, HIPS):
        ends = [NOSE, *pair]
        if (first[ends, 2] > HEIGHT_SEEN).all() and (model[ends, 2] > HEIGHT_SEEN).all():
            ours, theirs = (abs(float(b[pair, 1].mean() - b[NOSE, 1])) for b in (first, model))
            if ours > 0 and theirs > 0:
                return ours / theirs
    return math.sqrt(video[0] * video[1]) / math.sqrt(picture[0] * picture[1])


def framing_of(body: np.ndarray, height: int) -> Framing:
    """Return how much of a body [20, 3] a picture shows. Only the lower edge counts."""
    shown = (body[:, 1] / height <= 1) & (body[:, 2] >= SHOWN)
    if not shown[HIPS].all():
        return "half"
    return "full" if shown[ANKLES].all() else "three_quarter"


def limb_factors(scaled: np.ndarray, first: np.ndarray) -> np.ndarray:
    """Return float64 [19]: each limb's length in the scaled reference over that in driving frame 0 (1 if that is 0)."""
    start, end = np.array(LIMBS).T
    theirs, ours = (np.linalg.norm(b[end, :2] - b[start, :2], axis=-1) for b in (scaled, first))
    return np.divide(theirs, ours, out=np.ones_like(ours), where=ours > 0)


def symmetrised(factors: np.ndarray) -> np.ndarray:
    """Make left and right equal: the larger factor for limbs, the mean for eyes and ears. Neck to nose has no pair."""
    alike = factors.copy()
    for a, b in LIKE_LARGER:
        alike[[a, b]] = max(factors[a], factors[b])
    for a, b in LIKE_MEAN:
        alike[[a, b]] = (factors[a] + factors[b]) / 2
    return alike


def forward(bodies: np.ndarray, factors: np.ndarray, *, cap_feet: bool = False) -> np.ndarray:
    """Return joints [n, 20, 2] with every limb scaled by its factor, from the neck outwards. The neck stays."""
    made = bodies.copy()
    lengths: dict[int, np.ndarray] = {}
    for limb, (a, b) in enumerate(LIMBS):
        way = bodies[:, b] - bodies[:, a]
        was = np.linalg.norm(way, axis=-1)
        length = was * factors[limb]
        if cap_feet and limb in FOOT_OF_CALF:
            length = np.minimum(length, 0.5 * lengths[FOOT_OF_CALF[limb]])
        lengths[limb] = length
        unit = np.divide(way, was[:, None], out=np.zeros_like(way), where=was[:, None] > 0)
        made[:, b] = made[:, a] + length[:, None] * unit
    return made


def _anchor(made: np.ndarray, scaled: np.ndarray, framing: Framing) -> np.ndarray:
    """Return (dx, dy): the offset of the retargeted first frame from the scaled reference."""
    if framing != "full":
        return made[NECK] - scaled[NECK, :2]
    ground = max(scaled[list(foot), 1].mean() for foot in FEET)
    across = made[HIPS, 0].mean() - scaled[HIPS, 0].mean()
    return np.array([across, made[ANKLES, 1].max() - ground])


def _hands(track: PoseTrack, bodies: np.ndarray, made: np.ndarray, factor: float, points: np.ndarray) -> int:
    """Write both hands into `points`. Returns the number of frames in which they are exchanged."""
    hands = {"right": track.points[:, RIGHT_HAND].astype(np.float64), "left": track.points[:, LEFT_HAND].astype(float)}
    grown, shift = {}, {}
    for side, wrist in (("right", RIGHT_WRIST), ("left", LEFT_WRIST)):
        hand = hands[side]
        root = hand[:, :1, :2]
        grown[side] = hand.copy()
        grown[side][..., :2] = root + factor * (hand[..., :2] - root)
        snapped = made[:, wrist] - root[:, 0]
        carried = made[:, wrist] - bodies[:, wrist, :2]
        shift[side] = np.where(hand[:, 0, 2:] >= HAND_SEEN, snapped, carried)
    root = np.where(hands["right"][:, 0, 2:] >= HAND_SEEN, hands["right"][:, 0, :2], (-track.width, -track.height))
    to_left, to_right = (np.linalg.norm(root - bodies[:, wrist, :2], axis=-1) for wrist in (LEFT_WRIST, RIGHT_WRIST))
    exchange = to_left < to_right
    for side, other, rows in (("right", "left", LEFT_HAND), ("left", "right", RIGHT_HAND)):
        hand = np.where(exchange[:, None, None], grown[other], grown[side])
        hand[..., :2] = np.trunc(hand[..., :2] + shift[side][:, None])
        hand[hand[..., 2] < HAND_SEEN] = 0
        points[:, rows] = hand
    return int(exchange.sum())

"""Retarget: apply a driving person's motion to the body of the reference, at the reference's place.

In:   the poses of a clip, the pose of the reference picture. Out: poses in pixels of the output, a report, warnings.
Never: pictures. The official method is in `retarget_official`. This one measures limbs over the whole clip, uses only
joints that are seen, bounds every factor, and keeps planted feet at their height. Limbs keep the driver's directions.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

from runner.preprocess.body.keypoints import FACE, LEFT_HAND, RIGHT_HAND, PoseTrack
from runner.preprocess.body.retarget_feet import ANKLES, Footing, soles, travel
from runner.preprocess.body.retarget_limbs import LIMBS, NECK, PELVIS, Proportions, Skeleton, compare
from runner.preprocess.pictures.sizing import place

__all__ = ["Framing", "Retargeted", "on_canvas", "retarget_robust", "zoom_warning"]

Framing = Literal["full", "three_quarter", "half"]
DRAWN = 0.5  # confidence from which the skeleton shows a joint
# The points that follow a joint, each by one factor.
HEAD_POINTS = list(range(1, 5))
FOOT_POINTS = {15: [17, 18, 19], 16: [20, 21, 22]}
HANDS = {9: LEFT_HAND, 10: RIGHT_HAND}  # wrist: its hand


@dataclass(frozen=True, eq=False)
class Retargeted:
    """A clip's poses on the reference's body."""

    track: PoseTrack  # in pixels of the output; confidences are the driver's
    report: dict[str, Any]  # plain numbers, strings, lists and dicts
    warnings: list[str]  # sentences for the user


def retarget_robust(track: PoseTrack, reference: PoseTrack, *, canvas: tuple[int, int]) -> Retargeted:
    """Put the clip `track` on the body of `reference` (one frame), in pixels of an output of `canvas` (width, height).

    Every limb keeps its direction and is scaled by its factor of `retarget_limbs.compare`: the reference's length over
    the driver's, the same for left and right, bounded. The person starts where the reference stands: pelvis above
    pelvis and feet on the reference's floor. If the reference is cut above the feet, pelvis is on pelvis; above the
    hips, neck on neck. Distances travelled are scaled with the legs. A foot near the floor keeps its height above it
    (times the legs' factor): the whole figure is raised or lowered for this, and the remaining difference between the
    feet bends the knees. Hands, face and feet follow wrist, nose and ankle, each with its own factor. Confidences are
    not changed.

    The face of the result follows the head. Faces are cropped by the driving track, not by this one.
    Raises ValueError for an empty clip or a reference of more than one frame; NoPerson if no limb is seen in both.
    """
    reference = on_canvas(track, reference, canvas)
    driver, model = Skeleton.of(track), Skeleton.of(reference).without_guesses(reference.points[..., 2])
    proportions = compare(driver, model)
    framing = framing_of(model)
    body = _Body(driver, proportions)
    start = body.start
    if body.from_pelvis and framing == "full" and body.footing:
        floor = float(soles(model.xy, model.seen)[0, model.seen[0, ANKLES]].max())
        down = floor - proportions.motion * body.footing.floor_at(start, proportions.stature)
        anchor = np.array([model.xy[0, PELVIS, 0] - body.xy[start, PELVIS, 0], down])
    else:
        joints = [j for j in (PELVIS, NECK, 0) if model.seen[0, j] and (j != PELVIS or body.from_pelvis)]
        joint = joints[0] if joints else int(np.argmax(model.seen[0, :17]))
        anchor = model.xy[0, joint] - body.xy[start, joint]
    body.xy += anchor
    points = _all_points(track, driver, body.xy, proportions)
    result = PoseTrack(points.astype(np.float32), *canvas)
    report = _report(result, driver, proportions, framing, body)
    return Retargeted(result, report, _warnings(track, proportions, framing, body, canvas))


def on_canvas(track: PoseTrack, reference: PoseTrack, canvas: tuple[int, int]) -> PoseTrack:
    """Return the reference's pose in pixels of the output, into which the generator letterboxes the picture.

    Raises ValueError for an empty clip or a reference of more than one frame.
    """
    if not len(track):
        raise ValueError("a clip without frames cannot be retargeted")
    if len(reference) != 1:
        raise ValueError(f"the reference must be one picture, not {len(reference)}")
    if (reference.width, reference.height) == canvas:
        return reference
    points = reference.points.copy()
    points[..., :2] = place((reference.width, reference.height), canvas).points(points[..., :2].astype(np.float64))
    # A joint outside the picture can be inside the output's margins: mark it as unseen here.
    outside = (reference.points[..., :2] < 0) | (reference.points[..., :2] > (reference.width, reference.height))
    points[..., 2][outside.any(-1)] = 0
    return PoseTrack(points, *canvas)


def framing_of(model: Skeleton) -> Framing:
    """Return how much of the person a picture shows: down to a foot, down to the hips, or less."""
    if not model.seen[0, PELVIS]:
        return "half"
    return "full" if model.seen[0, ANKLES].any() else "three_quarter"


def zoom_warning(framing: Framing, zoom: float) -> str:
    """Return the warning that a reference which is not full-body gives a closely framed result."""
    shown, lost = ("hips", "legs") if framing == "three_quarter" else ("chest", "hips and legs")
    return (
        f"The reference is not full-body: it shows the person down to the {shown}. The motion is drawn at the "
        f"reference's size and place, so the result is zoomed to {zoom:.1f} times the driving video's framing, and the "
        f"{lost} are below the picture. Give a full-body reference, or set preprocess.retarget to off to keep the "
        "driving video's framing"
    )


class _Body:
    """The figure with its new limbs, before it is moved to its place: `xy` [n, 31, 2], rows as in `Skeleton`."""

    def __init__(self, driver: Skeleton, proportions: Proportions) -> None:
        self.driver, self.proportions = driver, proportions
        hips, necks = driver.seen[:, PELVIS], driver.seen[:, NECK]
        self.from_pelvis = bool(hips.sum() * 2 >= max(1, necks.sum()))
        known = hips if self.from_pelvis else necks
        self.start = int(np.argmax(known if known.any() else driver.seen[:, 0]))
        self.xy = np.zeros_like(driver.xy)
        motion = proportions.motion if self.from_pelvis else proportions.scale
        was = self._interpolate_hips()
        spine = proportions.factors["spine"] * (was[:, NECK] - was[:, PELVIS])
        if self.from_pelvis:
            self.xy[:, PELVIS] = motion * was[:, PELVIS]
            self.xy[:, NECK] = self.xy[:, PELVIS] + spine
        else:
            self.xy[:, NECK] = motion * was[:, NECK]
            self.xy[:, PELVIS] = self.xy[:, NECK] - spine
        for name, pairs in LIMBS.items():
            if name not in ("spine", "hand"):
                for a, b in pairs:
                    self.xy[:, b] = self.xy[:, a] + proportions.factors[name] * (was[:, b] - was[:, a])
        head = driver.xy[:, HEAD_POINTS] - driver.xy[:, :1]
        self.xy[:, HEAD_POINTS] = self.xy[:, :1] + proportions.factors["head"] * head
        self.footing = Footing.of(driver, proportions.stature) if self.from_pelvis and self._legs_known() else None
        self.stretch = self._keep_foot_heights(motion) if self.footing else 0.0

    def _legs_known(self) -> bool:
        return {"thigh", "calf"} <= self.proportions.driving.keys()

    def _interpolate_hips(self) -> np.ndarray:
        """Return the driver's xy. Where hips are not seen, their offset from the neck is interpolated over time.

        Otherwise the whole figure would jump in frames in which the pose model loses the hips.
        """
        xy, seen = self.driver.xy, self.driver.seen
        both = np.flatnonzero(seen[:, PELVIS] & seen[:, NECK])
        lost = np.flatnonzero(~seen[:, PELVIS] & seen[:, NECK])
        if not self.from_pelvis or not len(both) or not len(lost):
            return xy
        torso = xy[both, NECK] - xy[both, PELVIS]
        between = np.stack([np.interp(lost, both, torso[:, axis]) for axis in (0, 1)], 1)
        out = xy.copy()
        hips = np.array([PELVIS, 11, 12])
        out[lost[:, None], hips] += (xy[lost, NECK] - between - xy[lost, PELVIS])[:, None]
        return out

    def _keep_foot_heights(self, factor: float) -> float:
        """Raise or lower the figure so that feet near the floor keep their height. Returns the most that a leg is
        stretched or bent for this, in statures of the result."""
        assert self.footing is not None
        lacking, weight = self.footing.offsets(soles(self.xy, self.driver.seen), factor), self.footing.weight
        lift = (weight * lacking).sum(1) / np.maximum(weight.sum(1), 1)
        self.xy[..., 1] += lift[:, None]
        rest = weight * (lacking - lift[:, None])
        for side, (knee, ankle, toe) in enumerate(((13, 15, 25), (14, 16, 26))):
            self.xy[:, knee, 1] += rest[:, side] / 2
            self.xy[:, [ankle, toe], 1] += rest[:, side, None]
        return float(np.abs(rest).max()) / (factor * self.proportions.stature)


def _all_points(track: PoseTrack, driver: Skeleton, xy: np.ndarray, proportions: Proportions) -> np.ndarray:
    """Return [n, 133, 3]: the body's joints as given, and the points that follow them."""
    points = track.points.copy()

    def follow(rows: list[int] | slice, joint: int, factor: float) -> None:
        away = track.points[:, rows, :2] - driver.xy[:, None, joint]
        points[:, rows, :2] = xy[:, None, joint] + factor * away

    for joint in (0, *range(5, 17)):
        points[:, joint, :2] = xy[:, joint]
    for rows in (HEAD_POINTS, FACE):
        follow(rows, 0, proportions.factors["head"])
    for ankle, feet in FOOT_POINTS.items():
        follow(feet, ankle, proportions.factors["foot"])
    for wrist, hand in HANDS.items():
        follow(hand, wrist, proportions.factors["hand"])
    return points


def _report(
    result: PoseTrack, driver: Skeleton, proportions: Proportions, framing: Framing, body: _Body
) -> dict[str, Any]:
    drawn = result.points[:, :23, 2] >= DRAWN
    inside = (result.points[:, :23, :2] >= 0) & (result.points[:, :23, :2] <= (result.width, result.height))
    report: dict[str, Any] = {
        "method": "robust",
        "reference_shows": framing,
        "scale": round(proportions.scale, 4),
        "motion_scale": round(proportions.motion, 4),
        "size_at_start": round(proportions.size_at_start, 4),
        "factors": {name: round(value, 4) for name, value in proportions.factors.items()},
        "factors_bounded": {name: round(value, 4) for name, value in proportions.bounded.items()},
        "joints_outside": round(float((drawn & ~inside.all(-1)).sum() / max(1, drawn.sum())), 4),
    }
    if body.footing:
        planted, stature = body.footing.planted, proportions.stature
        across, down = travel(body.xy[:, ANKLES], planted)
        driven, _ = travel(driver.xy[:, ANKLES], planted)
        made = proportions.motion * stature
        report |= {
            "frames_planted": int(planted.any(1).sum()),
            "planted_height_change": round(down / made, 4),  # fractions of body height, worst contact
            "planted_slide": round(across / made, 4),
            "planted_slide_driving": round(driven / stature, 4),
            "leg_stretch": round(body.stretch, 4),
        }
    return report


def _warnings(
    track: PoseTrack, proportions: Proportions, framing: Framing, body: _Body, canvas: tuple[int, int]
) -> list[str]:
    warnings = []
    if framing != "full":
        _, _, width, _ = place((track.width, track.height), canvas).target
        warnings.append(zoom_warning(framing, proportions.scale * track.width / width))
    elif not body.footing:
        warnings.append(
            "The driving video shows no feet, but the reference is full-body: nothing drives its legs, and its feet "
            "cannot be put on the floor. Give a driving video that shows the whole person"
        )
    if proportions.bounded:
        names = ", ".join(f"{name} {value / proportions.scale:.2f}" for name, value in proportions.bounded.items())
        warnings.append(
            f"Some limbs of the reference differ much from the driver's proportions ({names} times the body's scale), "
            "so their factors were bounded. They probably point at the camera, or the person is turned to the side. A "
            "reference in which all limbs are well visible gives their true length"
        )
    return warnings

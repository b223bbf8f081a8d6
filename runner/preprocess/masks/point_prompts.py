"""Point prompts: make a segmenter's prompts (points on the person and on the background), and choose the key frames.

In:   whole-body points of a clip. Out: `Prompts` of a frame, `PromptPlan` of a clip. Never: pictures, masks, networks.

The official script prompts with eight joints, seen or not, on frames at fixed distances, and without background points.
Here a joint is used only if it is confident and inside the picture, and a frame only if it has enough such joints.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np

from runner.preprocess.body.keypoints import body_of

__all__ = ["PromptPlan", "Prompts", "key_frames", "prompts_from_joints"]

Box = tuple[float, float, float, float]  # x1, y1, x2, y2 in pixels

# Nose, neck, shoulders, hips, ankles of the 20 body joints: the official choice. Elbows, wrists and knees move fastest.
PROMPT_JOINTS = (0, 1, 2, 5, 8, 11, 10, 13)
CONFIDENT = 0.5  # of the raw heatmap peak: the same limit as for drawing a joint
LEAST_JOINTS = 3  # nose, neck and one shoulder: fewer points do not show how far a body reaches
MARGIN = 0.15  # of the box's longer side: hair, hats, skirts and wide sleeves reach beyond joints and detector boxes
KEYS_PER_CLIP, MOST_BETWEEN_KEYS = 4, 100  # frames; officially 4 or 5 prompts in a chunk of at most 400


@dataclass(frozen=True, eq=False)
class Prompts:
    """The prompts of one frame."""

    points: np.ndarray  # float32 [k, 2]: x, y in pixels of the frame
    inside: np.ndarray  # bool [k]: true on the person, false on the background

    @property
    def positive(self) -> np.ndarray:
        """float32 [p, 2], p ≥ LEAST_JOINTS: points on the person."""
        return self.points[self.inside]

    @property
    def negative(self) -> np.ndarray:
        """float32 [q, 2], q ≥ 0: points on the background."""
        return self.points[~self.inside]


def prompts_from_joints(points: np.ndarray, box: Box | None, size: tuple[int, int]) -> Prompts | None:
    """Return the prompts of one frame; None if too few confident joints are inside the picture.

    points: float [133, 3] whole-body points or [20, 3] body joints: x, y in pixels, confidence. box: the person's, if a
    detector gave one. size: (width, height) of the frame.
    Positive: PROMPT_JOINTS that are confident and inside the frame. Negative: corners and side middles of the box
    around the given box and every confident joint, MARGIN outside it, where they are inside the frame. There is none
    above the middle of the head or below that of the feet: a hat, a raised object or a shadow may be there.
    """
    body = body_of(points) if len(points) == 133 else points
    if body.shape != (20, 3):
        raise ValueError(f"133 points or 20 joints of x, y, confidence are needed, not an array of {points.shape}")
    chosen = body[list(PROMPT_JOINTS)]
    positive = chosen[_usable(chosen, size), :2]
    if len(positive) < LEAST_JOINTS:
        return None
    sure = points[np.isfinite(points).all(1) & (points[:, 2] >= CONFIDENT), :2]
    corners = [sure.min(0), sure.max(0)]
    if box is not None:
        corners = [np.minimum(corners[0], box[:2]), np.maximum(corners[1], box[2:])]
    negative = _around(np.concatenate(corners), size)
    both = np.concatenate([positive, negative]).astype(np.float32)
    return Prompts(both, np.arange(len(both)) < len(positive))


def key_frames(usable: np.ndarray) -> np.ndarray:
    """Return the frames to prompt on, int64, ascending. usable: bool [n], frames for which there are prompts.

    The first usable frame is one; then one every quarter of the clip, but at least every MOST_BETWEEN_KEYS frames, or
    the next usable frame. They depend on the clip only, not on the windows that it is read in.
    """
    step = max(1, min(len(usable) // KEYS_PER_CLIP, MOST_BETWEEN_KEYS))
    keys: list[int] = []
    for index in np.flatnonzero(usable):
        if not keys or index >= keys[-1] + step:
            keys.append(int(index))
    return np.array(keys, np.int64)


@dataclass(frozen=True, eq=False)
class PromptPlan:
    """The prompts of a clip."""

    points: np.ndarray  # float [n, 133, 3]
    size: tuple[int, int]  # width, height of the frames
    boxes: Sequence[Box | None] | None = None  # of the detector, one per frame

    def __len__(self) -> int:
        return len(self.points)

    def at(self, index: int) -> Prompts | None:
        """Return the prompts of frame `index`, key frame or not; None if the frame is not usable."""
        return prompts_from_joints(self.points[index], self.boxes[index] if self.boxes else None, self.size)

    @cached_property
    def usable(self) -> np.ndarray:
        """bool [n]: frames with enough confident joints inside the picture, in which an empty mask would be wrong."""
        joints = body_of(self.points)[:, list(PROMPT_JOINTS)]
        return _usable(joints, self.size).sum(-1) >= LEAST_JOINTS

    @cached_property
    def keys(self) -> frozenset[int]:
        """The key frames: those on which a tracking segmenter gets prompts."""
        return frozenset(key_frames(self.usable).tolist())


def _usable(joints: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """Joints [..., 3] → bool [...]: confident, and on a pixel of the frame."""
    x, y, confidence = np.moveaxis(joints, -1, 0)
    with np.errstate(invalid="ignore"):
        inside = (x >= 0) & (y >= 0) & (x <= size[0] - 1) & (y <= size[1] - 1)
        return inside & (confidence >= CONFIDENT)  # false for NaN


def _around(box: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """Return [q, 2]: four corners and the middles of the left and right side, outside `box`, if inside the frame."""
    margin = MARGIN * (box[2:] - box[:2]).max()
    (left, top), (right, bottom) = box[:2] - margin, box[2:] + margin
    middle = (top + bottom) / 2
    ring = np.array([(x, y) for x in (left, right) for y in (top, middle, bottom)])
    within = ((ring >= 0) & (ring <= np.array(size) - 1)).all(1)
    return ring[within]

"""Geometry: bring frames and poses of the driving video to the output's size, and limit how many are decoded at once.

In:   frames, masks, poses in pixels of the video. Out: the same at the output's size. Never: networks, files.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from runner.preprocess.body.keypoints import PoseTrack
from runner.preprocess.body.skeleton import draw_skeleton
from runner.preprocess.pictures.sizing import Placement, official_placement, padding_resize, resize_by_area

__all__ = ["WINDOW_BYTES", "Geometry", "frames_at_once"]

# Native frames decoded at once: 4 of 1080p. Five would need more than 32 MiB. malloc maps blocks of that size anew at
# each allocation, so that every page is faulted in again, which takes a third of the decoding time.
WINDOW_BYTES = 24 << 20


@dataclass(frozen=True)
class Geometry:
    """Brings frames and poses of the driving video to the output's size."""

    width: int
    height: int
    placement: Placement
    parity: bool = False
    resize_first: int | None = None  # official replace mode: every frame is first resized to this area

    def frame(self, frame: np.ndarray) -> np.ndarray:
        """Return the frame as detector, pose network and face crop get it."""
        return frame if self.resize_first is None else resize_by_area(frame, self.resize_first)

    def output(self, frame: np.ndarray) -> np.ndarray:
        """Return the result of `frame` at the output's size."""
        return frame if self.resize_first is not None else self.placement.image(frame)

    def mask(self, mask: np.ndarray) -> np.ndarray:
        """Resize a mask bool [h, w] of the native frame to uint8 [H, W] of 0 and 255, nearest neighbour."""
        import cv2

        grey = mask.astype(np.uint8) * 255
        if self.resize_first is not None:
            return padding_resize(grey, self.width, self.height, cv2.INTER_NEAREST)
        return self.placement.image(grey, cv2.INTER_NEAREST)

    def skeleton(
        self, track: PoseTrack, index: int, *, retargeted: bool = False, out: np.ndarray | None = None
    ) -> np.ndarray:
        """Draw the skeleton of a frame, uint8 [H, W, 3], at the output's size; in parity mode at the frame's size, and
        then resized, as in the official code.

        A `retargeted` track is in pixels of the output already. out: the array to draw into, which must be black.
        """
        pose = track.pose(index)
        canvas = np.zeros((self.height, self.width, 3), np.uint8) if out is None else out
        if retargeted:
            return draw_skeleton(pose, self.width, self.height, canvas)
        if not self.parity:
            return draw_skeleton(pose.moved(self.placement.points), self.width, self.height, canvas)
        drawn = draw_skeleton(pose, track.width, track.height)
        canvas[:] = drawn if self.resize_first is not None else padding_resize(drawn, self.width, self.height)
        return canvas

    def drawn_points(self, track: PoseTrack, *, retargeted: bool = False) -> np.ndarray:
        """Return float64 [n, 133, 3]: the points of `track` as `skeleton` draws them, in pixels of the output."""
        points = track.points.astype(np.float64)
        if retargeted or (self.parity and self.resize_first is not None):
            return points
        placement = self.placement
        if self.parity:
            placement = official_placement((track.width, track.height), (self.width, self.height))
        points[..., :2] = placement.points(points[..., :2])
        return points


def frames_at_once(width: int, height: int, most: int = 16) -> int:
    """Return how many frames of this size are decoded at once: as many as fit into WINDOW_BYTES, at least one."""
    return max(1, min(most, WINDOW_BYTES // (width * height * 3)))

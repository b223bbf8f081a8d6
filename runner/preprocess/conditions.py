"""Conditions: make the pictures that drive one render, a window at a time.

In:   the poses and plans of pass 1. Out: `ConditionFrames`: skeletons, faces, in replace mode backgrounds and masks.
Never: networks. It keeps about 2 KB per frame; pixels exist only while a window is made (pass 2, a second decode).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from fractions import Fraction
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from runner.preprocess.body.face import FacePlan, crop_face
from runner.preprocess.body.keypoints import PoseTrack
from runner.preprocess.body.person_boxes import face_boxes, person_boxes
from runner.preprocess.geometry import Geometry, frames_at_once
from runner.preprocess.masks.given import GivenMask
from runner.preprocess.masks.packed import ClipMasks
from runner.records.people import People, make_people
from runner.timing import StageTimer
from runner.video import VideoReader

if TYPE_CHECKING:
    from PIL import Image

__all__ = ["ConditionFrames", "PoseConditions"]

CROPS_KEPT = 4  # faces of frames outside the window, which the next window probably needs too


@dataclass(frozen=True, eq=False)
class ConditionFrames:
    """The pictures that drive the model in frames [start, stop)."""

    pose: np.ndarray  # uint8 [n, H, W, 3] RGB
    face: np.ndarray  # uint8 [n, F, F, 3] RGB
    background: np.ndarray | None = None  # uint8 [n, H, W, 3] RGB, black where the mask is white; replace mode
    mask: np.ndarray | None = None  # uint8 [n, H, W], 255 where the picture is generated, else 0; replace mode


@dataclass(eq=False)
class PoseConditions:
    """One job's conditions: the clip's size and length, and the data for its windows."""

    frames: int
    fps: Fraction
    width: int
    height: int
    start_s: float
    report: Mapping[str, Any]
    reference: Image.Image  # RGB, upright, at its own size
    video: Path
    indices: np.ndarray  # int64 [frames]: frame numbers of `video`
    track: PoseTrack  # of the driving person, in pixels of the video
    faces: FacePlan
    face_size: int
    geometry: Geometry
    mask: GivenMask | ClipMasks | None = None
    widen: Callable[[np.ndarray], np.ndarray] | None = None  # widens a mask of SAM 2, at the output's size
    retargeted: PoseTrack | None = None  # drawn instead of `track`, in pixels of the output
    timer: StageTimer = field(default_factory=StageTimer)
    reader: VideoReader | None = field(
        default=None, repr=False
    )  # of `video`, open since pass 1: opening a file is slow
    _crops: dict[int, np.ndarray] = field(default_factory=dict, repr=False)

    def window(self, start: int, stop: int) -> ConditionFrames:
        """Return frames [start, stop), 0 ≤ start < stop ≤ frames. They do not depend on earlier calls."""
        if not 0 <= start < stop <= self.frames:
            raise ValueError(f"frames {start}…{stop} are outside a clip of {self.frames}")
        with self.timer.stage("draw"):
            drawn, moved = (self.track, False) if self.retargeted is None else (self.retargeted, True)
            pose = np.zeros((stop - start, self.height, self.width, 3), np.uint8)
            for canvas, i in zip(pose, range(start, stop), strict=True):
                self.geometry.skeleton(drawn, i, retargeted=moved, out=canvas)
            face = np.empty((stop - start, self.face_size, self.face_size, 3), np.uint8)
            masks = self._masks(start, stop) if self.mask else None
            background = None if masks is None else np.zeros_like(pose)
            self._fill(start, stop, face, background)
            if background is not None and masks is not None:
                background[masks > 0] = 0
            return ConditionFrames(pose, face, background, masks)

    @property
    def people(self) -> People:
        """The boxes of the drawn person and of the face, one entry per frame."""
        drawn, moved = (self.track, False) if self.retargeted is None else (self.retargeted, True)
        points = self.geometry.drawn_points(drawn, retargeted=moved)
        faces = face_boxes(points, self.width, self.height)
        return make_people(person_boxes(points), faces, self.width, self.height, self.fps)

    def close(self) -> None:
        """Close the files. Idempotent; a later `window` opens the video again."""
        if self.reader:
            self.reader.close()
        self.reader = None
        self._crops.clear()
        if self.mask:
            self.mask.close()

    def _fill(self, start: int, stop: int, face: np.ndarray, background: np.ndarray | None) -> None:
        """Read the window's frames of the video, once and in order, and write faces and backgrounds into the arrays."""
        sources = self.faces.sources[start:stop]  # a frame without a face shows the face of another frame
        face[sources < 0] = 0
        for source in set(sources.tolist()) & self._crops.keys():
            face[sources == source] = self._crops[source]
        to_read = np.array([s for s in np.unique(sources) if s >= 0 and s not in self._crops], np.int64)
        scenes = np.arange(start, stop) if background is not None else np.zeros(0, np.int64)
        for index, native in self._native(np.unique(self.indices[np.concatenate([to_read, scenes])])):
            frame = self.geometry.frame(native)
            for source in to_read[self.indices[to_read] == index]:
                first, *others = np.flatnonzero(sources == source)
                crop_face(frame, self.faces.boxes[source], self.face_size, face[first])
                face[others] = face[first]
            if background is not None:
                background[self.indices[scenes] == index] = self.geometry.output(frame)
        for source in (int(sources[0]), int(sources[-1])):
            if source >= 0 and source not in self._crops:
                self._crops[source] = face[np.flatnonzero(sources == source)[0]].copy()
        while len(self._crops) > CROPS_KEPT:
            self._crops.pop(next(iter(self._crops)))

    def _native(self, indices: np.ndarray) -> Iterator[tuple[int, np.ndarray]]:
        """Yield (index, uint8 [h, w, 3]) for the frames `indices` (ascending) of the video, a few decoded at a time."""
        if not len(indices):
            return
        if self.reader is None:
            self.reader = VideoReader(self.video, parity=self.geometry.parity, plan=self.indices)
        info = self.reader.info
        at = iter(indices.tolist())
        for frames in self.reader.windows(indices, frames_at_once(info.width, info.height)):
            for frame in frames:
                yield next(at), frame

    def _masks(self, start: int, stop: int) -> np.ndarray:
        assert self.mask is not None
        masks = [self.geometry.mask(mask) for mask in self.mask.frames(start, stop)]
        return np.stack(masks if self.widen is None else [self.widen(mask) for mask in masks])

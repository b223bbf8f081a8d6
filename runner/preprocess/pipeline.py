"""Pipeline: pass 1 over a driving video: decode, find the person, find the pose, keep only the poses.

In:   a reference, a video, options. Out: `PoseConditions`. Never: generation.
Decoding runs in its own thread, a window ahead of the networks. No more than a few windows of pixels exist at a time.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from runner.errors import InputNotFound, NoPerson
from runner.metrics import StageTimer
from runner.options import JobOptions
from runner.preprocess.conditions import Geometry, PoseConditions, frames_at_once
from runner.preprocess.detect import Box, Detector, choose_person, choose_person_parity
from runner.preprocess.face import plan_faces
from runner.preprocess.images import load_image
from runner.preprocess.keypoints import FACE, PoseTrack, hold_lost_bodies
from runner.preprocess.mask import GivenMask
from runner.preprocess.pose import PoseEstimator
from runner.preprocess.sizing import AUTO_AREA, GRID, output_size, place
from runner.video import Sampled, VideoInfo, VideoReader

__all__ = ["Preprocessor"]

FACE_SIZE = 512  # the face encoder's
AHEAD = 2  # windows decoded before they are asked for


@dataclass
class _Person:
    """The box to look at in each frame, in order; what to do where the detector sees nobody."""

    detector: Detector
    parity: bool
    every: int
    last: Box | None = None
    looked: int = 0
    missed: list[bool] = field(default_factory=list)

    def boxes(self, frames: np.ndarray) -> list[Box | None]:
        """One box a frame; None: look at the whole frame. Between looks, and where nobody is seen, the last one stays:
        officially the whole frame is looked at instead, and the pose jumps."""
        choose = choose_person_parity if self.parity else choose_person
        size = (frames.shape[2], frames.shape[1])
        first = len(self.missed)
        look = [i for i in range(len(frames)) if (first + i) % self.every == 0]
        rows = dict(zip(look, self.detector.rows([frames[i] for i in look]), strict=True)) if look else {}
        boxes = []
        for i in range(len(frames)):
            box = choose(rows[i], size) if i in rows else None
            self.missed.append(i in rows and box is None)
            if box or (i in rows and self.parity):
                self.last = box
            boxes.append(self.last)
        self.looked += len(look)
        return boxes


class Preprocessor:
    """Detector and pose model, loaded once, and what they do to a job's inputs."""

    def __init__(self, detector: Detector, pose: PoseEstimator, device: str = "cpu") -> None:
        self._detector, self._pose = detector, pose
        self.description: dict[str, Any] = {
            "device": device,
            "detector": detector.network.description,
            "pose": pose.network.description,
        }

    @classmethod
    def load(cls, detector: Path, pose: Path, *, device: str = "cpu") -> Preprocessor:
        """Open both networks (files, or folders with `end2end.onnx`) on "cpu", "cuda" or "cuda:N".

        WeightsMissing, WeightsCorrupt, or ConfigInvalid where the device cannot be had.
        """
        return cls(Detector.load(detector, device), PoseEstimator.load(pose, device), device)

    def prepare(
        self,
        reference: Path,
        video: Path,
        options: JobOptions,
        *,
        mask: Path | None = None,
        face_size: int = FACE_SIZE,
        timer: StageTimer | None = None,
    ) -> PoseConditions:
        """Pass 1 over `video`; pass 2 happens in the result's `window`. Stages: decode, detect, pose; then draw.

        Raises InputNotFound, InputUnreadable, InputTooLarge, InputTooShort (fewer than two frames in the span asked
        for) and NoPerson (nobody in any frame).
        """
        timer = timer or StageTimer()
        parity = options.preprocess.parity
        picture = load_image(reference, backdrop=None if parity else (255, 255, 255))
        with VideoReader(video) as reader:
            info = reader.info
            sampled = reader.sample(options.fps, options.start_s, options.max_frames, parity=parity)
            indices = np.asarray(sampled.indices, np.int64)
            given = _mask(options, mask, info, sampled)
            try:
                width, height = output_size(options, picture.size, (info.width, info.height))
                geometry = _geometry(options, (info.width, info.height), (width, height))
                track, without_person = self._poses(reader, indices, options, geometry, timer)
            except BaseException:
                if given:
                    given.close()
                raise
        faces = plan_faces(track.points[:, FACE], track.width, track.height, parity=parity)
        return PoseConditions(
            frames=len(indices),
            fps=sampled.fps,
            width=width,
            height=height,
            start_s=sampled.start_s,
            report={
                "source_frames": info.frames,
                "sampled_frames": len(indices),
                "frames_without_person": without_person,
                "frames_face_held": faces.held,
                "face_seen": faces.seen,
                "detector": self._detector.network.path.name,
                "pose": self._pose.network.path.name,
                "provider": self._pose.network.provider,
                "parity": parity,
            },
            reference=picture,
            video=Path(video),
            indices=indices,
            track=track,
            faces=faces,
            face_size=face_size,
            geometry=geometry,
            mask=given,
            timer=timer,
        )

    def _poses(
        self, reader: VideoReader, indices: np.ndarray, options: JobOptions, geometry: Geometry, timer: StageTimer
    ) -> tuple[PoseTrack, int]:
        """(the poses of the clip, how many of its frames show nobody). A frame sampled twice is looked at once."""
        parity = options.preprocess.parity
        info = reader.info
        unique, back = np.unique(indices, return_inverse=True)
        person = _Person(self._detector, parity, options.preprocess.detect_every)
        windows = reader.windows(unique, frames_at_once(info.width, info.height))
        points = []
        width, height = info.width, info.height
        for native in _read_ahead(windows, timer):
            frames = native if geometry.resize_first is None else np.stack([geometry.frame(f) for f in native])
            height, width = frames.shape[1:3]
            with timer.stage("detect"):
                boxes = person.boxes(frames)
            with timer.stage("pose"):
                points.append(self._pose.points(frames, boxes, bgr=parity))
        missed = np.array(person.missed)
        if missed.sum() == person.looked:
            raise NoPerson(
                f"nobody was found in any of the {person.looked} frames looked at",
                where=info.path,
                todo="Give a video in which one person is well visible; check start_s",
            )
        found = np.concatenate(points)[back]
        return PoseTrack(hold_lost_bodies(found) if parity else found, width, height), int(missed[back].sum())


def _mask(options: JobOptions, mask: Path | None, video: VideoInfo, sampled: Sampled) -> GivenMask | None:
    """The mask of a replace job, known to belong to the video; None in animate mode."""
    if options.mode != "replace":
        return None
    if mask is None:
        raise InputNotFound(
            "mode is replace, but the job has no mask",
            where=video.path,
            todo="Give `mask:` a video or a still image in the video's aspect, white where the character goes",
        )
    given = GivenMask(mask, video, sampled)
    try:
        given.check_not_empty()
    except BaseException:
        given.close()
        raise
    return given


def _geometry(options: JobOptions, video: tuple[int, int], output: tuple[int, int]) -> Geometry:
    parity = options.preprocess.parity
    replace = options.mode == "replace"
    # A letterbox is invisible on a black skeleton; around a real background it would be rendered.
    placement = place(video, output, crop_up_to=GRID if replace else 0)
    asked = options.size_pixels
    area = asked[0] * asked[1] if asked else AUTO_AREA
    return Geometry(*output, placement, parity=parity, resize_first=area if parity and replace else None)


def _read_ahead(windows: Iterator[np.ndarray], timer: StageTimer) -> Iterator[np.ndarray]:
    """The same windows, the next ones decoded in a thread while one is worked on."""

    def decode() -> np.ndarray | None:
        with timer.stage("decode"):
            return next(windows, None)

    with ThreadPoolExecutor(1, thread_name_prefix="decode") as pool:
        ahead: deque[Future[np.ndarray | None]] = deque(pool.submit(decode) for _ in range(AHEAD))
        try:
            while (window := ahead.popleft().result()) is not None:
                ahead.append(pool.submit(decode))
                yield window
        finally:
            for waiting in ahead:
                waiting.cancel()

"""Given mask: read the mask file of a job, which marks the part of the driving video that the character takes.

In:   a still image or a video, white where the picture is generated. Out: bool [H, W] for each sampled frame.
Never: making a mask.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import cv2
import numpy as np

from runner.errors import InputTooShort, InputUnreadable
from runner.preprocess.pictures.images import is_image, load_mask
from runner.video import Sampled, VideoInfo, VideoReader

__all__ = ["GivenMask", "mask_indices"]

HALF = 128  # grey of this or more counts as white: lossy coding blurs the edge
LEAST_COVER = 0.98  # least ratio of the two aspects (in a mask scaled to even sides the aspect changes a little)
WINDOW = 16


class GivenMask:
    """The mask of one job at the times of its sampled frames. In memory is one still image, or only an open file."""

    def __init__(self, path: Path, video: VideoInfo, sampled: Sampled) -> None:
        """Open the mask. Raises InputNotFound, InputUnreadable, InputTooShort or InputTooLarge if it does not fit the
        video."""
        self.path = Path(path)
        self._size = (video.width, video.height)
        self._frames = len(sampled.indices)
        self._still: np.ndarray | None = None
        self._reader: VideoReader | None = None
        if is_image(path):
            self._still = load_mask(path) >= HALF
            height, width = self._still.shape
        else:
            self._reader = VideoReader(path)
            width, height = self._reader.info.width, self._reader.info.height
            self._indices = mask_indices(self._reader, video, sampled)
        ratio = (width / height) / (video.width / video.height)
        if not LEAST_COVER <= ratio <= 1 / LEAST_COVER:
            raise InputUnreadable(
                f"the mask is {width}x{height}, the video {video.width}x{video.height}: their aspects differ",
                where=self.path,
                todo="Give a mask in the video's aspect",
            )

    def frames(self, start: int, stop: int) -> Iterator[np.ndarray]:
        """Yield the mask of each sampled frame in [start, stop): bool [H, W] of the video's size."""
        if self._reader is None:
            assert self._still is not None
            still = self._scaled(self._still)
            for _ in range(start, stop):
                yield still
            return
        for frames in self._reader.windows(self._indices[start:stop], WINDOW):
            for frame in frames:
                yield self._scaled(cv2.cvtColor(frame, cv2.COLOR_RGB2GRAY) >= HALF)

    def check_not_empty(self) -> None:
        """Raise InputUnreadable if no sampled frame has a white pixel: there would be nothing to render."""
        if not any(frame.any() for frame in self.frames(0, self._frames)):
            raise InputUnreadable(
                "the mask is empty (black) in every rendered frame",
                where=self.path,
                todo="Paint white where the character goes",
            )

    def close(self) -> None:
        """Release the file. Idempotent."""
        if self._reader:
            self._reader.close()

    def _scaled(self, mask: np.ndarray) -> np.ndarray:
        if mask.shape == (self._size[1], self._size[0]):
            return mask
        return cv2.resize(mask.astype(np.uint8), self._size, interpolation=cv2.INTER_NEAREST).astype(bool)


def mask_indices(reader: VideoReader, video: VideoInfo, sampled: Sampled) -> np.ndarray:
    """Return int64 [n]: the frame of the mask video for each sampled frame.

    It is the same number if mask and video have equally many frames, else the mask's frame at the same time. Raises
    InputTooShort or InputUnreadable if their lengths differ.
    """
    mask = reader.info
    if mask.frames == video.frames:
        return sampled.indices
    lengths = (
        f"the mask lasts {mask.duration_s:.2f} s ({mask.frames} frames), "
        f"the video {video.duration_s:.2f} s ({video.frames} frames)"
    )
    slack = float(1 / min(mask.fps, video.fps))
    todo = "Make the mask from the whole video, at any frame rate, or give a still image"
    if mask.duration_s < video.duration_s - slack:
        raise InputTooShort(lengths, where=mask.path, todo=todo)
    if mask.duration_s > video.duration_s + slack:
        raise InputUnreadable(lengths, where=mask.path, todo=todo)
    indices = reader.sample(sampled.fps, sampled.start_s).indices
    return indices[np.minimum(np.arange(len(sampled.indices)), len(indices) - 1)]

"""Driver masks: where the driving person is in each frame, found by a segmenter from the poses of pass 1.

In:   the video, the sampled frames, the poses. Out: one-bit masks of the whole clip.
Never: pixels kept; how a mask is widened (conditions.py, at the output's size).
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np

from runner.metrics import StageTimer
from runner.preprocess.clip_masks import ClipMasks
from runner.preprocess.conditions import Geometry, frames_at_once
from runner.preprocess.poses import FoundPoses
from runner.preprocess.prompts import PromptPlan
from runner.preprocess.segment import Segmenter, segment_clip
from runner.video import Sampled, VideoReader

__all__ = ["segment_driver"]


def segment_driver(
    segmenter: Segmenter, video: Path, sampled: Sampled, geometry: Geometry, found: FoundPoses, timer: StageTimer
) -> ClipMasks:
    """One mask a sampled frame, at the size that the networks saw. A third decode: the person is known only now.

    Joints of frames in which nobody was seen are guesses and prompt nothing. Raises NoPerson.
    """
    indices = np.asarray(sampled.indices, np.int64)
    unique, first, back = np.unique(indices, return_index=True, return_inverse=True)
    points = found.track.points[first].copy()
    points[~found.present[first], :, 2] = 0
    plan = PromptPlan(points, (found.track.width, found.track.height))
    with timer.stage("segment"), VideoReader(video) as reader:
        if geometry.parity:
            reader.sample("source", parity=True)  # numbers frames as the official reader does, as pass 1 did
        windows = _windows(reader, unique, geometry)
        return segment_clip(segmenter, windows, plan, numbers=unique, where=video).taken(back)


def _windows(reader: VideoReader, indices: np.ndarray, geometry: Geometry) -> Iterator[np.ndarray]:
    for native in reader.windows(indices, frames_at_once(reader.info.width, reader.info.height)):
        yield native if geometry.resize_first is None else np.stack([geometry.frame(frame) for frame in native])

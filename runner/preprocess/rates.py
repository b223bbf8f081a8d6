"""Rates: warn if a job's fps is above the driving video's frame rate.

In:   options, the video's rate, the sampled frames. Out: a warning. Never: sampling, networks.
"""

from __future__ import annotations

import numpy as np

from runner.spec.options import JobOptions
from runner.video import Sampled, VideoInfo

__all__ = ["RATE_TOLERANCE", "fps_warning"]

RATE_TOLERANCE = 1.01  # 30 and 29.97 frames a second look the same to a person


def fps_warning(options: JobOptions, video: VideoInfo, sampled: Sampled) -> str | None:
    """Return a warning if `options.fps` is above the video's rate, so that frames are repeated; else None.

    Not for official files: fps has no effect on them.
    """
    source = float(video.fps)
    if options.fps == "source" or options.fps <= source * RATE_TOLERANCE:
        return None
    if len(np.unique(sampled.indices)) == len(sampled.indices):
        return None
    cause = f"fps {options.fps:g} is above the {source:.5g} of the driving video: frames are repeated."
    if options.output.interpolate == 2:
        return f"{cause} Set fps to {source:.5g} at most, or to source; output.interpolate doubles it."
    half = options.fps / 2
    fps, written = (f"{half:g}", options.fps) if half <= source else ("source", 2 * source)
    instead = f"fps: {fps} with output: {{interpolate: 2}}, which writes {written:.5g} frames a second"
    return f"{cause} Set fps to {source:.5g} at most, or take {instead}."

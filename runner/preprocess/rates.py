"""Rates: what a job's fps does where the driving video has fewer frames a second.

In:   options, the video's rate, the frames that were sampled. Out: a warning. Never: sampling, networks.
"""

from __future__ import annotations

import numpy as np

from runner.spec.options import JobOptions
from runner.video import Sampled, VideoInfo

__all__ = ["RATE_TOLERANCE", "fps_warning"]

RATE_TOLERANCE = 1.01  # 30 of a video of 29.97 frames a second is the same rate to a person


def fps_warning(options: JobOptions, video: VideoInfo, sampled: Sampled) -> str | None:
    """Where `options.fps` is above the video's rate, so that frames are repeated: that, and what to do. Else None.

    Not for official files: their rate is their own, whatever fps says.
    """
    source = float(video.fps)
    if options.fps == "source" or options.fps <= source * RATE_TOLERANCE:
        return None
    if len(np.unique(sampled.indices)) == len(sampled.indices):
        return None
    found = f"fps {options.fps:g} is above the {source:.5g} of the driving video: frames are repeated."
    if options.output.interpolate == 2:
        return f"{found} Set fps to {source:.5g} at most, or to source; output.interpolate doubles it."
    half = options.fps / 2
    fps, written = (f"{half:g}", options.fps) if half <= source else ("source", 2 * source)
    instead = f"fps: {fps} with output: {{interpolate: 2}}, which writes {written:.5g} frames a second"
    return f"{found} Set fps to {source:.5g} at most, or take {instead}."

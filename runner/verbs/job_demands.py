"""Job demands: finds the properties of jobs that decide their memory, before the model is loaded.

In:   jobs, the roots of inputs. Out: one `JobDemand` per kind of job. Never: downloads, weights, forecasts.

Most come from the options: the size, if it is given, and the longest window. The size `auto` has the area of 480x832
and the aspect ratio of the reference or the video, and files of the official preprocessing have their own size. For
these two the header of the file is read if it is on this machine. An input in a bucket is not fetched for this.
"""

from __future__ import annotations

import time
from collections.abc import Iterable, Sequence
from pathlib import Path

import structlog

from runner.errors import RunnerError
from runner.generation.protocol import JobDemand
from runner.generation.segments import longest_window
from runner.spec.manifest import Job
from runner.storage import fetch_input, is_remote
from runner.storage.roots import check_inside

__all__ = ["find_demands"]

READ_S = 10.0  # time limit for reading all headers, seconds; assumed


def find_demands(jobs: Iterable[Job], roots: Sequence[str], within_s: float = READ_S) -> tuple[JobDemand, ...]:
    """Return each demand once. Raises nothing: a job whose input cannot be read in time has no size."""
    headers = _Headers(roots, time.monotonic() + within_s)
    found, unknown = dict[JobDemand, None](), 0
    for job in jobs:
        options = job.options
        size = _find_size(job, headers)
        unknown += size is None and job.official is not None  # the others have about the same area
        demand = JobDemand(
            size,
            longest_window(options),
            guided=options.guidance_scale > 1,
            interpolates=options.output.interpolate > 1,
            loras=tuple((lora.name, lora.strength) for lora in options.loras),
            replace=options.mode == "replace",
        )
        found[demand] = None
    if unknown:
        structlog.get_logger().info(
            "sizes_not_known", jobs=unknown, why="their files cannot be read now; memory is planned for 480x832"
        )
    return tuple(found)


def _find_size(job: Job, headers: _Headers) -> tuple[int, int] | None:
    """Return (width, height); with `preprocess.parity` the requested size, which is never below the rendered one."""
    from runner.preprocess.pictures.sizing import output_size

    options = job.options
    if job.official is not None:
        return headers.video_size(job.video)
    if options.size_pixels is not None:
        return options.size_pixels
    replaces = options.mode == "replace"
    shape = headers.video_size(job.video) if replaces else headers.image_size(job.reference)
    return None if shape is None else output_size(options, shape, shape)


class _Headers:
    """Reads sizes (width, height) of files on this machine, each once, until `deadline` (monotonic clock)."""

    def __init__(self, roots: Sequence[str], deadline: float) -> None:
        self._roots, self._deadline = roots, deadline
        self._sizes: dict[str, tuple[int, int] | None] = {}

    def image_size(self, place: str) -> tuple[int, int] | None:
        return self._size(place, video=False)

    def video_size(self, place: str) -> tuple[int, int] | None:
        return self._size(place, video=True)

    def _size(self, place: str, *, video: bool) -> tuple[int, int] | None:
        if place not in self._sizes:
            late = time.monotonic() > self._deadline
            self._sizes[place] = None if late or is_remote(place) else self._read(place, video)
        return self._sizes[place]

    def _read(self, place: str, video: bool) -> tuple[int, int] | None:
        from runner.preprocess.pictures.images import image_size
        from runner.video import VideoReader

        try:
            path = fetch_input(check_inside(place, self._roots), Path())  # a local file stays where it is
            if not video:
                return image_size(path)
            with VideoReader(path) as reader:
                return reader.info.width, reader.info.height
        except (RunnerError, OSError):
            return None

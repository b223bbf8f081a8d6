"""Inputs: do the files that jobs name exist, and open as what they are said to be?

In:   jobs. Out: (job id, error) for every input that a render could not use, before any GPU is paid for.
Never: people in pictures, weights, outputs. Pixels are decoded only when asked (`deep`).
"""

from __future__ import annotations

import tempfile
from collections import defaultdict
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

from runner.errors import InputUnreadable, RunnerError, as_runner_error
from runner.manifest import Job
from runner.storage import fetch_input, is_remote, stat_input

__all__ = ["check_inputs"]


@dataclass
class _Input:
    """One file in one role, and the jobs that use it so."""

    uri: str
    role: str  # reference | video | mask
    jobs: list[Job] = field(default_factory=list)


def check_inputs(jobs: Iterable[Job], *, deep: bool = False, workers: int = 8) -> list[tuple[str, RunnerError]]:
    """What is wrong with the inputs, in the order of the jobs; empty if all can be used.

    Local images and videos are opened: headers, and for a video whether it has the frames that the job asks for. S3
    objects are asked for and must not be empty. `deep`: S3 objects are fetched (one at a time for each worker, and
    removed again) and opened too, and images are decoded whole. Each file is looked at once however many jobs use it.
    """
    inputs: dict[tuple[str, str], _Input] = {}
    jobs = list(jobs)
    for job in jobs:
        for role, uri in (("reference", job.reference), ("video", job.video), ("mask", job.mask)):
            if uri is not None:
                inputs.setdefault((uri, role), _Input(uri, role)).jobs.append(job)
    found: dict[str, list[RunnerError]] = defaultdict(list)
    with ThreadPoolExecutor(max_workers=max(1, workers), thread_name_prefix="inputs") as pool:
        for problems in pool.map(lambda item: _check(item, deep), inputs.values()):
            for job_id, error in problems:
                found[job_id].append(error)
    return [(job.id, error) for job in jobs for error in found.get(job.id, ())]


def _check(item: _Input, deep: bool) -> Sequence[tuple[str, RunnerError]]:
    """(job id, error) for each job that cannot use `item`."""
    try:
        info = stat_input(item.uri)
        if info.bytes == 0:
            raise InputUnreadable("the file is empty (0 bytes)", where=item.uri, todo="Copy or upload it again")
        if is_remote(item.uri) and not deep:
            return []
        with tempfile.TemporaryDirectory(prefix="video-lab-") as folder:
            return _open(item, fetch_input(item.uri, Path(folder)), deep)
    except Exception as err:  # whatever a decoder throws is this input's, and the others are still looked at
        error = _named(err, item.uri)
        return [(job.id, error) for job in item.jobs]


def _open(item: _Input, path: Path, deep: bool) -> Sequence[tuple[str, RunnerError]]:
    from runner.preprocess.images import image_size, is_image, load_image

    if item.role == "reference" or (item.role == "mask" and is_image(path)):
        if deep:
            load_image(path)
        else:
            image_size(path)
        return []
    from runner.video import VideoReader

    problems = []
    with VideoReader(path) as reader:
        for job in item.jobs if item.role == "video" else ():
            options = job.options
            try:
                reader.sample(options.fps, options.start_s, options.max_frames, parity=options.preprocess.parity)
            except RunnerError as err:
                problems.append((job.id, _named(err, item.uri)))
    return problems


def _named(err: Exception, uri: str) -> RunnerError:
    """As an error of ours that names the input as the manifest does, not a copy in a scratch folder."""
    error = as_runner_error(err, where=uri)
    if is_remote(uri):
        error.where = uri
    return error

"""Fetch: one job's inputs as local files.

In:   a job, a scratch folder of its own. Out: a `Request` for the generator. Never: what is in the files.
"""

from __future__ import annotations

from pathlib import Path

from runner.generation.base import Request
from runner.manifest import Job
from runner.official import official_names
from runner.storage import fetch_input, is_remote, local_path, open_storage

__all__ = ["fetch_request"]


def fetch_request(job: Job, folder: Path) -> Request:
    """Local inputs where they lie, S3 objects copied below `folder`. Raises InputNotFound, storage.*."""
    return Request(
        fetch_input(job.reference, folder / "reference"),
        fetch_input(job.video, folder / "video"),
        job.prompt,
        job.options,
        official=_official(job.official, job.options.mode, folder / "official") if job.official else None,
        mask=fetch_input(job.mask, folder / "mask") if job.mask else None,
    )


def _official(uri: str, mode: str, folder: Path) -> Path:
    """The folder of the official script's files."""
    if not is_remote(uri):
        return local_path(uri)
    source = open_storage(uri)
    folder.mkdir()
    for name in official_names(mode).values():
        source.fetch(name, folder / name)
    return folder

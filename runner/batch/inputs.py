"""Inputs: what one job's inputs hold, by identity, and the inputs as local files.

In:   a job, a scratch folder of its own. Out: identities for its fingerprint; a `Request` for the generator.
Never: what the bytes mean.
"""

from __future__ import annotations

from pathlib import Path

from runner.batch.fingerprint import sha256_file
from runner.generation.protocol import Request
from runner.records.record import InputRecord
from runner.spec.manifest import Job
from runner.spec.options import official_names
from runner.storage import fetch_input, is_remote, local_path, open_storage, stat_input

__all__ = ["fetch_request", "identify_inputs"]


def identify_inputs(job: Job) -> dict[str, InputRecord]:
    """Name → what the input holds now. Local files are read in full; of S3 objects the ETag and size are asked.

    Raises InputNotFound, StorageDenied, StorageUnavailable.
    """
    uris = {"reference": job.reference, "video": job.video} | ({"mask": job.mask} if job.mask else {})
    if job.official:
        uris = {name: f"{job.official}/{file}" for name, file in official_names(job.options.mode).items()}
    found = {}
    for name, uri in uris.items():
        info = stat_input(uri)
        identity = info.identity if is_remote(uri) else f"sha256:{sha256_file(local_path(uri))}"
        found[name] = InputRecord(uri=uri, bytes=info.bytes, identity=identity)
    return found


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

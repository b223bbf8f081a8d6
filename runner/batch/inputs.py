"""Inputs: the identities of a job's inputs, the reader that its driving video needs, and the inputs as local files.

In:   a job, a scratch folder of its own. Out: identities and reader for its fingerprint; a `Request` for the generator.
Never: models, frames that are kept.
"""

from __future__ import annotations

import hashlib
import json
import tempfile
import threading
from collections.abc import Mapping, Sequence
from concurrent.futures import Future
from importlib import metadata
from pathlib import Path

from runner.errors import InputError, StorageUnavailable
from runner.generation.protocol import Request
from runner.records.record import InputRecord
from runner.spec.manifest import Job
from runner.spec.options import official_names
from runner.storage import fetch_input, fetch_input_with_info, identify_input, is_remote, local_path
from runner.storage.file_hashes import FileHashes
from runner.storage.roots import check_inside

__all__ = ["InputIndex", "fetch_request"]

COMPARING = threading.Lock()  # readers are compared one file at a time: each comparison holds up to 300 MB


class InputIndex:
    """What inputs hold, by identity. Each one is looked at once in the life of this object. Safe from any thread."""

    def __init__(self, hashes: FileHashes, roots: Sequence[str] = ()) -> None:
        self._hashes, self._roots = hashes, roots
        self._known: dict[str, Future[InputRecord]] = {}
        self._lock = threading.Lock()

    def identify(self, job: Job) -> dict[str, InputRecord]:
        """Name → what the input holds. Local files are hashed; an object store is asked for the identity.

        Raises InputNotFound, InputUnreadable (also outside `roots`, where there are any), StorageDenied,
        StorageUnavailable.
        """
        return {name: self._record(uri) for name, uri in _places(job).items()}

    def find_reader(self, job: Job, inputs: Mapping[str, InputRecord]) -> str | None:
        """`decord` for a parity job that decord gives other frames than PyAV; None for every other job.

        `inputs`: those that `identify` returned. Both readers decode the sampled frames. The result is kept with the
        hashes of files: the next run decodes nothing. An object is fetched for it. None, too, for a video that PyAV
        refuses: the job fails with that error when it is prepared. Raises StorageDenied, StorageUnavailable,
        StorageFull; ConfigInvalid where decord is not installed.
        """
        options = job.options
        if not options.preprocess.parity or job.official:
            return None
        versions = [_version(name) for name in ("av", "decord2")]
        sampling = [options.fps, options.start_s, options.max_frames]
        question = json.dumps(["readers differ", inputs["video"].identity, sampling, versions])
        name = hashlib.sha256(question.encode()).hexdigest()
        try:
            with COMPARING:
                differ = self._hashes.fact(name, lambda: self._readers_differ(job))
        except InputError:
            return None
        return "decord" if differ else None

    def _readers_differ(self, job: Job) -> bool:
        from runner.video import readers_differ

        options = job.options
        with tempfile.TemporaryDirectory(prefix="video-lab-") as folder:
            path = fetch_input(check_inside(job.video, self._roots), Path(folder))
            return readers_differ(path, options.fps, options.start_s, options.max_frames)

    def _record(self, uri: str) -> InputRecord:
        with self._lock:
            known = self._known.get(uri)
            first = known is None
            if known is None:
                known = self._known[uri] = Future()
        if first:
            try:
                known.set_result(self._look(uri))
            except BaseException as error:
                known.set_exception(error)
        return known.result()

    def _look(self, uri: str) -> InputRecord:
        info, identity = identify_input(check_inside(uri, self._roots), self._hashes.sha256)
        return InputRecord(uri=uri, bytes=info.bytes, identity=identity)


def _version(distribution: str) -> str | None:
    """Return the installed version; None where there is none. Nothing is imported, so a done job starts fast."""
    try:
        return metadata.version(distribution)
    except metadata.PackageNotFoundError:
        return None


def _places(job: Job) -> dict[str, str]:
    if job.official:
        return {name: f"{job.official}/{file}" for name, file in official_names(job.options.mode).items()}
    return {"reference": job.reference, "video": job.video} | ({"mask": job.mask} if job.mask else {})


def fetch_request(
    job: Job, folder: Path, inputs: Mapping[str, InputRecord], roots: Sequence[str] = ()
) -> tuple[Request, list[str]]:
    """Local inputs where they lie, objects copied below `folder`; and a warning for each that could not be verified.

    `inputs`: what was identified. `roots`: where inputs must lie, if there are any. Raises StorageUnavailable, which is
    tried again, for an object that has changed since then; InputNotFound, InputUnreadable, storage.*.
    """
    warnings: list[str] = []

    identified = {record.uri: record for record in inputs.values()}

    def fetch(name: str, uri: str, below: Path) -> Path:
        fetched = fetch_input_with_info(check_inside(uri, roots), below)
        known = identified.get(uri)
        if is_remote(uri) and known is not None and known.identity != fetched.info.identity:
            raise StorageUnavailable(f"the {name} has changed since the job was begun", where=uri, todo="Run again")
        if fetched.unverified:
            warnings.append(f"unverified transfer: {uri} (the store gives no digest to compare it with)")
        return fetched.path

    official = None
    if job.official:
        official = folder / "official" if is_remote(job.official) else local_path(job.official)
        for name, file in official_names(job.options.mode).items():
            uri = f"{job.official}/{file}"
            if is_remote(uri):
                fetch(name, uri, folder / "fetched").rename(_made(official) / file)
            else:
                check_inside(uri, roots)
    request = Request(
        fetch("reference", job.reference, folder / "reference"),
        fetch("video", job.video, folder / "video"),
        job.prompt,
        job.options,
        official=official,
        mask=fetch("mask", job.mask, folder / "mask") if job.mask else None,
    )
    return request, warnings


def _made(folder: Path) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    return folder

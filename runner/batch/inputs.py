"""Inputs: the digests of a job's inputs, the reader that its driving video needs, and the inputs as local files.

In:   a job and its scratch folder. Out: digests and reader for its fingerprint; a `Request` for the generator.
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

COMPARING = threading.Lock()  # readers are compared one file at a time: each comparison uses up to 300 MB


class InputIndex:
    """Digests of inputs. Each input is read once per object of this class. Safe from any thread."""

    def __init__(self, hashes: FileHashes, roots: Sequence[str] = ()) -> None:
        self._hashes, self._roots = hashes, roots
        self._known: dict[str, Future[InputRecord]] = {}
        self._lock = threading.Lock()

    def identify(self, job: Job) -> dict[str, InputRecord]:
        """Return input name → record with its digest. Local files are hashed; an object store gives the ETag.

        Raises InputNotFound, InputUnreadable (also for an input outside `roots`, if there are any), StorageDenied,
        StorageUnavailable.
        """
        return {name: self._record(uri) for name, uri in _places(job).items()}

    def find_reader(self, job: Job, inputs: Mapping[str, InputRecord]) -> str | None:
        """Return `decord` for a parity job whose sampled frames differ between decord and PyAV; else None.

        `inputs`: the result of `identify`. Both readers decode the sampled frames; an object is fetched for that. The
        result is kept with the file hashes, so that the next run decodes nothing. Also None for a video that PyAV
        refuses: the job fails with that error when it is prepared. Raises StorageDenied, StorageUnavailable,
        StorageFull; ConfigInvalid if decord is not installed.
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
                known.set_result(self._identify(uri))
            except BaseException as error:
                known.set_exception(error)
        return known.result()

    def _identify(self, uri: str) -> InputRecord:
        info, identity = identify_input(check_inside(uri, self._roots), self._hashes.sha256)
        return InputRecord(uri=uri, bytes=info.bytes, identity=identity)


def _version(distribution: str) -> str | None:
    """Return the installed version, or None. It imports nothing, so that a finished job costs little time."""
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
    """Return the generator's request, and a warning for each transfer that could not be verified.

    Local inputs are used in place; objects are copied below `folder`. `inputs`: the result of `InputIndex.identify`.
    `roots`: where inputs must be, if there are any. Raises StorageUnavailable (retryable) for an object that has
    changed since it was identified; InputNotFound, InputUnreadable, storage.*.
    """
    warnings: list[str] = []

    identified = {record.uri: record for record in inputs.values()}

    def fetch(name: str, uri: str, below: Path) -> Path:
        fetched = fetch_input_with_info(check_inside(uri, roots), below)
        known = identified.get(uri)
        if is_remote(uri) and known is not None and known.identity != fetched.info.identity:
            raise StorageUnavailable(
                f"the input '{name}' has changed since the job began",
                where=uri,
                todo="Do not change inputs during a run. Run the same command again",
            )
        if fetched.unverified:
            warnings.append(f"unverified transfer: {uri} (the store gives no digest to compare the bytes with)")
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

"""Input upload: copies the local inputs of a run to an object store, where its tasks read them.

In:   local files and folders of official files, the URI of a prefix. Out: their URIs in the store; the copies.
Never: manifests; whether an input can be decoded.

A file's key consists of the sha256 of its content and its name. So the same file is sent only once for all runs, and a
file with other content never replaces it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import structlog

from runner.errors import StorageUnavailable
from runner.hashing import sha256_file
from runner.storage import Storage, check_key, combined_identity, open_storage

__all__ = ["InputUpload", "UploadFile", "plan_uploads", "send_uploads"]

AT_ONCE = 8
HEX = 32  # digits of a content's sha256 in a key: 128 bits


@dataclass(frozen=True)
class UploadFile:
    """One file to be copied."""

    path: Path
    key: str  # below the prefix
    bytes: int
    modified_ns: int  # when it was hashed


@dataclass(frozen=True)
class InputUpload:
    """A local input, its URI in the store and its files: a single file, or a folder of files."""

    place: str  # path on this machine
    uri: str  # in the store
    files: tuple[UploadFile, ...]


def plan_uploads(places: Mapping[str, Iterable[str]], root: str) -> list[InputUpload]:
    """Read and hash local inputs. Sends nothing.

    places: path of a file → (), of a folder → the names of the files in it that are needed. root: URI of the prefix.
    Raises ConfigInvalid for a name that cannot be part of a key, OSError for a file that cannot be read.
    """
    storage = open_storage(root)
    with ThreadPoolExecutor(AT_ONCE, thread_name_prefix="hash") as pool:
        return list(pool.map(lambda item: _plan(item[0], sorted(item[1]), storage), places.items()))


def _plan(place: str, names: list[str], storage: Storage) -> InputUpload:
    if not names:
        path = Path(place)
        digest, entry = _hash_file(path)
        file = UploadFile(path, check_key(f"{digest[:HEX]}/{path.name}"), *entry)
        return InputUpload(place, storage.uri(file.key), (file,))
    hashed = {name: _hash_file(Path(place, name)) for name in names}
    identity, _, _ = combined_identity({name: (digest, entry[0]) for name, (digest, entry) in hashed.items()})
    folder = f"{identity.removeprefix('sha256:')[:HEX]}/{Path(place).name or 'official'}"
    files = [
        UploadFile(Path(place, name), check_key(f"{folder}/{name}"), *entry) for name, (_, entry) in hashed.items()
    ]
    return InputUpload(place, storage.uri(folder), tuple(files))


def _hash_file(path: Path) -> tuple[str, tuple[int, int]]:
    """Return (sha256 of the file, (its size in bytes, its modification time in ns))."""
    entry = _size_and_time(path)
    return sha256_file(path), entry


def _size_and_time(path: Path) -> tuple[int, int]:
    status = path.stat()
    return status.st_size, status.st_mtime_ns


def send_uploads(uploads: Iterable[InputUpload], root: str) -> int:
    """Copy the files that the store does not have yet, log each file, and return the number of copied files.

    Raises StorageUnavailable for a file that was changed after it was hashed; storage.*, OSError.
    """
    storage = open_storage(root)
    files = list({file.key: file for upload in uploads for file in upload.files}.values())
    log = structlog.get_logger()
    sent = 0
    with ThreadPoolExecutor(AT_ONCE, thread_name_prefix="upload") as pool:
        try:
            for number, (file, was_sent) in enumerate(pool.map(_sender(storage), files), start=1):
                sent += was_sent
                event, uri = "uploaded" if was_sent else "already_there", storage.uri(file.key)
                log.info(event, file=str(file.path), uri=uri, bytes=file.bytes, number=number, files=len(files))
        except BaseException:
            pool.shutdown(cancel_futures=True)
            raise
    return sent


def _sender(storage: Storage) -> Callable[[UploadFile], tuple[UploadFile, bool]]:
    def send(file: UploadFile) -> tuple[UploadFile, bool]:
        there = storage.stat(file.key)
        if there is not None and there.bytes == file.bytes:
            return file, False
        storage.publish(file.path, file.key)
        if _size_and_time(file.path) != (file.bytes, file.modified_ns):
            storage.delete(file.key)  # its content may not match the sha256 in its key
            raise StorageUnavailable("was changed while it was sent", where=file.path, todo="Run the command again")
        return file, True

    return send

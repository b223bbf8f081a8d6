"""URIs: open the storage or the input file of a path, a `file:///` URI or a URI of an object store.

In:   a URI. Out: a `Storage`; the size and identity of an input; an input as a local file. Never: what the bytes mean.

A backend is one row of `BACKENDS`. Its module is imported when the first URI of its scheme is opened: boto3 takes half
a second to import. A URI of an object store has the form `<scheme>://<bucket>/<key>`.
"""

from __future__ import annotations

import hashlib
import os
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path, PurePosixPath
from urllib.parse import unquote, urlsplit
from uuid import uuid4

from runner.errors import BucketMissing, ConfigInvalid, InputNotFound, InputUnreadable, InternalError
from runner.hashing import sha256_file
from runner.storage.base import PROBE_NAME, ObjectInfo, Storage, check_key
from runner.storage.disk import os_errors
from runner.storage.regular_file import check_regular_file

__all__ = [
    "BACKENDS",
    "FetchedInput",
    "backend_class",
    "download_name",
    "fetch_input",
    "fetch_input_with_info",
    "identify_input",
    "is_remote",
    "local_path",
    "open_storage",
    "probe_conditions",
    "probe_writable",
    "remote_forms",
    "split_object",
    "split_uri",
    "stat_input",
]

LOCAL = "file"  # the scheme of local paths, which are used in place and never fetched
BACKENDS = {  # scheme → module:class of its Storage
    LOCAL: "runner.storage.local:LocalStorage",
    "s3": "runner.storage.s3:S3Storage",
}
_SCHEME = re.compile(r"[A-Za-z][A-Za-z0-9+.-]+")


@dataclass(frozen=True)
class FetchedInput:
    """An input as a local file, and the object that was read."""

    path: Path
    info: ObjectInfo
    unverified: bool  # it came over the network, and the store gave no digest to compare it with


# Parts of a URI


def _scheme(uri: str | Path) -> str:
    """Return the scheme in lower case; `file` for a plain path."""
    scheme, separator, _ = str(uri).partition("://")
    plain = isinstance(uri, Path) or not separator or not _SCHEME.fullmatch(scheme)
    return LOCAL if plain else scheme.lower()


def is_remote(uri: str | Path) -> bool:
    """Return whether this is a URI of an object store, and not a local path."""
    return _scheme(uri) in BACKENDS.keys() - {LOCAL}


def remote_forms() -> str:
    """Return the forms of object store URIs, for error messages."""
    return " or ".join(f"{scheme}://bucket/key" for scheme in BACKENDS if scheme != LOCAL)


def split_uri(uri: str) -> tuple[str, str, str]:
    """Return (scheme in lower case, bucket, key) of an object store's URI; bucket and key may be empty."""
    scheme, _, rest = uri.partition("://")
    bucket, _, key = rest.partition("/")
    return scheme.lower(), bucket, key


def split_object(uri: str) -> tuple[str, str]:
    """Return (root of a storage, key below it) of an object's URI. Raises InputNotFound for a bucket or a folder."""
    root, _, name = uri.rpartition("/")
    if root.count("/") < 2 or not name:  # s3://bucket, s3://bucket/folder/
        todo = f"Write {_scheme(uri)}://bucket/path/file"
        raise InputNotFound("this names a bucket or a folder, not a file", where=uri, todo=todo)
    return root, name


def local_path(uri: str | Path) -> Path:
    """Return a plain path or `file:///…` URI (percent-decoded, RFC 8089) as a path. Raises ConfigInvalid for others."""
    if isinstance(uri, Path):
        return uri
    scheme, separator, _ = uri.partition("://")
    if not separator or not _SCHEME.fullmatch(scheme):
        if not uri or "\0" in uri:
            raise ConfigInvalid(f"{uri!r} is not a path", todo=f"Give a folder or {remote_forms()}")
        try:
            return _native_path(uri).expanduser()
        except RuntimeError as err:  # ~name, or ~ of a user without a home folder
            what = f"{uri!r} begins with ~, but there is no such home folder here"
            raise ConfigInvalid(what, todo="Write the path in full") from err
    if scheme.lower() != LOCAL:
        todo = f"Use a path, file:/// or {remote_forms()}"
        raise ConfigInvalid(f"{scheme}:// is not supported", where=uri, todo=todo)
    parts = urlsplit(uri)
    path = unquote(uri.partition("://")[2][len(parts.netloc) :])
    if parts.netloc not in ("", "localhost") or not path.startswith("/") or "\0" in path:
        raise ConfigInvalid(
            "a file URI must name an absolute path on this machine", where=uri, todo="Write file:///folder"
        )
    return _native_path(path)


def _native_path(text: str) -> Path:
    """Return `text` as a path whose bytes are UTF-8, also if Python encodes file names as ASCII (LC_ALL=POSIX)."""
    try:
        os.fsencode(text)
        return Path(text)
    except UnicodeEncodeError:
        pass
    try:
        return Path(os.fsdecode(text.encode("utf-8", "surrogateescape")))
    except UnicodeError as err:
        raise ConfigInvalid(f"{text!r} is not valid Unicode", todo=f"Give a folder or {remote_forms()}") from err


# Storages


def backend_class(uri: str | Path) -> type[Storage]:
    """Return the class for the URI's scheme. Raises ConfigInvalid, with the known schemes, for an unknown one."""
    scheme = _scheme(uri)
    if scheme not in BACKENDS:
        local_path(uri)  # raises
    module, _, name = BACKENDS[scheme].partition(":")
    found: type[Storage] = getattr(import_module(module), name)
    return found


def open_storage(uri: str | Path) -> Storage:
    """Return the storage with this root: a folder, a `file:///` URI or `s3://bucket[/prefix]`. No request is sent yet.

    Raises ConfigInvalid for a URI that can never work, and for a wrong setting of its backend in the environment.
    """
    return backend_class(uri).from_uri(uri, os.environ)


PROBE = b"Video Lab runner tests whether it can write here\n" * 100


def probe_writable(storage: Storage) -> None:
    """Write, read and delete one small object, so that a run that cannot store its results fails at once.

    Raises StorageDenied, StorageFull, StorageUnavailable or ConfigInvalid, each with the remedy.
    """
    key = f"{PROBE_NAME}{uuid4().hex}"
    storage.write_bytes(key, PROBE)
    try:
        _require_probe(storage, key)
    finally:
        storage.delete(key)


def _require_probe(storage: Storage, key: str) -> None:
    if storage.read_bytes(key) != PROBE:
        raise InternalError(
            "a test object reads back with other content than was written",
            where=storage.uri(key),
            todo="Check the store: no run can use it",
        )


def probe_conditions(storage: Storage) -> str | None:
    """Test conditional writes with one small object. Return None if they work, else one sentence with the problem.

    It includes the test of `probe_writable` and raises the same errors. Leases need conditional writes: without them
    two runners can both take the same job. If the store ignores conditions, `storage` compares before each write from
    then on.
    """
    key = f"{PROBE_NAME}{uuid4().hex}"
    try:
        problem = _ignored_condition(storage, key)
        if problem:
            storage.distrust_conditions()
        return problem or storage.weak_conditions()
    finally:
        storage.delete(key)


def _ignored_condition(storage: Storage, key: str) -> str | None:
    first = storage.write_if(key, PROBE, None)
    if first is None:
        return "the store refuses to create an object although its key is free"
    _require_probe(storage, key)
    if storage.write_if(key, b"second", None) is not None:
        return "the store replaces an object although the request says to create it only if its key is free"
    third = storage.write_if(key, b"third", first)
    if third is None:
        return "the store refuses to replace an object although its version is the expected one"
    if storage.write_if(key, b"fourth", first) is not None:
        return "the store replaces an object although its version is not the expected one"
    return None


# Inputs


def stat_input(uri: str | Path) -> ObjectInfo:
    """Return the size, time and (of an object) identity of an input, without reading it.

    Raises InputNotFound; InputUnreadable for a folder, a pipe, and a file that cannot be read or does not answer;
    StorageDenied; StorageUnavailable; ConfigInvalid only for a wrong configuration of the backend itself.
    """
    if is_remote(uri):
        return _stat_object(str(uri))[1]
    try:
        path = local_path(uri)
    except ConfigInvalid as err:  # only this job's input is wrong; the other jobs continue
        raise InputNotFound(err.what, where=uri, todo=err.todo) from err
    with os_errors(path, writing=False):
        status = check_regular_file(path)
    return ObjectInfo(str(path), status.st_size, None, status.st_mtime, path.name)


def identify_input(uri: str | Path, sha256: Callable[[Path], str] = sha256_file) -> tuple[ObjectInfo, str]:
    """Return an input's object and its identity. If the store does not give the identity, `sha256` hashes the file.

    Raises as `stat_input` does.
    """
    if is_remote(uri):
        storage, info = _stat_object(str(uri))
        with _one_input(str(uri)):
            return info, storage.identify(info, sha256)
    info = stat_input(uri)
    path = Path(info.uri)
    with os_errors(path, writing=False):
        return info, f"sha256:{sha256(path)}"


def fetch_input(uri: str | Path, dest_dir: Path) -> Path:
    """Return an input as a local file: a local one in place, an object copied below `dest_dir` with its own name.

    Raises as `stat_input` does, and StorageFull.
    """
    return fetch_input_with_info(uri, dest_dir).path


def fetch_input_with_info(uri: str | Path, dest_dir: Path) -> FetchedInput:
    """Do as `fetch_input`, and return the object that was read and whether it was verified."""
    if not is_remote(uri):
        info = stat_input(uri)
        return FetchedInput(Path(info.uri), info, unverified=False)
    storage, key = _open_object(str(uri))
    dest = dest_dir / download_name(str(uri))
    with _one_input(str(uri)):
        info = storage.fetch(key, dest)
    return FetchedInput(dest, info, unverified=not info.verified)


def _stat_object(uri: str) -> tuple[Storage, ObjectInfo]:
    storage, key = _open_object(uri)
    with _one_input(uri):
        info = storage.stat(key)
    if info is None:
        raise InputNotFound("no such object", where=uri, todo="Check the bucket and the key")
    return storage, info


def _open_object(uri: str) -> tuple[Storage, str]:
    """Return the storage of one object, and its key there."""
    root, name = split_object(uri)
    try:
        return open_storage(root), check_key(name)
    except ConfigInvalid as err:
        if err.where and not is_remote(err.where):  # a setting of the backend, by the name of its variable
            raise
        raise InputNotFound(err.what, where=uri, todo=err.todo) from err


@contextmanager
def _one_input(uri: str) -> Iterator[None]:
    """Turn a store's refusal of one object into an error of this input.

    Examples: the bucket does not exist or is in another region; the key is too long. An error of the configuration,
    which names a variable instead of the object, is not changed.
    """
    try:
        yield
    except BucketMissing as err:
        raise InputNotFound(err.what, where=uri, todo=err.todo) from err
    except ConfigInvalid as err:
        if is_remote(err.where or ""):
            raise InputUnreadable(err.what, where=uri, todo=err.todo) from err
        raise


def download_name(uri: str) -> str:
    """Return the path of a downloaded object below its folder: its own name, in a folder named by a hash."""
    name = PurePosixPath(uri.rpartition("/")[2])
    stem = name.stem.encode()[:120].decode(errors="ignore")  # file names hold 255 bytes, keys 1024
    return f"{hashlib.sha256(uri.encode()).hexdigest()[:12]}/{stem}{name.suffix[:16]}"

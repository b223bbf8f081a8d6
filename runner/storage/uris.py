"""URIs: the storage or the input file behind a path, a `file:///` URI or a URI of an object store.

In:   a URI. Out: a `Storage`, what an input is, an input as a local file. Never: what the bytes mean.

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

LOCAL = "file"  # the scheme of local paths, which are inputs where they lie and are never fetched
BACKENDS = {  # scheme → module:class of its Storage
    LOCAL: "runner.storage.local:LocalStorage",
    "s3": "runner.storage.s3:S3Storage",
}
_SCHEME = re.compile(r"[A-Za-z][A-Za-z0-9+.-]+")


@dataclass(frozen=True)
class FetchedInput:
    """An input as a local file, and what was read."""

    path: Path
    info: ObjectInfo
    unverified: bool  # it came over the network, and the store gave no digest to compare it with


# What a URI says


def _scheme(uri: str | Path) -> str:
    """In lower case; `file` for a plain path."""
    scheme, separator, _ = str(uri).partition("://")
    plain = isinstance(uri, Path) or not separator or not _SCHEME.fullmatch(scheme)
    return LOCAL if plain else scheme.lower()


def is_remote(uri: str | Path) -> bool:
    """Does this name a place in one of the object stores, rather than a local path?"""
    return _scheme(uri) in BACKENDS.keys() - {LOCAL}


def remote_forms() -> str:
    """What URIs of object stores look like, in words for an error message."""
    return " or ".join(f"{scheme}://bucket/key" for scheme in BACKENDS if scheme != LOCAL)


def split_uri(uri: str) -> tuple[str, str, str]:
    """(scheme in lower case, bucket, key) of a URI of an object store; bucket and key may be empty."""
    scheme, _, rest = uri.partition("://")
    bucket, _, key = rest.partition("/")
    return scheme.lower(), bucket, key


def split_object(uri: str) -> tuple[str, str]:
    """(root of a storage, key below it) of the URI of one object. Raises InputNotFound for a bucket or a folder."""
    root, _, name = uri.rpartition("/")
    if root.count("/") < 2 or not name:  # s3://bucket, s3://bucket/folder/
        todo = f"Write {_scheme(uri)}://bucket/path/file"
        raise InputNotFound("names a bucket or a folder, not a file", where=uri, todo=todo)
    return root, name


def local_path(uri: str | Path) -> Path:
    """A plain path or a `file:///…` URI (percent-decoded, RFC 8089) as a path. Raises ConfigInvalid for other URIs."""
    if isinstance(uri, Path):
        return uri
    scheme, separator, _ = uri.partition("://")
    if not separator or not _SCHEME.fullmatch(scheme):
        if not uri or "\0" in uri:
            raise ConfigInvalid(f"{uri!r} is not a path", todo=f"Give a folder or {remote_forms()}")
        try:
            return _native_path(uri).expanduser()
        except RuntimeError as err:  # ~name, or ~ of a user without a home
            what = f"{uri!r} begins with ~, which names no home folder here"
            raise ConfigInvalid(what, todo="Write the path in full") from err
    if scheme.lower() != LOCAL:
        todo = f"Use a path, file:/// or {remote_forms()}"
        raise ConfigInvalid(f"{scheme}:// is not supported", where=uri, todo=todo)
    parts = urlsplit(uri)
    path = unquote(uri.partition("://")[2][len(parts.netloc) :])
    if parts.netloc not in ("", "localhost") or not path.startswith("/") or "\0" in path:
        raise ConfigInvalid("a file URI names an absolute path on this machine", where=uri, todo="Write file:///folder")
    return _native_path(path)


def _native_path(text: str) -> Path:
    """`text` as a path whose bytes are UTF-8, also where Python takes file names for ASCII (LC_ALL=POSIX)."""
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
    """The class that serves the URI's scheme. Raises ConfigInvalid, which lists the schemes, for an unknown one."""
    scheme = _scheme(uri)
    if scheme not in BACKENDS:
        local_path(uri)  # raises
    module, _, name = BACKENDS[scheme].partition(":")
    found: type[Storage] = getattr(import_module(module), name)
    return found


def open_storage(uri: str | Path) -> Storage:
    """The storage rooted at a folder, a `file:///` URI or `s3://bucket[/prefix]`. Nothing is asked of it yet.

    Raises ConfigInvalid for a URI that can never work, and for a wrong setting of its backend in the environment.
    """
    return backend_class(uri).from_uri(uri, os.environ)


PROBE = b"Video Lab runner asks whether it may write here\n" * 100


def probe_writable(storage: Storage) -> None:
    """Write, read and delete one small object, so that a run that cannot store its results ends before it begins.

    Raises StorageDenied, StorageFull, StorageUnavailable or ConfigInvalid, each with what to do about it.
    """
    key = f"{PROBE_NAME}{uuid4().hex}"
    storage.write_bytes(key, PROBE)
    try:
        _require_probe(storage, key)
    finally:
        storage.delete(key)


def _require_probe(storage: Storage, key: str) -> None:
    if storage.read_bytes(key) != PROBE:
        raise InternalError("what was written does not read back", where=storage.uri(key))


def probe_conditions(storage: Storage) -> str | None:
    """Find out with one small object whether conditional writes hold: None, or one sentence that says what does not.

    It finds out what `probe_writable` does, too, and raises the same. Leases rest on conditional writes: without them
    two runners can both believe that a job is theirs. Where the store ignores conditions, `storage` compares by itself
    before it writes from then on.
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
        return "the store refuses to create an object although nothing lies under its key"
    _require_probe(storage, key)
    if storage.write_if(key, b"second", None) is not None:
        return "the store replaces an object where it was asked to create one only if nothing lies there"
    third = storage.write_if(key, b"third", first)
    if third is None:
        return "the store refuses to replace an object although its version is the expected one"
    if storage.write_if(key, b"fourth", first) is not None:
        return "the store replaces an object although its version is not the expected one"
    return None


# Inputs


def stat_input(uri: str | Path) -> ObjectInfo:
    """What an input file or object is, without reading it.

    Raises InputNotFound, InputUnreadable for a folder, a pipe, and what cannot be read or does not answer,
    StorageDenied, StorageUnavailable; ConfigInvalid only for what is wrong with the backend's configuration itself.
    """
    if is_remote(uri):
        return _stat_object(str(uri))[1]
    try:
        path = local_path(uri)
    except ConfigInvalid as err:  # one job's input cannot be reached; the other jobs go on
        raise InputNotFound(err.what, where=uri, todo=err.todo) from err
    with os_errors(path, writing=False):
        status = check_regular_file(path)
    return ObjectInfo(str(path), status.st_size, None, status.st_mtime, path.name)


def identify_input(uri: str | Path, sha256: Callable[[Path], str] = sha256_file) -> tuple[ObjectInfo, str]:
    """What an input is, and its identity. A file whose store does not know that is hashed by `sha256`.

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
    """An input as a local file: a local one where it lies, an object copied below `dest_dir` under its own name.

    Raises as `stat_input` does, and StorageFull.
    """
    return fetch_input_with_info(uri, dest_dir).path


def fetch_input_with_info(uri: str | Path, dest_dir: Path) -> FetchedInput:
    """As `fetch_input`, with what was read and whether that could be verified."""
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
    """The storage that holds one object, and its key there."""
    root, name = split_object(uri)
    try:
        return open_storage(root), check_key(name)
    except ConfigInvalid as err:
        if err.where and not is_remote(err.where):  # a setting of the backend, by the name of its variable
            raise
        raise InputNotFound(err.what, where=uri, todo=err.todo) from err


@contextmanager
def _one_input(uri: str) -> Iterator[None]:
    """A store's refusal of one object (its bucket does not exist or lies in another region, its key is too long) is
    that input's fault. A fault of the configuration, which names its variable instead of the object, stays one."""
    try:
        yield
    except BucketMissing as err:
        raise InputNotFound(err.what, where=uri, todo=err.todo) from err
    except ConfigInvalid as err:
        if is_remote(err.where or ""):
            raise InputUnreadable(err.what, where=uri, todo=err.todo) from err
        raise


def download_name(uri: str) -> str:
    """Where a downloaded object lies below its folder: its own name, below a folder that tells apart equal names."""
    name = PurePosixPath(uri.rpartition("/")[2])
    stem = name.stem.encode()[:120].decode(errors="ignore")  # file names hold 255 bytes, keys 1024
    return f"{hashlib.sha256(uri.encode()).hexdigest()[:12]}/{stem}{name.suffix[:16]}"

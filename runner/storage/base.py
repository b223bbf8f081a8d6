"""Storage: the interface over whole files and small objects by key, on a local disk or in an S3 bucket.

In:   a root (`DIR`, `file:///DIR`, `s3://bucket/prefix`) and keys relative to it (`jobs/anna/output.mp4`).
Out:  local files; objects that appear whole or not at all; errors under the storage.* and input.* codes.
Never: what the bytes mean, which of them belong together, in which order they are written.
"""

from __future__ import annotations

import os
import re
from abc import ABC, abstractmethod
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal
from urllib.parse import unquote, urlsplit

from runner.errors import ConfigInvalid, RunnerError
from runner.storage.disk import is_staged

__all__ = [
    "PROBE_NAME",
    "Leftover",
    "ObjectInfo",
    "Storage",
    "Versioned",
    "check_key",
    "is_remote",
    "local_path",
]

PROBE_NAME = ".video-lab-probe-"  # how the names of the objects begin that `probe_writable` writes
_KEY_BYTES = 1024  # S3's limit of a key in UTF-8


@dataclass(frozen=True)
class ObjectInfo:
    """What lies under one key now."""

    uri: str
    bytes: int
    identity: str  # "etag:<etag>:<bytes>" on S3; on a disk "sha256:<hex>" of what was published, "" of what is found
    modified: float  # seconds since 1970, UTC
    key: str = ""  # relative to the storage's root
    verified: str = field(
        default="", compare=False
    )  # after `fetch` from S3: the digest that agreed; "": none was there


@dataclass(frozen=True)
class Versioned:
    """A small object, and which version of it was read: what `write_if` takes."""

    data: bytes
    version: str


@dataclass(frozen=True)
class Leftover:
    """What a killed process left behind, or what another process is writing. It takes space and is no output."""

    uri: str
    key: str  # relative to the storage's root; an upload's is that of the object it was to become
    bytes: int
    modified: float  # seconds since 1970, UTC
    kind: Literal["staged file", "write probe", "unfinished upload"]
    abandoned: bool = False  # known to be in no process's hands; else only its age and its job's mark can tell
    upload_id: str = ""  # of an unfinished upload


class Storage(ABC):
    """Objects by key under one root. Every method may be called from any thread.

    Keys are relative POSIX paths, see `check_key`. Raises StorageDenied when refused, or when another file or folder is
    in the way of a key; StorageUnavailable (retryable) when the far end fails; StorageFull; InputUnreadable for what is
    there and cannot be read as a file; ConfigInvalid for a root or key that can never work.
    """

    root: str

    @property
    @abstractmethod
    def appends(self) -> bool:
        """Does `append_lines` add to one file? Else it writes a new, numbered object each time."""

    @abstractmethod
    def fetch(self, key: str, dest: Path) -> ObjectInfo:
        """Copy the object to the local file `dest`, which appears whole or not at all; say what was read.

        What comes from S3 is compared with a digest that the store gives, if it gives one: see `ObjectInfo.verified`.
        Raises InputNotFound if nothing lies under `key`.
        """

    @abstractmethod
    def publish(self, local: Path, key: str) -> ObjectInfo:
        """Store the local file under `key`: a reader sees what was there before, then all of it, never a part.

        Returns the identity and size of the very bytes that were stored, also where another process has stored other
        bytes under `key` by then. On a disk the identity is the `sha256:<hex>` of the bytes that were copied.
        """

    @abstractmethod
    def stat(self, key: str) -> ObjectInfo | None:
        """What lies under `key`; None if nothing does."""

    @abstractmethod
    def list(self, prefix: str = "") -> Iterator[ObjectInfo]:
        """Every object whose key begins with `prefix` (`jobs/` for a folder), at any depth, in no promised order.

        Nothing there, nothing listed; files still being published are not listed.
        """

    @abstractmethod
    def read_bytes(self, key: str) -> bytes | None:
        """A small object whole; None if nothing lies under `key`."""

    @abstractmethod
    def write_bytes(self, key: str, data: bytes) -> None:
        """Store a small object, as whole as `publish` does."""

    @abstractmethod
    def read_versioned(self, key: str) -> Versioned | None:
        """A small object whole, with its version; None if nothing lies under `key`."""

    @abstractmethod
    def write_if(self, key: str, data: bytes, version: str | None) -> str | None:
        """Store a small object if what lies under `key` is still `version`; with None, if nothing lies there.

        Returns the new version, or None if something else lies there: then nothing was written. Of two processes that
        call it with the same version at the same time, at most one succeeds. This does not hold for an S3 store that
        does not know conditional requests (it answers 501 or ignores the headers), nor for the replacement of a file on
        a file system without locks: there, another process may write between the comparison and the writing.
        """

    @abstractmethod
    def append_lines(self, key: str, data: bytes) -> None:
        """Add whole lines to the end of what lies under `key`; it is made if nothing lies there.

        Where a store cannot append (see `appends`), each call writes a new object beside `key` instead, numbered after
        those that are there: `x.events.jsonl` → `x.events-0001.jsonl`, `x.events-0002.jsonl`, …
        """

    @abstractmethod
    def delete(self, key: str) -> None:
        """Remove the object; nothing there is fine."""

    @abstractmethod
    def leftovers(self, prefix: str = "") -> Iterator[Leftover]:
        """What killed processes left below `prefix` (`jobs/a/`), and what others are writing now, where that cannot be
        told apart (`abandoned` is False)."""

    @abstractmethod
    def remove_leftover(self, leftover: Leftover) -> bool:
        """Remove it; False if it is in use, or gone by now (which not every S3 store tells)."""

    @abstractmethod
    def _unfinished(self, prefix: str) -> Iterator[Leftover]:
        """What `remove_leftovers` removes."""

    def remove_leftovers(self, prefix: str) -> int:
        """Remove what earlier processes left below `prefix` (`jobs/a/`), and count it, before a job there is begun.

        On a disk, the staged files that no process is writing. On S3, the unfinished uploads; a process that still
        makes one begins it again. Probes stay. What cannot be listed or removed stays, with a warning: it stops no job.
        """
        removed = 0
        try:
            for leftover in self._unfinished(prefix):
                removed += self.remove_leftover(leftover)
        except RunnerError as error:
            import structlog  # brings rich with it, and `--help` passes through here

            structlog.get_logger().warning("storage.leftovers", uri=self.root, prefix=prefix, reason=error.message)
        return removed

    def exists(self, key: str) -> bool:
        return self.stat(key) is not None

    def uri(self, key: str) -> str:
        """Where `key` lies, for people and records; a path that can be opened, on a local disk."""
        return f"{self.root.rstrip('/')}/{check_key(key)}"

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.root!r})"


def check_key(key: str) -> str:
    """`key`, if it names one place below a root on every backend; else ConfigInvalid.

    Refused: absolute keys, empty, `.` and `..` parts, control characters, what UTF-8 cannot hold, more than 1024 bytes
    (S3's limit), and the names under which files are staged.
    """
    parts = key.split("/")
    problem = None
    if not key:
        problem = "is empty"
    elif key.startswith("/"):
        problem = "is absolute"
    elif ".." in parts or "." in parts or "" in parts:
        problem = "has an empty, . or .. part"
    elif any(ord(c) < 0x20 or ord(c) == 0x7F for c in key):
        problem = "has a control character"
    elif any(0xD800 <= ord(c) <= 0xDFFF for c in key):
        problem = "is not valid Unicode"
    elif len(key.encode()) > _KEY_BYTES:
        problem = f"is longer than {_KEY_BYTES} bytes"
    elif is_staged(parts[-1]):
        problem = "has a name that is reserved for files being written"
    if problem:
        shown = key if len(key) <= 80 else key[:79] + "…"
        raise ConfigInvalid(f"the key {shown!r} {problem}", todo="Use a relative path such as jobs/anna/output.mp4")
    return key


def is_remote(uri: str | Path) -> bool:
    """Does this name an object store rather than a local path?"""
    return isinstance(uri, str) and uri.lower().startswith("s3://")


def local_path(uri: str | Path) -> Path:
    """A plain path or a `file:///…` URI (percent-decoded, RFC 8089) as a path. Raises ConfigInvalid for other URIs."""
    if isinstance(uri, Path):
        return uri
    scheme, separator, _ = uri.partition("://")
    if not separator or not re.fullmatch(r"[A-Za-z][A-Za-z0-9+.-]+", scheme):
        if not uri or "\0" in uri:
            raise ConfigInvalid(f"{uri!r} is not a path", todo="Give a folder or an s3:// URI")
        try:
            return _native_path(uri).expanduser()
        except RuntimeError as err:  # ~name, or ~ of a user without a home
            what = f"{uri!r} begins with ~, which names no home folder here"
            raise ConfigInvalid(what, todo="Write the path in full") from err
    parts = urlsplit(uri)
    if scheme.lower() != "file":
        raise ConfigInvalid(f"{scheme}:// is not supported", where=uri, todo="Use a path, file:/// or s3://bucket/key")
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
        raise ConfigInvalid(f"{text!r} is not valid Unicode", todo="Give a folder or an s3:// URI") from err

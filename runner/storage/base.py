"""Storage: the interface for files and small objects by key, on a local disk or in an object store.

In:   a root (`DIR`, `file:///DIR`, `s3://bucket/prefix`) and keys relative to it (`anna/dance.mp4`).
Out:  local files; objects that appear whole or not at all; errors under the storage.* and input.* codes.
Never: what the bytes mean, which objects belong together, in which order they are written.
"""

from __future__ import annotations

import hashlib
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal, Self

from runner.errors import ConfigInvalid, InternalError, LeaseLost, RunnerError
from runner.hashing import sha256_file
from runner.storage.disk import is_staged

__all__ = [
    "PROBE_NAME",
    "Fence",
    "Leftover",
    "ObjectInfo",
    "Replaces",
    "Storage",
    "Versioned",
    "check_key",
    "combined_identity",
]

PROBE_NAME = ".video-lab-probe-"  # the names of `probe_writable`'s objects begin with it
_KEY_BYTES = 1024  # S3's limit of a key in UTF-8


@dataclass(frozen=True)
class ObjectInfo:
    """The object under one key."""

    uri: str
    bytes: int
    # "etag:<etag>:<bytes>" on S3, "sha256:<hex>" on a disk. None: unknown without reading, see `Storage.identify`.
    identity: str | None
    modified: float  # seconds since 1970, UTC
    key: str = ""  # relative to the storage's root
    verified: str = field(
        default="", compare=False
    )  # after `fetch` over a network: the name of the digest that matched; "": the store gave none


@dataclass(frozen=True)
class Versioned:
    """A small object and its version, which `write_if` takes."""

    data: bytes
    version: str
    # Seconds since it was written, by the store's clock. None: not requested, or the store's clock cannot be read.
    age_s: float | None = None


@dataclass(frozen=True)
class Fence:
    """A lease that must be held when an object is replaced or removed."""

    key: str  # of the lease
    is_held: Callable[[bytes | None], bool]  # from the present content under `key` (None: no object)

    def require(self, data: bytes | None, uri: str) -> None:
        """Raise LeaseLost if `data`, the present content of `uri`, is not the lease that is held."""
        if not self.is_held(data):
            raise lease_lost("another runner has taken this job over", uri)


def lease_lost(what: str, uri: str) -> LeaseLost:
    """Return the error for a lost lease."""
    return LeaseLost(what, where=uri, todo="The other runner's result counts. Run the same command again to see it")


# What an object may replace: the object that was found earlier (None: no object), or any object.
Replaces = ObjectInfo | None | Literal["anything"]


@dataclass(frozen=True)
class Leftover:
    """A file of a killed process, or one that another process is writing. It takes space and is not an output."""

    uri: str
    key: str  # relative to the storage's root; for an upload, the key of the finished object
    bytes: int
    modified: float  # seconds since 1970, UTC
    kind: Literal["staged file", "write probe", "unfinished upload", "finished segment"]
    abandoned: bool = False  # no process uses it; if False, only its age and its job's mark can show that
    upload_id: str = ""  # of an unfinished upload


@contextmanager
def counted(on_bytes: Callable[[int], None] | None) -> Iterator[Callable[[int], None]]:
    """Yield a function that passes counts of bytes on to `on_bytes`, for `fetch`.

    If the block raises, their sum is passed as a negative count, as no bytes are kept then.
    """
    arrived = 0

    def count(amount: int) -> None:
        nonlocal arrived
        arrived += amount
        if on_bytes is not None:
            on_bytes(amount)

    try:
        yield count
    except BaseException:
        count(-arrived)
        raise


class Storage(ABC):
    """Objects by key under one root. Every method may be called from any thread.

    Keys are relative POSIX paths, see `check_key`. Methods raise StorageDenied if access is refused, or if a file or
    folder has the place of a key; StorageUnavailable (retryable) if the store fails; StorageFull; InputUnreadable for
    an object that cannot be read as a file; ConfigInvalid for a root or key that can never work.
    """

    root: str

    @classmethod
    def from_uri(cls, uri: str | Path, environ: Mapping[str, str]) -> Self:
        """Return the storage at a URI of this backend's scheme, with the backend's settings from `environ`.

        No request is sent yet. Raises ConfigInvalid for a URI or a setting that can never work.
        """
        return cls(uri)

    @abstractmethod
    def __init__(self, uri: str | Path) -> None: ...

    @property
    @abstractmethod
    def appends(self) -> bool:
        """Whether `append_lines` appends to one file. If not, each call writes a new, numbered object."""

    @property
    @abstractmethod
    def lists_identities(self) -> bool:
        """Whether `list` gives each object's identity, so that one listing replaces one request per object."""

    @abstractmethod
    def fetch(self, key: str, dest: Path, on_bytes: Callable[[int], None] | None = None) -> ObjectInfo:
        """Copy the object to the local file `dest`, which appears whole or not at all. Return what was read.

        `on_bytes` is called with the size of each piece that has arrived, perhaps from another thread. The sum is the
        size of the object: after a failed try it is called with the negative size of that try's pieces.
        Bytes from a network are compared with a digest of the store, if it gives one: see `ObjectInfo.verified`.
        The returned identity is never None. Raises InputNotFound if there is no object under `key`.
        """

    def identify(self, info: ObjectInfo, sha256: Callable[[Path], str] = sha256_file) -> str:
        """Return the identity of an object of this storage: the one that `publish` returns for the same bytes.

        If the store does not give it, `sha256` (path → hexadecimal digits, perhaps from a cache) hashes the object's
        file. Raises as `read_bytes` does; InputNotFound if the object no longer exists.
        """
        if info.identity is None:
            raise InternalError(f"{type(self).__name__} did not give the identity of this object", where=info.uri)
        return info.identity

    @abstractmethod
    def publish(
        self, local: Path, key: str, *, fence: Fence | None = None, replaces: Replaces = "anything"
    ) -> ObjectInfo:
        """Store the local file under `key`. A reader sees the old object, then the whole new one, never a part.

        `fence`: the lease is read again right before the write. `replaces`: the result of `stat` for `key` when the
        lease was taken; nothing is replaced if `key` has another object, or none, right before the write. Raises
        LeaseLost in both cases; then nothing was changed.

        On a disk, both checks and the rename happen while the folders of the lease and of `key` are locked. On S3, the
        lease is read right before each request that makes the object appear, and that request carries the condition of
        `replaces`. If the store ignores the condition, the key is compared right before that request; another process
        can still change it in between.

        Returns the identity and size of the stored bytes, even if another process has stored other bytes under `key`
        since then. The identity is never None.
        """

    @abstractmethod
    def stat(self, key: str) -> ObjectInfo | None:
        """Return the object under `key`; None if there is none."""

    @abstractmethod
    def list(self, prefix: str = "") -> Iterator[ObjectInfo]:
        """Yield every object whose key begins with `prefix` (`jobs/` for a folder), at any depth, in any order.

        Files that are still being published are not listed.
        """

    def folders(self, prefix: str = "") -> Iterator[str]:
        """Yield the names of the folders right below `prefix` (`jobs/`; "": the root), each once, in any order.

        Their content is not listed, so this is faster than `list`. On a disk a folder may be empty.
        """
        names = (info.key.removeprefix(prefix).partition("/") for info in self.list(prefix))
        yield from dict.fromkeys(name for name, slash, _ in names if slash)

    @abstractmethod
    def read_bytes(self, key: str) -> bytes | None:
        """Return a small object as a whole; None if there is none under `key`."""

    @abstractmethod
    def write_bytes(self, key: str, data: bytes) -> None:
        """Store a small object. A reader never sees a part of it."""

    @abstractmethod
    def read_versioned(self, key: str, *, aged: bool = False) -> Versioned | None:
        """Return a small object with its version; None if there is none under `key`.

        `aged`: also its age in seconds, by the store's or file system's clock (a server's on a network mount), never by
        this machine's. On a disk, a temporary file beside `key` is made for that; the age is None if that is refused.
        It is never negative; S3 gives whole seconds.
        """

    @abstractmethod
    def write_if(self, key: str, data: bytes, version: str | None, *, fence: Fence | None = None) -> str | None:
        """Store a small object if `key` still has `version`; with None, if `key` has no object.

        `fence` as of `publish`: raises LeaseLost.

        Returns the new version, or None if `key` has something else: then nothing was written. Of two processes that
        call it with the same version at the same time, at most one succeeds. There are two exceptions, in which another
        process may write between the comparison and the write: an S3 store that does not support conditional requests
        (it answers 501 or ignores the headers), and a replacement on a file system without locks.
        """

    @abstractmethod
    def append_lines(self, key: str, data: bytes) -> None:
        """Append whole lines to the object under `key`, which is made if it does not exist.

        If a store cannot append (see `appends`), each call writes a new object beside `key`, with the next number:
        `x.events.jsonl` → `x.events-0001.jsonl`, `x.events-0002.jsonl`, …
        """

    @abstractmethod
    def delete(self, key: str, *, version: str | None = None, fence: Fence | None = None) -> bool:
        """Remove the object, if it exists. Return whether `key` has no object now.

        `version`: only if `key` still has this version, see `read_versioned`. `fence` as of `publish`:
        raises LeaseLost.
        """

    def weak_conditions(self) -> str | None:
        """Return why `write_if` is not atomic here, as one sentence, as far as known; None if it is atomic."""
        return None

    def distrust_conditions(self) -> None:
        """Compare before each conditional write from now on, as the store ignores conditions."""
        return  # a disk compares by itself

    def use_own_clock(self) -> None:
        """Use this machine's clock for ages from now on, as reading a disk's clock writes a file."""
        return  # the answers of an object store have dates

    @abstractmethod
    def leftovers(self, prefix: str = "") -> Iterator[Leftover]:
        """Yield the leftovers of killed processes below `prefix` (`jobs/a/`).

        If it is unknown whether a process still writes a file, the file is included, with `abandoned` False.
        """

    @abstractmethod
    def remove_leftover(self, leftover: Leftover) -> bool:
        """Remove a leftover. False if it is in use or no longer exists (which not every S3 store reports)."""

    @abstractmethod
    def _unfinished(self, prefix: str) -> Iterator[Leftover]:
        """Yield the leftovers that `remove_leftovers` removes."""

    def remove_leftovers(self, prefix: str) -> int:
        """Remove leftovers of earlier processes below `prefix` (`jobs/a/`) before a job begins. Return their number.

        On a disk these are staged files that no process is writing. On S3 these are unfinished uploads; a process that
        still makes one starts it again. Probes stay. If they cannot be listed or removed, a warning is logged.
        """
        removed = 0
        try:
            for leftover in self._unfinished(prefix):
                removed += self.remove_leftover(leftover)
        except RunnerError as error:
            import structlog  # it imports rich, and `--help` imports this module

            structlog.get_logger().warning("storage.leftovers", uri=self.root, prefix=prefix, reason=error.message)
        return removed

    def exists(self, key: str) -> bool:
        """Return whether there is an object under `key`."""
        return self.stat(key) is not None

    def uri(self, key: str) -> str:
        """Return the URI of `key`, for people and records; on a local disk, a path."""
        return f"{self.root.rstrip('/')}/{check_key(key)}"

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.root!r})"


def combined_identity(files: Mapping[str, tuple[str, int]]) -> tuple[str, int, int]:
    """Return (identity, bytes, files) of a folder from its files' (identity, bytes) by key."""
    lines = [f"{key}\t{identity}" for key, (identity, _) in sorted(files.items())]
    digest = hashlib.sha256("\n".join(lines).encode()).hexdigest()
    return f"sha256:{digest}", sum(nbytes for _, nbytes in files.values()), len(files)


def check_key(key: str) -> str:
    """Return `key` if it names one place below a root on every backend. Raises ConfigInvalid for others.

    Refused are: absolute keys; empty, `.` and `..` parts; control characters; invalid Unicode; more than 1024 bytes
    (S3's limit); names of staged files.
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
        raise ConfigInvalid(f"the key {shown!r} {problem}", todo="Use a relative path such as anna/dance.mp4")
    return key

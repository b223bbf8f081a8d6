"""Storage: the interface over whole files and small objects by key, on a local disk or in an object store.

In:   a root (`DIR`, `file:///DIR`, `s3://bucket/prefix`) and keys relative to it (`anna/dance.mp4`).
Out:  local files; objects that appear whole or not at all; errors under the storage.* and input.* codes.
Never: what the bytes mean, which of them belong together, in which order they are written.
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

PROBE_NAME = ".video-lab-probe-"  # how the names of the objects begin that `probe_writable` writes
_KEY_BYTES = 1024  # S3's limit of a key in UTF-8


@dataclass(frozen=True)
class ObjectInfo:
    """What lies under one key now."""

    uri: str
    bytes: int
    # "etag:<etag>:<bytes>" on S3, "sha256:<hex>" on a disk. None: not known without reading, see `Storage.identify`.
    identity: str | None
    modified: float  # seconds since 1970, UTC
    key: str = ""  # relative to the storage's root
    verified: str = field(
        default="", compare=False
    )  # after `fetch` over a network: the name of the digest that agreed; "": the store gave none


@dataclass(frozen=True)
class Versioned:
    """A small object, and which version of it was read: what `write_if` takes."""

    data: bytes
    version: str
    # Seconds since it was written, by the store's own clock. None: not asked for, or the store's clock cannot be read.
    age_s: float | None = None


@dataclass(frozen=True)
class Fence:
    """A lease that must be held at the moment when an object is replaced or removed."""

    key: str  # where the lease lies
    is_held: Callable[[bytes | None], bool]  # given the content that lies there now (None: nothing)

    def require(self, data: bytes | None, uri: str) -> None:
        """Raise LeaseLost if `data`, which lies under `uri` now, is not the lease that is held."""
        if not self.is_held(data):
            raise lease_lost("another runner has taken this job over", uri)


def lease_lost(what: str, uri: str) -> LeaseLost:
    return LeaseLost(what, where=uri, todo="The other runner's result counts; run the same command to see it")


# What an object may replace: what was seen there (None: nothing was), or whatever lies there.
Replaces = ObjectInfo | None | Literal["anything"]


@dataclass(frozen=True)
class Leftover:
    """What a killed process left behind, or what another process is writing. It takes space and is no output."""

    uri: str
    key: str  # relative to the storage's root; an upload's is that of the object it was to become
    bytes: int
    modified: float  # seconds since 1970, UTC
    kind: Literal["staged file", "write probe", "unfinished upload", "finished segment"]
    abandoned: bool = False  # known to be in no process's hands; else only its age and its job's mark can tell
    upload_id: str = ""  # of an unfinished upload


@contextmanager
def counted(on_bytes: Callable[[int], None] | None) -> Iterator[Callable[[int], None]]:
    """For `fetch`: a function that passes counts of bytes on to `on_bytes`. What it passed is taken back, as a negative
    count, if the block raises: none of it is kept then."""
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

    Keys are relative POSIX paths, see `check_key`. Raises StorageDenied when refused, or when another file or folder is
    in the way of a key; StorageUnavailable (retryable) when the far end fails; StorageFull; InputUnreadable for what is
    there and cannot be read as a file; ConfigInvalid for a root or key that can never work.
    """

    root: str

    @classmethod
    def from_uri(cls, uri: str | Path, environ: Mapping[str, str]) -> Self:
        """The storage at a URI of this backend's scheme, with the settings that the backend reads from `environ`.

        Nothing is asked of the store yet. Raises ConfigInvalid for a URI or a setting that can never work.
        """
        return cls(uri)

    @abstractmethod
    def __init__(self, uri: str | Path) -> None: ...

    @property
    @abstractmethod
    def appends(self) -> bool:
        """Does `append_lines` add to one file? Else it writes a new, numbered object each time."""

    @property
    @abstractmethod
    def lists_identities(self) -> bool:
        """Does `list` give each object's identity? Then one listing replaces a question for each object."""

    @abstractmethod
    def fetch(self, key: str, dest: Path, on_bytes: Callable[[int], None] | None = None) -> ObjectInfo:
        """Copy the object to the local file `dest`, which appears whole or not at all. Return what was read.

        `on_bytes` is called with the number of bytes of each piece that has arrived, perhaps from another thread. The
        sum is the size of the object: after a try that failed it is called with minus what that try had brought.
        What comes over a network is compared with a digest that the store gives, if any: see `ObjectInfo.verified`.
        The identity of what is returned is never None.
        Raises InputNotFound if nothing lies under `key`.
        """

    def identify(self, info: ObjectInfo, sha256: Callable[[Path], str] = sha256_file) -> str:
        """The identity of an object of this storage: what `publish` returns for the same bytes.

        Where the store does not know it, the object's file is hashed by `sha256` (path → hexadecimal digits), which
        may remember. Raises as `read_bytes` does; InputNotFound for what is gone meanwhile.
        """
        if info.identity is None:
            raise InternalError(f"{type(self).__name__} gave no identity", where=info.uri)
        return info.identity

    @abstractmethod
    def publish(
        self, local: Path, key: str, *, fence: Fence | None = None, replaces: Replaces = "anything"
    ) -> ObjectInfo:
        """Store the local file under `key`: a reader sees what was there before, then all of it, never a part.

        `fence`: the lease is read once more at the last moment. `replaces`: what `stat` returned for `key` when the
        lease was taken; nothing is replaced if something else, or nothing any more, lies there at the last moment.
        Raises LeaseLost in both cases; then nothing was changed.

        On a disk, both are checked and the file gets its name while the folders of the lease and of `key` are locked.
        On S3, the lease is read right before each request that makes the object appear, and that request carries the
        condition of `replaces`. Where the store ignores the condition, the key is compared right before that request;
        another process can still change it in between.

        Returns the identity and size of the very bytes that were stored, also where another process has stored other
        bytes under `key` by then. The identity is never None.
        """

    @abstractmethod
    def stat(self, key: str) -> ObjectInfo | None:
        """What lies under `key`; None if nothing does."""

    @abstractmethod
    def list(self, prefix: str = "") -> Iterator[ObjectInfo]:
        """Every object whose key begins with `prefix` (`jobs/` for a folder), at any depth, in no promised order.

        Nothing there, nothing listed; files still being published are not listed.
        """

    def folders(self, prefix: str = "") -> Iterator[str]:
        """The names of the folders right below `prefix` (`jobs/`; "": the root), each once, in no promised order.

        What they hold is not listed, so that a store answers this sooner than `list`. On a disk a folder may be empty.
        """
        names = (info.key.removeprefix(prefix).partition("/") for info in self.list(prefix))
        yield from dict.fromkeys(name for name, slash, _ in names if slash)

    @abstractmethod
    def read_bytes(self, key: str) -> bytes | None:
        """A small object whole; None if nothing lies under `key`."""

    @abstractmethod
    def write_bytes(self, key: str, data: bytes) -> None:
        """Store a small object, as whole as `publish` does."""

    @abstractmethod
    def read_versioned(self, key: str, *, aged: bool = False) -> Versioned | None:
        """A small object whole, with its version; None if nothing lies under `key`.

        `aged`: with its age in seconds too, by the clock that dated it and never by that of this machine: the store's,
        or that of the file system, which is a server's on a network mount. On a disk this makes a file beside `key` for
        a moment; the age is None where that is refused. It is never negative; S3 gives whole seconds.
        """

    @abstractmethod
    def write_if(self, key: str, data: bytes, version: str | None, *, fence: Fence | None = None) -> str | None:
        """Store a small object if what lies under `key` is still `version`; with None, if nothing lies there.

        `fence` as of `publish`: raises LeaseLost.

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
    def delete(self, key: str, *, version: str | None = None, fence: Fence | None = None) -> bool:
        """Remove the object; nothing there is fine. Return whether nothing lies there now.

        `version`: only if what lies under `key` is still this version, see `read_versioned`. `fence` as of `publish`:
        raises LeaseLost.
        """

    def weak_conditions(self) -> str | None:
        """What makes `write_if` less than atomic here, in one sentence, as far as is known by now; None if nothing."""
        return None

    def distrust_conditions(self) -> None:
        """From now on, compare before each conditional write too: the store was seen to ignore the condition."""
        return  # a disk compares by itself

    def use_own_clock(self) -> None:
        """From now on, ages go by this machine's clock: a disk is asked for its time by writing a file."""
        return  # an object store dates each of its answers

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


def combined_identity(files: Mapping[str, tuple[str, int]]) -> tuple[str, int, int]:
    """(identity, bytes, files) of a folder from its files' (identity, bytes) by key."""
    lines = [f"{key}\t{identity}" for key, (identity, _) in sorted(files.items())]
    digest = hashlib.sha256("\n".join(lines).encode()).hexdigest()
    return f"sha256:{digest}", sum(nbytes for _, nbytes in files.values()), len(files)


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
        raise ConfigInvalid(f"the key {shown!r} {problem}", todo="Use a relative path such as anna/dance.mp4")
    return key

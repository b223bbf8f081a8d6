"""Hub: list a repository of a model hub at one commit, and download its files, resumed and checked.

In:   an endpoint, a token, a repository and revision; a file of the listing and its place on disk. Out: listings; whole
      files, each with the record that the hub's own client writes beside it (and that digests.py reads).
Never: which files a recipe needs.

The client library downloads into a file of a random name and deletes it after any failure: a connection that breaks
10 GB into a shard costs 10 GB. Here the part that has arrived stays, under a name with the file's checksum. The next
call requests the rest. The library checks sizes only; here every file is hashed before it gets its name.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any, cast

from runner.errors import (
    ConfigInvalid,
    RunnerError,
    StorageDenied,
    StorageUnavailable,
    WeightsCorrupt,
    WeightsMissing,
    as_runner_error,
)
from runner.hashing import sha256_file

__all__ = [
    "Hub",
    "Listing",
    "RemoteFile",
    "git_sha1",
    "online",
    "partial_path",
    "read_record",
    "record_path",
    "write_record",
]

ATTEMPTS = 4  # for a request or a (resumed) file; within each attempt the library reconnects, too
FIRST_WAIT_S = 1.0
BUSY = (408, 425, 429)
BLOCK = 1 << 20


@dataclass(frozen=True)
class RemoteFile:
    """A file as the hub lists it. Large files have a sha256 (Git LFS), small ones a Git blob id."""

    path: str
    bytes: int
    sha256: str | None
    blob: str | None

    @property
    def digest(self) -> str | None:
        return self.sha256 or self.blob

    def matches(self, file: Path) -> bool:
        """Does `file` have these bytes? Reads the whole file, unless its size differs."""
        if file.stat().st_size != self.bytes:
            return False
        if self.sha256:
            return sha256_file(file) == self.sha256
        return self.blob is None or git_sha1(file) == self.blob


@dataclass(frozen=True)
class Listing:
    """A repository at one commit; `licence` as its card states it."""

    repo: str
    commit: str
    licence: str | None
    files: tuple[RemoteFile, ...]


class Hub:
    """A hub at `endpoint` (default: HF_ENDPOINT, else the public one); `token`: default HF_TOKEN or a stored login."""

    def __init__(self, endpoint: str | None = None, token: str | None = None) -> None:
        from huggingface_hub import constants

        self.endpoint = (endpoint or os.environ.get("HF_ENDPOINT") or constants.ENDPOINT).rstrip("/")
        self.token = token
        if not self.endpoint.startswith(("http://", "https://")):
            raise ConfigInvalid(
                "not an http(s) address",
                where=self.endpoint,
                todo="Correct --endpoint, or HF_ENDPOINT in the environment",
            )

    def listing(self, repo: str, revision: str) -> Listing:
        """List all files of `repo` at `revision`, which may be a branch; downloads are of the commit in the listing.

        Raises StorageDenied, StorageUnavailable, WeightsMissing (no such repository or revision), ConfigInvalid.
        """
        from huggingface_hub import HfApi

        where = f"{self.endpoint}/{repo}"
        api = HfApi(endpoint=self.endpoint, token=self.token)

        def request() -> Any:
            with self._errors(where):
                return api.model_info(repo, revision=revision, files_metadata=True, timeout=30)

        info = _retry(request)
        if not info.sha or info.siblings is None:
            raise _no_hub(where, "the answer names no commit or no files")
        return Listing(repo, info.sha, _licence(info), tuple(_remote_file(s, where) for s in info.siblings))

    def download(
        self,
        listing: Listing,
        file: RemoteFile,
        base: Path,
        place: str,
        *,
        on_bytes: Callable[[int], None],
    ) -> None:
        """Download `file` to `base/place`, check it and write its record. Resumes a download that was cut off.

        `on_bytes` gets the number of bytes of each block; a negative number when bytes are dropped and loaded again.
        Raises as `listing` does, StorageFull, and WeightsCorrupt after two downloads with another checksum.
        """
        part = partial_path(base, place, file)
        where = f"{self.endpoint}/{listing.repo}/{file.path}"
        try:
            part.parent.mkdir(parents=True, exist_ok=True)
            (base / place).parent.mkdir(parents=True, exist_ok=True)
            for again in (True, False):
                _retry(lambda: self._append(listing, file, part, where, on_bytes))
                if file.matches(part):
                    break
                on_bytes(-part.stat().st_size)
                part.unlink()
                if not again:
                    raise WeightsCorrupt(
                        "the file arrived twice with another checksum than the hub lists",
                        where=where,
                        todo="A proxy or mirror may alter it: try another network or --endpoint",
                    )
            os.chmod(part, 0o644)
            os.replace(part, base / place)
            write_record(base, place, listing.commit, file.digest)
        except OSError as err:
            raise as_runner_error(err, where=base / place) from err

    def _append(
        self, listing: Listing, file: RemoteFile, part: Path, where: str, on_bytes: Callable[[int], None]
    ) -> None:
        """Download the rest of `part`."""
        from huggingface_hub import hf_hub_url
        from huggingface_hub.file_download import http_get
        from huggingface_hub.utils import build_hf_headers

        url = hf_hub_url(listing.repo, file.path, revision=listing.commit, endpoint=self.endpoint)
        headers = build_hf_headers(token=self.token) | {"Accept-Encoding": "identity"}
        with part.open("ab") as stream:
            there = stream.tell()
            if there > file.bytes:
                stream.truncate(0)
                on_bytes(-there)
                there = 0
            with self._errors(where):
                http_get(
                    url,
                    stream,
                    resume_size=there,
                    headers=headers,
                    expected_size=file.bytes,
                    displayed_filename=file.path,
                    tqdm_class=_counter(on_bytes),
                )
            stream.flush()
            os.fsync(stream.fileno())

    @contextmanager
    def _errors(self, where: str) -> Iterator[None]:
        """Translate errors of the client library into RunnerErrors."""
        from huggingface_hub.errors import HfHubHTTPError

        # The base class of its HTTP library's errors; the client has changed its HTTP library twice.
        foreign = cast("type[Exception]", HfHubHTTPError.__bases__[0])
        try:
            yield
        except HfHubHTTPError as err:
            raise self._refusal(err, where) from err
        except foreign as err:
            raise _unreachable(err, where) from err
        except OSError as err:
            found = as_runner_error(err, where=where)
            # An error without a disk's errno is of the network: a short body, a refused or broken connection.
            raise (_unreachable(err, where) if found.code in ("internal", "storage.denied") else found) from err
        except (ValueError, TypeError, KeyError, AttributeError) as err:
            raise _no_hub(where, f"{type(err).__name__}: {err}") from err

    def _refusal(self, err: Any, where: str) -> RunnerError:
        from huggingface_hub.errors import EntryNotFoundError, GatedRepoError, RevisionNotFoundError

        status = err.response.status_code
        page = "/".join(where.split("/")[:5])
        login = "set HF_TOKEN to a token of an account that may read it"
        if isinstance(err, GatedRepoError):
            return StorageDenied(
                f"the repository is gated: its publisher requires that you accept terms first ({status})",
                where=where,
                todo=f"Accept the terms at {page}, then {login}",
            )
        if isinstance(err, RevisionNotFoundError):
            return WeightsMissing("the repository has no such revision", where=where, todo="Check --revision")
        if isinstance(err, EntryNotFoundError):
            return WeightsMissing("the repository has no such file", where=where, todo="Run the same command again")
        if status in (401, 403):
            return StorageDenied(
                f"the hub refused access ({status}): the repository is private, gated, or does not exist",
                where=where,
                todo=f"Check that {page} can be read, then {login}",
            )
        if status in (404, 410):
            return WeightsMissing(f"not found ({status})", where=where, todo="Check --endpoint (HF_ENDPOINT)")
        if status in BUSY or status >= 500:
            return StorageUnavailable(
                f"the hub answered {status}", where=where, todo="Run the same command later: it resumes the download"
            )
        return _no_hub(where, f"it answered {status}")


def partial_path(base: Path, place: str, file: RemoteFile) -> Path:
    """The file of the part that has arrived. Its name has the checksum, so that two versions are never joined."""
    return _beside(base, place, f"{file.digest or file.bytes}.incomplete")


def record_path(base: Path, place: str) -> Path:
    """The path where the hub's client keeps its record of `base/place`."""
    return _beside(base, place, "metadata")


def write_record(base: Path, place: str, commit: str, digest: str | None) -> None:
    """Write the record of `base/place` in the client's own format: commit, checksum, time. Nothing without `digest`."""
    if digest is None:
        return
    record = record_path(base, place)
    record.parent.mkdir(parents=True, exist_ok=True)
    staged = record.with_name(f"{record.name}.tmp")
    staged.write_text(f"{commit}\n{digest}\n{time.time()}\n")
    os.replace(staged, record)


def read_record(base: Path, place: str) -> tuple[str, str] | None:
    """Read (commit, checksum) from the record of `base/place`, of any age; None without a readable record."""
    with contextlib.suppress(FileNotFoundError, ValueError):
        commit, digest = record_path(base, place).read_text().splitlines()[:2]
        return commit, digest.strip()
    return None


def git_sha1(file: Path) -> str:
    """Compute a file's Git blob id: sha1 over `blob SIZE`, a zero byte, and the bytes."""
    digest = hashlib.sha1(b"blob %d\0" % file.stat().st_size, usedforsecurity=False)
    with file.open("rb") as stream:
        while block := stream.read(BLOCK):
            digest.update(block)
    return digest.hexdigest()


def _beside(base: Path, place: str, suffix: str) -> Path:
    return base / ".cache" / "huggingface" / "download" / f"{place}.{suffix}"


def _retry(call: Callable[[], Any]) -> Any:
    """Return `call()`, repeated after a pause while the hub is unavailable."""
    from tenacity import Retrying, retry_if_exception_type, stop_after_attempt, wait_exponential

    return Retrying(
        retry=retry_if_exception_type(StorageUnavailable),
        stop=stop_after_attempt(ATTEMPTS),
        wait=wait_exponential(multiplier=FIRST_WAIT_S, max=30),
        reraise=True,
    )(call)


def _counter(on_bytes: Callable[[int], None]) -> Any:
    """A progress bar class for the library that draws nothing and passes byte counts to `on_bytes`."""
    from huggingface_hub.utils import tqdm

    class Counter(tqdm):
        def __init__(self, *args: Any, **options: Any) -> None:
            super().__init__(*args, **(options | {"disable": True}))

        def update(self, n: float | None = 1) -> None:
            on_bytes(int(n or 0))

    return Counter


def _remote_file(sibling: Any, where: str) -> RemoteFile:
    path = str(sibling.rfilename)
    if PurePosixPath(path).is_absolute() or ".." in PurePosixPath(path).parts:
        raise _no_hub(where, f"it lists {path!r}, which leads out of the repository")
    lfs = sibling.lfs
    size = sibling.size if sibling.size is not None else (lfs.size if lfs else None)
    if size is None:
        raise _no_hub(where, f"it gives no size for {path}")
    return RemoteFile(path, int(size), lfs.sha256 if lfs else None, sibling.blob_id)


def _licence(info: Any) -> str | None:
    if info.card_data is not None and info.card_data.get("license"):
        return str(info.card_data.get("license"))
    tags = [tag.removeprefix("license:") for tag in info.tags or () if tag.startswith("license:")]
    return tags[0] if tags else None


def _unreachable(err: BaseException, where: str) -> StorageUnavailable:
    text = " ".join(str(err).split())[:300]
    return StorageUnavailable(
        f"{type(err).__name__}: {text}" if text else type(err).__name__,
        where=where,
        todo="Check the network, a proxy (HTTPS_PROXY) and HF_ENDPOINT; the same command resumes the download",
    )


def _no_hub(where: str, why: str) -> ConfigInvalid:
    return ConfigInvalid(
        f"the address does not answer like a model hub ({why})", where=where, todo="Check --endpoint, or HF_ENDPOINT"
    )


_offline = threading.Lock()


@contextmanager
def online(say: Callable[[str], None]) -> Iterator[None]:
    """Let the client library use the network inside the block; the image forbids it for renders (HF_HUB_OFFLINE=1)."""
    from huggingface_hub import constants

    with _offline:
        before = constants.HF_HUB_OFFLINE
        if before:
            say("HF_HUB_OFFLINE is set; it applies to renders only. This command uses the network")
        constants.HF_HUB_OFFLINE = False
        try:
            yield
        finally:
            constants.HF_HUB_OFFLINE = before

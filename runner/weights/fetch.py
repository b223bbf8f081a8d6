"""Fetch: download the published files of a recipe from their hubs into the model store, and check them.

In:   the store's folder, a recipe. Out: the files in their places in the store, and a summary; or an error.
Never: pickles (see repositories.py); the files' content. Before the first download the licences are shown and the free
space of the disk is checked. A fetch that was cut off resumes where it stopped.
"""

from __future__ import annotations

import shutil
import threading
import time
from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import FIRST_EXCEPTION, ThreadPoolExecutor, wait
from dataclasses import dataclass, field, replace
from pathlib import Path

from runner.errors import StorageFull, WeightsCorrupt, WeightsMissing, as_runner_error
from runner.spec.recipes import Recipe, get_recipe
from runner.weights.hub import Hub, Listing, RemoteFile, online, partial_path, read_record, record_path, write_record
from runner.weights.repositories import HubSource, parts_of, sources_of
from runner.weights.variant import TRANSFORMER_FILE, quantize_command, quantized_folder, svdq_format, variant_folders

__all__ = ["Fetched", "fetch_weights"]

GB = 1e9
WORKERS = 4  # the pose model alone is some 440 files
REPORT_EVERY = 0.05  # of all bytes
CLOCK_SLACK_S = 1  # a record may be written within the same second as its file
LOCK = ".fetch.lock"


@dataclass(frozen=True)
class Fetched:
    """The result of a fetch. Counts are of files, sizes in bytes."""

    folder: Path
    files: int
    downloaded: int
    bytes: int
    downloaded_bytes: int
    commits: dict[str, str]  # repository → commit
    seconds: float


@dataclass(frozen=True)
class _Item:
    """One file that belongs in the store."""

    source: HubSource
    listing: Listing
    file: RemoteFile
    base: Path
    place: str

    @property
    def path(self) -> Path:
        return self.base / self.place

    @property
    def left(self) -> int:
        """Bytes that are still missing."""
        part = partial_path(self.base, self.place, self.file)
        return self.file.bytes - (min(part.stat().st_size, self.file.bytes) if part.is_file() else 0)

    @property
    def known(self) -> bool:
        """Is the file there, and unchanged since its record was written?"""
        if not self.path.is_file() or self.path.stat().st_size != self.file.bytes:
            return False
        record = read_record(self.base, self.place)
        if record is None or record[1] != self.file.digest:
            return False
        return self.path.stat().st_mtime <= record_path(self.base, self.place).stat().st_mtime + CLOCK_SLACK_S


def fetch_weights(
    models: Path,
    recipe: Recipe | str,
    *,
    parts: Iterable[str] | None = None,
    endpoint: str | None = None,
    token: str | None = None,
    revisions: Mapping[str, str] | None = None,
    dry_run: bool = False,
    say: Callable[[str], None] = print,
) -> Fetched:
    """Download what the store at `models` lacks for `recipe`, or for `parts` (names of repositories.py) instead.

    `revisions` maps a repository to the branch, tag or commit to take instead of the table's. `say` gets lines for the
    user: each source with its files and licence. `dry_run` stops after these lines.

    No file in an SVDQ format is published: for a recipe with such a format the source is fetched to make the file from,
    unless the store already has the file.

    Raises ConfigInvalid, StorageDenied (gated or private: the message says where to accept terms), WeightsMissing (the
    hub no longer has it), WeightsCorrupt (another checksum than pinned or listed), StorageFull (before the first byte
    if that can be foreseen) and StorageUnavailable, after which the same command resumes.
    """
    from filelock import FileLock, Timeout

    begin = time.monotonic()
    if parts is None:
        parts = _missing_parts(models, recipe, say)
    sources, hub = sources_of(recipe, parts), Hub(endpoint, token)
    with online(say):
        items = _items(models, sources, hub, revisions or {}, say)
        commits = {item.listing.repo: item.listing.commit for item in items}
        total = sum(item.file.bytes for item in items)
        if dry_run:
            return Fetched(models, len(items), 0, total, 0, commits, time.monotonic() - begin)
        try:
            models.mkdir(parents=True, exist_ok=True)
            lock = FileLock(models / LOCK)
            try:
                lock.acquire(timeout=0)
            except Timeout:
                say(f"Waiting for another process that fetches into {models}")
                lock.acquire()
            try:
                missing = [item for item in items if not _adopt(item)]
                arrived = _download(hub, missing, models) if missing else 0
            finally:
                lock.release()
        except OSError as err:
            raise as_runner_error(err, where=models) from err
    seconds = time.monotonic() - begin
    say(f"{len(items)} files, {total / GB:.2f} GB in {models}; {len(missing)} fetched, {arrived / GB:.2f} GB")
    return Fetched(models, len(items), len(missing), total, arrived, commits, seconds)


def _missing_parts(models: Path, recipe: Recipe | str, say: Callable[[str], None]) -> Iterable[str] | None:
    """The parts to fetch for a recipe whose transformer is not published, as `say` reports; None: all parts."""
    chosen = get_recipe(recipe) if isinstance(recipe, str) else recipe
    fmt, parts = svdq_format(chosen), parts_of(recipe)
    if fmt is None:
        return None
    made = next((name for name in variant_folders(chosen) if (models / name / TRANSFORMER_FILE).is_file()), None)
    if made is None:
        say(f"There is no published transformer in {fmt}. Its source is fetched; make the file from it afterwards:")
        say(f"  {quantize_command(chosen)}")
        return parts
    say(f"{made}/{TRANSFORMER_FILE} is there: the source that it was made from is not fetched")
    unneeded = {"transformer", "distill-lora"} if made == quantized_folder(chosen) else {"transformer"}
    return [part for part in parts if part not in unneeded]


def _items(
    models: Path, sources: list[HubSource], hub: Hub, revisions: Mapping[str, str], say: Callable[[str], None]
) -> list[_Item]:
    """List every file to have, and announce each source. Requests one listing per repository."""
    listings: dict[tuple[str, str], Listing] = {}
    items: dict[Path, _Item] = {}
    for source in sources:
        key = (source.repo, revisions.get(source.repo, source.revision))
        listing = listings.get(key) or hub.listing(*key)
        listings[key] = listing
        found = [file for file in listing.files if source.wants(file.path)]
        if not found:
            raise WeightsMissing(
                f"the repository has no {' or '.join(source.files)}",
                where=f"{hub.endpoint}/{source.repo}@{listing.commit[:12]}",
                todo=f"Put them into {models / source.folder} by hand, or pass another --revision",
            )
        _say_source(source, listing, found, say)
        for file in found:
            item = _pinned(_Item(source, listing, file, models / source.folder, source.place(file.path)))
            other = items.get(item.path)
            if other is not None and other.file.path != file.path:
                raise WeightsCorrupt(
                    f"{file.path} and {other.file.path} would go to the same place in the store", where=source.repo
                )
            items[item.path] = item
    return list(items.values())


def _say_source(source: HubSource, listing: Listing, found: list[RemoteFile], say: Callable[[str], None]) -> None:
    size = sum(file.bytes for file in found) / GB
    card = f" (the hub's card: {listing.licence})" if listing.licence else ""
    say(f"{source.part}: {source.repo}@{listing.commit[:12]}, {len(found)} files, {size:.2f} GB")
    say(f"  licence: {source.licence}{card}")
    if source.notice:
        say(f"  note: {source.notice}")


def _pinned(item: _Item) -> _Item:
    """Return `item` with its pinned checksum, if it has one. Raises WeightsCorrupt when the hub lists another file."""
    pin = item.source.pins.get(item.path.name)
    if pin is None:
        return item
    if item.file.bytes != pin.bytes or item.file.sha256 not in (None, pin.sha256):
        raise WeightsCorrupt(
            f"{item.file.path} is not the known file: it has {item.file.bytes} bytes, sha256 {item.file.sha256}; "
            f"expected are {pin.bytes} and {pin.sha256}",
            where=f"{item.listing.repo}@{item.listing.commit[:12]}",
            todo="The publisher has replaced it: fetch it by hand if you trust the new file",
        )
    return replace(item, file=replace(item.file, sha256=pin.sha256))


def _adopt(item: _Item) -> bool:
    """Is the file there as listed? A file without a record is hashed once and gets its record."""
    if item.known:
        return True
    if not item.path.is_file():
        return False
    if item.file.digest is not None and item.file.matches(item.path):
        write_record(item.base, item.place, item.listing.commit, item.file.digest)
        return True
    _log("weights.replace", file=str(item.path), reason="not the bytes that the hub lists")
    return False


def _download(hub: Hub, missing: list[_Item], models: Path) -> int:
    """Download all, WORKERS at a time. Returns the bytes received. After an error all stop at their next block."""
    _require_space(missing, models)
    progress = _FetchProgress(sum(item.left for item in missing))
    _log("weights.fetch", files=len(missing), gb=round(progress.total / GB, 3), folder=str(models))

    def fetch(item: _Item) -> None:
        hub.download(item.listing, item.file, item.base, item.place, on_bytes=progress.add)
        _log("weights.file", file=str(item.path.relative_to(models)), bytes=item.file.bytes)

    with ThreadPoolExecutor(WORKERS, thread_name_prefix="fetch") as pool:
        running = [pool.submit(fetch, item) for item in missing]
        try:
            for one in wait(running, return_when=FIRST_EXCEPTION).done:
                one.result()
        except BaseException:  # Ctrl-C too: it must not wait for 10 GB of running downloads
            progress.stopped.set()
            pool.shutdown(wait=True, cancel_futures=True)
            raise
    return progress.done


def _require_space(missing: list[_Item], models: Path) -> None:
    """Raise StorageFull when the missing files are larger than the free space."""
    needed, free = sum(item.left for item in missing), shutil.disk_usage(models).free
    if needed > free:
        raise StorageFull(
            f"the files need {needed / GB:.1f} GB, and {free / GB:.1f} GB are free",
            where=models,
            todo="Free some space, or pass --models with a folder on a larger disk",
        )


class _Stopped(Exception):
    """This worker stops its download; the part that has arrived stays for the next fetch."""


@dataclass
class _FetchProgress:
    """Logs the progress of the fetch, one line for each twentieth."""

    total: int
    done: int = 0
    begin: float = field(default_factory=time.monotonic)
    reported: int = 0
    lock: threading.Lock = field(default_factory=threading.Lock)
    stopped: threading.Event = field(default_factory=threading.Event)

    def add(self, amount: int) -> None:
        """Called from all workers. Raises _Stopped once another has failed."""
        if self.stopped.is_set():
            raise _Stopped
        with self.lock:
            self.done += amount
            step = int(self.done / (self.total * REPORT_EVERY)) if self.total else 0
            if step <= self.reported or self.done <= 0:
                return
            self.reported = step
            rate = self.done / max(time.monotonic() - self.begin, 1e-6)
            left = round((self.total - self.done) / rate)
        _log(
            "weights.progress",
            gb=round(self.done / GB, 3),
            of_gb=round(self.total / GB, 3),
            mb_s=round(rate / 1e6, 1),
            left_s=left,
        )


def _log(event: str, **fields: object) -> None:
    import structlog  # brings rich with it, and `--help` passes through here

    structlog.get_logger().info(event, **fields)

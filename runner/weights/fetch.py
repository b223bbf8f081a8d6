"""Fetch: the published files of a recipe copied from their hubs into the model store, checked, and only those.

In:   the store's folder, a recipe. Out: the files where the store looks for them, and a summary; or an error.
Never: pickles (see repositories.py); what is in the files. Nothing is fetched before its licence has been shown and the
disk has been found large enough; a fetch that was cut off goes on where it stopped.
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
    """What a fetch did. Counts are of files, sizes in bytes."""

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
        """Bytes still to come."""
        part = partial_path(self.base, self.place, self.file)
        return self.file.bytes - (min(part.stat().st_size, self.file.bytes) if part.is_file() else 0)

    @property
    def known(self) -> bool:
        """Is the file there, and untouched since its record was written?"""
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
    """Bring the store at `models` to what `recipe` needs (or to `parts`, names of repositories.py, instead).

    `revisions` maps a repository to the branch, tag or commit to take, over the table's. `say` gets the lines that a
    person should read: what comes from where under which licence. `dry_run` stops after these.

    No file in an SVDQ format is published: for a recipe that runs one, the source is fetched to make it from, unless
    the store has it.

    Raises ConfigInvalid, StorageDenied (gated or private: the message says where to accept terms), WeightsMissing (the
    hub has it no longer), WeightsCorrupt (not the pinned or listed checksum), StorageFull (before the first byte where
    that can be foreseen) and StorageUnavailable, after which the same command goes on.
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
                say(f"Waiting: another process fetches into {models}")
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
    """The parts to fetch for a recipe whose transformer is not published, which `say` is told; None: all."""
    chosen = get_recipe(recipe) if isinstance(recipe, str) else recipe
    fmt, parts = svdq_format(chosen), parts_of(recipe)
    if fmt is None:
        return None
    made = next((name for name in variant_folders(chosen) if (models / name / TRANSFORMER_FILE).is_file()), None)
    if made is None:
        say(f"There is no published transformer in {fmt}: its source is fetched. Make the file from it afterwards:")
        say(f"  {quantize_command(chosen)}")
        return parts
    say(f"{made}/{TRANSFORMER_FILE} is there: the source that it was made from is not fetched")
    unneeded = {"transformer", "distill-lora"} if made == quantized_folder(chosen) else {"transformer"}
    return [part for part in parts if part not in unneeded]


def _items(
    models: Path, sources: list[HubSource], hub: Hub, revisions: Mapping[str, str], say: Callable[[str], None]
) -> list[_Item]:
    """Every wanted file, each announced with its source. Asks the hub once a repository."""
    listings: dict[tuple[str, str], Listing] = {}
    items: dict[Path, _Item] = {}
    for source in sources:
        key = (source.repo, revisions.get(source.repo, source.revision))
        listing = listings.get(key) or hub.listing(*key)
        listings[key] = listing
        found = [file for file in listing.files if source.wants(file.path)]
        if not found:
            raise WeightsMissing(
                f"has no {' or '.join(source.files)}",
                where=f"{hub.endpoint}/{source.repo}@{listing.commit[:12]}",
                todo=f"Put them into {models / source.folder} by hand, or pass another --revision",
            )
        _say_source(source, listing, found, say)
        for file in found:
            item = _pinned(_Item(source, listing, file, models / source.folder, source.place(file.path)))
            other = items.get(item.path)
            if other is not None and other.file.path != file.path:
                raise WeightsCorrupt(
                    f"holds {file.path} and {other.file.path}, which go to the same place", where=source.repo
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
    """`item`, held to its pin where there is one. Raises WeightsCorrupt when the hub lists another file."""
    pin = item.source.pins.get(item.path.name)
    if pin is None:
        return item
    if item.file.bytes != pin.bytes or item.file.sha256 not in (None, pin.sha256):
        raise WeightsCorrupt(
            f"{item.file.path} is not the known file: {item.file.bytes} bytes, sha256 {item.file.sha256}, "
            f"where {pin.bytes} and {pin.sha256} are expected",
            where=f"{item.listing.repo}@{item.listing.commit[:12]}",
            todo="Another file has taken its name: fetch it by hand if you trust it",
        )
    return replace(item, file=replace(item.file, sha256=pin.sha256))


def _adopt(item: _Item) -> bool:
    """Is the file there as listed? One that came some other way is hashed once and gets its record."""
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
    """Fetch all, some at a time; the bytes that came. The first error stops the rest, each at its next block."""
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
        except BaseException:  # Ctrl-C among them: nobody wants to wait for 10 GB that are on their way
            progress.stopped.set()
            pool.shutdown(wait=True, cancel_futures=True)
            raise
    return progress.done


def _require_space(missing: list[_Item], models: Path) -> None:
    """Raise StorageFull when what is missing cannot fit."""
    needed, free = sum(item.left for item in missing), shutil.disk_usage(models).free
    if needed > free:
        raise StorageFull(
            f"{needed / GB:.1f} GB are to come and {free / GB:.1f} GB are free",
            where=models,
            todo="Free space, or pass --models on a larger disk",
        )


class _Stopped(Exception):
    """This worker's file is given up for now; what came of it stays for the next fetch."""


@dataclass
class _FetchProgress:
    """Says how far the fetch is, one line for each twentieth."""

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

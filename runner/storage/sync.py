"""Sync: copy a model store from a bucket once into a local folder, for all processes of the machine.

In:   the URI of an object store, a cache folder, a filter of keys. Out: a local folder with those files of the bucket.
Never: the purpose of the files.

    <cache>/<name>/        the store; each file appears whole
    <cache>/<name>.json    the index: key → identity and size of the downloaded file
    <cache>/<name>.lock    locked while comparing and downloading
"""

from __future__ import annotations

import hashlib
import json
import re
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from runner.errors import InputNotFound, StorageFull, WeightsMissing
from runner.storage.base import ObjectInfo, Storage, check_key
from runner.storage.disk import is_staged, os_errors, staged, walk_files
from runner.storage.uris import is_remote, local_path, open_storage

__all__ = ["cache_name", "sync_models"]

INDEX_VERSION = 1
GB = 1e9
REPORT_EVERY = 0.1  # of all bytes


def sync_models(uri: str | Path, cache: Path, wanted: Callable[[str], bool], *, download: bool = True) -> Path:
    """Return the model store at `uri` as a local folder. A local store is returned unchanged.

    From an object store, the files that `wanted` selects (by key below the root) are downloaded, unless the cache has
    them with the same identity and size. Downloads are compared with the store's digest; if the store gives none, the
    event `models.unverified` names the file.

    Processes that share the cache work one after the other, so the second finds the files. Files that the bucket no
    longer has are removed from the cache. Raises WeightsMissing if the store has no (selected) file; StorageFull before
    a download that does not fit; StorageDenied; StorageUnavailable.

    Without `download` nothing is changed, and files that the cache lacks raise WeightsMissing.
    """
    if not is_remote(uri):
        folder = local_path(uri)
        if not folder.is_dir():
            raise WeightsMissing(
                "the model folder does not exist", where=folder, todo="Check --models (VIDEO_LAB_MODELS)"
            )
        return folder
    storage = open_storage(uri)
    folder = cache / cache_name(storage.root)
    if not download:
        with os_errors(cache, writing=False):
            _Sync(storage, folder).require_all(wanted)
        return folder
    with os_errors(cache, writing=True):
        folder.mkdir(parents=True, exist_ok=True)
        with _locked(folder.with_name(folder.name + ".lock")):
            _Sync(storage, folder).run(wanted)
    return folder


def cache_name(root: str) -> str:
    """Return a readable folder name for a store, unique for its URI."""
    slug = re.sub(r"[^A-Za-z0-9._-]+", "-", root.rpartition("/")[2]).strip("-.")[:40]
    return f"{slug or 'models'}-{hashlib.sha256(root.encode()).hexdigest()[:12]}"


class _locked:
    """Lock a file while the block runs, and log an event if another process has locked it.

    The system releases the lock when its holder dies.
    """

    def __init__(self, path: Path) -> None:
        from filelock import FileLock

        self.lock = FileLock(path)

    def __enter__(self) -> None:
        from filelock import Timeout

        try:
            self.lock.acquire(timeout=0)
        except Timeout:
            _log("models.waiting", reason="another process is downloading them", lock=str(self.lock.lock_file))
            self.lock.acquire()

    def __exit__(self, *_: object) -> None:
        self.lock.release()


class _Sync:
    """One comparison of bucket and folder, while the lock is held."""

    def __init__(self, storage: Storage, folder: Path) -> None:
        self.storage, self.folder = storage, folder
        self.index_path = folder.with_name(folder.name + ".json")
        self.index = self._read_index()

    def run(self, wanted: Callable[[str], bool]) -> None:
        self._remove_leftovers()
        there = self._there(wanted)
        for key in [key for key in self.index if key not in there and wanted(key)]:
            (self.folder / key).unlink(missing_ok=True)  # a loader could mix two versions of a sharded file
            self._record(key, None)
        missing = [info for info in there.values() if not self._has(info)]
        if not missing:
            _log("models.ready", files=len(there), downloaded=0, folder=str(self.folder))
            return
        self._require_space(missing)
        begin, progress = time.monotonic(), _SyncProgress(sum(info.bytes for info in missing))
        _log("models.sync", uri=self.storage.root, files=len(missing), gb=round(progress.total / GB, 3))
        for number, info in enumerate(missing, 1):
            got = self.storage.fetch(info.key, self.folder / info.key, progress.add)
            if not got.verified:
                _log("models.unverified", level="warning", key=info.key, reason="the store gives no digest of it")
            self._record(info.key, {"identity": self.storage.identify(got), "bytes": got.bytes})
            _log("models.file", key=info.key, bytes=got.bytes, number=number, of=len(missing))
        seconds = round(time.monotonic() - begin, 1)
        _log("models.ready", files=len(there), downloaded=len(missing), seconds=seconds, folder=str(self.folder))

    def require_all(self, wanted: Callable[[str], bool]) -> None:
        """Raise WeightsMissing unless the folder has the selected files as they are in the bucket."""
        there = self._there(wanted)
        missing = [info for info in there.values() if not self._has(info)]
        stale = [key for key in self.index if key not in there and wanted(key)]
        if missing or stale:
            size = sum(info.bytes for info in missing) / GB
            raise WeightsMissing(
                f"the cache does not have the present models of {self.storage.root}: {len(missing)} files, "
                f"{size:.1f} GB, would be downloaded",
                where=self.folder,
                todo="A dry run downloads nothing. Run without --dry-run, or name a local copy with --models",
            )

    def _there(self, wanted: Callable[[str], bool]) -> dict[str, ObjectInfo]:
        """Return selected key → object in the bucket, in order of key."""
        root, todo = self.storage.root, "Check --models (VIDEO_LAB_MODELS) and upload the published weights there"
        try:
            found = list(self.storage.list())
        except InputNotFound as err:
            raise WeightsMissing(err.what, where=root, todo=todo) from err
        if not found:
            raise WeightsMissing("the model store has no files", where=root, todo=todo)
        there = {
            check_key(info.key): info for info in found if wanted(info.key)
        }  # a key must not lead out of the folder
        if not there:
            seen = ", ".join(sorted(info.key for info in found)[:3])
            raise WeightsMissing(
                f"the model store has none of the needed files (it has {seen}, …)", where=root, todo=todo
            )
        return dict(sorted(there.items()))

    def _has(self, info: ObjectInfo) -> bool:
        path = self.folder / info.key
        if info.key not in self.index or not path.is_file() or path.stat().st_size != info.bytes:
            return False
        return bool(self.index[info.key] == {"identity": self.storage.identify(info), "bytes": info.bytes})

    def _require_space(self, missing: list[ObjectInfo]) -> None:
        """Raise StorageFull if the new files do not fit, even after old ones are replaced."""
        old = sum(path.stat().st_size for info in missing if (path := self.folder / info.key).is_file())
        needed, free = sum(info.bytes for info in missing) - old, shutil.disk_usage(self.folder).free
        if needed > free:
            raise StorageFull(
                f"the models need {needed / GB:.1f} GB more, but only {free / GB:.1f} GB are free",
                where=self.folder,
                todo="Free space, or put --cache on a larger disk",
            )

    def _read_index(self) -> dict[str, Any]:
        try:
            index = json.loads(self.index_path.read_bytes())
            files = index["files"] if index["version"] == INDEX_VERSION else {}
        except (FileNotFoundError, ValueError, KeyError, TypeError):  # none yet, or a foreign file: download again
            return {}
        return dict(files) if isinstance(files, dict) else {}

    def _record(self, key: str, entry: dict[str, Any] | None) -> None:
        """Note the file under `key` in the index, after it was written: a crash in between only costs a download."""
        if entry is None:
            del self.index[key]
        else:
            self.index[key] = entry
        with staged(self.index_path) as out:
            whole = {"version": INDEX_VERSION, "uri": self.storage.root, "files": self.index}
            out.write(json.dumps(whole, ensure_ascii=False, indent=1).encode())

    def _remove_leftovers(self) -> None:
        """Remove files of a process killed while downloading. No process is writing now, as this one holds the lock."""
        for path in [path for path in walk_files(self.folder) if is_staged(path.name)]:
            path.unlink(missing_ok=True)


class _SyncProgress:
    """Logs how far a download is, at each tenth."""

    def __init__(self, total: int) -> None:
        self.total, self.done, self.next = total, 0, REPORT_EVERY

    def add(self, amount: int) -> None:
        """Add bytes. Called from the transfer's threads; a lost update only delays a line a little."""
        self.done += amount
        if self.total and self.done / self.total >= self.next and self.next < 1:
            self.next = self.done // (self.total * REPORT_EVERY) * REPORT_EVERY + REPORT_EVERY
            _log("models.progress", gb=round(self.done / GB, 3), of_gb=round(self.total / GB, 3))


def _log(event: str, *, level: str = "info", **fields: object) -> None:
    import structlog  # it imports rich, and `--help` imports this module

    getattr(structlog.get_logger(), level)(event, **fields)

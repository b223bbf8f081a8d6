"""Sync: a model store in a bucket copied once into a local folder, for every process of the machine.

In:   the URI of an object store, a cache folder, which keys are wanted. Out: a local folder with those files as the
bucket has them.
Never: what the files are for.

    <cache>/<name>/        the store, each file put in place whole
    <cache>/<name>.json    the index: key → identity and size of what was downloaded
    <cache>/<name>.lock    held while comparing and downloading
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
    """The model store at `uri` as a local folder. A local one is returned unchanged.

    Of one in an object store, the files that `wanted` names (by key below the root) are downloaded unless the cache has
    them with the same identity and size. What is downloaded is compared with a digest that the store gives; where it
    gives none, the event `models.unverified` names the file.

    Processes that share the cache take turns; the second finds the work done. Files that the bucket no longer has are
    removed from the cache. Raises WeightsMissing when there is nothing (wanted) there, StorageFull before a download
    that cannot fit, StorageDenied, StorageUnavailable.

    Without `download` nothing is changed, and what the cache lacks is WeightsMissing.
    """
    if not is_remote(uri):
        folder = local_path(uri)
        if not folder.is_dir():
            raise WeightsMissing("no such model folder", where=folder, todo="Check --models (VIDEO_LAB_MODELS)")
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
    """The folder's name for a store: the same for the same URI, readable, and different for different URIs."""
    slug = re.sub(r"[^A-Za-z0-9._-]+", "-", root.rpartition("/")[2]).strip("-.")[:40]
    return f"{slug or 'models'}-{hashlib.sha256(root.encode()).hexdigest()[:12]}"


class _locked:
    """Hold a lock file for the length of a block, and say so when another process has it. The system frees it when its
    holder dies."""

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
    """One comparison of bucket and folder, with the lock held."""

    def __init__(self, storage: Storage, folder: Path) -> None:
        self.storage, self.folder = storage, folder
        self.index_path = folder.with_name(folder.name + ".json")
        self.index = self._read_index()

    def run(self, wanted: Callable[[str], bool]) -> None:
        self._remove_leftovers()
        there = self._there(wanted)
        for key in [key for key in self.index if key not in there and wanted(key)]:
            (self.folder / key).unlink(missing_ok=True)  # else a loader could mix two versions of a sharded file
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
        """Raise WeightsMissing unless the folder holds what is wanted as the bucket has it."""
        there = self._there(wanted)
        missing = [info for info in there.values() if not self._has(info)]
        stale = [key for key in self.index if key not in there and wanted(key)]
        if missing or stale:
            size = sum(info.bytes for info in missing) / GB
            raise WeightsMissing(
                f"the cache does not hold the models of {self.storage.root} as they are now: {len(missing)} files, "
                f"{size:.1f} GB, would be downloaded",
                where=self.folder,
                todo="A dry run downloads nothing: run without --dry-run, or name a local copy with --models",
            )

    def _there(self, wanted: Callable[[str], bool]) -> dict[str, ObjectInfo]:
        """Wanted key → what the bucket has, in order of key."""
        root, todo = self.storage.root, "Check --models (VIDEO_LAB_MODELS) and upload the published weights there"
        try:
            found = list(self.storage.list())
        except InputNotFound as err:
            raise WeightsMissing(err.what, where=root, todo=todo) from err
        if not found:
            raise WeightsMissing("holds no files", where=root, todo=todo)
        there = {check_key(info.key): info for info in found if wanted(info.key)}  # no key may lead out of the folder
        if not there:
            seen = ", ".join(sorted(info.key for info in found)[:3])
            raise WeightsMissing(f"holds none of the files needed (it has {seen}, …)", where=root, todo=todo)
        return dict(sorted(there.items()))

    def _has(self, info: ObjectInfo) -> bool:
        path = self.folder / info.key
        if info.key not in self.index or not path.is_file() or path.stat().st_size != info.bytes:
            return False
        return bool(self.index[info.key] == {"identity": self.storage.identify(info), "bytes": info.bytes})

    def _require_space(self, missing: list[ObjectInfo]) -> None:
        """Raise StorageFull if even after replacing old files the new ones cannot fit."""
        old = sum(path.stat().st_size for info in missing if (path := self.folder / info.key).is_file())
        needed, free = sum(info.bytes for info in missing) - old, shutil.disk_usage(self.folder).free
        if needed > free:
            raise StorageFull(
                f"the models need {needed / GB:.1f} GB more and {free / GB:.1f} GB are free",
                where=self.folder,
                todo="Free space, or put --cache on a larger disk",
            )

    def _read_index(self) -> dict[str, Any]:
        try:
            said = json.loads(self.index_path.read_bytes())
            files = said["files"] if said["version"] == INDEX_VERSION else {}
        except (FileNotFoundError, ValueError, KeyError, TypeError):  # none yet, or not ours: download again
            return {}
        return dict(files) if isinstance(files, dict) else {}

    def _record(self, key: str, entry: dict[str, Any] | None) -> None:
        """Note what lies under `key` now, after it does: a crash in between costs a download, never a wrong file."""
        if entry is None:
            del self.index[key]
        else:
            self.index[key] = entry
        with staged(self.index_path) as out:
            whole = {"version": INDEX_VERSION, "uri": self.storage.root, "files": self.index}
            out.write(json.dumps(whole, ensure_ascii=False, indent=1).encode())

    def _remove_leftovers(self) -> None:
        """Files of a process killed while downloading: nobody else may be writing here, as we hold the lock."""
        for path in [path for path in walk_files(self.folder) if is_staged(path.name)]:
            path.unlink(missing_ok=True)


class _SyncProgress:
    """Says how far a download is, a tenth at a time."""

    def __init__(self, total: int) -> None:
        self.total, self.done, self.next = total, 0, REPORT_EVERY

    def add(self, amount: int) -> None:
        """Called from the transfer's threads; a lost update only makes a line come a little later."""
        self.done += amount
        if self.total and self.done / self.total >= self.next and self.next < 1:
            self.next = self.done // (self.total * REPORT_EVERY) * REPORT_EVERY + REPORT_EVERY
            _log("models.progress", gb=round(self.done / GB, 3), of_gb=round(self.total / GB, 3))


def _log(event: str, *, level: str = "info", **fields: object) -> None:
    import structlog  # brings rich with it, and `--help` passes through here

    getattr(structlog.get_logger(), level)(event, **fields)

"""Storage: one interface for files and small objects by key, on a local disk or in an object store.

base.py has the interface; local.py and s3.py implement it; uris.py maps URI schemes to backends and opens a storage;
sync.py copies a model store; disk.py writes files atomically on a disk; disk_cache.py keeps results between runs;
file_hashes.py caches the sha256 of files.
"""

from runner.storage.base import Fence, Leftover, ObjectInfo, Storage, Versioned, check_key, combined_identity
from runner.storage.local import LocalStorage
from runner.storage.uris import (
    FetchedInput,
    fetch_input,
    fetch_input_with_info,
    identify_input,
    is_remote,
    local_path,
    open_storage,
    probe_conditions,
    probe_writable,
    stat_input,
)

__all__ = [
    "Fence",
    "FetchedInput",
    "Leftover",
    "LocalStorage",
    "ObjectInfo",
    "Storage",
    "Versioned",
    "check_key",
    "combined_identity",
    "fetch_input",
    "fetch_input_with_info",
    "identify_input",
    "is_remote",
    "local_path",
    "open_storage",
    "probe_conditions",
    "probe_writable",
    "stat_input",
]

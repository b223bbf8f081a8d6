"""Storage: whole files and small objects by key, on a local disk or in an object store, behind one small interface.

base.py has the interface; local.py and s3.py fulfil it; uris.py has the backends by scheme and opens one by its URI;
sync.py copies a model store; disk.py puts a file in place on a disk; disk_cache.py keeps results between runs;
file_hashes.py remembers the sha256 of files.
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

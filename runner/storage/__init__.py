"""Storage: whole files and small objects by key, on a local disk or in an S3 bucket, behind one small interface.

base.py has the interface; local.py and s3.py fulfil it; uris.py opens one by its URI; sync.py copies a model store;
disk.py puts a file in place on a disk; disk_cache.py keeps results between runs.
"""

from runner.storage.base import Leftover, ObjectInfo, Storage, Versioned, check_key, is_remote, local_path
from runner.storage.local import LocalStorage
from runner.storage.uris import (
    FetchedInput,
    fetch_input,
    fetch_input_with_info,
    open_storage,
    probe_writable,
    stat_input,
)

__all__ = [
    "FetchedInput",
    "Leftover",
    "LocalStorage",
    "ObjectInfo",
    "Storage",
    "Versioned",
    "check_key",
    "fetch_input",
    "fetch_input_with_info",
    "is_remote",
    "local_path",
    "open_storage",
    "probe_writable",
    "stat_input",
]

"""Digests: find the sha256 of model files, without reading 80 GB at every start.

In:   files, a folder that keeps results. Out: hex digests. Never: the meaning of the files' content.

A digest comes from the first of these sources that has it:
- the file's own safetensors metadata (`video_lab.sha256`, in files that `quantize` made);
- the hub's record beside a download (`.cache/huggingface/download/NAME.metadata`, whose second line is the sha256 of a
  large file);
- the kept result of an earlier hashing of this file (same path, size, mtime and inode);
- the bytes.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from pathlib import Path

from runner.errors import WeightsCorrupt, as_runner_error
from runner.storage.file_hashes import FileHashes

__all__ = ["MEMORY_FILE", "METADATA_KEY", "FileDigests"]

METADATA_KEY = "video_lab.sha256"
MEMORY_FILE = "weight-identities.json"  # in the cache folder
SHA256 = re.compile(r"[0-9a-f]{64}")
CLOCK_SLACK_S = 1  # the hub's record may be written within the same second as the file


class FileDigests:
    """sha256 of files. Each file is hashed at most once by this object, and once in all where a folder keeps results.

    Several processes may share the folder. `saves`: whether results are added to it; else it is only read.
    """

    def __init__(self, *, saves: bool = True) -> None:
        self._hashes, self._saves = FileHashes(), saves

    def find(self, files: Iterable[Path], root: Path, folder: Path | None = None) -> dict[Path, str]:
        """Return the digest of each file. Folders from the file's up to `root` may hold the hub's records.

        `folder` keeps results. Raises WeightsCorrupt for a truncated safetensors file, StorageDenied or StorageFull
        where `folder` cannot be written, OSError for a file that cannot be read.
        """
        if folder is not None:
            self._hashes.use(folder / MEMORY_FILE)
        digests = {file: recorded(file, root) or self._hashes.sha256(file) for file in files}
        if not self._saves:
            return digests
        try:
            self._hashes.save()
        except OSError as err:
            raise as_runner_error(err, where=folder) from err
        return digests


def recorded(file: Path, root: Path) -> str | None:
    """Return the digest that was recorded when `file` was made or downloaded, or None."""
    return _read_metadata(file) or _read_hub_record(file, root)


def _read_metadata(file: Path) -> str | None:
    if file.suffix != ".safetensors":
        return None
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(file, framework="np") as opened:
            value = (opened.metadata() or {}).get(METADATA_KEY, "")
    except SafetensorError as err:
        raise WeightsCorrupt(f"not a whole safetensors file ({err})", where=file, todo="Download it again") from err
    return value if SHA256.fullmatch(value) else None


def _read_hub_record(file: Path, root: Path) -> str | None:
    for base in file.parents:
        if not base.is_relative_to(root):
            return None
        name = file.relative_to(base).as_posix()
        record = base / ".cache" / "huggingface" / "download" / f"{name}.metadata"
        try:
            _commit, etag, written_s = record.read_text().splitlines()[:3]
            unchanged = file.stat().st_mtime <= float(written_s) + CLOCK_SLACK_S
        except FileNotFoundError:
            continue
        except ValueError:
            return None  # not the hub's format: the file is hashed
        return etag if unchanged and SHA256.fullmatch(etag) else None
    return None

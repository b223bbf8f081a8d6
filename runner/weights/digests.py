"""Digests: the sha256 of model files, found without reading 80 GB at every start.

In:   files, and where to remember. Out: hex digests. Never: what is in the files.

A digest comes from the first of these that has it: the file's own safetensors metadata (`video_lab.sha256`, written
when we made it), the hub's record beside a download (`.cache/huggingface/download/NAME.metadata`, whose second line is
the sha256 of a large file), our memory of having hashed this very file (same path, size, mtime and inode), the bytes.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from pathlib import Path

from runner.errors import WeightsCorrupt, as_runner_error
from runner.storage.file_hashes import FileHashes

__all__ = ["MEMORY_FILE", "METADATA_KEY", "FileIdentities"]

METADATA_KEY = "video_lab.sha256"
MEMORY_FILE = "weight-identities.json"  # in the cache folder
SHA256 = re.compile(r"[0-9a-f]{64}")
CLOCK_SLACK_S = 1  # the hub's record may be written within the same second as the file


class FileIdentities:
    """sha256 by file, hashed once in the life of this object, and once in all where a folder keeps the results.

    Several processes may share the folder. `saves`: whether results are added to it; else it is only read.
    """

    def __init__(self, *, saves: bool = True) -> None:
        self._hashes, self._saves = FileHashes(), saves

    def of(self, files: Iterable[Path], root: Path, folder: Path | None = None) -> dict[Path, str]:
        """Digest of each file. The hub's records are looked for between the file and `root`; `folder` keeps results.

        Raises WeightsCorrupt for a safetensors file that is not whole, StorageDenied or StorageFull where `folder`
        cannot be written, OSError for a file that cannot be read.
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
    """The digest that was written down when `file` was made or downloaded, or None."""
    return _own_metadata(file) or _hub_record(file, root)


def _own_metadata(file: Path) -> str | None:
    if file.suffix != ".safetensors":
        return None
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(file, framework="np") as opened:
            value = (opened.metadata() or {}).get(METADATA_KEY, "")
    except SafetensorError as err:
        raise WeightsCorrupt(f"not a whole safetensors file ({err})", where=file, todo="Download it again") from err
    return value if SHA256.fullmatch(value) else None


def _hub_record(file: Path, root: Path) -> str | None:
    for base in file.parents:
        if not base.is_relative_to(root):
            return None
        name = file.relative_to(base).as_posix()
        record = base / ".cache" / "huggingface" / "download" / f"{name}.metadata"
        try:
            _commit, etag, written_s = record.read_text().splitlines()[:3]
            fits = file.stat().st_mtime <= float(written_s) + CLOCK_SLACK_S
        except FileNotFoundError:
            continue
        except ValueError:
            return None  # not the hub's format: the bytes will tell
        return etag if fits and SHA256.fullmatch(etag) else None
    return None

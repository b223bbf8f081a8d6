"""Part archive: pack the files of one part of an output into one file, and unpack it.

In:   files by name. Out: a tar file, the same bytes for the same files; or the files, each checked.
Never: what the files contain, or where the archive is kept.

The first entry lists the sha256 of all others, as `sha256sum` writes it.
"""

from __future__ import annotations

import io
import os
import re
import shutil
import tarfile
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path

from runner.errors import InternalError, RunnerError, as_runner_error
from runner.hashing import sha256_file

__all__ = ["PNGS", "pack_files", "unpack_files"]

PNGS = "pngs"  # the only folder that a part may hold
SUMS = "sha256sums"
SUMS_BYTES = 64 << 20  # a longer list is damaged: a line has about a hundred bytes
_NAME = re.compile(rf"(?:{PNGS}/)?[a-z0-9]+\.[a-z0-9]+")
_SUM = re.compile(rf"([0-9a-f]{{64}})  ({_NAME.pattern})", re.ASCII)


def pack_files(files: Mapping[str, Path], dest: Path) -> None:
    """Write `files` (name in the archive → file) into the file `dest`, which appears whole.

    Raises ValueError for a name that `unpack_files` refuses; StorageFull and StorageDenied for errors of the disk.
    """
    for name in files:
        if not _NAME.fullmatch(name):
            raise ValueError(f"{name!r} is not a valid name for a file of a part")
    part = dest.with_name(dest.name + ".part")
    try:
        sums = "".join(f"{sha256_file(files[name])}  {name}\n" for name in sorted(files)).encode()
        # PAX, as USTAR allows 8 GiB per file at most. Small sizes and names give the same headers in both.
        with tarfile.open(part, "w", format=tarfile.PAX_FORMAT) as archive:
            archive.addfile(_entry(SUMS, len(sums)), io.BytesIO(sums))
            for name in sorted(files):
                with files[name].open("rb") as file:
                    archive.addfile(_entry(name, os.fstat(file.fileno()).st_size), file)
        os.replace(part, dest)
    except OSError as error:
        with suppress(OSError):
            part.unlink(missing_ok=True)
        raise as_runner_error(error, where=dest) from error


def unpack_files(packed: Path, folder: Path) -> set[str]:
    """Unpack an archive into `folder`, which is emptied first. Returns the names of the files.

    Raises InternalError if the archive is damaged or contains anything that `pack_files` does not write; StorageFull
    and StorageDenied for errors of the disk. After an error the folder is removed.
    """
    try:
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
        try:
            with tarfile.open(packed, "r:") as archive:
                return _unpack(archive, folder)
        except (tarfile.TarError, ValueError) as error:
            todo = "Remove the file. The job then starts before this segment"
            raise InternalError(f"the packed part is damaged ({error})", where=packed, todo=todo) from error
    except (RunnerError, OSError) as error:
        shutil.rmtree(folder, ignore_errors=True)
        raise as_runner_error(error, where=packed) from error


def _unpack(archive: tarfile.TarFile, folder: Path) -> set[str]:
    """Copy the files, so that no link or device is made. Raises ValueError for what `pack_files` does not write."""
    missing = _read_sums(archive)
    names = set(missing)
    while (entry := archive.next()) is not None:
        if entry.name not in missing or not entry.isreg():
            raise ValueError(f"the entry {entry.name!r} is not in its list, or occurs twice")
        path = folder / entry.name
        path.parent.mkdir(exist_ok=True)
        source = archive.extractfile(entry)
        assert source is not None  # a regular file has content
        with source, path.open("wb") as file:
            shutil.copyfileobj(source, file)
        if sha256_file(path) != missing.pop(entry.name):
            raise ValueError(f"{entry.name} does not have the listed sha256")
    if missing:
        raise ValueError(f"{min(missing)} is missing")
    return names


def _read_sums(archive: tarfile.TarFile) -> dict[str, str]:
    """Return name → sha256 from the first entry."""
    entry = archive.next()
    source = archive.extractfile(entry) if entry is not None and entry.name == SUMS else None
    if source is None:
        raise ValueError("it does not begin with a list of its files")
    lines = source.read(SUMS_BYTES).decode("ascii").splitlines()
    found = [_SUM.fullmatch(line) for line in lines]
    sums = {match[2]: match[1] for match in found if match}
    if len(sums) != len(lines):
        raise ValueError("its list of files is damaged")
    return sums


def _entry(name: str, size: int) -> tarfile.TarInfo:
    """Return a header without time, owner and permissions, so that the same files give the same bytes."""
    entry = tarfile.TarInfo(name)
    entry.size = size
    return entry

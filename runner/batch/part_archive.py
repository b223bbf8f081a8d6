"""Part archive: the files of one part of an output, packed into one file and unpacked again.

In:   files by name. Out: a tar file, the same bytes for the same files; or the files, each checked.
Never: what the files hold, or where the archive is kept.

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
SUMS_BYTES = 64 << 20  # a longer list is damaged: a line takes a hundred bytes
_NAME = re.compile(rf"(?:{PNGS}/)?[a-z0-9]+\.[a-z0-9]+")
_SUM = re.compile(rf"([0-9a-f]{{64}})  ({_NAME.pattern})", re.ASCII)


def pack_files(files: Mapping[str, Path], dest: Path) -> None:
    """Write `files`, by the name that each gets, into `dest`, which appears whole.

    Raises ValueError for a name that `unpack_files` would refuse, StorageFull and StorageDenied as the disk does.
    """
    for name in files:
        if not _NAME.fullmatch(name):
            raise ValueError(f"{name!r} is no name of a part's file")
    part = dest.with_name(dest.name + ".part")
    try:
        sums = "".join(f"{sha256_file(files[name])}  {name}\n" for name in sorted(files)).encode()
        # PAX: USTAR ends at 8 GiB a file. Small sizes and names give the same headers in both.
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
    """Put the files of an archive below `folder`, which is made anew. Returns their names.

    Raises InternalError if the archive is damaged or holds anything but what `pack_files` writes, StorageFull and
    StorageDenied as the disk does; nothing is left then.
    """
    try:
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
        try:
            with tarfile.open(packed, "r:") as archive:
                return _unpack(archive, folder)
        except (tarfile.TarError, ValueError) as error:
            todo = "Remove it; the job then starts before this segment"
            raise InternalError(f"the packed part is damaged ({error})", where=packed, todo=todo) from error
    except (RunnerError, OSError) as error:
        shutil.rmtree(folder, ignore_errors=True)
        raise as_runner_error(error, where=packed) from error


def _unpack(archive: tarfile.TarFile, folder: Path) -> set[str]:
    """Raises ValueError for what `pack_files` does not write. The files are copied: no link or device is made."""
    missing = _read_sums(archive)
    names = set(missing)
    while (entry := archive.next()) is not None:
        if entry.name not in missing or not entry.isreg():
            raise ValueError(f"an entry {entry.name!r} that it does not list, or a second one")
        path = folder / entry.name
        path.parent.mkdir(exist_ok=True)
        source = archive.extractfile(entry)
        assert source is not None  # a regular file has content
        with source, path.open("wb") as file:
            shutil.copyfileobj(source, file)
        if sha256_file(path) != missing.pop(entry.name):
            raise ValueError(f"{entry.name} has another sha256 than listed")
    if missing:
        raise ValueError(f"{min(missing)} is missing")
    return names


def _read_sums(archive: tarfile.TarFile) -> dict[str, str]:
    """Name → sha256, from the first entry."""
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
    """Without time, owner and permissions of the file, so that the same files give the same bytes."""
    entry = tarfile.TarInfo(name)
    entry.size = size
    return entry

"""File operations: every operation of this process on files below some folders, counted, and one of them disturbed.

`FileOperations(folders, meet).install()` replaces functions of `os` and `open` until the process ends: for a forked
child. `meet(name, path)` is called before each operation and may raise an OSError or end the process. A `write` that is
disturbed has already written the first half of its bytes. Writes of libraries in C (libav) are not seen.
"""

from __future__ import annotations

import builtins
import io
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

__all__ = ["CHANGES", "READS", "FileOperations"]

Meet = Callable[[str, str], None]

# Name of the function of `os` -> the name of the operation; its path is the argument that the tuple gives.
_BY_PATH = {
    "rename": ("rename", 1),
    "replace": ("rename", 1),
    "link": ("link", 1),
    "symlink": ("link", 1),
    "unlink": ("unlink", 0),
    "remove": ("unlink", 0),
    "mkdir": ("mkdir", 0),
    "rmdir": ("rmdir", 0),
    "truncate": ("truncate", 0),
    "utime": ("utime", 0),
    "stat": ("stat", 0),
    "lstat": ("stat", 0),
    "scandir": ("scandir", 0),
    "listdir": ("scandir", 0),
}
_BY_DESCRIPTOR = {
    "fsync": ("fsync", 0),
    "fdatasync": ("fsync", 0),
    "ftruncate": ("truncate", 0),
    "write": ("write", 0),
    "pwrite": ("write", 0),
    "sendfile": ("write", 0),
    "copy_file_range": ("write", 1),
}
READS = frozenset({"stat", "scandir", "open to read", "read"})
CHANGES = frozenset({"open", "write", "fsync", "rename", "link", "unlink", "mkdir", "rmdir", "truncate", "utime"})


class FileOperations:
    """`kinds`: of CHANGES and READS, the operations that are met; folders without links in their names."""

    def __init__(self, folders: Sequence[Path], meet: Meet, kinds: frozenset[str] = CHANGES) -> None:
        self._folders = tuple(f"{os.path.realpath(folder)}{os.sep}" for folder in folders)
        self._meet, self._kinds = meet, kinds
        self._os = {name: getattr(os, name) for name in (*_BY_PATH, *_BY_DESCRIPTOR, "open") if hasattr(os, name)}
        self._open: Callable[..., Any] = io.open
        self.written = 0  # bytes, to files below the folders

    def install(self) -> None:
        for name, (operation, position) in (_BY_PATH | _BY_DESCRIPTOR).items():
            if name in self._os:
                setattr(os, name, self._wrapped(self._os[name], operation, position, name))
        os.open = self._os_open
        # pathlib calls io.open, other modules the builtin.
        io.open = builtins.open = self._open_file  # type: ignore[assignment]

    def before(self, operation: str, path: str) -> None:
        if operation in self._kinds and path.startswith(self._folders):
            self._meet(operation, path)

    def _wrapped(self, original: Callable[..., Any], operation: str, position: int, name: str) -> Callable[..., Any]:
        fd_argument = "dst_dir_fd" if name in ("rename", "replace", "link") else "dir_fd"

        def call(*arguments: Any, **keywords: Any) -> Any:
            if len(arguments) <= position:
                return original(*arguments, **keywords)
            path = self._path(arguments[position], keywords.get(fd_argument))
            self.before(operation, path)
            result = original(*arguments, **keywords)
            if operation == "write" and path.startswith(self._folders):
                self.written += result
            return result

        return call

    def _os_open(self, path: Any, flags: int, *arguments: Any, **keywords: Any) -> int:
        changes = flags & (os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC)
        self.before("open" if changes else "open to read", self._path(path, keywords.get("dir_fd")))
        return int(self._os["open"](path, flags, *arguments, **keywords))

    def _path(self, path: Any, folder: int | None = None) -> str:
        """Absolute; of a descriptor, what it is open on."""
        try:
            if isinstance(path, int):
                return os.readlink(f"/proc/self/fd/{path}")
            name = os.fsdecode(path)
            if folder is not None and not os.path.isabs(name):
                return os.path.join(os.readlink(f"/proc/self/fd/{folder}"), name)
            return os.path.abspath(name)
        except (OSError, TypeError):
            return ""

    def _open_file(
        self,
        file: Any,
        mode: str = "r",
        buffering: int = -1,
        encoding: str | None = None,
        errors: str | None = None,
        newline: str | None = None,
        closefd: bool = True,
        opener: Any = None,
    ) -> Any:
        path = "" if isinstance(file, int) or opener is not None else self._path(file)
        if not path.startswith(self._folders):
            return self._open(file, mode, buffering, encoding, errors, newline, closefd, opener)
        writes = any(letter in mode for letter in "wxa+")
        self.before("open" if writes else "open to read", path)
        raw = _Watched(file, mode.replace("b", "").replace("t", ""), self, path)
        if "b" in mode and buffering == 0:
            return raw
        kind = io.BufferedRandom if "+" in mode else io.BufferedWriter if writes else io.BufferedReader
        buffered = kind(raw)
        return buffered if "b" in mode else io.TextIOWrapper(buffered, encoding, errors, newline)


class _Watched(io.FileIO):
    """A file whose writes, and whose first read, are operations too."""

    def __init__(self, file: Any, mode: str, operations: FileOperations, path: str) -> None:
        self._operations, self._watched_path, self._read = operations, path, False
        super().__init__(file, mode)

    def write(self, data: Any) -> int:
        view = memoryview(data).cast("B")
        half = super().write(view[: len(view) // 2]) if len(view) > 1 else 0
        self._operations.before("write", self._watched_path)
        written = half + super().write(view[half:])
        self._operations.written += written
        return written

    def _first_read(self) -> None:
        if not self._read:
            self._read = True
            self._operations.before("read", self._watched_path)

    def readinto(self, buffer: Any) -> int:
        self._first_read()
        return super().readinto(buffer)

    def readall(self) -> bytes:
        self._first_read()
        return super().readall()

    def read(self, size: int | None = -1) -> bytes:
        self._first_read()
        return super().read(-1 if size is None else size)

"""Regular file: whether a local path is a file that answers when it is read, found out within a time limit.

In:   a local path. Out: its status, or InputUnreadable that says what it is instead. Never: more than its first byte.
A pipe, a device, a file of /proc or a mount whose server is gone would stop the thread that reads it for ever.
"""

from __future__ import annotations

import errno
import os
import stat as stat_modes
import threading
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

from runner.errors import InputUnreadable

__all__ = ["ANSWER_S", "answer_in_time", "check_regular_file"]

ANSWER_S = 30.0  # a network mount whose disk must start, or whose server is asked again, takes a few seconds
MOUNTS = Path("/proc/self/mountinfo")
# File systems whose files are made up by the kernel at each read.
KERNEL_FILE_SYSTEMS = {"proc", "sysfs", "cgroup", "cgroup2", "debugfs", "tracefs", "securityfs", "configfs", "pstore"}
KERNEL_FILE_SYSTEMS |= {"bpf", "binfmt_misc", "devpts", "efivarfs", "fusectl", "mqueue", "selinuxfs"}

T = TypeVar("T")


def check_regular_file(path: Path, *, answer_s: float = ANSWER_S) -> os.stat_result:
    """The status of a regular file whose first byte can be read; of an empty one, too.

    Raises OSError as reading does, and InputUnreadable for a pipe, a device, a file of the kernel's, one that cannot be
    read without waiting, and where no answer came within `answer_s` seconds.
    """
    return answer_in_time(lambda: _look(path), path, answer_s)


def answer_in_time(ask: Callable[[], T], path: Path, answer_s: float = ANSWER_S) -> T:
    """What `ask` returns or raises. Raises InputUnreadable if it does neither within `answer_s` seconds."""
    answers: list[T] = []
    errors: list[Exception] = []

    def run() -> None:
        try:
            answers.append(ask())
        except Exception as error:
            errors.append(error)

    thread = threading.Thread(target=run, name="first-byte", daemon=True)
    thread.start()
    thread.join(answer_s)
    if errors:
        raise errors[0]
    if not answers:
        raise InputUnreadable(
            f"did not answer within {answer_s:g} s", where=path, todo="Check the mount or the disk that it lies on"
        )
    return answers[0]


def _look(path: Path) -> os.stat_result:
    status = path.stat()
    _check_kind(status, path)
    # Should a pipe have taken the file's place by now, neither the opening nor the reading waits.
    descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    try:
        status = os.fstat(descriptor)
        _check_kind(status, path)
        first = os.read(descriptor, 1)
    except BlockingIOError as err:
        raise _no_file("cannot be read without waiting", path) from err
    finally:
        os.close(descriptor)
    if first and not status.st_size:
        raise _no_file("says that it is empty, and is not", path)
    return status


def _check_kind(status: os.stat_result, path: Path) -> None:
    if stat_modes.S_ISDIR(status.st_mode):
        raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR), str(path))
    if not stat_modes.S_ISREG(status.st_mode):
        raise InputUnreadable("is a pipe or a device, not a file", where=path, todo="Copy it into a file first")
    kind = _file_system(status.st_dev)
    if kind in KERNEL_FILE_SYSTEMS:
        raise _no_file(f"lies on {kind}, whose files the kernel makes up at each read", path)


def _no_file(what: str, path: Path) -> InputUnreadable:
    return InputUnreadable(what, where=path, todo="Name a file on a disk")


def _file_system(device: int) -> str:
    """The type of the file system with this device number; empty where the system does not tell."""
    number = f"{os.major(device)}:{os.minor(device)}"
    try:
        lines = MOUNTS.read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:  # not Linux
        return ""
    for line in lines:
        before, _, after = line.partition(" - ")  # id parent major:minor root mountpoint options… - type source …
        if before.split(" ")[2:3] == [number]:
            return after.partition(" ")[0]
    return ""

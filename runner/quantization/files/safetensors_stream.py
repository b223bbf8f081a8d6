"""Safetensors stream: write files header first, whole or not at all; read single tensors.

In:   paths; names, shapes and dtypes of all tensors before the first tensor exists. Out: a file; single tensors.
Never: the tensors' meaning.

A safetensors file is eight bytes of header length, a JSON header, and the tensors' bytes without gaps. The writer first
puts tensors whose size is a multiple of eight bytes, in the given order, then the others by decreasing item size. So
every tensor is aligned to its items, and tensors written in the given order go to the disk as one stream.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import hashlib
import json
import os
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from types import TracebackType

import torch
from torch import Tensor

from runner.errors import ConfigInvalid, as_runner_error
from runner.hashing import sha256_stream
from runner.quantization.files.file_header import PLACEHOLDER, TensorInfo
from runner.quantization.formats.stored_dtypes import DTYPES

__all__ = [
    "StreamWriter",
    "data_sha256",
    "read_tensor",
]

NAMES: Mapping[torch.dtype, str] = {getattr(torch, row.torch_name): name for name, row in DTYPES.items()}

ALIGNMENT = 8
BLOCK = 1 << 24  # bytes read at a time for a digest


def read_tensor(path: Path, name: str) -> Tensor:
    """Map one tensor on the CPU: its pages are read at first access, and the system can drop them again."""
    from safetensors import safe_open

    with safe_open(path, framework="pt") as opened:
        return opened.get_tensor(name)


def data_sha256(path: Path) -> str:
    """Compute the sha256 of all data after the header; reads the whole file. Edits of metadata do not change it."""
    with path.open("rb") as stream:
        stream.seek(8 + int.from_bytes(stream.read(8), "little"))
        return sha256_stream(stream)


class StreamWriter:
    """Writes one safetensors file as `NAME.tmp` and renames it at the end, when all data is on the disk.

        with StreamWriter(path, tensors, metadata, digest_key="sha256") as writer:
            writer.write("blocks.0.weight", tensor)      # each tensor once, in any order; the given order is fastest

    Metadata that is known only at the end is given as PLACEHOLDER and set with `patch`; the value of `digest_key`
    becomes the sha256 of the data section. A killed process leaves a `.tmp` file, which the next run overwrites. All
    space is reserved at once, so that a full disk is an error in the first second. Raises StorageFull or StorageDenied,
    and ConfigInvalid where another process is writing the same file.
    """

    def __init__(
        self,
        path: Path,
        tensors: Iterable[tuple[str, tuple[int, ...], torch.dtype]],
        metadata: Mapping[str, str],
        digest_key: str | None = None,
    ) -> None:
        self.path, self.staged = path, path.with_name(f"{path.name}.tmp")
        self.digest: str | None = None  # of the data section, once the file has its name
        self._digest_key = digest_key
        self._metadata = dict(metadata) | ({digest_key: PLACEHOLDER} if digest_key else {})
        self._header, self._where, data_start = _lay_out(list(tensors), self._metadata)
        self.size = max((info.stop for info in self._where.values()), default=data_start)
        self._left = set(self._where)
        self._sha, self._hashed = hashlib.sha256(), data_start

    def __enter__(self) -> StreamWriter:
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            self._fd = _open_alone(self.staged)
        except OSError as err:
            raise as_runner_error(err, where=self.staged) from err
        try:
            os.ftruncate(self._fd, 0)
            _reserve(self._fd, self.size)
            _write_all(self._fd, self._header, 0)
        except BaseException as err:
            self._discard()
            if isinstance(err, OSError):
                raise as_runner_error(err, where=self.staged) from err
            raise
        return self

    def write(self, name: str, tensor: Tensor) -> None:
        """Write one tensor (CPU or CUDA) of exactly the announced shape and dtype."""
        info = self._where[name]
        if name not in self._left or tuple(tensor.shape) != info.shape or tensor.dtype != info.dtype:
            raise ValueError(f"{name}: {tensor.dtype} {tuple(tensor.shape)}, or written twice; announced was {info}")
        data = tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data
        try:
            _write_all(self._fd, data, info.start)
        except OSError as err:
            raise as_runner_error(err, where=self.staged) from err
        self._left.remove(name)
        if info.start == self._hashed:
            self._sha.update(data)
            self._hashed = info.stop

    def patch(self, key: str, value: str) -> None:
        """Replace a PLACEHOLDER in the metadata with a sha256."""
        if self._metadata.get(key) != PLACEHOLDER or len(value) != len(PLACEHOLDER):
            raise ValueError(f"metadata {key!r} is not a place of {len(PLACEHOLDER)} characters kept for later")
        mark = f"{json.dumps(key)}:{json.dumps(PLACEHOLDER)}".encode()
        at = self._header.index(mark) + len(mark) - 1 - len(PLACEHOLDER)
        _write_all(self._fd, value.encode("ascii"), at)
        self._metadata[key] = value

    def __exit__(
        self, kind: type[BaseException] | None, err: BaseException | None, trace: TracebackType | None
    ) -> None:
        if kind is not None:
            self._discard()
            return
        try:
            self._publish()
        except BaseException as failure:
            self._discard()
            if isinstance(failure, OSError):
                raise as_runner_error(failure, where=self.staged) from failure
            raise

    def _publish(self) -> None:
        if self._left:
            raise ValueError(f"{len(self._left)} tensors were announced and never written, such as {min(self._left)}")
        for block in _blocks(self._fd, self._hashed, self.size):  # tensors that were not written in order
            self._sha.update(block)
        self.digest = self._sha.hexdigest()
        if self._digest_key:
            self.patch(self._digest_key, self.digest)
        os.fsync(self._fd)
        os.replace(self.staged, self.path)
        os.close(self._fd)
        self._fd = -1
        folder = os.open(self.path.parent, os.O_RDONLY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)

    def _discard(self) -> None:
        with contextlib.suppress(FileNotFoundError):
            os.unlink(self.staged)
        with contextlib.suppress(OSError):
            os.close(self._fd)


def _lay_out(
    tensors: list[tuple[str, tuple[int, ...], torch.dtype]], metadata: Mapping[str, str]
) -> tuple[bytes, dict[str, TensorInfo], int]:
    """(length and JSON, the place of each tensor in the file, the beginning of the data)."""

    def place(item: tuple[str, tuple[int, ...], torch.dtype]) -> tuple[bool, int]:
        _, shape, dtype = item
        whole = torch.Size(shape).numel() * dtype.itemsize % ALIGNMENT == 0
        return not whole, 0 if whole else -dtype.itemsize

    entries: dict[str, object] = {"__metadata__": dict(metadata)} if metadata else {}
    spans: list[tuple[str, tuple[int, ...], torch.dtype, int, int]] = []
    start = 0
    for name, shape, dtype in sorted(tensors, key=place):  # a stable sort keeps the given order within each part
        if name in entries:
            raise ValueError(f"two tensors called {name!r}")
        stop = start + torch.Size(shape).numel() * dtype.itemsize
        entries[name] = {"dtype": NAMES[dtype], "shape": list(shape), "data_offsets": [start, stop]}
        spans.append((name, shape, dtype, start, stop))
        start = stop
    text = json.dumps(entries, separators=(",", ":")).encode()
    text += b" " * (-len(text) % ALIGNMENT)
    begin = 8 + len(text)
    where = {name: TensorInfo(name, _name(dtype), shape, begin + a, begin + b) for name, shape, dtype, a, b in spans}
    return len(text).to_bytes(8, "little") + text, where, begin


def _name(dtype: torch.dtype) -> str:
    return DTYPES[NAMES[dtype]].torch_name


def _open_alone(path: Path) -> int:
    """Open `path` under a lock that ends with this process; returns the descriptor."""
    fd = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        # The former holder of the lock may have renamed the file since it was opened here.
        alone = os.fstat(fd).st_ino == path.stat().st_ino
    except (BlockingIOError, FileNotFoundError):
        alone = False
    except BaseException:
        os.close(fd)
        raise
    if not alone:
        os.close(fd)
        raise ConfigInvalid("another process is writing this file", where=path, todo="Wait for it, or stop it")
    return fd


def _reserve(fd: int, size: int) -> None:
    try:
        os.posix_fallocate(fd, 0, size)
    except OSError as err:
        if err.errno not in (errno.EOPNOTSUPP, errno.EINVAL, errno.ENOSYS):
            raise
        os.ftruncate(fd, size)  # the file system cannot reserve space


def _write_all(fd: int, data: bytes | memoryview, at: int) -> None:
    view = memoryview(data)
    while view.nbytes:
        written = os.pwrite(fd, view, at)
        view, at = view[written:], at + written


def _blocks(fd: int, start: int, stop: int) -> Iterator[bytes]:
    while start < stop:
        block = os.pread(fd, min(BLOCK, stop - start), start)
        if not block:
            raise OSError(errno.EIO, "the file became shorter while it was written")
        yield block
        start += len(block)

"""Safetensors headers: read a file's header and check it against the file's length. Needs no torch.

In:   the path of a safetensors file. Out: names, shapes, dtypes, places, metadata; or WeightsCorrupt.
Never: tensors and their meaning.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from runner.errors import WeightsCorrupt, WeightsMissing
from runner.quantization.formats.stored_dtypes import DTYPES

if TYPE_CHECKING:
    import torch

__all__ = ["LFS_POINTER", "PLACEHOLDER", "SHARD_NAME", "SafetensorsHeader", "TensorInfo", "read_header"]


MOST_DIMENSIONS, MOST_ITEMS = 8, 2**40  # of a tensor and of one dimension; torch fails beyond 64 and 2**63
PLACEHOLDER = "0" * 64  # for a sha256 in a header that is written before the data
SHARD_NAME = re.compile(r"[\w.-]{1,200}\.safetensors", re.ASCII)  # an index may only name files beside it
LFS_POINTER = b"version https://git-lfs"
AGAIN = "Download or quantise it again"


@dataclass(frozen=True)
class TensorInfo:
    """The header's entry of one tensor; `start` and `stop` are bytes from the beginning of the file."""

    name: str
    dtype_name: str  # torch's, e.g. bfloat16
    shape: tuple[int, ...]
    start: int
    stop: int

    @property
    def dtype(self) -> torch.dtype:
        import torch

        dtype: torch.dtype = getattr(torch, self.dtype_name)
        return dtype

    @property
    def bytes(self) -> int:
        return self.stop - self.start


@dataclass(frozen=True)
class SafetensorsHeader:
    """A file's header. `tensors` is in the order of the bytes."""

    path: Path
    tensors: Mapping[str, TensorInfo]
    metadata: Mapping[str, str]
    data_start: int


def read_header(path: Path) -> SafetensorsHeader:
    """Read the header of a safetensors file and check it against the file's length; reads no tensor.

    Raises WeightsMissing, or WeightsCorrupt for a file that is empty, truncated, too long or no safetensors, or has
    overlapping tensors.
    """
    from safetensors import SafetensorError, safe_open

    try:
        with path.open("rb") as stream:
            head = stream.read(len(LFS_POINTER))
    except FileNotFoundError as err:
        raise WeightsMissing("no such file", where=path, todo="Run `video-lab doctor` for what goes where") from err
    if not head:
        raise WeightsCorrupt("the file is empty", where=path, todo=AGAIN)
    if head == LFS_POINTER:
        raise WeightsCorrupt("a Git LFS pointer, not the file itself", where=path, todo="Run `git lfs pull` there")
    tensors: dict[str, TensorInfo] = {}
    try:
        with safe_open(path, framework="np") as opened:
            metadata = opened.metadata() or {}
            start = data_start = 8 + int.from_bytes(head[:8], "little")
            for name in opened.offset_keys():
                slice_ = opened.get_slice(name)
                dtype, shape = DTYPES.get(slice_.get_dtype()), tuple(slice_.get_shape())
                if dtype is None:
                    raise WeightsCorrupt(f"{name} is {slice_.get_dtype()}, which is not supported", where=path)
                if len(shape) > MOST_DIMENSIONS or any(length > MOST_ITEMS for length in shape):
                    raise WeightsCorrupt(
                        f"{name} has a shape that no weight has: {shape[:MOST_DIMENSIONS]}", where=path
                    )
                stop = start + math.prod(shape) * dtype.bytes
                tensors[name] = TensorInfo(name, dtype.torch_name, shape, start, stop)
                start = stop  # the library has checked that there are no gaps
    except SafetensorError as err:
        raise WeightsCorrupt(
            f"truncated or not a safetensors file, {path.stat().st_size} bytes ({err})", where=path, todo=AGAIN
        ) from err
    return SafetensorsHeader(path, tensors, metadata, data_start)

"""Headers of safetensors files, rewritten in place: the tensors' bytes stay as they are."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

__all__ = ["edit_header", "first_of", "redeclare"]


def edit_header(file: Path, change: Callable[[dict[str, Any]], object]) -> None:
    """Apply `change` to the header's JSON: tensor → dtype, shape, data_offsets."""
    data = file.read_bytes()
    stop = 8 + int.from_bytes(data[:8], "little")
    header = json.loads(data[8:stop])
    change(header)
    text = json.dumps(header).encode()
    file.write_bytes(len(text).to_bytes(8, "little") + text + data[stop:])


def redeclare(file: Path, name: str, dtype: str) -> None:
    """Say that tensor `name` is of another dtype, of the same width."""
    edit_header(file, lambda header: header[name].update(dtype=dtype))


def first_of(file: Path, dtype: str, but: str = ".weight_") -> str:
    """The first tensor of this dtype, by name, whose name does not hold `but`."""
    data = file.read_bytes()
    header = json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")])
    return min(n for n, entry in header.items() if n != "__metadata__" and entry["dtype"] == dtype and but not in n)

"""Stored dtypes: the dtypes of safetensors files by their names in headers. Needs no torch.

In:   a name. Out: torch's name, bytes an item. Never: tensors.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

__all__ = ["DTYPES", "DTYPE_BYTES", "DtypeRow"]


@dataclass(frozen=True)
class DtypeRow:
    """A dtype as a safetensors header names it: torch's name, bytes an item."""

    torch_name: str
    bytes: int


DTYPES: Mapping[str, DtypeRow] = {
    "F64": DtypeRow("float64", 8),
    "F32": DtypeRow("float32", 4),
    "F16": DtypeRow("float16", 2),
    "BF16": DtypeRow("bfloat16", 2),
    "F8_E4M3": DtypeRow("float8_e4m3fn", 1),
    "F8_E5M2": DtypeRow("float8_e5m2", 1),
    "F8_E8M0": DtypeRow("float8_e8m0fnu", 1),
    "I64": DtypeRow("int64", 8),
    "I32": DtypeRow("int32", 4),
    "I16": DtypeRow("int16", 2),
    "I8": DtypeRow("int8", 1),
    "U8": DtypeRow("uint8", 1),
    "BOOL": DtypeRow("bool", 1),
}
DTYPE_BYTES: Mapping[str, int] = {row.torch_name: row.bytes for row in DTYPES.values()}

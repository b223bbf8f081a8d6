"""RIFE's file: check by its header that a file holds the tensors of the frame interpolation network.

In:   a safetensors file, or names and shapes. Out: the network's widths, or WeightsCorrupt. Never: torch, tensors.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from runner.errors import WeightsCorrupt
from runner.forecast.rife_shape import RifeShape
from runner.quantization.files.file_header import read_header

__all__ = ["REMEDY", "check_rife", "check_rife_file"]

REMEDY = "Make it again: python tools/convert_rife.py"
FLOATS = ("float32", "float16", "bfloat16")


def _widths(shapes: Mapping[str, tuple[int, ...]]) -> RifeShape:
    """Read the network's widths from its tensors' shapes; the published widths where a tensor is missing."""
    published = RifeShape()
    widths = []
    for number, width in enumerate(published.widths):
        found = shapes.get(f"block{number}.conv0.1.0.bias", ())
        widths.append(found[0] if found else width)
    head = shapes.get("encode.cnn0.bias", ())
    return RifeShape(head[0] if head else published.head, tuple(widths))


def check_rife(shapes: Mapping[str, tuple[int, ...]], where: Path | None = None) -> RifeShape:
    """Return the network's widths. Raises WeightsCorrupt unless `shapes` are exactly those of its tensors."""
    shape = _widths(shapes)
    expected = shape.tensors
    wrong = sorted(name for name in shapes.keys() | expected.keys() if shapes.get(name) != expected.get(name))
    if wrong:
        name = wrong[0]
        if name not in expected:
            what = f"tensor {name} does not belong to the network"
        elif name not in shapes:
            what = f"tensor {name} is missing"
        else:
            what = f"tensor {name} has shape {shapes[name]}, not {expected[name]}"
        raise WeightsCorrupt(what, where=where, todo=REMEDY)
    return shape


def check_rife_file(path: Path) -> RifeShape:
    """Check a safetensors file by its header, dtypes included. Raises WeightsCorrupt, WeightsMissing."""
    header = read_header(path).tensors
    for name, info in header.items():
        if info.dtype_name not in FLOATS:
            raise WeightsCorrupt(f"tensor {name} is {info.dtype_name}, not a float", where=path, todo=REMEDY)
    return check_rife({name: info.shape for name, info in header.items()}, path)

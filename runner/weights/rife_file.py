"""RIFE's file: are the tensors of a file those of the network between frames, by its header alone?

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
    """The network's widths, by the shapes of its tensors; the published ones where a tensor is missing."""
    published = RifeShape()
    widths = []
    for number, width in enumerate(published.widths):
        found = shapes.get(f"block{number}.conv0.1.0.bias", ())
        widths.append(found[0] if found else width)
    head = shapes.get("encode.cnn0.bias", ())
    return RifeShape(head[0] if head else published.head, tuple(widths))


def check_rife(shapes: Mapping[str, tuple[int, ...]], where: Path | None = None) -> RifeShape:
    """The network's widths. Raises WeightsCorrupt unless `shapes` are those of its tensors, of all and no others."""
    shape = _widths(shapes)
    wanted = shape.tensors
    wrong = sorted(name for name in shapes.keys() | wanted.keys() if shapes.get(name) != wanted.get(name))
    if wrong:
        name = wrong[0]
        if name not in wanted:
            what = f"tensor {name} is none of the network"
        elif name not in shapes:
            what = f"tensor {name} is not there"
        else:
            what = f"tensor {name} has shape {shapes[name]}, not {wanted[name]}"
        raise WeightsCorrupt(what, where=where, todo=REMEDY)
    return shape


def check_rife_file(path: Path) -> RifeShape:
    """The same of a safetensors file, by its header; its dtypes too. Raises WeightsCorrupt, WeightsMissing."""
    header = read_header(path).tensors
    for name, info in header.items():
        if info.dtype_name not in FLOATS:
            raise WeightsCorrupt(f"tensor {name} is {info.dtype_name}, not a float", where=path, todo=REMEDY)
    return check_rife({name: info.shape for name, info in header.items()}, path)

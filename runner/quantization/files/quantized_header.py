"""Quantised header: what a file of `quantize` says it holds, and whether names, shapes and dtypes add up.

In:   the path of a quantised transformer. Out: its description, or WeightsCorrupt with the tensor's name.
Never: tensors, torch, the model that the file is for: a run checks its files before it imports either.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from runner.errors import WeightsCorrupt
from runner.quantization.files.file_header import PLACEHOLDER, SafetensorsHeader, read_header
from runner.quantization.formats.fp4_layout import LAYOUTS, Layout

__all__ = [
    "AGAIN",
    "CALIBRATION_KEY",
    "FORMAT_KEY",
    "GROUP_KEY",
    "LORAS_KEY",
    "METHOD_KEY",
    "RANK_KEY",
    "REFITS_KEY",
    "SHA256_KEY",
    "SMOOTHING_KEY",
    "SOURCE_KEY",
    "VERSION_KEY",
    "QuantizedFile",
    "check_file",
]

FORMAT_KEY: Final = "video_lab.format"
METHOD_KEY: Final = "video_lab.scale_method"
GROUP_KEY: Final = "video_lab.group"
SOURCE_KEY: Final = "video_lab.source_sha256"
LORAS_KEY: Final = "video_lab.loras"
VERSION_KEY: Final = "video_lab.version"
RANK_KEY: Final = "video_lab.rank"  # this and the next ones: of SVDQ files
SMOOTHING_KEY: Final = "video_lab.smoothing"  # `calibrated` | `weights`: what smoothing factors were chosen by
CALIBRATION_KEY: Final = "video_lab.calibration"  # JSON: what was watched; `{}` without calibration
REFITS_KEY: Final = "video_lab.refits"  # rounds in which the low-rank part was fitted to what rounding left
SHA256_KEY: Final = "video_lab.sha256"
PACKED = ".weight_packed"
FLOATS: Final = ("bfloat16", "float32")  # of what is not quantised
AGAIN = "Make it again with `video-lab quantize`, or fetch it again"


@dataclass(frozen=True)
class QuantizedFile:
    """What the header says. `layers`: quantised linear → (out_features, in_features)."""

    header: SafetensorsHeader
    layout: Layout
    layers: Mapping[str, tuple[int, int]]
    loras: tuple[dict[str, object], ...]

    @property
    def sha256(self) -> str:
        """Of the data section, as recorded when the file was made."""
        return self.header.metadata[SHA256_KEY]

    def tensors_of(self, layer: str) -> dict[str, str]:
        """Suffix → name of a layer's tensors."""
        return {suffix: f"{layer}.{suffix}" for suffix in self.layout.tensor_table(*self.layers[layer])}


def check_file(path: Path) -> QuantizedFile:
    """Is `path` one of our files, and do names, shapes and dtypes in it agree with its format? Reads the header alone.

    Raises WeightsMissing; WeightsCorrupt with the name of the tensor, or with what the metadata lacks.
    """
    header = read_header(path)
    meta = header.metadata
    layout = LAYOUTS.get(meta.get(FORMAT_KEY, ""))
    if layout is None:
        said = f"is {meta[FORMAT_KEY]!r}, not one of {', '.join(LAYOUTS)}" if FORMAT_KEY in meta else "is missing"
        raise WeightsCorrupt(f"not a file of `quantize`: {FORMAT_KEY} in its metadata {said}", where=path, todo=AGAIN)
    if meta.get(GROUP_KEY) != str(layout.group):
        found = meta.get(GROUP_KEY)
        raise WeightsCorrupt(f"{GROUP_KEY} is {found!r}; {layout.name} has {layout.group}", where=path, todo=AGAIN)
    for key in (SHA256_KEY, SOURCE_KEY):
        if len(meta.get(key, "")) != len(PLACEHOLDER) or meta[key] == PLACEHOLDER:
            raise WeightsCorrupt(f"{key} was never filled in: the file was not finished", where=path, todo=AGAIN)
    try:
        loras = tuple(json.loads(meta[LORAS_KEY]))
    except (KeyError, TypeError, ValueError, RecursionError) as err:
        raise WeightsCorrupt(f"{LORAS_KEY} is no list ({err})", where=path, todo=AGAIN) from err
    return QuantizedFile(header, layout, _layers(header, layout), loras)


def _layers(header: SafetensorsHeader, layout: Layout) -> dict[str, tuple[int, int]]:
    layers: dict[str, tuple[int, int]] = {}
    claimed: set[str] = set()
    for name, info in header.tensors.items():
        if not name.endswith(PACKED):
            continue
        layer = name.removesuffix(PACKED)
        if len(info.shape) != 2:
            raise WeightsCorrupt(f"{name} is {list(info.shape)}, not a matrix", where=header.path, todo=AGAIN)
        try:
            table = layout.tensor_table(info.shape[0], info.shape[1] * 2)
        except ValueError as err:
            raise WeightsCorrupt(f"{name}: {err}", where=header.path, todo=AGAIN) from err
        for suffix, (shape, dtype) in table.items():
            part = header.tensors.get(f"{layer}.{suffix}")
            if part is None or part.shape != shape or part.dtype_name != dtype:
                found = f"is torch.{part.dtype_name} {list(part.shape)}" if part else "is missing"
                raise WeightsCorrupt(
                    f"{layer}.{suffix} {found}, {layout.name} asks for torch.{dtype} {list(shape)}",
                    where=header.path,
                    todo=AGAIN,
                )
            claimed.add(f"{layer}.{suffix}")
        layers[layer] = info.shape[0], info.shape[1] * 2
    stray = [name for name in header.tensors if name not in claimed and ".weight_" in name]
    if stray or not layers:
        what = f"{stray[0]} belongs to no quantised layer" if stray else "no layer in it is quantised"
        raise WeightsCorrupt(what, where=header.path, todo=AGAIN)
    for name, info in header.tensors.items():
        if name not in claimed and info.dtype_name not in FLOATS:
            wanted = " or ".join(f"torch.{dtype}" for dtype in FLOATS)
            raise WeightsCorrupt(f"{name} is torch.{info.dtype_name}, not {wanted}", where=header.path, todo=AGAIN)
    return layers

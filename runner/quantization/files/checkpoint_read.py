"""Checkpoint, reading: what a file of ours holds, whether it adds up, and a model on the meta device filled from it.

In:   the path of a quantised transformer; the model on the meta device. Out: its description; the model, ready.
Never: recipes, full-precision weights, a repair: what does not add up is refused, with the tensor's name.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import torch
from torch import Tensor, nn

from runner.errors import WeightsCorrupt
from runner.quantization.files.safetensors_stream import PLACEHOLDER, Header, read_header
from runner.quantization.formats.e2m1 import FORMATS, Format
from runner.quantization.rules import kept_in_fp32, linear_shapes, stored_dtype

__all__ = [
    "FORMAT_KEY",
    "GROUP_KEY",
    "LORAS_KEY",
    "METHOD_KEY",
    "SHA256_KEY",
    "SOURCE_KEY",
    "VERSION_KEY",
    "Loaded",
    "QuantizedFile",
    "check_file",
    "check_model",
    "fill",
    "load_quantized",
]

FORMAT_KEY: Final = "video_lab.format"
METHOD_KEY: Final = "video_lab.scale_method"
GROUP_KEY: Final = "video_lab.group"
SOURCE_KEY: Final = "video_lab.source_sha256"
LORAS_KEY: Final = "video_lab.loras"
VERSION_KEY: Final = "video_lab.version"
SHA256_KEY: Final = "video_lab.sha256"
PACKED = ".weight_packed"
FLOATS: Final = (torch.bfloat16, torch.float32)  # of what is not quantised
AGAIN = "Make it again with `video-lab quantize`, or fetch it again"


@dataclass(frozen=True)
class QuantizedFile:
    """What the header says. `layers`: quantised linear → (out_features, in_features)."""

    header: Header
    format: Format
    layers: Mapping[str, tuple[int, int]]
    loras: tuple[dict[str, object], ...]

    @property
    def sha256(self) -> str:
        """Of the data section, as recorded when the file was made."""
        return self.header.metadata[SHA256_KEY]

    def tensors_of(self, layer: str) -> dict[str, str]:
        """Suffix → name of a layer's tensors."""
        return {suffix: f"{layer}.{suffix}" for suffix in self.format.tensors(*self.layers[layer])}


@dataclass(frozen=True)
class Loaded:
    """What a model was filled with."""

    path: Path
    format: Format
    layers: tuple[str, ...]
    bytes: int  # of all parameters, as they lie in memory
    sha256: str
    metadata: Mapping[str, str]


def check_file(path: Path) -> QuantizedFile:
    """Is `path` one of our files, and do names, shapes and dtypes in it agree with its format? Reads the header alone.

    Raises WeightsMissing; WeightsCorrupt with the name of the tensor, or with what the metadata lacks.
    """
    header = read_header(path)
    meta = header.metadata
    fmt = FORMATS.get(meta.get(FORMAT_KEY, ""))
    if fmt is None:
        said = f"is {meta[FORMAT_KEY]!r}, not one of {', '.join(FORMATS)}" if FORMAT_KEY in meta else "is missing"
        raise WeightsCorrupt(f"not a file of `quantize`: {FORMAT_KEY} in its metadata {said}", where=path, todo=AGAIN)
    if meta.get(GROUP_KEY) != str(fmt.group):
        found = meta.get(GROUP_KEY)
        raise WeightsCorrupt(f"{GROUP_KEY} is {found!r}; {fmt.name} has {fmt.group}", where=path, todo=AGAIN)
    for key in (SHA256_KEY, SOURCE_KEY):
        if len(meta.get(key, "")) != len(PLACEHOLDER) or meta[key] == PLACEHOLDER:
            raise WeightsCorrupt(f"{key} was never filled in: the file was not finished", where=path, todo=AGAIN)
    try:
        loras = tuple(json.loads(meta[LORAS_KEY]))
    except (KeyError, TypeError, ValueError, RecursionError) as err:
        raise WeightsCorrupt(f"{LORAS_KEY} is no list ({err})", where=path, todo=AGAIN) from err
    return QuantizedFile(header, fmt, _layers(header, fmt), loras)


def _layers(header: Header, fmt: Format) -> dict[str, tuple[int, int]]:
    layers: dict[str, tuple[int, int]] = {}
    claimed: set[str] = set()
    for name, info in header.tensors.items():
        if not name.endswith(PACKED):
            continue
        layer = name.removesuffix(PACKED)
        if len(info.shape) != 2:
            raise WeightsCorrupt(f"{name} is {list(info.shape)}, not a matrix", where=header.path, todo=AGAIN)
        try:
            table = fmt.tensors(info.shape[0], info.shape[1] * 2)
        except ValueError as err:
            raise WeightsCorrupt(f"{name}: {err}", where=header.path, todo=AGAIN) from err
        for suffix, (shape, dtype) in table.items():
            part = header.tensors.get(f"{layer}.{suffix}")
            if part is None or part.shape != shape or part.dtype != dtype:
                found = f"is {part.dtype} {list(part.shape)}" if part else "is missing"
                raise WeightsCorrupt(
                    f"{layer}.{suffix} {found}, {fmt.name} asks for {dtype} {list(shape)}",
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
        if name not in claimed and info.dtype not in FLOATS:
            wanted = " or ".join(str(dtype) for dtype in FLOATS)
            raise WeightsCorrupt(f"{name} is {info.dtype}, not {wanted}", where=header.path, todo=AGAIN)
    return layers


def check_model(file: QuantizedFile, model: nn.Module) -> None:
    """Does `file` hold `model`, no more and no less, each tensor in its dtype? Reads nothing. Raises WeightsCorrupt."""
    linears, fp32, path = linear_shapes(model), kept_in_fp32(model), file.header.path
    expected: dict[str, tuple[tuple[int, ...], torch.dtype]] = {}
    for layer, shape in file.layers.items():
        if linears.get(layer) != shape:
            has = f"has {list(linears[layer])}" if layer in linears else "has no linear of that name"
            raise WeightsCorrupt(f"{layer} is quantised as {list(shape)}, the model {has}", where=path)
        expected |= {f"{layer}.{suffix}": entry for suffix, entry in file.format.tensors(*shape).items()}
    for name, param in model.named_parameters():
        layer, _, leaf = name.rpartition(".")
        if leaf != "weight" or layer not in file.layers:
            expected[name] = tuple(param.shape), stored_dtype(name, fp32)
    for name in [*expected, *(n for n in file.header.tensors if n not in expected)]:
        info = file.header.tensors.get(name)
        found = (info.shape, info.dtype) if info else None
        if found != expected.get(name):
            has = f"{found[1]} {list(found[0])}" if found else "missing"
            wants = f"{expected[name][1]} {list(expected[name][0])}" if name in expected else "no such tensor"
            raise WeightsCorrupt(f"{name} is {has}, the model asks for {wants}", where=path, todo=AGAIN)


@torch.no_grad()
def load_quantized(
    model: nn.Module, path: Path, device: torch.device | str = "cpu", dtype: torch.dtype = torch.bfloat16
) -> Loaded:
    """Fill `model` (as `rules.transformer_on_meta` makes it) from a file of `quantize_store`, in place.

    Linears that the file has quantised become FP4Linear. On the CPU parameters are views of the mapped file. What is
    stored in bf16 gets `dtype`; scales and what is kept in float32 stay. Raises WeightsMissing, and, before `model` is
    touched, WeightsCorrupt for what does not agree with it and for scales that are NaN, infinite or negative.
    """
    from safetensors import SafetensorError, safe_open

    file = check_file(path)
    check_model(file, model)
    mine = {name for layer in file.layers for name in file.tensors_of(layer).values()}
    tensors: dict[str, Tensor] = {}
    try:
        with safe_open(path, framework="pt", device=str(device)) as opened:
            for name, info in file.header.tensors.items():
                tensor = opened.get_tensor(name)
                tensors[name] = tensor.to(dtype) if name not in mine and info.dtype == torch.bfloat16 else tensor
    except SafetensorError as err:
        raise WeightsCorrupt(f"not a whole safetensors file ({err})", where=path, todo=AGAIN) from err
    for layer in file.layers:
        try:
            file.format.check({suffix: tensors[name] for suffix, name in file.tensors_of(layer).items()})
        except ValueError as err:
            raise WeightsCorrupt(f"{layer}: {err}", where=path, todo=AGAIN) from err
    fill(model, file.format, file.layers, tensors, device)
    size = sum(tensor.nbytes for tensor in tensors.values())
    return Loaded(path, file.format, tuple(file.layers), size, file.sha256, file.header.metadata)


def fill(
    model: nn.Module,
    fmt: Format,
    layers: Mapping[str, tuple[int, int]],
    tensors: Mapping[str, Tensor],
    device: torch.device | str,
) -> None:
    """Swap the linears in `layers`, hand every parameter its tensor without a copy, take buffers to `device`."""
    from runner.quantization.linear import swap_linears

    stuck = [name for name, buffer in model.named_buffers() if buffer.is_meta]
    if stuck:
        raise ValueError(f"buffer {stuck[0]} has no values: build the model with `rules.transformer_on_meta`")
    model.requires_grad_(False)
    swap_linears(model, fmt, lambda name: name not in layers)
    model.load_state_dict(dict(tensors), strict=True, assign=True)
    model.to(device)  # buffers; parameters are there already

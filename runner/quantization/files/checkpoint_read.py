"""Checkpoint, reading: check that a file of `quantize` fits its model, and fill a model on the meta device from it.

In:   the path of a quantised transformer; the model on the meta device. Out: the model, ready.
Never: recipes, full-precision weights, repairs: a file that does not fit is refused, with the tensor's name.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from runner.errors import WeightsCorrupt
from runner.quantization.files.quantized_header import AGAIN, QuantizedFile, check_file
from runner.quantization.formats.e2m1 import FORMATS, Format
from runner.quantization.formats.svdq import check_values
from runner.quantization.formats.svdq_layout import SvdqLayout
from runner.quantization.rules import kept_in_fp32, linear_shapes, stored_dtype

__all__ = ["Loaded", "check_model", "fill", "load_quantized"]


@dataclass(frozen=True)
class Loaded:
    """The source of a filled model."""

    path: Path
    format: Format | SvdqLayout
    layers: tuple[str, ...]
    bytes: int  # of all parameters in memory
    sha256: str
    metadata: Mapping[str, str]
    chosen: Mapping[str, Any] = field(default_factory=dict)  # as of `QuantizedFile`


def check_model(file: QuantizedFile, model: nn.Module) -> None:
    """Check that `file` holds exactly the tensors of `model`, with their dtypes. Reads nothing. Raises WeightsCorrupt.

    The stored shape of a layer must be its linear's shape; where a format pads, the padded shape.
    """
    linears, fp32, path = linear_shapes(model), kept_in_fp32(model), file.header.path
    expected: dict[str, tuple[tuple[int, ...], torch.dtype]] = {}
    for layer, shape in file.layers.items():
        if layer not in linears or file.layout.padded(*linears[layer]) != shape:
            has = f"has {list(linears[layer])}" if layer in linears else "has no linear of that name"
            raise WeightsCorrupt(f"{layer} is quantised as {list(shape)}, the model {has}", where=path)
        table = file.layout.tensor_table(*shape)
        expected |= {f"{layer}.{suffix}": (size, getattr(torch, dtype)) for suffix, (size, dtype) in table.items()}
    for name, param in model.named_parameters():
        layer, _, leaf = name.rpartition(".")
        if leaf != "weight" or layer not in file.layers:
            expected[name] = tuple(param.shape), stored_dtype(name, fp32)
    for name in [*expected, *(n for n in file.header.tensors if n not in expected)]:
        info = file.header.tensors.get(name)
        found = (info.shape, info.dtype) if info else None
        if found != expected.get(name):
            has = f"{found[1]} {list(found[0])}" if found else "missing"
            needs = f"{expected[name][1]} {list(expected[name][0])}" if name in expected else "no such tensor"
            raise WeightsCorrupt(f"{name} is {has}, the model asks for {needs}", where=path, todo=AGAIN)


@torch.no_grad()
def load_quantized(
    model: nn.Module, path: Path, device: torch.device | str = "cpu", dtype: torch.dtype = torch.bfloat16
) -> Loaded:
    """Fill `model` (as `rules.transformer_on_meta` makes it) from a file of `quantize_store`, in place.

    Linears that are quantised in the file become FP4Linear or SvdqLinear. On the CPU parameters are views of the mapped
    file. Parameters stored in bf16 get `dtype`; scales, factors and float32 parameters keep theirs. Raises
    WeightsMissing, and, before `model` changes, WeightsCorrupt for tensors that do not fit it, for scales and factors
    that are NaN or infinite, and for negative scales.
    """
    from safetensors import SafetensorError, safe_open

    file = check_file(path)
    check_model(file, model)
    fmt = file.layout if isinstance(file.layout, SvdqLayout) else FORMATS[file.layout.name]
    packed = {name for layer in file.layers for name in file.tensor_names(layer).values()}
    tensors: dict[str, Tensor] = {}
    try:
        with safe_open(path, framework="pt", device=str(device)) as opened:
            for name, info in file.header.tensors.items():
                tensor = opened.get_tensor(name)
                tensors[name] = tensor.to(dtype) if name not in packed and info.dtype == torch.bfloat16 else tensor
    except SafetensorError as err:
        raise WeightsCorrupt(f"not a whole safetensors file ({err})", where=path, todo=AGAIN) from err
    for layer in file.layers:
        parts = {suffix: tensors[name] for suffix, name in file.tensor_names(layer).items()}
        try:
            if isinstance(fmt, SvdqLayout):
                check_values(parts)
            else:
                fmt.check(parts)
        except ValueError as err:
            raise WeightsCorrupt(f"{layer}: {err}", where=path, todo=AGAIN) from err
    fill(model, fmt, file.layers, tensors, device)
    size = sum(tensor.nbytes for tensor in tensors.values())
    return Loaded(path, fmt, tuple(file.layers), size, file.sha256, file.header.metadata, file.chosen)


def fill(
    model: nn.Module,
    fmt: Format | SvdqLayout,
    layers: Mapping[str, tuple[int, int]],
    tensors: Mapping[str, Tensor],
    device: torch.device | str,
) -> None:
    """Replace the linears in `layers`, assign every parameter its tensor without a copy, move buffers to `device`."""
    from runner.quantization.packed_layers import swap_linears

    stuck = [name for name, buffer in model.named_buffers() if buffer.is_meta]
    if stuck:
        raise ValueError(f"buffer {stuck[0]} has no values: build the model with `rules.transformer_on_meta`")
    model.requires_grad_(False)
    swap_linears(model, fmt, lambda name: name not in layers)
    model.load_state_dict(dict(tensors), strict=True, assign=True)
    model.to(device)  # moves buffers; parameters are on the device already

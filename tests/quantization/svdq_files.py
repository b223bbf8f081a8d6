"""Files in an SVDQ format for tests: random values, whole and valid, as the quantiser lays them out."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from runner.quantization.files import quantized_header as keys
from runner.quantization.files.safetensors_stream import StreamWriter
from runner.quantization.formats.svdq import torch_table
from runner.quantization.formats.svdq_layout import SVDQ_LAYOUTS, SvdqLayout
from runner.quantization.rules import RULES, kept_in_fp32, linear_shapes, rule_for, stored_dtype, transformer_on_meta

__all__ = ["LAYOUTS", "metadata_of", "random_layer", "random_tensors", "write_svdq", "write_tensors"]

LAYOUTS = tuple(layout.with_rank(16) for layout in SVDQ_LAYOUTS.values())


def random_layer(layout: SvdqLayout, out: int, wide: int, generator: torch.Generator) -> dict[str, Tensor]:
    """Suffix → tensor of one layer; the weight that they stand for has entries of about 1/sqrt(wide)."""
    tensors: dict[str, Tensor] = {}
    for suffix, (shape, dtype) in torch_table(layout, out, wide).items():
        if dtype is torch.int8:
            tensors[suffix] = torch.randint(-128, 128, shape, dtype=dtype, generator=generator)
            continue
        values = torch.rand(shape, generator=generator) + 0.5  # of smoothing factors, and of e4m3 scales
        if suffix == "wcscales" or (suffix == "wscales" and dtype is torch.bfloat16):
            values /= 5 * wide**0.5
        elif suffix.startswith("proj_"):
            values = (values - 1) / 4
        tensors[suffix] = values.to(dtype)
    return tensors


def random_tensors(config: Mapping[str, Any], layout: SvdqLayout, seed: int = 0) -> dict[str, Tensor]:
    """Name → tensor of a whole file for the model of `config`: what the rule `all` quantises, and the rest."""
    model, generator = transformer_on_meta(config), torch.Generator().manual_seed(seed)
    linears, fp32, keep = linear_shapes(model), kept_in_fp32(model), rule_for(layout, RULES["all"]).keep
    tensors: dict[str, Tensor] = {}
    for name, param in model.named_parameters():
        layer, _, leaf = name.rpartition(".")
        if leaf == "weight" and layer in linears and not keep(layer):
            parts = random_layer(layout, *linears[layer], generator)
            tensors |= {f"{layer}.{suffix}": tensor for suffix, tensor in parts.items()}
        else:
            values = torch.randn(param.shape, generator=generator) / max(1, param[0].numel()) ** 0.5
            tensors[name] = values.to(stored_dtype(name, fp32))
    return tensors


def metadata_of(layout: SvdqLayout, **changes: str | None) -> dict[str, str]:
    """The metadata of a file; `changes` by the last word of a key, None to leave it out."""
    values = {
        keys.FORMAT_KEY: layout.name,
        keys.GROUP_KEY: str(layout.group),
        keys.METHOD_KEY: "mse",
        keys.SOURCE_KEY: "5a" * 32,
        keys.LORAS_KEY: "[]",
        keys.VERSION_KEY: "0",
        keys.RANK_KEY: str(layout.rank),
        keys.SMOOTHING_KEY: keys.SMOOTHINGS[0],
        keys.CALIBRATION_KEY: json.dumps({"jobs": 2, "steps": 6, "rows": 4096}),
        keys.REFITS_KEY: "1",
    }
    changed = values | {f"video_lab.{word}": text for word, text in changes.items()}
    return {key: text for key, text in changed.items() if text is not None}


def write_tensors(path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> Path:
    """The file, with its checksum in the metadata."""
    announced = [(name, tuple(tensor.shape), tensor.dtype) for name, tensor in tensors.items()]
    with StreamWriter(path, announced, metadata, digest_key=keys.SHA256_KEY) as writer:
        for name, tensor in tensors.items():
            writer.write(name, tensor)
    return path


def write_svdq(
    path: Path,
    config: Mapping[str, Any],
    layout: SvdqLayout,
    change: Callable[[dict[str, Tensor]], object] = lambda tensors: None,
    **metadata: str | None,
) -> Path:
    """A file for the model of `config` at `path`, its tensors changed by `change`, and config.json beside it."""
    tensors = random_tensors(config, layout)
    change(tensors)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.with_name("config.json").write_text(json.dumps(dict(config)))
    return write_tensors(path, tensors, metadata_of(layout, **metadata))

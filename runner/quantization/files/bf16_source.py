"""bf16 source: read and check the headers of a diffusers folder of full-precision weights; no tensors are loaded.

In:   a folder with config.json and `diffusion_pytorch_model` in one safetensors file, or in shards with an index.
Out:  `Bf16Source`: the config, the shards, the place of each tensor. Never: pickles, other layouts, the network.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from runner.errors import ConfigInvalid, WeightsCorrupt, WeightsMissing, as_runner_error
from runner.quantization.files.file_header import SHARD_NAME, SafetensorsHeader, TensorInfo, read_header
from runner.quantization.files.json_reading import read_json_object

__all__ = ["Bf16Source", "open_source"]

STEM = "diffusion_pytorch_model"
FLOATS = (torch.float32, torch.bfloat16, torch.float16)
AGAIN = "Download it again"
FOLDER = "Give the transformer's own folder"


@dataclass(frozen=True)
class Bf16Source:
    """A folder of weights."""

    folder: Path
    config: Mapping[str, Any]
    headers: tuple[SafetensorsHeader, ...]  # by name of the file, in the order of reading

    @property
    def shards(self) -> tuple[Path, ...]:
        return tuple(header.path for header in self.headers)

    def tensors(self) -> Iterator[tuple[Path, TensorInfo]]:
        """(file, tensor), in the order of the bytes."""
        for header in self.headers:
            for info in header.tensors.values():
                yield header.path, info

    def check_against(
        self, shapes: Mapping[str, tuple[int, ...]], ignored: Sequence[str] = ()
    ) -> dict[str, tuple[int, ...]]:
        """Check that the folder holds exactly the parameters in `shapes`, in float32, bf16 or fp16; returns `shapes`.

        Tensors that match one of the patterns `ignored` are skipped. Raises WeightsCorrupt with the first name.
        """
        found: dict[str, TensorInfo] = {}
        for path, info in self.tensors():
            if info.name not in shapes:
                if any(re.search(pattern, info.name) for pattern in ignored):
                    continue
                raise WeightsCorrupt(f"{info.name} is not part of the model that config.json describes", where=path)
            if info.shape != tuple(shapes[info.name]):
                expected = list(shapes[info.name])
                raise WeightsCorrupt(
                    f"{info.name} has shape {list(info.shape)}, config.json asks for {expected}", where=path
                )
            if info.dtype not in FLOATS:
                raise WeightsCorrupt(f"{info.name} is {info.dtype}, not a dtype of full-precision weights", where=path)
            found[info.name] = info
        missing = [name for name in shapes if name not in found]
        if missing:
            raise WeightsCorrupt(
                f"{len(missing)} of {len(shapes)} parameters are missing, {missing[0]} first",
                where=self.folder,
                todo=AGAIN,
            )
        return {name: tuple(shape) for name, shape in shapes.items()}

    def copy_config(self, folder: Path) -> None:
        """Copy config.json unchanged into `folder`, atomically."""
        target = folder / "config.json"
        staged = folder / f".config.json.{os.getpid()}.tmp"
        try:
            staged.write_bytes((self.folder / "config.json").read_bytes())
            os.replace(staged, target)
        except OSError as err:
            staged.unlink(missing_ok=True)
            raise as_runner_error(err, where=target) from err


def open_source(folder: Path) -> Bf16Source:
    """Read config, index and headers of `folder`. Raises WeightsMissing, WeightsCorrupt."""
    config = read_json_object(folder / "config.json", FOLDER, AGAIN)
    if "quantization_config" in config:
        raise ConfigInvalid("these weights are quantised already", where=folder, todo="Use the published weights")
    single, index = folder / f"{STEM}.safetensors", folder / f"{STEM}.safetensors.index.json"
    if single.is_file():
        return Bf16Source(folder, config, (read_header(single),))
    if not index.is_file():
        raise WeightsMissing(
            f"the folder has neither {single.name} nor {index.name}",
            where=folder,
            todo="Put the safetensors there; pickles are never read",
        )
    placed = read_json_object(index, FOLDER, AGAIN).get("weight_map")
    if not isinstance(placed, dict) or not placed or not all(isinstance(shard, str) for shard in placed.values()):
        raise WeightsCorrupt("the index names no shards", where=index, todo=AGAIN)
    strays = sorted({shard for shard in placed.values() if not SHARD_NAME.fullmatch(shard)})
    if strays:
        raise WeightsCorrupt(f"the index names {strays[0]!r}, which is no safetensors file beside it", where=index)
    headers = tuple(read_header(folder / shard) for shard in sorted(set(placed.values())))
    held = {(name, header.path.name) for header in headers for name in header.tensors}
    if len({name for name, _ in held}) != len(held):
        twice = next(name for name, shard in sorted(held) if placed.get(name) != shard)
        raise WeightsCorrupt(f"{twice} is in two shards", where=folder, todo=AGAIN)
    for name, shard in placed.items():
        if (name, shard) not in held:
            raise WeightsCorrupt(f"{name} is not in {shard}, where the index puts it", where=index, todo=AGAIN)
    return Bf16Source(folder, config, headers)

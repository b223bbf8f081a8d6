"""Published names: translate the names of a published file to the library's, by prefixes and the original Wan's names.

In:   a header. Out: the library's name → `PublishedPiece`, a tensor or some rows of one, still on the disk.
Never: which of them are quantised, and their meaning.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor

from runner.errors import WeightsCorrupt
from runner.quantization.files.file_header import SafetensorsHeader
from runner.quantization.files.safetensors_stream import read_tensor

__all__ = ["PublishedPiece", "as_diffusers"]

PREFIXES = ("model.", "diffusion_model.", "transformer.", "module.", "_orig_mod.")
ORIGINAL = (".self_attn.", "time_embedding.0.", "face_adapter.fuser_blocks.")  # parts of the original's names only


@dataclass(frozen=True)
class PublishedPiece:
    """A tensor of a file, or its rows `start` to `stop`. It can be sliced like a tensor; `read` reads it."""

    key: str
    dtype: torch.dtype
    shape: tuple[int, ...]
    start: int = 0
    stop: int | None = None
    flat: bool = False  # only the longest dimension is meant

    @property
    def numel(self) -> int:
        return torch.Size(self.shape).numel()

    def __getitem__(self, index: slice | tuple[int | slice, ...]) -> PublishedPiece:
        """Slice rows, or (as the library slices a bias of [1, n, 1, 1]) the one dimension longer than one."""
        if isinstance(index, slice):
            start, stop, _ = index.indices(self.shape[0])
            return replace(
                self, start=self.start + start, stop=self.start + stop, shape=(stop - start, *self.shape[1:])
            )
        return replace(self, shape=(max(self.shape),), flat=True)

    def read(self, path: Path) -> Tensor:
        """Read the numbers: on the CPU, mapped."""
        tensor = read_tensor(path, self.key)
        if self.flat:
            tensor = tensor.reshape(-1)
        return tensor[self.start : self.stop] if self.stop is not None else tensor


def as_diffusers(header: SafetensorsHeader) -> dict[str, PublishedPiece]:
    """The library's names → pieces. Raises WeightsCorrupt where two tensors get one name."""
    pieces: dict[str, PublishedPiece] = {}
    for key, info in header.tensors.items():
        name = _bare(key)
        if name in pieces:
            raise WeightsCorrupt(f"{key} and {pieces[name].key} are both {name}", where=header.path)
        pieces[name] = PublishedPiece(key, info.dtype, info.shape)
    if any(mark in f".{name}" for name in pieces for mark in ORIGINAL):
        from diffusers.loaders.single_file_utils import convert_wan_transformer_to_diffusers

        try:
            pieces = convert_wan_transformer_to_diffusers(pieces)
        except (IndexError, KeyError, TypeError) as err:
            raise WeightsCorrupt(
                f"its names look like the original Wan's, but cannot be translated ({err})", where=header.path
            ) from err
    return pieces


def _bare(name: str) -> str:
    while name.startswith(PREFIXES):
        name = name.split(".", 1)[1]
    return name

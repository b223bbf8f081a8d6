"""LPIPS: measures the perceptual distance of two pictures by a network that was trained on people's judgements.

In:   a safetensors file of AlexNet's convolutions and five heads; pairs of pictures.
Out:  one number per pair, 0 for equal pictures. Never: the source of the pictures, limits.

The metric is LPIPS version 0.1 with AlexNet (Zhang et al., 2018). `tools/convert_lpips.py` makes the file;
`docs/metric-networks.md` names its sources.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from runner.errors import WeightsCorrupt
from runner.quantization.files.file_header import read_header

if TYPE_CHECKING:
    import torch

__all__ = ["LEAST_PICTURE", "LPIPS_SHAPES", "Lpips", "check_tensors"]

# Convolutions as (channels in, channels out, kernel, stride, padding); the second and third read a pooled picture.
CONVOLUTIONS = ((3, 64, 11, 4, 2), (64, 192, 5, 1, 2), (192, 384, 3, 1, 1), (384, 256, 3, 1, 1), (256, 256, 3, 1, 1))
POOLED_BEFORE = (1, 2)
LPIPS_SHAPES: Mapping[str, tuple[int, ...]] = {
    **{f"conv{i}.weight": (out, come, k, k) for i, (come, out, k, _, _) in enumerate(CONVOLUTIONS, 1)},
    **{f"conv{i}.bias": (out,) for i, (_, out, _, _, _) in enumerate(CONVOLUTIONS, 1)},
    **{f"head{i}": (out,) for i, (_, out, _, _, _) in enumerate(CONVOLUTIONS, 1)},
}
# Converts pictures of -1 to 1 to ImageNet's statistics, as published with the metric.
SHIFT, SCALE = (-0.030, -0.088, -0.188), (0.458, 0.448, 0.450)
EPSILON = 1e-10
LEAST_PICTURE = 64  # pixels per side: smaller pictures have few values after two poolings; below 31 none
REMEDY = "Make it again: python tools/convert_lpips.py"


class Lpips:
    """The network with its weights, float32 on the CPU."""

    def __init__(self, tensors: Mapping[str, torch.Tensor]) -> None:
        check_tensors({name: tuple(tensor.shape) for name, tensor in tensors.items()})
        self._tensors = {name: tensor.float() for name, tensor in tensors.items()}

    @classmethod
    def open(cls, path: Path) -> Lpips:
        """Open the file. Raises WeightsCorrupt for a damaged file or other tensors, WeightsMissing if it is missing."""
        from safetensors.torch import load_file

        shapes = {name: info.shape for name, info in read_header(path).tensors.items()}
        check_tensors(shapes, path)
        return cls(load_file(path))

    def distance(self, one: np.ndarray, other: np.ndarray) -> float:
        """Return the distance of two uint8 RGB [H, W, 3] of one size. Raises ValueError for other or small sizes."""
        import torch

        if one.shape != other.shape or one.ndim != 3 or min(one.shape[:2]) < LEAST_PICTURE:
            raise ValueError(f"pictures of {one.shape} and {other.shape}; one size of at least 64 pixels is needed")
        with torch.inference_mode():
            pictures = torch.from_numpy(np.stack([one, other])).permute(0, 3, 1, 2).float() / 127.5 - 1
            pictures = (pictures - _channels(SHIFT)) / _channels(SCALE)
            total = torch.zeros(())
            for number, features in enumerate(self._features(pictures), 1):
                unit = features / (features.square().sum(1, keepdim=True).sqrt() + EPSILON)
                weighted = (unit[0] - unit[1]).square() * self._tensors[f"head{number}"][:, None, None]
                total += weighted.sum(0).mean()
            return float(total)

    def _features(self, pictures: torch.Tensor) -> list[torch.Tensor]:
        """Return the output of each of the five convolutions, float32 [2, C, h, w], negative values cut."""
        from torch.nn.functional import conv2d, max_pool2d, relu

        found = []
        for index, (_, _, _, stride, padding) in enumerate(CONVOLUTIONS):
            if index in POOLED_BEFORE:
                pictures = max_pool2d(pictures, 3, 2)
            weight, bias = (self._tensors[f"conv{index + 1}.{name}"] for name in ("weight", "bias"))
            pictures = relu(conv2d(pictures, weight, bias, stride, padding))
            found.append(pictures)
        return found


def check_tensors(shapes: Mapping[str, tuple[int, ...]], where: Path | None = None) -> None:
    """Raise WeightsCorrupt unless these are the tensors of the metric."""
    wrong = sorted(name for name in shapes.keys() | LPIPS_SHAPES.keys() if shapes.get(name) != LPIPS_SHAPES.get(name))
    if wrong:
        found = shapes.get(wrong[0])
        raise WeightsCorrupt(
            f"tensor {wrong[0]} has shape {found}, not {LPIPS_SHAPES.get(wrong[0])}"
            if found is not None
            else f"tensor {wrong[0]} is missing",
            where=where,
            todo=REMEDY,
        )


def _channels(values: tuple[float, float, float]) -> torch.Tensor:
    import torch

    return torch.tensor(values)[:, None, None]

"""RIFE: make the frame in the middle between two frames, with a network that estimates the motion from both.

In:   a safetensors file of the network, two frames. Out: one frame, of the same size.
Never: choosing frames of a clip, rates, jobs.

The network is IFNet of RIFE 4.25 (Huang et al. 2022, "Real-Time Intermediate Flow Estimation", and the project
Practical-RIFE). Five blocks, from coarse to fine, refine two flows and a mask. Both frames are warped along their flows
and blended by the mask. `tools/convert_rife.py` makes the file; `docs/interpolation.md` names its source.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from torch import nn
from torch.nn import functional as F

from runner.errors import InternalError, NotFinite
from runner.forecast.rife_shape import (
    FEATURES,
    FLOW,
    RESIDUALS,
    SCALES,
    UNSHUFFLED,
    RifeShape,
    channels_in,
    padded,
)
from runner.generation.runtime.device import as_out_of_memory
from runner.weights.rife_file import REMEDY, check_rife_file

__all__ = ["RifeInterpolator", "RifeNetwork", "warp"]

SLOPE = 0.2  # of the leaky ReLUs
MIDDLE = 0.5  # time of the new frame: 0 is the first frame's, 1 the second's


class RifeInterpolator:
    """The network with its weights on one device, in float32."""

    def __init__(self, network: RifeNetwork, device: torch.device | str = "cpu") -> None:
        self.device = torch.device(device)
        self._network = network.to(self.device, torch.float32).eval().requires_grad_(False)

    @classmethod
    def open(cls, path: Path, device: torch.device | str = "cpu") -> RifeInterpolator:
        """Load the network. Raises WeightsCorrupt for a damaged file or other tensors, WeightsMissing without a file,
        OutOfMemory if it does not fit on the device."""
        from safetensors.torch import load_file

        shape = check_rife_file(path)
        with torch.device("meta"):
            network = RifeNetwork(shape)
        network.load_state_dict(load_file(path), assign=True)
        try:
            return cls(network, device)
        except (RuntimeError, MemoryError) as error:
            exhausted = as_out_of_memory(error, torch.device(device), doing="loading the interpolation network")
            if exhausted is None:
                raise
            raise exhausted from error

    def between(self, one: np.ndarray, other: np.ndarray) -> np.ndarray:
        """Return the frame in the middle between `one` and `other`. All three are uint8 RGB [H, W, 3], of any size.

        The frames are padded with black on the right and below to multiples of 64 pixels. Raises InternalError for
        frames of different sizes, OutOfMemory, NotFinite.
        """
        if one.shape != other.shape or one.ndim != 3 or one.shape[2] != 3 or one.dtype != np.uint8:
            raise InternalError(f"cannot interpolate between frames of {one.shape} and {other.shape}")
        height, width = one.shape[:2]
        try:
            return self._between(one, other)
        except (RuntimeError, MemoryError) as error:
            exhausted = as_out_of_memory(error, self.device, doing=f"interpolating between frames of {width}x{height}")
            if exhausted is None:
                raise
            raise exhausted from error

    def _between(self, one: np.ndarray, other: np.ndarray) -> np.ndarray:
        height, width = one.shape[:2]
        with torch.inference_mode():
            pair = torch.from_numpy(np.stack([one, other])).to(self.device).permute(0, 3, 1, 2).float().div_(255)
            pair = F.pad(pair, (0, padded(width) - width, 0, padded(height) - height))
            middle = self._network(pair[:1], pair[1:])[0, :, :height, :width]
            if not bool(torch.isfinite(middle).all()):
                raise NotFinite("the interpolation network's output has NaN or infinity", todo=REMEDY)
            levels = middle.mul_(255).round_().clamp_(0, 255).to(torch.uint8)
            return levels.permute(1, 2, 0).contiguous().cpu().numpy()


class RifeNetwork(nn.Module):
    """IFNet. Its tensors have their published names."""

    def __init__(self, shape: RifeShape | None = None) -> None:
        super().__init__()
        shape = shape or RifeShape()
        self.encode = RifeHead(shape.head)
        self.blocks = [RifeBlock(channels_in(number), width) for number, width in enumerate(shape.widths)]
        for number, block in enumerate(self.blocks):
            self.add_module(f"block{number}", block)

    def forward(self, one: torch.Tensor, other: torch.Tensor) -> torch.Tensor:
        """Return the middle between `one` and `other`; all [n, 3, H, W], values 0 to 1, sides multiples of 64.

        A flow is [n, 2, H, W]: for each pixel, the offset (right, down) in pixels at which its colour is in that frame.
        """
        first, second = (torch.cat([frame, self.encode(frame)], 1) for frame in (one, other))  # [n, 3 + FEATURES, H, W]
        x, flows, made = self._block_input(first, second, None, None, SCALES[0]), None, None
        for coarse, scale, block in zip(SCALES, (*SCALES[1:], None), self.blocks, strict=True):
            x = block(x)  # [n, FLOW + MASK + PASSED, H / coarse, W / coarse]
            change, made = resize(x[:, :FLOW], coarse) * coarse, x[:, FLOW:]
            flows = change if flows is None else flows.add_(change)
            if scale is not None:
                x = self._block_input(warp(first, flows[:, :2]), warp(second, flows[:, 2:]), flows, made, scale)
            if scale == SCALES[-1]:
                del first, second  # no later block reads the features
        assert flows is not None and made is not None
        return torch.lerp(warp(other, flows[:, 2:]), warp(one, flows[:, :2]), torch.sigmoid(made[:, :1]))

    @staticmethod
    def _block_input(
        first: torch.Tensor, second: torch.Tensor, flows: torch.Tensor | None, made: torch.Tensor | None, scale: int
    ) -> torch.Tensor:
        """Return the input of the block at `scale`: [n, channels_in, H / scale, W / scale].

        made: mask and features [n, 9, H / s, W / s] of the block before. Its scale s is twice as coarse. Enlarging a
        picture s times and then reducing it s / 2 times equals enlarging it twice, because the reduced pixels are on a
        straight line between two neighbours. So it is enlarged twice here.
        """
        one, other = resize(first, 1 / scale), resize(second, 1 / scale)
        parts = [one[:, :3], other[:, :3], one[:, 3:], other[:, 3:], torch.full_like(one[:, :1], MIDDLE)]
        if flows is not None and made is not None:
            parts += [resize(made, 2), resize(flows, 1 / scale) / scale]
        return torch.cat(parts, 1)


class RifeHead(nn.Module):
    """Features of one frame, at its size."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.cnn0 = nn.Conv2d(3, channels, 3, stride=2, padding=1)
        self.cnn1 = nn.Conv2d(channels, channels, 3, padding=1)
        self.cnn2 = nn.Conv2d(channels, channels, 3, padding=1)
        self.cnn3 = nn.ConvTranspose2d(channels, FEATURES, 4, stride=2, padding=1)

    def forward(self, frame: torch.Tensor) -> torch.Tensor:
        """Return [n, FEATURES, H, W] for [n, 3, H, W]."""
        for layer in (self.cnn0, self.cnn1, self.cnn2):
            frame = F.leaky_relu_(layer(frame), SLOPE)
        features: torch.Tensor = self.cnn3(frame)
        return features


class RifeBlock(nn.Module):
    """Estimates flows, a mask, and features for the next block, from two frames that are concatenated in channels."""

    def __init__(self, channels: int, width: int) -> None:
        super().__init__()
        half = width // 2
        self.conv0 = nn.Sequential(
            nn.Sequential(nn.Conv2d(channels, half, 3, stride=2, padding=1)),
            nn.Sequential(nn.Conv2d(half, width, 3, stride=2, padding=1)),
        )
        self.convblock = nn.Sequential(*(RifeResidual(width) for _ in range(RESIDUALS)))
        self.lastconv = nn.Sequential(nn.ConvTranspose2d(width, UNSHUFFLED, 4, stride=2, padding=1))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Return [n, FLOW + MASK + PASSED, h, w] for [n, channels, h, w]; flows in pixels of h x w."""
        for halving in self.conv0:
            x = F.leaky_relu_(halving(x), SLOPE)
        return F.pixel_shuffle(self.lastconv(self.convblock(x)), 2)


class RifeResidual(nn.Module):
    """A residual convolution with a scale for each channel."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(width, width, 3, padding=1)
        self.beta = nn.Parameter(torch.ones(1, width, 1, 1))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return F.leaky_relu_(self.conv(x).mul_(self.beta).add_(x), SLOPE)


def warp(picture: torch.Tensor, flow: torch.Tensor) -> torch.Tensor:
    """Warp `picture` [n, C, H, W] by `flow` [n, 2, H, W]: pixel (x, y) takes the value at (x + u, y + v).

    Bilinear between pixels; outside the picture its border.
    """
    height, width = picture.shape[2:]
    columns = torch.arange(width, dtype=flow.dtype, device=flow.device)
    rows = torch.arange(height, dtype=flow.dtype, device=flow.device)[:, None]
    # grid_sample counts from -1, the middle of the first pixel, to 1, that of the last.
    grid = torch.stack(
        [(columns + flow[:, 0]) * (2 / (width - 1)) - 1, (rows + flow[:, 1]) * (2 / (height - 1)) - 1], dim=-1
    )
    return F.grid_sample(picture, grid, mode="bilinear", padding_mode="border", align_corners=True)


def resize(picture: torch.Tensor, factor: float) -> torch.Tensor:
    """Resize `picture` [n, C, H, W] by `factor`, bilinear. With factor 1 it is returned itself."""
    if factor == 1:
        return picture
    return F.interpolate(picture, scale_factor=factor, mode="bilinear", align_corners=False)

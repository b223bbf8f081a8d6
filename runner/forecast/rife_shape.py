"""RIFE's shape: the tensors of the frame interpolation network, and the cost of one interpolated frame.

In:   channels of the network; width and height of the frames. Out: shapes, FLOPs, bytes.
Never: torch, weights, which frames are interpolated.

The published network is version 4.25; the tensors of 4.26 have the same names and shapes. "heavy" variants are wider.
Operations are counted as in flops.py. The bytes of activations are a count of live tensors, which a test repeats.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

from runner.forecast.flops import TERA
from runner.forecast.precisions import DEFAULT_PRECISION
from runner.forecast.seconds import DeviceSpeed

__all__ = ["ALIGNMENT", "FEATURES", "RESIDUALS", "SCALES", "RifeShape", "padded"]

SCALES = (16, 8, 4, 2, 1)  # of the blocks: frame pixels per side for one pixel of a block's input
RESIDUALS = 8  # convolutions of a block that keep the size
FEATURES = 4  # channels that the head makes of each frame
FLOW, MASK, PASSED = 4, 1, 8  # channels of a block's output: two flows, a mask, features for the next block
UNSHUFFLED = 4 * (FLOW + MASK + PASSED)  # before they are laid out at twice the size
PAIR = 2 * (3 + FEATURES) + 1  # a block's input channels for two frames: colours, features, the moment between them
ALIGNMENT = 64  # pixels: the first block works at a sixteenth of the size and halves it twice
# Rate of convolutions in float32 with their memory traffic, as a share of the bf16 product's: estimated from published
# decoding times of the autoencoder (seconds.py).
SHARE = 0.16
LIVE_FLOATS = 88  # live numbers per pixel at the peak, in the last block, without weights


@dataclass(frozen=True)
class RifeShape:
    """Channels of the head and of the five blocks; the defaults are the published network's."""

    head: int = 16
    widths: tuple[int, ...] = (192, 128, 96, 64, 32)

    @property
    def tensors(self) -> Mapping[str, tuple[int, ...]]:
        """Published name of each tensor → its shape."""
        head = self.head
        found: dict[str, tuple[int, ...]] = {
            "encode.cnn0.weight": (head, 3, 3, 3),
            "encode.cnn1.weight": (head, head, 3, 3),
            "encode.cnn2.weight": (head, head, 3, 3),
            "encode.cnn3.weight": (head, FEATURES, 4, 4),
            "encode.cnn0.bias": (head,),
            "encode.cnn1.bias": (head,),
            "encode.cnn2.bias": (head,),
            "encode.cnn3.bias": (FEATURES,),
        }
        for number, width in enumerate(self.widths):
            block, half = f"block{number}", width // 2
            found |= {
                f"{block}.conv0.0.0.weight": (half, channels_in(number), 3, 3),
                f"{block}.conv0.0.0.bias": (half,),
                f"{block}.conv0.1.0.weight": (width, half, 3, 3),
                f"{block}.conv0.1.0.bias": (width,),
                f"{block}.lastconv.0.weight": (width, UNSHUFFLED, 4, 4),
                f"{block}.lastconv.0.bias": (UNSHUFFLED,),
            }
            for each in range(RESIDUALS):
                found |= {
                    f"{block}.convblock.{each}.beta": (1, width, 1, 1),
                    f"{block}.convblock.{each}.conv.weight": (width, width, 3, 3),
                    f"{block}.convblock.{each}.conv.bias": (width,),
                }
        return found

    @property
    def weight_bytes(self) -> int:
        """Bytes of the weights in float32."""
        return 4 * sum(math.prod(shape) for shape in self.tensors.values())

    def frame_flop(self, width: int, height: int) -> float:
        """FLOPs of the convolutions for one interpolated frame of `width` x `height` pixels."""
        area, head = padded(width) * padded(height), self.head
        heads = 2 * area / 4 * (2 * 9 * (3 * head + 2 * head * head) + 2 * 16 * head * FEATURES)
        return heads + sum(
            self._block_flop(number, area / scale**2) for number, scale in enumerate(SCALES[: len(self.widths)])
        )

    def _block_flop(self, number: int, area: float) -> float:
        width, half = self.widths[number], self.widths[number] // 2
        halved = 2 * 9 * (channels_in(number) * half * area / 4 + half * width * area / 16)
        return halved + area / 16 * (RESIDUALS * 2 * 9 * width * width + 2 * 16 * width * UNSHUFFLED)

    def peak_bytes(self, width: int, height: int) -> int:
        """Peak bytes of one interpolated frame in float32, without weights and scratch memory of kernels."""
        return 4 * LIVE_FLOATS * padded(width) * padded(height)

    def frame_seconds(self, width: int, height: int, device: DeviceSpeed) -> float:
        """Lower bound of the seconds on a known GPU: the convolutions alone, at an estimated share of its rate."""
        return self.frame_flop(width, height) / TERA / device.matmul[DEFAULT_PRECISION] / SHARE


def channels_in(number: int) -> int:
    """Input channels of block `number`: later blocks also read the mask, features and flows of the block before."""
    return PAIR if number == 0 else PAIR + MASK + PASSED + FLOW


def padded(side: int) -> int:
    """Return `side` pixels, rounded up so that the network can halve them."""
    return -(-side // ALIGNMENT) * ALIGNMENT

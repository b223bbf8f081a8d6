"""Causal slots: run causal convolutions in time that keep their last two inputs in place, padded and in order.

In:   one or a few pictures at a time, [B, C, n, H, W]. Out: the convolution's results of them and of the two pictures
before, [B, C', n, H', W']. Never: blocks, the order of layers, the library's cache.

A convolution needs its padded inputs consecutive in memory: two old ones and n new ones. M convolutions of one input
shape that run one after the other share a ring of 2M + n slots. Each has its two old inputs directly before those of
the layer that ran before it. So it writes its new input over that layer's oldest one, which is free then:

    first layer:   . . . . a a +        a: old inputs, +: the new one
    next layer:    . . b b + a a
    next layer:    c c + b b a a        then all layers have moved by one slot, and the first one can write again

The ring has n + 1 extra slots, so that inputs beyond its end are still consecutive. A layer that reaches the end moves
its two old inputs to the beginning, once in 2M + n pictures. This takes no more memory than two inputs per layer and
one padded tensor. The padding is zeroed once, when the ring is made. A layer that is alone with its input shape moves
its two inputs each time, as the ring would take twice the memory.

If channels are innermost and the batch is one, consecutive slots are one contiguous tensor, and nothing is copied.
Otherwise (on the CPU) torch copies the inputs of a convolution as it runs.
"""

from __future__ import annotations

from collections.abc import Iterable
from itertools import groupby
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from runner.generation.wan_animate.norm_silu import norm_silu_into

__all__ = ["CausalConvolutions", "CausalLayer"]

KEPT = 2  # old inputs of a convolution over three pictures


class CausalLayer(NamedTuple):
    """A convolution and its place: inputs of one `level` have one size; at most `pictures` pictures come at once."""

    conv: Any  # the library's WanCausalConv3d, with a kernel of three pictures
    level: int
    pictures: int


class _Ring:
    """The slots of consecutive layers. `starts`: for each layer, the slot of the older of its two old inputs."""

    def __init__(self, layers: int, count: int) -> None:
        self.count = count
        self.alone = layers == 1
        self.round = KEPT * layers + count
        self.length = self.round if self.alone else self.round + count + 1
        self.starts = [KEPT * (layers - 1 - at) for at in range(layers)]
        self.slots: Tensor | None = None

    def advance(self, layer: int, conv: Any, x: Tensor) -> tuple[Tensor, Tensor]:
        """Return (the layer's padded inputs, the place for `x` in them), which are valid until the next layer runs."""
        count = x.shape[2]
        if count > self.count:
            raise ValueError(f"{count} pictures at once for a ring that was planned for {self.count}")
        left, right, top, bottom, _, _ = conv._padding
        slots = self.slots if self.slots is not None else self._make(conv, x)
        start = self.starts[layer]
        if start >= self.round or (self.alone and start):
            to = 0 if self.alone else start - self.round
            if to + KEPT <= start:
                slots[:, :, to : to + KEPT] = slots[:, :, start : start + KEPT]
            else:
                for at in range(KEPT):
                    slots[:, :, to + at] = slots[:, :, start + at]
            start = to
        self.starts[layer] = start + count
        padded = slots.narrow(2, start, KEPT + count)
        height, width = padded.shape[3:]
        return padded, padded[:, :, KEPT:, top : height - bottom, left : width - right]

    def _make(self, conv: Any, x: Tensor) -> Tensor:
        batch, channels, _, height, width = x.shape
        left, right, top, bottom, _, _ = conv._padding
        shape = batch, channels, self.length, height + top + bottom, width + left + right
        innermost = conv.weight.is_contiguous(memory_format=torch.channels_last_3d) and not conv.weight.is_contiguous()
        layout = torch.channels_last_3d if innermost else torch.contiguous_format
        self.slots = torch.empty(shape, dtype=x.dtype, device=x.device, memory_format=layout).zero_()
        return self.slots


class CausalConvolutions:
    """The kept inputs of all causal convolutions in one pass through a clip, zeros at first. One object per pass."""

    def __init__(self, layers: Iterable[CausalLayer]) -> None:
        """`layers`: in the order in which they run. All run for some pictures before any runs for later ones."""
        self._places: dict[Any, tuple[_Ring, int]] = {}
        self._last: dict[Any, Tensor] = {}
        for (_, count, _, _), some in groupby(
            layers, key=lambda layer: (layer.level, layer.pictures, layer.conv.in_channels, layer.conv._padding)
        ):
            members = list(some)
            ring = _Ring(len(members), count)
            self._places |= {layer.conv: (ring, at) for at, layer in enumerate(members)}

    def run(self, conv: Any, x: Tensor, norm: Any = None) -> Tensor:
        """Return `conv` of the pictures `x` [B, C, n, H, W] and the two before them; with `norm`, of SiLU(norm(x))."""
        ring, layer = self._places[conv]
        padded, place = ring.advance(layer, conv, x)
        if norm is None:
            place.copy_(x)
        else:
            norm_silu_into(x, norm.gamma, norm.bias if isinstance(norm.bias, Tensor) else None, place)
        del x  # frees the largest tensor for the result, if the caller keeps no reference
        out: Tensor = nn.Conv3d.forward(conv, padded)
        return out

    def old_inputs(self, conv: Any) -> tuple[Tensor, Tensor]:
        """Return the two old inputs of `conv`, padded, [B, C, 1, H, W]; it must have run."""
        ring, layer = self._places[conv]
        assert ring.slots is not None
        older, newer = ring.slots.narrow(2, ring.starts[layer], KEPT).split(1, dim=2)
        return older, newer

    def halve(self, conv: Any, x: Tensor) -> Tensor:
        """Halve the pictures: `conv`, of three pictures with stride two, on `x` [B, C, n, H, W] and the one before.

        The first picture of a clip is returned unchanged.
        """
        before, self._last[conv] = self._last.get(conv), x[:, :, -1:].clone() if x.shape[2] > 1 else x
        if before is None:
            return x
        out: Tensor = nn.Conv3d.forward(conv, torch.cat([before, x], dim=2))
        return out

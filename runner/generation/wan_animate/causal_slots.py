"""Causal convolutions in time that keep their last two inputs, padded and in order, without moving them.

In:   one or a few pictures at a time, [B, C, n, H, W]. Out: what the convolution makes of them and of the two before,
[B, C', n, H', W']. Never: blocks, in which order layers run, the library's cache.

A convolution wants its padded inputs one behind the other in memory: two old ones and the n new. Convolutions of one
input shape that run in turn, M of them, share a ring of 2M + n slots. Each has its two old inputs directly before those
of the layer that ran before it, and so writes its new ones where that layer's oldest were, which it has just let go:

    first layer:   . . . . a a +        old inputs, +: the new one
    next layer:    . . b b + a a
    next layer:    c c + b b a a        then all have moved on by one, and the first may write behind itself

The ring is n + 1 slots longer than it is round, so that inputs beyond its end still lie one behind the other; a layer
that comes to the end moves its two old inputs to the beginning, once in 2M + n pictures. That takes no more memory than
two inputs a layer beside one padded tensor. The padding is zeroed once, when the ring is made. A layer that is alone
with its input shape moves its two inputs each time: the ring would take twice the memory.

Where channels are innermost and the batch is one, consecutive slots are one contiguous tensor, and nothing is copied.
Where they are not (on the CPU), torch copies the inputs of a convolution behind one another as it runs.
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
    """A convolution where it stands: inputs of one `level` have one size; at most so many `pictures` come at once."""

    conv: Any  # the library's WanCausalConv3d, three pictures long
    level: int
    pictures: int


class _Ring:
    """The slots of consecutive layers. `starts`: of each layer, the slot of the older of its two old inputs."""

    def __init__(self, layers: int, count: int) -> None:
        self.count = count
        self.alone = layers == 1
        self.round = KEPT * layers + count
        self.length = self.round if self.alone else self.round + count + 1
        self.starts = [KEPT * (layers - 1 - at) for at in range(layers)]
        self.slots: Tensor | None = None

    def advance(self, layer: int, conv: Any, x: Tensor) -> tuple[Tensor, Tensor]:
        """(the layer's padded inputs, the place of `x` among them); they are its own until the next layer runs."""
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
    """The kept inputs of all causal convolutions of a walk through a clip, zeros at first. One for each walk."""

    def __init__(self, layers: Iterable[CausalLayer]) -> None:
        """`layers`: in the order in which they run; each runs once for the same pictures, before any runs for later."""
        self._places: dict[Any, tuple[_Ring, int]] = {}
        self._last: dict[Any, Tensor] = {}
        for (_, count, _, _), some in groupby(
            layers, key=lambda layer: (layer.level, layer.pictures, layer.conv.in_channels, layer.conv._padding)
        ):
            members = list(some)
            ring = _Ring(len(members), count)
            self._places |= {layer.conv: (ring, at) for at, layer in enumerate(members)}

    def run(self, conv: Any, x: Tensor, norm: Any = None) -> Tensor:
        """`conv` of the pictures `x` [B, C, n, H, W] and the two before them; with `norm`, of SiLU(norm(x))."""
        ring, layer = self._places[conv]
        padded, place = ring.advance(layer, conv, x)
        if norm is None:
            place.copy_(x)
        else:
            norm_silu_into(x, norm.gamma, norm.bias if isinstance(norm.bias, Tensor) else None, place)
        del x  # the largest tensor that is not kept: where the caller has let it go, the result may lie there
        out: Tensor = nn.Conv3d.forward(conv, padded)
        return out

    def old_inputs(self, conv: Any) -> tuple[Tensor, Tensor]:
        """The two inputs of `conv` that its next ones stand behind, padded, [B, C, 1, H, W]; it must have run."""
        ring, layer = self._places[conv]
        assert ring.slots is not None
        older, newer = ring.slots.narrow(2, ring.starts[layer], KEPT).split(1, dim=2)
        return older, newer

    def halve(self, conv: Any, x: Tensor) -> Tensor:
        """Half as many pictures: `conv`, over three with a step of two, of `x` [B, C, n, H, W] and the one before.

        The first picture of a clip comes back as it is.
        """
        before, self._last[conv] = self._last.get(conv), x[:, :, -1:].clone() if x.shape[2] > 1 else x
        if before is None:
            return x
        out: Tensor = nn.Conv3d.forward(conv, torch.cat([before, x], dim=2))
        return out

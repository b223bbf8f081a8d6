"""Fixed point: causal layers that saw the same picture often enough repeat their last output; it is reused.

In:   pixels [B, C, n, H, W], groups of layers, each run on one picture, the inputs that their convolutions keep.
Out:  for each picture the last group's output, bit for bit as if all had run. Never: which layers these are, weights.

A causal convolution keeps the two pictures that it saw last. A group's output is a function of its input and of all
that its convolutions keep. If a picture left the kept inputs as they were, the same picture again gives the same output
and leaves them so once more. Nothing is said of how many pictures that takes: kept inputs are compared.

Equal means equal bits; a kernel must give the same bits for the same inputs, as cuDNN's convolutions do. On a GPU a
clip costs one transfer to the host, and each picture that repeats before the switch-over one for each group that has
not settled, two or three at the switch-over. Without pictures that repeat nothing else is compared and nothing held.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence

import torch
from torch import Tensor

__all__ = ["FixedPoints", "find_repeats"]

Group = Callable[[Tensor], Tensor]  # runs its layers on a picture
# The two pictures that each convolution of the group of this number keeps, the older one first. The last convolution
# comes first: it settles last.
KeptInputs = Callable[[int], Iterable[tuple[Tensor, Tensor]]]

# Equal as numbers is not enough: 0 and -0 differ in bits, and NaN equals nothing.
BITS = {8: torch.int64, 4: torch.int32, 2: torch.int16}


def find_repeats(pixels: Tensor) -> list[bool]:
    """Of each picture of `pixels` [B, C, n, H, W], whether it equals the one before; one transfer to the host.

    Tensors without contents (device meta) have no repeats.
    """
    count = pixels.shape[2]
    if pixels.is_meta or count < 2:
        return [False] * count
    bits = _as_bits(pixels)
    same = (bits[:, :, 1:] == bits[:, :, :-1]).all(dim=(0, 1, 3, 4))
    return [False, *same.tolist()]


class FixedPoints:
    """The groups' outputs for the pictures of one clip, in order, each reused where it repeats.

    `repeats`: of each picture, whether it equals the one before. `kept`: what a group keeps now. A group may be given
    its last output again instead of running, so that a caller must not write into it. Its input must not be written
    into either.
    """

    def __init__(self, repeats: Iterable[bool], kept: KeptInputs) -> None:
        self._repeats = iter(repeats)
        self._kept = kept
        self._states: dict[int, _State] = {}

    def run(self, groups: Sequence[Group], picture: Tensor) -> Tensor:
        """What `groups`, one after the other, make of the clip's next picture [B, C, 1, H, W]."""
        repeats = next(self._repeats)
        if not repeats:  # before the first group runs: it needs the most memory
            for state in self._states.values():
                state.output = None
        for number, group in enumerate(groups):
            state = self._states.setdefault(number, _State())
            if repeats and state.output is not None:
                picture = state.output
                continue
            picture = group(picture)
            still = repeats and self._are_still(number)
            # All three inputs of each convolution were equal: what it kept before this picture, and keeps after it.
            state.output = picture if still and state.still else None
            state.still = still
            repeats = False  # the next group's input was computed anew
        return picture

    def _are_still(self, number: int) -> bool:
        """Are, for each convolution of a group, the two pictures that it keeps equal?"""
        return all(torch.equal(_as_bits(older), _as_bits(newer)) for older, newer in self._kept(number))


class _State:
    """Of one group: whether the inputs kept after the last picture are equal, and the output once it repeats."""

    def __init__(self) -> None:
        self.still = False
        self.output: Tensor | None = None


def _as_bits(pictures: Tensor) -> Tensor:
    return pictures.view(BITS[pictures.element_size()])

"""Fixed point: reuse the output of causal layers when the same picture repeats and their kept inputs are stable.

In:   pixels [B, C, n, H, W], groups of layers, each run on one picture, the inputs that their convolutions keep.
Out:  for each picture the last group's output, bit for bit as if all had run. Never: the kind of layers, weights.

A causal convolution keeps its last two input pictures. A group's output is a function of its input and of the inputs
that its convolutions keep. If a picture does not change the kept inputs, the same picture gives the same output again,
and again leaves them unchanged. The number of pictures that this takes is not assumed: kept inputs are compared.

Equal means equal bits. A kernel must give the same bits for the same inputs, as cuDNN's convolutions do. On a GPU a
clip costs one transfer to the host. Before all groups are stable, each repeated picture costs one more transfer for
each group that is not stable yet, and two or three when they become stable. Without repeated pictures nothing else is
compared and nothing is kept.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence

import torch
from torch import Tensor

__all__ = ["FixedPoints", "find_repeats"]

Group = Callable[[Tensor], Tensor]  # runs its layers on a picture
# For a group's number: the two pictures that each of its convolutions keeps, the older one first. The last convolution
# comes first, because it becomes stable last.
KeptInputs = Callable[[int], Iterable[tuple[Tensor, Tensor]]]

# Equal as numbers is not enough: 0 and -0 differ in bits, and NaN equals nothing.
BITS = {8: torch.int64, 4: torch.int32, 2: torch.int16}


def find_repeats(pixels: Tensor) -> list[bool]:
    """Return for each picture of `pixels` [B, C, n, H, W] whether it equals the one before; one transfer to the host.

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

    `repeats`: for each picture, whether it equals the one before. `kept`: returns the inputs that a group keeps now. A
    caller must write neither into a group's output, which may be reused, nor into its input.
    """

    def __init__(self, repeats: Iterable[bool], kept: KeptInputs) -> None:
        self._repeats = iter(repeats)
        self._kept = kept
        self._states: dict[int, _State] = {}

    def run(self, groups: Sequence[Group], picture: Tensor) -> Tensor:
        """Run `groups` one after the other on the clip's next picture [B, C, 1, H, W]."""
        repeats = next(self._repeats)
        if not repeats:  # before the first group runs, which needs the most memory
            for state in self._states.values():
                state.output = None
        for number, group in enumerate(groups):
            state = self._states.setdefault(number, _State())
            if repeats and state.output is not None:
                picture = state.output
                continue
            picture = group(picture)
            still = repeats and self._are_still(number)
            # All three inputs of each convolution were equal: those kept before this picture, and after it.
            state.output = picture if still and state.still else None
            state.still = still
            repeats = False  # the next group's input was computed anew
        return picture

    def _are_still(self, number: int) -> bool:
        """Return whether the two kept pictures are equal, for each convolution of a group."""
        return all(torch.equal(_as_bits(older), _as_bits(newer)) for older, newer in self._kept(number))


class _State:
    """State of one group: whether the inputs kept after the last picture are equal, and the output once it repeats."""

    def __init__(self) -> None:
        self.still = False
        self.output: Tensor | None = None


def _as_bits(pictures: Tensor) -> Tensor:
    return pictures.view(BITS[pictures.element_size()])

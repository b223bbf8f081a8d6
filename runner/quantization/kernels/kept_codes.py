"""Kept codes: keep the 8-bit codes of a layer's weight between products.

In:   a layer that makes the codes of its weight. Out: these codes, or None where none are kept or they are stale.
Never: how codes are made, layers' names, the choice whether memory is enough (the memory plan makes it).

The same function makes kept codes and codes for one product, so that results have the same bits. The stored weight
stays in memory, since other LoRAs need it again: kept codes take one more byte a weight, and four bytes a row.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple, Self

import torch
from torch import Tensor, nn

from runner.quantization.kernels.rowwise import Rows, code_dtype

__all__ = ["CodesKept", "KeepsCodes", "drop_codes", "keep_codes"]


class CodesKept(NamedTuple):
    """`layers` hold codes of `nbytes` in all; for `made` of these layers they were made in this call."""

    layers: int
    nbytes: int
    made: int


class KeepsCodes(nn.Module):
    """A layer with a weight [out, in] that may keep the weight's codes in buffers, which are in no state dict, or None:

    kept_codes   [out, in] in the dtype of the precision's codes
    kept_scale   float32 [out, 1], one scale per row (per output channel)

    When a tensor of `_code_sources` changes or is replaced, codes are stale and are no longer used. A compiled graph
    does not check this: code that changes the weight of a compiled layer calls `drop_codes`, or `keep_codes` again.
    """

    in_features: int
    out_features: int
    compute: str
    kept_codes: Tensor | None
    kept_scale: Tensor | None

    def __init__(self) -> None:
        nn.Module.__init__(self)  # not of a subclass's other bases: nn.Linear's would make a random weight
        self.register_buffer("kept_codes", None, persistent=False)
        self.register_buffer("kept_scale", None, persistent=False)
        self._codes_dtype: torch.dtype | None = None
        self._made_of: tuple[tuple[Tensor | None, int], ...] = ()

    @property
    def computes_in_rows(self) -> bool:
        """Does a product need the weight in codes with one scale per row?"""
        raise NotImplementedError

    def _code_sources(self) -> Sequence[Tensor | None]:
        """All tensors that the codes are made from, always the same number."""
        raise NotImplementedError

    def _make_codes(self, dtype: torch.dtype, codes: Tensor) -> Rows:
        """Write the weight's codes for products of `dtype` into `codes`; return them with new scales."""
        raise NotImplementedError

    @property
    def holds_codes(self) -> bool:
        """Are codes kept, fresh or stale?"""
        return self.kept_codes is not None

    @torch.no_grad()
    def keep_codes(self, dtype: torch.dtype) -> bool:
        """Keep the codes of the present weight for products of `dtype`. Returns True where they had to be made.

        Where the layer needs no codes with one scale per row, it keeps none.
        """
        if not self.computes_in_rows:
            self.drop_codes()
            return False
        if self._codes_dtype is dtype and self._are_fresh():
            return False
        self.drop_codes()  # first, so that old and new codes are never in memory together
        sources = self._code_sources()
        device = next(source.device for source in sources if source is not None)
        codes = torch.empty(self.out_features, self.in_features, dtype=code_dtype(self.compute), device=device)
        made = self._make_codes(dtype, codes)
        self.kept_codes, self.kept_scale = made.codes, made.scale
        self._codes_dtype, self._made_of = dtype, tuple((source, _version(source)) for source in sources)
        return True

    def drop_codes(self) -> None:
        """Drop kept codes: each product makes them again."""
        self.kept_codes = self.kept_scale = None
        self._codes_dtype, self._made_of = None, ()

    def codes_for(self, dtype: torch.dtype) -> Rows | None:
        """The codes for a product of `dtype`; None where none are kept, or where they are stale."""
        codes, scale = self.kept_codes, self.kept_scale
        if codes is None or scale is None or self._codes_dtype is not dtype:
            return None
        if not torch.compiler.is_compiling() and not self._are_fresh():
            return None
        return Rows(codes, scale)

    def _are_fresh(self) -> bool:
        sources = self._code_sources()
        return len(sources) == len(self._made_of) and all(
            now is then and _version(now) == version
            for now, (then, version) in zip(sources, self._made_of, strict=True)
        )

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        # A cast changes the codes' sources, and would also cast e4m3 codes, which have a floating dtype.
        self.drop_codes()
        super()._apply(fn, recurse)
        return self


def _version(tensor: Tensor | None) -> int:
    """A counter that grows with each change in place."""
    return -1 if tensor is None else tensor._version


def keep_codes(model: nn.Module, dtype: torch.dtype) -> CodesKept:
    """Keep the codes of every layer of `model` that computes with one scale per row, for products of `dtype`.

    Only missing and stale codes are made: after a change of LoRAs, those of the layers with other LoRAs.
    """
    held, made = list[KeepsCodes](), 0
    for layer in model.modules():
        if isinstance(layer, KeepsCodes):
            made += layer.keep_codes(dtype)
            held += [layer] * layer.holds_codes
    nbytes = sum(
        buffer.nbytes for layer in held for buffer in (layer.kept_codes, layer.kept_scale) if buffer is not None
    )
    return CodesKept(len(held), nbytes, made)


def drop_codes(model: nn.Module) -> None:
    """Drop the kept codes of all layers of `model`."""
    for layer in model.modules():
        if isinstance(layer, KeepsCodes):
            layer.drop_codes()

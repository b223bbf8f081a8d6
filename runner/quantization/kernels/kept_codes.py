"""Kept codes: the 8-bit codes of a layer's weight, held from one product to the next.

In:   a layer that makes the codes of its own weight. Out: those codes, or None where there are none that fit.
Never: how codes are made, layers' names, whether there is memory for them (the memory plan says so).

Codes are made by the function that makes them at each product where none are kept: results have the same bits. The
weight that they are made of stays beside them, for other LoRAs need it again: one byte a weight more, and four a row.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple, Self

import torch
from torch import Tensor, nn

from runner.quantization.kernels.rowwise import Rows, code_dtype

__all__ = ["CodesKept", "KeepsCodes", "drop_codes", "keep_codes"]


class CodesKept(NamedTuple):
    """`layers` hold codes of `nbytes` in all; those of `made` layers were made just now."""

    layers: int
    nbytes: int
    made: int


class KeepsCodes(nn.Module):
    """A layer with a weight [out, in] that may hold the weight's codes. Buffers, in no state dict, or None:

    kept_codes   [out, in] in the dtype of the precision's codes
    kept_scale   float32 [out, 1]

    A tensor of `_code_sources` that changes, in place or for another, makes codes stale: they are not used any more.
    A compiled graph cannot see that: code that changes a weight under one calls `drop_codes`, or `keep_codes` again.
    """

    in_features: int
    out_features: int
    compute: str
    kept_codes: Tensor | None
    kept_scale: Tensor | None

    def __init__(self) -> None:
        nn.Module.__init__(self)  # not that of a subclass's other bases: nn.Linear's own would draw a weight
        self.register_buffer("kept_codes", None, persistent=False)
        self.register_buffer("kept_scale", None, persistent=False)
        self._codes_dtype: torch.dtype | None = None
        self._made_of: tuple[tuple[Tensor | None, int], ...] = ()

    @property
    def computes_in_rows(self) -> bool:
        """Does a product need the weight as rows of codes?"""
        raise NotImplementedError

    def _code_sources(self) -> Sequence[Tensor | None]:
        """Every tensor that the codes are made of, always as many."""
        raise NotImplementedError

    def _make_codes(self, dtype: torch.dtype, codes: Tensor) -> Rows:
        """The weight's codes for products of `dtype`, written into `codes`, and their scales in memory of their own."""
        raise NotImplementedError

    @property
    def holds_codes(self) -> bool:
        """Are there codes, be they stale or not?"""
        return self.kept_codes is not None

    @torch.no_grad()
    def keep_codes(self, dtype: torch.dtype) -> bool:
        """Hold the codes of the weight as it is now, for products of `dtype`; True where they had to be made.

        Does nothing, and holds none, while the layer does not compute in rows.
        """
        if not self.computes_in_rows:
            self.drop_codes()
            return False
        if self._codes_dtype is dtype and self._are_fresh():
            return False
        self.drop_codes()  # first, so that old and new ones are never there together
        sources = self._code_sources()
        device = next(source.device for source in sources if source is not None)
        codes = torch.empty(self.out_features, self.in_features, dtype=code_dtype(self.compute), device=device)
        made = self._make_codes(dtype, codes)
        self.kept_codes, self.kept_scale = made.codes, made.scale
        self._codes_dtype, self._made_of = dtype, tuple((source, _version(source)) for source in sources)
        return True

    def drop_codes(self) -> None:
        """Hold no codes: they are made at each product again."""
        self.kept_codes = self.kept_scale = None
        self._codes_dtype, self._made_of = None, ()

    def codes_for(self, dtype: torch.dtype) -> Rows | None:
        """The codes for a product of `dtype`; None where none are held, or where they are stale."""
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
        # A cast changes what the codes were made of, and would cast codes of e4m3 too, which count as floating.
        self.drop_codes()
        super()._apply(fn, recurse)
        return self


def _version(tensor: Tensor | None) -> int:
    """It grows with each change in place."""
    return -1 if tensor is None else tensor._version


def keep_codes(model: nn.Module, dtype: torch.dtype) -> CodesKept:
    """Let every layer of `model` that computes in rows hold its weight's codes, for products of `dtype`.

    Only those are made that are missing or stale: after other LoRAs those of the layers that these change.
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
    """Let no layer of `model` hold codes."""
    for layer in model.modules():
        if isinstance(layer, KeepsCodes):
            layer.drop_codes()

"""Prepared inputs: quantise an activation once for all layers that read it in the same precision.

In:   layers, an activation. Out: the quantised activation for these layers. Never: weights, products, layers' names.

Query, key and value have one input. Each layer would rotate and quantise it again, and a compiler merges neither
operators nor arithmetic of several kernels. So the caller prepares the input and passes it to the layers. Nothing is
cached.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from runner.forecast.precisions import PRECISIONS
from runner.quantization.kernels.nvfp4 import quantize_blocks
from runner.quantization.kernels.row_codes import prepare_rows

__all__ = ["Prepared", "prepare", "prepare_gelu", "prepared_for", "takes_gelu"]


class Prepared(NamedTuple):
    """An activation [..., in] for layers of one precision.

    x         [M, in] in its dtype, where the precision's LoRAs read it (`blocks`), else None
    operands  `rowwise.Rows` or `nvfp4.Blocks`, as a tuple
    sizes     of the activation without the last; M is their product
    """

    x: Tensor | None
    operands: tuple[Tensor, ...]
    compute: str
    sizes: tuple[int, ...]
    dtype: torch.dtype


def prepare(layers: Sequence[Any], x: Tensor) -> Tensor | Prepared:
    """Quantise `x` [..., in] for all of `layers`, with the same bits as each layer would make.

    Returns `x` itself where a layer computes in 16 bits, or where the layers' precisions differ.
    """
    compute = _layer_compute(layers[0])
    precision = PRECISIONS.get(compute)
    if (
        precision is None
        or precision.layout in ("exact", "svdq")
        or any(_layer_compute(layer) != compute for layer in layers)
    ):
        return x
    return _prepare(x, compute)


def prepare_gelu(layer: Any, x: Tensor) -> Prepared:
    """Quantise GELU (by tanh) of `x` [..., in] for a `layer` with `takes_gelu`."""
    return _prepare(x, _layer_compute(layer), gelu=True)


def takes_gelu(layer: Any) -> bool:
    """Can the operator that makes this layer's codes also compute GELU before?"""
    precision = PRECISIONS.get(_layer_compute(layer))
    return precision is not None and precision.rotated


def prepared_for(layer: Any, x: Tensor | Prepared) -> Prepared:
    """Return `x` if it is prepared, else quantise it for `layer`. Raises ValueError if prepared for another compute."""
    compute = _layer_compute(layer)
    if not isinstance(x, Prepared):
        return _prepare(x, compute)
    if x.compute != compute:
        raise ValueError(f"an input prepared for {x.compute}; the layer computes {compute}")
    return x


def _layer_compute(layer: Any) -> str:
    return getattr(layer, "compute", "")


def _prepare(x: Tensor, compute: str, *, gelu: bool = False) -> Prepared:
    flat, sizes = x.reshape(-1, x.shape[-1]), tuple(x.shape[:-1])
    if PRECISIONS[compute].layout == "blocks":
        return Prepared(flat, tuple(quantize_blocks(flat)), compute, sizes, x.dtype)
    return Prepared(None, tuple(prepare_rows(flat, compute, gelu=gelu)), compute, sizes, x.dtype)

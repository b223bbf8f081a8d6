"""Products of a linear in SVDQuant W4A4: the definition, and the packages' kernels.

In:   activations, the layer's stored tensors. Out: x W^T + bias. Never: names of layers, which product is taken.
"""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

from runner.quantization.formats.svdq import svdq_linear
from runner.quantization.formats.svdq_layout import SvdqLayout

__all__ = ["reference"]


def reference(
    x: Tensor, tensors: Mapping[str, Tensor], layout: SvdqLayout, out_features: int, bias: Tensor | None
) -> Tensor:
    """The definition, `formats.svdq.svdq_linear`: [M, out_features] in the dtype of x [M, in]."""
    return svdq_linear(x, tensors, layout, out_features, bias)

"""Added deltas: check and join the deltas that a layer with a packed weight adds to its weight and bias.

In:   factors and vectors of LoRAs, a layer's widths. Out: tensors that fit the layer, or ValueError.
Never: names of LoRAs, how a layer adds the deltas.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

__all__ = ["LowRankDelta", "check_bias_delta", "frozen", "join_deltas"]

LowRankDelta = tuple[Tensor, Tensor, float]  # (down [rank, in], up [out, rank], scale): scale * up @ down on the weight


def join_deltas(
    deltas: Sequence[LowRankDelta], in_features: int, out_features: int, device: torch.device
) -> tuple[Tensor, Tensor, Tensor]:
    """Join all `deltas` into one pair of factors on `device`: down [R, in], up [out, R], scale float32 [R].

    The factors keep their dtype; R is the sum of the ranks. Raises ValueError for factors that do not fit a weight of
    [out_features, in_features].
    """
    for down, up, _ in deltas:
        rank = down.shape[0]
        if tuple(down.shape) != (rank, in_features) or tuple(up.shape) != (out_features, rank):
            raise ValueError(
                f"LoRA factors {tuple(down.shape)} and {tuple(up.shape)} do not fit a weight of "
                f"[{out_features}, {in_features}]"
            )
    scales = [torch.full((down.shape[0],), float(scale)) for down, _, scale in deltas]
    return (
        torch.cat([down for down, _, _ in deltas], dim=0).to(device),
        torch.cat([up for _, up, _ in deltas], dim=1).to(device),
        torch.cat(scales).to(device),
    )


def check_bias_delta(delta: Tensor | None, out_features: int) -> None:
    """Raise ValueError for a delta with another width than the layer's outputs."""
    if delta is not None and tuple(delta.shape) != (out_features,):
        raise ValueError(f"a bias delta of {tuple(delta.shape)} does not fit {out_features} outputs")


def frozen(tensor: Tensor) -> nn.Parameter:
    """A parameter without a gradient, in the same memory."""
    return nn.Parameter(tensor.detach(), requires_grad=False)

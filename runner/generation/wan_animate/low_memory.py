"""Low memory: one block, one face adapter and the last layers a few rows at a time, as `transformer.py` has them whole.

In:   the tensors that `transformer.run_block` takes. Out: the same values; the hidden states given are overwritten.
Never: which mode a run is in, where weights lie.

Every token's row goes its own way outside attention. Norms, rotations and residuals are done some rows at a time, so
that no float32 copy of all tokens is ever there; the feed-forward part, whose inside is 2.7 times as wide, in four
pieces. With u for hidden states [S, d] (0.35 GB for 81 frames of 832x480 in bfloat16), a block peaks at 5.4 u (hidden
states, their norm, query, key, value) instead of 12, an attention package's own copies aside. In NVFP4 an activation
has one scale for all its rows: the feed-forward part stays whole, and the peak is 7.4 u.

A matrix product of fewer rows may sum in another order. On the CPU, in float32, pieces of 8 rows and more have the
whole's bits, and no piece is smaller; kernels of GPUs may differ in the last bit of bfloat16. Eager: a compiled block
keeps no float32 copies anyway.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor

from runner.forecast.precisions import PRECISIONS
from runner.generation.wan_animate.transformer import (
    ROWS,
    BlockForward,
    CrossAttended,
    KeyValue,
    Rope,
    attend,
    attend_face,
    feed_forward,
    in_heads,
    pieces,
    project,
    rotate,
    run_block,
)
from runner.quantization.kernels.prepared import prepare

__all__ = ["FFN_PIECES", "choose_eager_block", "chunked_block", "chunked_face"]

FFN_PIECES = 4


def choose_eager_block(device: torch.device, chunked: bool) -> BlockForward:
    """Return the function that runs a block eagerly: without compiled code, and to compare compiled code with.

    On a GPU it is `chunked_block` in every mode, so that comparison and fallback take no more memory than the compiled
    block. On a CPU `chunked` decides.
    """
    return chunked_block if chunked or device.type == "cuda" else run_block


def by_rows(run: Callable[[Tensor], Tensor], x: Tensor, *, into: Tensor | None = None) -> Tensor:
    """`run` on runs of rows of `x` [B, S, d], which give rows of the same shape; `into` may be `x` itself."""
    out = torch.empty_like(x) if into is None else into
    for run_of in pieces(x.shape[1], ROWS):
        out[:, run_of] = run(x[:, run_of])
    return out


def chunked_block(block: Any, hidden: Tensor, modulation: Tensor, rope: Rope, attended: CrossAttended) -> Tensor:
    """As `transformer.run_block`, a BlockForward; the result lies where `hidden` [B, S, d] lay."""
    table = block.scale_shift_table + modulation.float()
    shift, scale, gate, ff_shift, ff_scale, ff_gate = table.chunk(6, dim=1)

    def modulated(norm: Any, scale: Tensor, shift: Tensor, x: Tensor) -> Tensor:
        return (norm(x.float()) * (1 + scale) + shift).type_as(x)

    normed = by_rows(partial(modulated, block.norm1, scale, shift), hidden)
    given: Any = prepare((block.attn1.to_q, block.attn1.to_k, block.attn1.to_v), normed)
    del normed
    query = _turned(block.attn1, block.attn1.norm_q, block.attn1.to_q(given), rope)
    key = _turned(block.attn1, block.attn1.norm_k, block.attn1.to_k(given), rope)
    value = in_heads(block.attn1, block.attn1.to_v(given))
    del given
    read = attend(block.attn1, query, KeyValue(key, value))
    del query, key, value
    _add_gated(hidden, project(block.attn1, read), gate)
    del read

    normed = by_rows(lambda x: block.norm2(x.float()).type_as(x), hidden)
    query = block.attn2.to_q(normed)
    del normed
    query = in_heads(block.attn2, by_rows(block.attn2.norm_q, query, into=query))
    read = attend(block.attn2, query, attended.text)
    if attended.image is not None:
        read += attend(block.attn2, query, attended.image)
    del query
    hidden += project(block.attn2, read)
    del read

    rows = hidden.shape[1] if _share_a_scale(block.ffn) else -(-hidden.shape[1] // FFN_PIECES)
    for run in pieces(hidden.shape[1], rows):
        piece = hidden[:, run]
        update = feed_forward(block.ffn, by_rows(partial(modulated, block.norm3, ff_scale, ff_shift), piece))
        _add_gated(piece, update, ff_gate)
        del update
    return hidden


def _share_a_scale(module: Any) -> bool:
    """Is there a layer of `module` whose input's rows are quantised by one scale, so that they must stay together?"""
    computes = (PRECISIONS.get(getattr(layer, "compute", "")) for layer in module.modules())
    return any(precision is not None and precision.tensor_scale for precision in computes)


def _turned(attn: Any, norm: Any, x: Tensor, rope: Rope) -> Tensor:
    """`x` [B, S, d] normed and rotated, [B, S, heads, head_dim]."""
    out = torch.empty_like(in_heads(attn, x))
    for run in pieces(x.shape[1], ROWS):
        angles = Rope(rope.cos[:, run], rope.sin[:, run])
        out[:, run] = rotate(in_heads(attn, norm(x[:, run])), angles)
    return out


def _add_gated(hidden: Tensor, update: Tensor, gate: Tensor) -> None:
    """hidden [B, S, d] += update * gate [B, 1, d], in float32, rounded once."""
    for run in pieces(hidden.shape[1], ROWS):
        rows = hidden[:, run]
        rows.copy_(rows.float() + update[:, run].float() * gate)


def chunked_face(adapter: Any, hidden: Tensor, read: KeyValue, strength: float = 1.0) -> Tensor:
    """As `transformer.run_face`, a FaceForward: a latent frame at a time, into `hidden` [1, S, d].

    Several clips at once are not split: their tokens do not lie frame by frame. Nor are rows that share a scale.
    """
    frames = read.key.shape[0] // hidden.shape[0]
    if hidden.shape[0] != 1 or _share_a_scale(adapter):
        return attend_face(adapter, hidden, read, strength) + hidden
    count = hidden.shape[1] // frames
    for frame in range(frames):
        rows = hidden[:, frame * count : (frame + 1) * count]
        faces = KeyValue(read.key[frame : frame + 1], read.value[frame : frame + 1])
        rows.copy_(attend_face(adapter, rows, faces, strength) + rows)
    return hidden

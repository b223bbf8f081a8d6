"""Low memory: run a block or a face adapter of `transformer.py` in chunks of rows.

In:   the tensors that `transformer.run_block` takes. Out: the same values; the given hidden states are overwritten.
Never: the memory mode of a run, the device of weights.

Outside attention, each token's row is computed independently. Norms, rotations and residuals run on some rows at a
time, so that no float32 copy of all tokens exists. The feed-forward part, whose inside is 2.7 times as wide, runs in
four pieces. Let u be the size of hidden states [S, d] (0.35 GB for 81 frames of 832x480 in bfloat16). A block peaks at
5.4 u (hidden states, their norm, query, key, value) instead of 12 u, without the copies of an attention package. In
NVFP4 all rows of an activation share one scale, so the feed-forward part stays whole, and the peak is 7.4 u.

A matrix product of fewer rows may sum in another order. On the CPU in float32, chunks of 8 or more rows have the bits
of the whole, and no chunk is smaller. Kernels of GPUs may differ in the last bit of bfloat16. This is for eager blocks:
a compiled block keeps no float32 copies anyway.
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
    """Apply `run` to chunks of rows of `x` [B, S, d]; its results have the same shape. `into` may be `x` itself."""
    out = torch.empty_like(x) if into is None else into
    for rows in pieces(x.shape[1], ROWS):
        out[:, rows] = run(x[:, rows])
    return out


def chunked_block(block: Any, hidden: Tensor, modulation: Tensor, rope: Rope, attended: CrossAttended) -> Tensor:
    """Run a block as `transformer.run_block` does; the result overwrites `hidden` [B, S, d]."""
    table = block.scale_shift_table + modulation.float()
    shift, scale, gate, ff_shift, ff_scale, ff_gate = table.chunk(6, dim=1)

    def modulated(norm: Any, scale: Tensor, shift: Tensor, x: Tensor) -> Tensor:
        return (norm(x.float()) * (1 + scale) + shift).type_as(x)

    normed = by_rows(partial(modulated, block.norm1, scale, shift), hidden)
    prepared: Any = prepare((block.attn1.to_q, block.attn1.to_k, block.attn1.to_v), normed)
    del normed
    query = _norm_and_rotate(block.attn1, block.attn1.norm_q, block.attn1.to_q(prepared), rope)
    key = _norm_and_rotate(block.attn1, block.attn1.norm_k, block.attn1.to_k(prepared), rope)
    value = in_heads(block.attn1, block.attn1.to_v(prepared))
    del prepared
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
    """Return whether a layer of `module` quantises all rows of its input with one scale, so that they stay together."""
    computes = (PRECISIONS.get(getattr(layer, "compute", "")) for layer in module.modules())
    return any(precision is not None and precision.tensor_scale for precision in computes)


def _norm_and_rotate(attn: Any, norm: Any, x: Tensor, rope: Rope) -> Tensor:
    """Return `x` [B, S, d] normed and rotated: [B, S, heads, head_dim]."""
    out = torch.empty_like(in_heads(attn, x))
    for run in pieces(x.shape[1], ROWS):
        angles = Rope(rope.cos[:, run], rope.sin[:, run])
        out[:, run] = rotate(in_heads(attn, norm(x[:, run])), angles)
    return out


def _add_gated(hidden: Tensor, update: Tensor, gate: Tensor) -> None:
    """Add update * gate [B, 1, d] to hidden [B, S, d] in place, in float32, rounded once."""
    for run in pieces(hidden.shape[1], ROWS):
        rows = hidden[:, run]
        rows.copy_(rows.float() + update[:, run].float() * gate)


def chunked_face(adapter: Any, hidden: Tensor, read: KeyValue, strength: float = 1.0) -> Tensor:
    """Run a face adapter as `transformer.run_face` does, one latent frame at a time, into `hidden` [1, S, d].

    Batches of several clips are not split, as their tokens are not in order of frames. Rows that share a scale are not
    split either.
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

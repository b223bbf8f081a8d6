"""Emulated 8-bit attention: rounds as comfy-kitchen's `int8_attention`, in plain float arithmetic on any device.

In:   query [B, S, heads, head_dim], key and value [B, T, heads, head_dim]. Out: [B, S, heads, head_dim], their dtype.
Never: int8 units, a measurement of the kernel: its sources are not in the package, and it was not run on a GPU.

From the package's documentation and buffers (comfy_kitchen 0.2.40, sage_attention.py):
* head_dim is padded with zeros to 64, 128 or 256; the scale of the scores is that of the unpadded width;
* query and key are rotated by one Hadamard matrix in blocks: of 4 where there are at most 256 keys, else of 64 for
  width 64, of 128 with fixed signs for width 128, of 128 for width 256;
* query, key and value become int8: 32 scales for 128 queries (64 at width 256), 4 for a tile of keys, which is 64, or
  128 at width 128 and more with over 1,024 keys, and one for each channel of the values over all keys;
* the softmax is in float32, its weights become unsigned 8 bits, the sum of weights is float32.

Assumed: a scale is the largest magnitude / 127 and rounding is to nearest; which tokens share a scale is as in
SageAttention (of 32 queries those 8 apart, of a tile's keys neighbouring pairs 8 apart); weights are relative to the
row's final maximum, where the kernel may take the maximum so far, which is finer; the sum is of unrounded weights; the
signs. Left out: the key that the kernel may subtract from all keys to narrow their range. Values of `bits` above 8 show
that only rounding changes the result.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from runner.generation.wan_animate import transformer

EMULATED = "emulated int8"
SHORT_KEYS, LONG_KEYS = 256, 1024
SIGN_SEED = 0


def emulated_attention(query: Tensor, key: Tensor, value: Tensor, bits: int = 8) -> Tensor:
    """As the module says; `bits`: of codes of query, key, value and weights."""
    head_dim, keys, most = query.shape[-1], key.shape[1], 2 ** (bits - 1) - 1
    width = next(width for width in (64, 128, 256) if head_dim <= width)
    q, k, v = (F.pad(x.float().transpose(1, 2), (0, width - head_dim)) for x in (query, key, value))
    q, k = (rotate(x, width, keys) for x in (q, k))
    tile = 128 if width >= 128 and keys > LONG_KEYS else 64
    q = round_to_scale(q, query_groups(q.shape[2], 16 if width == 256 else 8), most)
    k = round_to_scale(k, key_groups(keys, tile), most)
    v_scale = v.abs().amax(dim=2, keepdim=True).clamp(min=1e-30) / most
    scores = q @ k.transpose(2, 3) * head_dim**-0.5
    weights = (scores - scores.amax(dim=3, keepdim=True)).exp()
    levels = 2**bits - 1
    attended = (weights * levels).round() / levels @ ((v / v_scale).round() * v_scale)
    return (attended / weights.sum(dim=3, keepdim=True))[..., :head_dim].transpose(1, 2).to(query.dtype)


def rotate(x: Tensor, width: int, keys: int) -> Tensor:
    """`x` [..., width] times the orthogonal matrix that the kernel takes for so many keys."""
    size = 4 if keys <= SHORT_KEYS else min(width, 128)
    matrix = hadamard(size).to(x.device)
    if keys > SHORT_KEYS and width == 128:
        generator = torch.Generator().manual_seed(SIGN_SEED)
        matrix = (torch.randint(2, (size, 1), generator=generator) * 2.0 - 1).to(x.device) * matrix
    return (x.unflatten(-1, (-1, size)) @ matrix).flatten(-2)


def hadamard(size: int) -> Tensor:
    """Sylvester's matrix [size, size] of a power of two, its rows of length one."""
    matrix = torch.ones(1, 1)
    while len(matrix) < size:
        matrix = torch.cat([torch.cat([matrix, matrix], 1), torch.cat([matrix, -matrix], 1)])
    return matrix * size**-0.5


def query_groups(count: int, groups: int) -> Tensor:
    """Of each of `count` queries the number of its scale: of 32 each, every `groups`-th one shares it."""
    at = torch.arange(count)
    return at // 32 * groups + at % groups


def key_groups(count: int, tile: int) -> Tensor:
    """Of each of `count` keys the number of its scale: four in a tile, for neighbouring pairs 8 apart."""
    at = torch.arange(count)
    return at // tile * 4 + at % 8 // 2


def round_to_scale(x: Tensor, groups: Tensor, most: int) -> Tensor:
    """`x` [B, heads, S, width] as integers up to `most` times a scale; `groups` [S]: which tokens share one."""
    groups = groups.to(x.device)
    largest = x.new_zeros(*x.shape[:2], int(groups.max()) + 1)
    largest.scatter_reduce_(2, groups.expand(x.shape[:3]), x.abs().amax(dim=3), "amax")
    scale = largest.clamp(min=1e-30)[:, :, groups, None] / most
    return (x / scale).round() * scale


@contextmanager
def emulating(model: Any) -> Iterator[None]:
    """Within it, the self-attention of `model`'s blocks, and no other attention, is `emulated_attention`."""
    exact, processors = transformer.run_attention, [block.attn1.processor for block in model.blocks]
    before = [processor._attention_backend for processor in processors]

    def run(query: Tensor, key: Tensor, value: Tensor, backend: Any) -> Tensor:
        return emulated_attention(query, key, value) if backend == EMULATED else exact(query, key, value, backend)

    try:
        transformer.run_attention = run
        for processor in processors:
            processor._attention_backend = EMULATED
        yield
    finally:
        transformer.run_attention = exact
        for processor, backend in zip(processors, before, strict=True):
            processor._attention_backend = backend

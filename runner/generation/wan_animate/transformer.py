"""Transformer: run one denoising step of Wan-Animate's transformer, without the parts that are equal at every step.

In:   the library's WanAnimateTransformer3DModel, one window's conditions; then, per step, noisy latents and a timestep.
Out:  the velocity, bit for bit the one that the model's own `forward` computes from the same inputs.
Never: schedules, CFG, prompts as text, frames, the device of weights. No weight is copied, no module changed.

The model's `forward` runs the motion encoder, the text and image embedders and all keys and values of cross-attention
again at each step, although only latents and timestep differ. Here these are computed once per window and cached. The
other modules of the model are called in the model's order. Their linears may be of any kind. Linears that quantise
their input get it as codes: query, key and value share the same codes, and the codes for the second layer of the
feed-forward part are made together with GELU. Attention runs on the backend that each processor names
(`runtime/attention.py`); nothing else of a processor is used. Hooks on submodules run; those on a block, on an
attention or on the whole model do not.

For the 14B model at 832x480, 81 frames, in bfloat16, a window's cache takes 1.00 GB until the window ends:

    keys and values of text and image    40 blocks x (512 + 257) x 5120 x 2 x 2 bytes      0.63 GB
    pose patches                         21 x 1560 x 5120 x 2 bytes                        0.34 GB
    keys and values of the face          8 adapters x 22 x 5 x 5120 x 2 x 2 bytes          0.02 GB
    rotary angles                        2 x 34320 x 64 x 4 bytes                          0.02 GB

With CFG, the uncond call adds keys and values of its text (0.42 GB) and face, and shares the rest.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from runner.generation.runtime.attention import run_attention
from runner.quantization.kernels.prepared import prepare, prepare_gelu, takes_gelu

__all__ = [
    "BlockForward",
    "ConditioningCache",
    "Context",
    "CrossAttended",
    "FaceForward",
    "KeyValue",
    "Rope",
    "Strengths",
    "Switches",
    "attend",
    "attend_face",
    "denoise_step",
    "embed_context",
    "feed_forward",
    "held_bytes",
    "in_heads",
    "pieces",
    "project",
    "rotate",
    "run_block",
]


class KeyValue(NamedTuple):
    """Keys and values of one attention, projected, normed and split into heads: both [B, tokens, heads, head_dim]."""

    key: Tensor
    value: Tensor


class CrossAttended(NamedTuple):
    """Keys and values of one block's cross-attention."""

    text: KeyValue
    image: KeyValue | None


class Rope(NamedTuple):
    """Rotary angles of every token, one per pair of channels: both float32 [1, S, 1, head_dim / 2]."""

    cos: Tensor
    sin: Tensor


# (block, hidden [B, S, d], modulation [B, 6, d], rope, what it attends to) -> hidden [B, S, d]
BlockForward = Callable[[Any, Tensor, Tensor, Rope, CrossAttended], Tensor]
# (face adapter, hidden [B, S, d], what it reads, strength of its residual) -> hidden [B, S, d]
FaceForward = Callable[[Any, Tensor, KeyValue, float], Tensor]

ROWS = 2048  # rows per chunk when float32 copies are made: 42 MB each for the 14B model
LEAST_ROWS = 8  # products of fewer rows sum in another order


@dataclass(frozen=True)
class Context:
    """Embedded prompt and reference, as the blocks read them; equal for all windows of a job."""

    text: Tensor  # [B, 512, d]
    image: Tensor | None  # [B, image tokens, d]; None if the blocks read it as part of `text`, before the text tokens


@dataclass(frozen=True)
class Strengths:
    """Strength of the driver's face and skeleton. At 1 nothing is multiplied: the velocity has the model's bits.

    `face` multiplies the residual of every face adapter, also in the uncond call, which has no face. `pose` multiplies
    the tokens of the pose's patch embedding, its bias included, so that 0 adds nothing.
    """

    face: float = 1.0
    pose: float = 1.0


def embed_context(transformer: Any, texts: Iterable[Tensor], clip: Tensor) -> list[Context]:
    """Return a Context for each of `texts` [B, 512, text_dim], all with the image `clip` [B, tokens, image_dim]."""
    embedder = transformer.condition_embedder
    image = embedder.image_embedder(clip)
    embedded = [embedder.text_embedder(text) for text in texts]
    if transformer.config.added_kv_proj_dim is None:
        return [Context(torch.cat([image, text], dim=1), None) for text in embedded]
    return [Context(text, image) for text in embedded]


class ConditioningCache:
    """What all steps of one window share. Keys and values are computed when their block first runs.

    So a block's weights are needed only while the block runs. Streamed blocks need no extra pass before the first step.
    """

    def __init__(
        self,
        transformer: Any,
        context: Context,
        pose: Tensor,
        faces: Tensor,
        *,
        keep_text: bool = True,
        strengths: Strengths = Strengths(),
    ) -> None:
        """`pose`: latents [B, 16, T - 1, H/8, W/8] of the skeletons. `faces`: [B, 3, n, F, F] in [-1, 1].

        n is 4 (T - 1) - 3, so the face encoder makes T - 1 feature frames; zeros are put before them for the reference.
        `keep_text`: whether keys and values of text and image are cached for later steps. For the 14B model they take
        0.6 GB, and computing them takes 0.2 % of a step.
        """
        batch, _, later, height, width = pose.shape
        self.grid = (later + 1, height, width)
        self.context, self.keep_text, self.strengths = context, keep_text, strengths
        self.pose = to_tokens(transformer.pose_patch_embedding(pose))
        if strengths.pose != 1:
            self.pose *= strengths.pose  # in place: for the 14B model a copy is 0.34 GB
        self.rope = rotary_angles(transformer, pose.new_empty((batch, 1, *self.grid)))
        self.motion = encode_motion(transformer, faces)
        self._text: dict[int, KeyValue] = {}
        self._image: dict[int, KeyValue] = {}
        self._face: dict[int, KeyValue] = {}

    def sharing(self, transformer: Any, context: Context, faces: Tensor) -> ConditioningCache:
        """Return the cache of the same window for another text and other faces; it shares pose, angles and image.

        Raises ValueError if the image of `context` is another one.
        """
        if context.image is not self.context.image:
            raise ValueError("the other context has another image, so its keys and values cannot be shared")
        other = object.__new__(ConditioningCache)
        other.grid, other.pose, other.rope, other._image = self.grid, self.pose, self.rope, self._image
        other.keep_text, other.strengths = self.keep_text, self.strengths
        other.context, other.motion = context, encode_motion(transformer, faces)
        other._text, other._face = {}, {}
        return other

    def attended(self, index: int, block: Any) -> CrossAttended:
        """Return keys and values of cross-attention `index`; `block` computes them if they are not cached."""
        attn, image = block.attn2, self.context.image
        text = self._text.get(index)
        if text is None:
            key, value = attn.norm_k(attn.to_k(self.context.text)), attn.to_v(self.context.text)
            text = KeyValue(in_heads(attn, key), in_heads(attn, value))
        picture = self._image.get(index)
        if image is not None and picture is None:
            key, value = attn.norm_added_k(attn.add_k_proj(image)), attn.add_v_proj(image)
            picture = KeyValue(in_heads(attn, key), in_heads(attn, value))
        if self.keep_text:
            self._text[index] = text
            if picture is not None:
                self._image[index] = picture
        return CrossAttended(text, picture)

    def face(self, index: int, adapter: Any) -> KeyValue:
        """Return keys and values of face adapter `index`, [B * T, faces' tokens, heads, head_dim]; computed once."""
        if index not in self._face:
            normed = adapter.pre_norm_kv(self.motion)
            shape = (*normed.shape[:3], adapter.heads, -1)
            normed = normed.flatten(1, 2)
            key, value = adapter.to_k(normed).view(shape), adapter.to_v(normed).view(shape)
            self._face[index] = KeyValue(adapter.norm_k(key).flatten(0, 1), value.flatten(0, 1))
        return self._face[index]

    def tensors(self) -> Iterable[Tensor]:
        """Yield all cached tensors, without the context, which belongs to the job."""
        yield from (self.pose, self.motion, *self.rope)
        for held in (self._text, self._image, self._face):
            for pair in held.values():
                yield from pair


def held_bytes(windows: Iterable[ConditioningCache]) -> int:
    """Return the bytes of all tensors in the caches `windows`; shared ones count once."""
    return sum({id(tensor): tensor.nbytes for window in windows for tensor in window.tensors()}.values())


def denoise_step(
    transformer: Any,
    conditioning: ConditioningCache,
    hidden_states: Tensor,
    timestep: Tensor,
    *,
    blocks: Iterable[Any] | None = None,
    block_forward: BlockForward | None = None,
    face_forward: FaceForward | None = None,
) -> Tensor:
    """The velocity [B, 16, T, H/8, W/8] in the dtype of `hidden_states` [B, 36, T, H/8, W/8] at `timestep` [B].

    `blocks`: the transformer's own blocks in order, each ready to run when the iterable yields it. Streamed blocks come
    as a generator, which is closed when the step ends, also by an exception. `block_forward` replaces `run_block`, e.g.
    by its compiled form; `face_forward` replaces `run_face`. Both may overwrite their hidden states. Call it under
    `torch.no_grad()`. Raises ValueError for latents of another shape than the window's.
    """
    if tuple(hidden_states.shape[2:]) != conditioning.grid:
        raise ValueError(f"latents of {tuple(hidden_states.shape[2:])} in a window of {conditioning.grid}")
    run, run_adapter = block_forward or run_block, face_forward or run_face
    hidden = to_tokens(transformer.patch_embedding(hidden_states))
    hidden[:, -conditioning.pose.shape[1] :] += conditioning.pose  # all but the reference's
    level, modulation = embed_time(transformer, timestep, conditioning.context.text.dtype)
    every = transformer.config.inject_face_latents_blocks
    with ExitStack() as ended:
        if isinstance(blocks, Generator):
            ended.callback(blocks.close)  # at once: else the traceback of an exception would keep it open
        for index, block in enumerate(transformer.blocks if blocks is None else blocks):
            hidden = run(block, hidden, modulation, conditioning.rope, conditioning.attended(index, block))
            if index % every == 0:
                adapter = transformer.face_adapter[index // every]
                read = conditioning.face(index // every, adapter)
                hidden = run_adapter(adapter, hidden, read, conditioning.strengths.face)
    return to_latents(transformer, hidden, level, conditioning.grid)


def run_block(block: Any, hidden: Tensor, modulation: Tensor, rope: Rope, attended: CrossAttended) -> Tensor:
    """Run one WanTransformerBlock on `hidden` [B, S, d]. `modulation` [B, 6, d]: shift, scale and gate, twice.

    It is a pure function of tensors and one module, so that it compiles to one graph for all blocks.
    """
    table = block.scale_shift_table + modulation.float()
    shift, scale, gate, ff_shift, ff_scale, ff_gate = table.chunk(6, dim=1)
    normed = (block.norm1(hidden.float()) * (1 + scale) + shift).type_as(hidden)
    hidden = (hidden.float() + attend_self(block.attn1, normed, rope) * gate).type_as(hidden)
    normed = block.norm2(hidden.float()).type_as(hidden)
    hidden = hidden + attend_cross(block.attn2, normed, attended)
    normed = (block.norm3(hidden.float()) * (1 + ff_scale) + ff_shift).type_as(hidden)
    return (hidden.float() + feed_forward(block.ffn, normed).float() * ff_gate).type_as(hidden)


def run_face(adapter: Any, hidden: Tensor, read: KeyValue, strength: float = 1.0) -> Tensor:
    """Run one face adapter on `hidden` [B, S, d], with its residual times `strength`."""
    return attend_face(adapter, hidden, read, strength) + hidden


def attend_self(attn: Any, hidden: Tensor, rope: Rope) -> Tensor:
    prepared: Any = prepare((attn.to_q, attn.to_k, attn.to_v), hidden)
    query = rotate(in_heads(attn, attn.norm_q(attn.to_q(prepared))), rope)
    key = rotate(in_heads(attn, attn.norm_k(attn.to_k(prepared))), rope)
    return project(attn, attend(attn, query, KeyValue(key, in_heads(attn, attn.to_v(prepared)))))


def attend_cross(attn: Any, hidden: Tensor, attended: CrossAttended) -> Tensor:
    query = in_heads(attn, attn.norm_q(attn.to_q(hidden)))
    read = attend(attn, query, attended.text)
    if attended.image is not None:
        read = read + attend(attn, query, attended.image)
    return project(attn, read)


def attend_face(adapter: Any, hidden: Tensor, read: KeyValue, strength: float = 1.0) -> Tensor:
    """Return the residual times `strength`: each latent frame of `hidden` [B, S, d] attends to its face tokens."""
    batch = hidden.shape[0]
    query = adapter.norm_q(in_heads(adapter, adapter.to_q(adapter.pre_norm_q(hidden))))
    query = query.unflatten(1, (read.key.shape[0] // batch, -1)).flatten(0, 1)  # [B * T, S / T, heads, head_dim]
    residual: Tensor = adapter.to_out(attend(adapter, query, read).unflatten(0, (batch, -1)).flatten(1, 2))
    return residual if strength == 1 else residual * strength


def attend(attn: Any, query: Tensor, read: KeyValue) -> Tensor:
    """Attention of `query` [B, S, heads, head_dim] with the backend set on `attn`: [B, S, heads * head_dim]."""
    out = run_attention(query, read.key, read.value, attn.processor._attention_backend)
    return out.flatten(2, 3).type_as(query)


def feed_forward(ffn: Any, hidden: Tensor) -> Tensor:
    """Run the library's FeedForward on `hidden` [B, S, d]; its second layer computes GELU itself if it can."""
    first, last = ffn.net[0], ffn.net[-1]
    if takes_gelu(last) and getattr(first, "approximate", "") == "tanh":
        return last(prepare_gelu(last, first.proj(hidden)))  # the dropout between them is for training
    return ffn(hidden)


def project(attn: Any, hidden: Tensor) -> Tensor:
    for layer in attn.to_out:
        hidden = layer(hidden)
    return hidden


def in_heads(attn: Any, hidden: Tensor) -> Tensor:
    """[B, S, heads * head_dim] as [B, S, heads, head_dim]."""
    return hidden.unflatten(2, (attn.heads, -1))


def rotate(x: Tensor, rope: Rope) -> Tensor:
    """Rotate each pair of neighbouring channels of `x` [B, S, heads, head_dim] by its angle, in float32.

    The halves are stacked instead of written into every second channel: some compilers compile strided slice assignment
    wrong, and none fuses it. Each half is rounded before stacking, which halves the memory in float32.
    """
    even, odd = x.unflatten(-1, (-1, 2)).unbind(-1)
    first = (even * rope.cos - odd * rope.sin).type_as(x)
    second = (even * rope.sin + odd * rope.cos).type_as(x)
    return torch.stack((first, second), dim=-1).flatten(-2)


def rotary_angles(transformer: Any, latents: Tensor) -> Rope:
    """Return the angles for latents of this shape. The library repeats each for both channels of its pair."""
    cos, sin = transformer.rope(latents)
    return Rope(cos[..., 0::2].contiguous(), sin[..., 1::2].contiguous())


def pieces(count: int, most: int) -> Iterator[slice]:
    """Yield slices of 0..count-1 of nearly equal length: at most `most`, and LEAST_ROWS or more if `count` allows."""
    runs = max(1, min(-(-count // max(most, LEAST_ROWS)), count // LEAST_ROWS))
    ends = [count * i // runs for i in range(runs + 1)]
    return (slice(begin, end) for begin, end in pairwise(ends))


def to_tokens(patches: Tensor) -> Tensor:
    """Return [B, d, T, h, w] as [B, T h w, d], contiguous."""
    return patches.flatten(2).transpose(1, 2).contiguous()


def to_latents(transformer: Any, hidden: Tensor, level: Tensor, grid: tuple[int, int, int]) -> Tensor:
    """Norm and project tokens [B, S, d], and arrange them as [B, 16, T, H/8, W/8]. `level`: [B, d]."""
    shift, scale = (transformer.scale_shift_table + level.unsqueeze(1)).chunk(2, dim=1)
    hidden = torch.cat(
        [
            transformer.proj_out((transformer.norm_out(rows.float()) * (1 + scale) + shift).to(hidden.dtype))
            for rows in (hidden[:, run] for run in pieces(hidden.shape[1], ROWS))
        ],
        dim=1,
    )
    patch = transformer.config.patch_size
    cells = [size // side for size, side in zip(grid, patch, strict=True)]
    hidden = hidden.reshape(hidden.shape[0], *cells, *patch, -1).permute(0, 7, 1, 4, 2, 5, 3, 6)
    return hidden.flatten(6, 7).flatten(4, 5).flatten(2, 3)


def embed_time(transformer: Any, timestep: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Embed `timestep` [B] as [B, d] and as the blocks' modulation [B, 6, d], both in `dtype`."""
    embedder = transformer.condition_embedder
    # The library reads the weight's dtype too. Quantised layers have packed bytes there.
    stored: torch.dtype = embedder.time_embedder.linear_1.weight.dtype
    waves = embedder.timesteps_proj(timestep).to(stored if stored.is_floating_point else dtype)
    level = embedder.time_embedder(waves).to(dtype)
    return level, embedder.time_proj(embedder.act_fn(level)).unflatten(1, (6, -1))


def encode_motion(transformer: Any, faces: Tensor) -> Tensor:
    """Encode `faces` [B, 3, n, F, F] as face tokens [B, T, tokens, d]; those of the first latent frame are zeros."""
    batch, _, frames = faces.shape[:3]
    encoder: nn.Module = transformer.motion_encoder
    pictures = faces.permute(0, 2, 1, 3, 4).flatten(0, 1)
    # In the library's batch size: a convolution's last bits may depend on the number of pictures.
    batches = torch.split(pictures, transformer.config.motion_encoder_batch_size)
    motion = torch.cat([encoder(some) for some in batches]).view(batch, frames, -1)
    features = transformer.face_encoder(motion)
    return torch.cat([torch.zeros_like(features[:, :1]), features], dim=1)


@dataclass(frozen=True)
class Switches:
    """Feature flags for optimisations; benchmarks toggle them.

    `compile`: run blocks as fused kernels (`compiled.py`), which sum in another order, within stated tolerances. None:
    yes on CUDA, no on a CPU, where frames equal the library's bit for bit.
    `channels_last`: run the autoencoder's convolutions in the memory layout that CUDA's kernels prefer
    (`autoencoder.py`), which sums in another order. None: as `compile`.
    `tensor_cache`: encode once what several jobs share (`tensor_cache.py`, and `text_cache.py` on disk). Bit for bit.
    """

    tensor_cache: bool = True
    compile: bool | None = None
    channels_last: bool | None = None

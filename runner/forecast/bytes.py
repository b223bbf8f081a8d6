"""Bytes: forecast how many bytes each part of the engine takes, from the shapes of its models.

In:   the shapes of flops.py, bytes per element, width, height, frames. Out: plain numbers of bytes.
Never: torch, weights, a device, the choice of what is kept where (memory_plan.py). The numbers are closed forms, or
counts of live tensors on torch's meta device, which the tests repeat. Other numbers are marked as assumptions.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from runner.forecast.flops import MOTION_CHANNELS, TEXT_TOKENS, TransformerShape, VaeShape
from runner.forecast.precisions import DEFAULT_PRECISION, PRECISIONS

__all__ = [
    "FP4_BYTES",
    "SVDQ_RANK",
    "Weights",
    "code_bytes",
    "face_bytes",
    "kept_code_bytes",
    "latent_bytes",
    "step_bytes",
    "svdq_bytes",
    "vae_bytes",
    "vae_peak",
    "vae_traffic",
    "weights_of",
    "workspace_bytes",
]

FP4_BYTES = 0.5625  # per weight: half a byte of code, and a scale of 16 bits per 32 weights or of 8 bits per 16
# Rank of low-rank factors if a file's rank is not known. Each 16 more add 0.19 GB for the 14B model.
SVDQ_RANK = 32
SVDQ_TILE = 128  # inputs and outputs of a stored weight are padded to multiples
# Peak memory of one eager block in 16 or 32 bits, in units of hidden states [S, d], without attention's scratch memory.
# For a compiled block see `GemmPrecision.fused_units`.
BLOCK_UNITS: Mapping[str, float] = {"whole": 12.0, "chunked": 5.36}
# The same during 8-bit attention: hidden states, query, key, value and result, and one-byte codes of query, key and
# value, which comfy-kitchen and SageAttention make first. Derived.
EIGHT_BIT_ATTENTION_UNITS = 5 + 3 / 2


HALVES = ("bfloat16", "float16")
# The autoencoder's peak of live tensors, in bytes per pixel at 96 base channels, without cuDNN's workspace: with
# channels innermost, as on a GPU by default, a convolution does not transpose its input.
# One picture at a time (autoencoder.py): the slots of causal_slots.py, and the peak beside them.
VAE_DECODE: Mapping[str, int] = {"float32": 13_890} | dict.fromkeys(HALVES, 7_100)
VAE_ENCODE: Mapping[str, int] = {"float32": 10_060} | dict.fromkeys(HALVES, 5_100)
# The library's code on a tile, with all four pictures of a latent frame at once.
VAE_TILE: Mapping[str, int] = {"float32": 19_460} | dict.fromkeys(HALVES, 10_130)
# Bytes that the autoencoder reads and writes per pixel of each picture, for 81 pictures of 480x832 at 96 base channels.
# Every operator reads its inputs once and writes its result once, counted on the meta device (test_operator_counts.py).
VAE_TRAFFIC: Mapping[str, Mapping[str, int]] = {
    "decode": {"float32": 36_540} | dict.fromkeys(HALVES, 18_710),
    "encode": {"float32": 24_460} | dict.fromkeys(HALVES, 12_680),
}
# The same for the library's code.
LIBRARY_TRAFFIC: Mapping[str, Mapping[str, int]] = {
    "decode": {"float32": 102_290} | dict.fromkeys(HALVES, 75_520),
    "encode": {"float32": 61_950} | dict.fromkeys(HALVES, 43_620),
}
TILE = 256  # pixels per side, the library's value


@dataclass(frozen=True)
class Weights:
    """Bytes of the transformer's weights: one block, one face adapter, and the rest."""

    block: float
    adapter: float
    rest: float
    blocks: int
    adapters: int

    @property
    def total(self) -> float:
        return self.blocks * self.block + self.adapters * self.adapter + self.rest

    @property
    def largest_part(self) -> float:
        """A block with its face adapter, which are streamed together."""
        return self.block + self.adapter


def weights_of(
    shape: TransformerShape, *, fp4: bool, element: int = 2, compute: str = DEFAULT_PRECISION, rank: int = SVDQ_RANK
) -> Weights:
    """Return the bytes of weights in memory and in a file. `fp4`: every nn.Linear is packed.

    Weights that the library keeps in float32 count as float32. `compute`: the name of a row of `PRECISIONS`. If that
    row needs an SVDQuant format, `fp4` weights have it, with factors of `rank`, and the last projection is not packed.
    """
    packed = PRECISIONS[compute] if fp4 and PRECISIONS[compute].layout == "svdq" else None

    def linear(out_features: int, in_features: int, plain: int = element) -> float:
        if packed is not None:
            return svdq_bytes(out_features, in_features, compute=compute, rank=rank)
        return out_features * in_features * (FP4_BYTES if fp4 else plain)

    d, ffn, other = shape.dim, shape.ffn_dim, element
    added = shape.added_kv_proj_dim
    block_linear = 8 * linear(d, d) + linear(ffn, d) + linear(d, ffn) + (2 * linear(d, added) if added else 0)
    block_other = 8 * d + ffn + d + 4 * d + (3 * d if added else 0)
    block = block_linear + block_other * other + (2 + 6) * d * 4  # the second norm and the table: float32
    adapter = 4 * linear(d, d) + (4 * d + 2 * shape.attention_head_dim) * other

    image, text = shape.image_dim, shape.text_dim
    heads, hidden = shape.face_encoder_num_heads, shape.face_encoder_hidden_dim
    rest_linear = linear(6 * d, d) + linear(d, text) + linear(d, d)
    rest_linear += linear(image, image) + linear(d, image) + linear(d, hidden)
    last = shape.patch**2 * shape.out_channels
    rest_linear += linear(last, d) if packed is None else last * d * element
    time = linear(d, shape.freq_dim, plain=4) + linear(d, d, plain=4)
    patches = d * shape.patch**2 * (shape.in_channels + shape.latent_channels)
    face = 3 * shape.motion_encoder_dim * hidden * heads + 6 * hidden * hidden
    rest = rest_linear + time + (patches + face + _motion_encoder(shape)) * other
    return Weights(block, adapter, rest, shape.num_layers, shape.num_layers // shape.inject_face_latents_blocks)


def svdq_bytes(out_features: int, in_features: int, *, compute: str, rank: int = SVDQ_RANK) -> int:
    """Return the bytes of a weight in `compute`'s SVDQuant format: codes, scales, vectors, low-rank factors."""
    precision = PRECISIONS[compute]
    rows, columns = (-(-side // SVDQ_TILE) * SVDQ_TILE for side in (out_features, in_features))
    vectors = precision.vectors[0] * columns + precision.vectors[1] * rows
    return round(rows * columns * (0.5 + precision.group_bytes)) + 2 * (vectors + rank * (rows + columns))


def _motion_encoder(shape: TransformerShape) -> float:
    """Return the count of numbers in the motion encoder's convolutions and linears."""
    channels = shape.motion_encoder_channel_sizes or MOTION_CHANNELS
    size, style = shape.motion_encoder_size, shape.motion_style_dim
    here, count = channels[str(size)], 3 * channels[str(size)]
    while size > 4:
        there = channels[str(size // 2)]
        count += 9 * here * here + (9 + 1) * here * there
        here, size = there, size // 2
    return count + 16 * here * style + 4 * style * style + (style + shape.motion_encoder_dim) * shape.motion_dim


def step_bytes(
    shape: TransformerShape,
    width: int,
    height: int,
    frames: int,
    *,
    kind: str,
    element: int = 2,
    compute: str = DEFAULT_PRECISION,
    attention_8bit: bool = False,
) -> float:
    """Peak bytes of one denoising step beside weights and conditioning cache. `kind`: whole | fused | chunked.

    `compute`: the name of a row of `PRECISIONS`; `element`: bytes of a number of the hidden states.
    """
    hidden = _tokens(width, height, frames, shape.patch) * shape.dim * element
    if kind == "fused":
        peak = PRECISIONS[compute].fused_units * hidden
    else:
        units = BLOCK_UNITS[kind]
        if PRECISIONS[compute].tensor_scale:  # hidden states, their norm, and the feed-forward part's inside twice
            units = max(units, 2 + 2 * shape.ffn_dim / shape.dim)
        peak = units * hidden + code_bytes(shape, width, height, frames, kind=kind, compute=compute)
    return max(peak, EIGHT_BIT_ATTENTION_UNITS * hidden) if attention_8bit else peak


def _tokens(width: int, height: int, frames: int, patch: int) -> int:
    return ((frames - 1) // 4 + 2) * (height // 8 // patch) * (width // 8 // patch)


def workspace_bytes(
    shape: TransformerShape, *, fp4: bool = True, compute: str = DEFAULT_PRECISION, element: int = 2
) -> int:
    """Bytes of the buffers in which weights are prepared for a product, shared by all layers.

    They hold the largest weight in the product's dtype if FP4 is dequantised, and the largest token-wise weight in
    codes. `compute`: the name of a row of `PRECISIONS`. In SVDQuant no token-wise weight is dequantised.
    """
    precision = PRECISIONS[compute]
    widest = 6 * shape.dim if precision.layout == "svdq" else max(shape.ffn_dim, 6 * shape.dim)
    dense = shape.dim * widest * element if fp4 else 0
    return dense + shape.dim * shape.ffn_dim * precision.code_bytes


def kept_code_bytes(shape: TransformerShape, *, compute: str) -> int:
    """Bytes of kept codes: those of all token-wise linears' weights, with one float32 scale per row (output channel).

    0 where products take no such codes. `compute`: the name of a row of `PRECISIONS`.
    """
    precision, adapters = PRECISIONS[compute], shape.num_layers // shape.inject_face_latents_blocks
    if precision.layout != "rows":
        return 0
    rows = shape.num_layers * (7 * shape.dim + shape.ffn_dim) + adapters * 2 * shape.dim
    return shape.block_weights * precision.code_bytes + 4 * rows


def code_bytes(
    shape: TransformerShape,
    width: int,
    height: int,
    frames: int,
    *,
    compute: str,
    kind: str = "whole",
) -> int:
    """Bytes of the widest activation of an eager block as codes (SVDQuant: with scales), beside the activation.

    `kind` chunked: the feed-forward part runs in pieces, so the input of query, key and value is the widest.
    """
    precision, tokens = PRECISIONS[compute], _tokens(width, height, frames, shape.patch)
    each = 0.5 + precision.group_bytes if precision.layout == "svdq" else precision.code_bytes
    return round(tokens * (shape.dim if kind == "chunked" else shape.ffn_dim) * each)


def latent_bytes(shape: TransformerShape, width: int, height: int, frames: int, *, element: int = 2) -> int:
    """Bytes of noise, velocity and two states of the sampler in float32, and of scene, pose and the model's input."""
    cells = ((frames - 1) // 4 + 2) * (height // 8) * (width // 8)
    scene = shape.in_channels - shape.latent_channels
    return cells * (4 * shape.latent_channels * 4 + (scene + shape.in_channels + shape.latent_channels) * element)


def face_bytes(shape: TransformerShape, frames: int, *, element: int = 2) -> int:
    """Bytes of one window's face crops, as the motion encoder takes them, and of the embedded text and image."""
    crops = 3 * frames * shape.motion_encoder_size**2
    return (crops + (TEXT_TOKENS + shape.image_tokens) * shape.dim) * element


def vae_bytes(shape: VaeShape, dtype: str) -> int:
    """Bytes of the autoencoder's weights: 126.9 M numbers in Wan 2.1's, nearly all for two channel counts each."""
    return int(126.9e6 * (shape.base_dim / 96) ** 2) * (4 if dtype == "float32" else 2)


def vae_traffic(
    shape: VaeShape, width: int, height: int, frames: int, *, dtype: str, library: bool = False
) -> tuple[float, float]:
    """Return the bytes that encoding and that decoding `frames` pictures reads and writes.

    `library`: by the library's code.
    """
    rows = LIBRARY_TRAFFIC if library else VAE_TRAFFIC
    pixels = width * height * frames * shape.base_dim / 96
    return rows["encode"][dtype] * pixels, rows["decode"][dtype] * pixels


def vae_peak(
    shape: VaeShape, width: int, height: int, frames: int, *, dtype: str, tiled: bool = False
) -> tuple[float, float]:
    """Return the peak bytes of (encoding, decoding) a window, without weights, with the window's pixels."""

    def at_peak(found: int) -> float:
        return found * shape.base_dim / 96

    pixel = 4 if dtype == "float32" else 2
    clip = 3 * frames * width * height
    # Encoding: pixels in float32 as they come from bytes, in its dtype, and joined to the last window's end.
    given = clip * (4 + 2 * pixel)
    if not tiled:
        return given + at_peak(VAE_ENCODE[dtype]) * width * height, at_peak(VAE_DECODE[dtype]) * width * height
    tile = at_peak(VAE_TILE[dtype]) * min(width, TILE) * min(height, TILE)
    # Decoding: all tiles with their overlap (4/3 a side), the rows they are joined to, and the whole.
    return given + tile, tile + clip * pixel * (16 / 9 + 2)

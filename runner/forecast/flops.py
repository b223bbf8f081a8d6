"""FLOPs: forecast the TFLOP of a job from the shapes of its models.

In:   the configs of transformer, autoencoder and image encoder; width, height, frames, steps.
Out:  plain numbers. One multiply-add counts as two operations, as torch.utils.flop_counter does; norms, activations and
      softmax are not counted.
Never: torch, weights, a device. `plan` prints a forecast on a machine without them.

Letters: S tokens of the whole window, T latent frames with the reference's, d width of the model, n a count of frames.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

__all__ = ["PRODUCTION", "Costs", "TransformerShape", "VaeShape"]

TEXT_TOKENS = 512
TERA = 1e12

# Channels of the motion encoder at each resolution, if the config does not have them (the model's default).
MOTION_CHANNELS = {"4": 512, "8": 512, "16": 512, "32": 512, "64": 256, "128": 128, "256": 64, "512": 32, "1024": 16}


@dataclass(frozen=True)
class TransformerShape:
    """The fields of WanAnimateTransformer3DModel's config that decide its cost; the defaults are the 14B model's."""

    num_attention_heads: int = 40
    attention_head_dim: int = 128
    in_channels: int = 36
    latent_channels: int = 16
    out_channels: int = 16
    text_dim: int = 4096
    freq_dim: int = 256
    ffn_dim: int = 13824
    num_layers: int = 40
    image_dim: int = 1280
    added_kv_proj_dim: int | None = 5120
    motion_encoder_channel_sizes: Mapping[str, int] | None = None
    motion_encoder_size: int = 512
    motion_style_dim: int = 512
    motion_dim: int = 20
    motion_encoder_dim: int = 512
    face_encoder_hidden_dim: int = 1024
    face_encoder_num_heads: int = 4
    inject_face_latents_blocks: int = 5
    image_tokens: int = 257  # of the image encoder: patches and one class token
    patch: int = 2  # latent pixels per side

    def forward_flop(self, width: int, height: int, frames: int) -> float:
        """FLOPs of one call of the transformer on a window of `frames` frames (4k+1) of `width` x `height` pixels."""
        latent_frames = (frames - 1) // 4 + 1
        frame_tokens = self._frame_tokens(width, height)
        T = latent_frames + 1
        return (
            self._embed(T * frame_tokens, latent_frames * frame_tokens)
            + self.num_layers * self._block(T * frame_tokens)
            + (self.num_layers // self.inject_face_latents_blocks) * self._face_adapter(T * frame_tokens, T)
            + frames * self._motion_encoder()
            + self._face_encoder(frames)
        )

    def conditioning_flop(self, width: int, height: int, frames: int) -> float:
        """The part of `forward_flop` that all steps of a window share; `transformer.py` computes it once."""
        d, latent_frames, frame_tokens = self.dim, (frames - 1) // 4 + 1, self._frame_tokens(width, height)
        pose = 2 * d * self.patch**2 * latent_frames * frame_tokens * self.latent_channels
        block = 4 * self.text_tokens * d * d
        if self.added_kv_proj_dim is not None:
            block += 4 * self.image_tokens * self.added_kv_proj_dim * d
        adapter = 4 * (latent_frames + 1) * (self.face_encoder_num_heads + 1) * d * d
        return (
            pose
            + self._embed_context()
            + self.num_layers * block
            + (self.num_layers // self.inject_face_latents_blocks) * adapter
            + frames * self._motion_encoder()
            + self._face_encoder(frames)
        )

    def conditioning_bytes(
        self, width: int, height: int, frames: int, *, element: int = 2, guided: bool = False
    ) -> int:
        """Bytes of a window's conditioning cache (`transformer.py`), in elements of `element` bytes."""
        d, T, frame_tokens = self.dim, (frames - 1) // 4 + 2, self._frame_tokens(width, height)
        faces = T * (self.face_encoder_num_heads + 1) * d
        per_call = 2 * self.num_layers * self.text_tokens * d
        per_call += faces * (1 + 2 * (self.num_layers // self.inject_face_latents_blocks))
        image = 2 * self.num_layers * self.image_tokens * d if self.added_kv_proj_dim is not None else 0
        angles = T * frame_tokens * self.attention_head_dim * 4  # always float32
        return ((1 + guided) * per_call + image + (T - 1) * frame_tokens * d) * element + angles

    def self_attention_flop(self, width: int, height: int, frames: int) -> float:
        """The part of `forward_flop` for self-attention, without projections."""
        return 4.0 * self.num_layers * self.tokens(width, height, frames) ** 2 * self.dim

    def tokens(self, width: int, height: int, frames: int) -> int:
        """Tokens of a window, including those of the reference."""
        return ((frames - 1) // 4 + 2) * self._frame_tokens(width, height)

    @property
    def block_weights(self) -> int:
        """Weights of the token-wise linears of blocks and face adapters, which every step uses."""
        d, adapters = self.dim, self.num_layers // self.inject_face_latents_blocks
        return self.num_layers * (6 * d * d + 2 * d * self.ffn_dim) + adapters * 2 * d * d

    @property
    def activation_numbers(self) -> int:
        """Numbers per token that go into a block's linears of `block_weights`; query, key and value have one input."""
        return 5 * self.dim + self.ffn_dim

    @property
    def separate_activation_numbers(self) -> int:
        """The same if query, key and value each quantise that input."""
        return self.activation_numbers + 2 * self.dim

    def low_rank_flop(self, width: int, height: int, frames: int, rank: int) -> float:
        """FLOPs of low-rank factors of `rank` beside all `block_weights`; not a part of `forward_flop`."""
        d, adapters = self.dim, self.num_layers // self.inject_face_latents_blocks
        sides = self.num_layers * (14 * d + 2 * self.ffn_dim) + adapters * 4 * d  # inputs and outputs of all layers
        return 2.0 * rank * sides * self.tokens(width, height, frames)

    @property
    def conditioning_weights(self) -> int:
        """Weights of the linears for keys and values of text, image and face, which are used once per window."""
        d, adapters = self.dim, self.num_layers // self.inject_face_latents_blocks
        image = 2 * (self.added_kv_proj_dim or 0) * d
        return self.num_layers * (2 * d * d + image) + adapters * 2 * d * d

    @property
    def dim(self) -> int:
        return self.num_attention_heads * self.attention_head_dim

    @property
    def text_tokens(self) -> int:
        """Tokens of the text's keys; with those of the image if the model has no separate projection for the image."""
        return TEXT_TOKENS + (self.image_tokens if self.added_kv_proj_dim is None else 0)

    def _frame_tokens(self, width: int, height: int) -> int:
        return (height // 8 // self.patch) * (width // 8 // self.patch)

    def _embed(self, tokens: int, pose_tokens: int) -> float:
        d, area = self.dim, self.patch**2
        patches = 2 * d * area * (tokens * self.in_channels + pose_tokens * self.latent_channels)
        time = 2 * (self.freq_dim * d + d * d + 6 * d * d)
        return patches + time + self._embed_context() + 2 * tokens * d * area * self.out_channels

    def _embed_context(self) -> float:
        d = self.dim
        text = 2 * TEXT_TOKENS * (self.text_dim * d + d * d)
        return text + 2 * self.image_tokens * (self.image_dim**2 + self.image_dim * d)

    def _block(self, tokens: int) -> float:
        d = self.dim
        self_attention = 8 * tokens * d * d + 4 * tokens * tokens * d
        text = self.text_tokens
        cross = 4 * tokens * d * d + 4 * text * d * d + 4 * tokens * text * d
        if self.added_kv_proj_dim is not None:
            cross += 4 * self.image_tokens * self.added_kv_proj_dim * d + 4 * tokens * self.image_tokens * d
        return self_attention + cross + 4 * tokens * d * self.ffn_dim

    def _face_adapter(self, tokens: int, T: int) -> float:
        d, keys = self.dim, self.face_encoder_num_heads + 1
        return 4 * tokens * d * d + 4 * T * keys * d * d + 4 * tokens * keys * d

    def _motion_encoder(self) -> float:
        """One face. Blurs are 4x4 depthwise convolutions before each strided one."""
        channels = self.motion_encoder_channel_sizes or MOTION_CHANNELS
        size, style = self.motion_encoder_size, self.motion_style_dim
        here = channels[str(size)]
        flop = 2 * size * size * 3 * here
        while size > 4:
            there, half = channels[str(size // 2)], size // 2
            blurs = 2 * 16 * here * ((size + 1) ** 2 + (size - 1) ** 2)
            flop += 2 * 9 * size * size * here * here + blurs + 2 * (9 + 1) * half * half * here * there
            here, size = there, half
        linears = 4 * style * style + style * self.motion_dim
        return flop + 2 * (16 * here * style + linears + self.motion_dim**2 * self.motion_encoder_dim)

    def _face_encoder(self, frames: int) -> float:
        hidden, heads = self.face_encoder_hidden_dim, self.face_encoder_num_heads
        half = (frames - 1) // 2 + 1
        quarter = (half - 1) // 2 + 1
        first = 6 * frames * self.motion_encoder_dim * hidden * heads
        return first + heads * (6 * (half + quarter) * hidden * hidden + 2 * quarter * hidden * self.dim)


@dataclass(frozen=True)
class VaeShape:
    """The fields of AutoencoderKLWan's config that decide its cost; the defaults are Wan 2.1's."""

    base_dim: int = 96
    decoder_base_dim: int | None = None
    z_dim: int = 16
    dim_mult: tuple[int, ...] = (1, 2, 4, 4)
    num_res_blocks: int = 2
    temperal_downsample: tuple[bool, ...] = (False, True, True)  # the library's spelling
    in_channels: int = 3
    out_channels: int = 3
    patch_size: int | None = None  # pixels per side that are folded into channels first
    is_residual: bool = False  # the kind of later models

    @property
    def spatial(self) -> int:
        """Pixels per side for one latent pixel."""
        return 2 ** (len(self.dim_mult) - 1) * (self.patch_size or 1)

    @property
    def framewise(self) -> bool:
        """Whether `autoencoder.py` encodes single pictures until time is halved, and reuses repeated outputs."""
        plain = not self.is_residual and self.patch_size is None and any(self.temperal_downsample)
        return plain and self.base_dim % 8 == 0

    def encode_flop(self, width: int, height: int, frames: int, blank_from: int | None = None) -> float:
        """FLOPs of encoding `frames` (4k+1) frames: the first alone, then four at a time.

        `blank_from`: from this frame on all pixels are zero, and repeated work is not run. None: no frame repeats.
        """
        later = (frames - 1) // 4
        chunks = self._encode_chunk(width, height, 1) + later * self._encode_chunk(width, height, 4)
        quant = 2 * (2 * self.z_dim) ** 2 * (later + 1) * (width // self.spatial) * (height // self.spatial)
        return chunks + quant - (0 if blank_from is None else self._repeated(width, height, frames, blank_from))

    def _repeated(self, width: int, height: int, frames: int, blank_from: int) -> float:
        """The part of `encode_flop` that is not run for repeated frames: at each picture size, until time is halved.

        A convolution in time reads two frames back: its output repeats two frames after its input. Two frames of zeros
        precede the first frame, so a clip that is blank from the first frame on is blank two frames earlier.
        """
        if not self.framewise:
            return 0.0
        area, here, saved = width * height, self.base_dim, 0.0
        flop, equal_from = conv3d(self.in_channels, here, 1, area), (blank_from or -2) + 2  # of the first convolution
        for mult, halves in zip(self.dim_mult, self.temperal_downsample, strict=False):
            for _ in range(self.num_res_blocks):
                flop += res_block(here, self.base_dim * mult, 1, area)
                here, equal_from = self.base_dim * mult, equal_from + 2 * 2
            area //= 4
            if not halves:  # the convolution that halves the sides is part of this group
                flop += 2 * 9 * here * here * area
            saved, flop = saved + max(0, frames - 1 - equal_from) * flop, 0.0
            if halves:
                break
        return saved

    def decode_flop(self, width: int, height: int, frames: int) -> float:
        """FLOPs of decoding `frames` (4k+1) frames: one latent frame at a time, the first without doubling in time."""
        later = (frames - 1) // 4
        quant = 2 * self.z_dim**2 * (later + 1) * (width // self.spatial) * (height // self.spatial)
        return quant + self._decode_chunk(width, height, True) + later * self._decode_chunk(width, height, False)

    def _encode_chunk(self, width: int, height: int, n: int) -> float:
        area, here = width * height // (self.patch_size or 1) ** 2, self.base_dim
        flop = conv3d(self.in_channels, here, n, area)
        first = n == 1
        for level, mult in enumerate(self.dim_mult):
            for _ in range(self.num_res_blocks):
                flop += res_block(here, self.base_dim * mult, n, area)
                here = self.base_dim * mult
            if level < len(self.dim_mult) - 1:
                area //= 4
                flop += 2 * 9 * here * here * n * area
                if self.temperal_downsample[level] and not first:
                    n //= 2
                    flop += 2 * 3 * here * here * n * area
        return flop + mid_block(here, n, area) + conv3d(here, 2 * self.z_dim, n, area)

    def _decode_chunk(self, width: int, height: int, first: bool) -> float:
        base = self.decoder_base_dim or self.base_dim
        area, n = width * height // self.spatial**2, 1
        here = base * self.dim_mult[-1]
        flop = conv3d(self.z_dim, here, n, area) + mid_block(here, n, area)
        for level, (mult, in_time) in enumerate(self._up_levels()):
            if level and not self.is_residual:
                here //= 2  # the upsampler of the level below halves the channels
            for _ in range(self.num_res_blocks + 1):
                flop += res_block(here, base * mult, n, area)
                here = base * mult
            if level < len(self.dim_mult) - 1:
                if in_time and not first:
                    flop += 2 * 3 * here * 2 * here * n * area
                    n *= 2
                area *= 4
                flop += 2 * 9 * here * (here if self.is_residual else here // 2) * n * area
        return flop + conv3d(here, self.out_channels, n, area)

    def _up_levels(self) -> Iterator[tuple[int, bool]]:
        yield from zip(self.dim_mult[::-1], (*self.temperal_downsample[::-1], False), strict=True)


def conv3d(channels_in: int, channels_out: int, n: int, area: int, taps: int = 27) -> float:
    return 2 * taps * channels_in * channels_out * n * area


def res_block(channels_in: int, channels_out: int, n: int, area: int) -> float:
    flop = conv3d(channels_in, channels_out, n, area) + conv3d(channels_out, channels_out, n, area)
    return flop + (conv3d(channels_in, channels_out, n, area, taps=1) if channels_in != channels_out else 0)


def mid_block(channels: int, n: int, area: int) -> float:
    """FLOPs of two residual blocks with one single-headed attention over each frame's pixels between them."""
    attention = n * (2 * 4 * channels * channels * area + 4 * area * area * channels)
    return 2 * res_block(channels, channels, n, area) + attention


@dataclass(frozen=True)
class Costs:
    """The shapes of a store's transformer and autoencoder, and the cost of a job with them."""

    transformer: TransformerShape = field(default_factory=TransformerShape)
    vae: VaeShape = field(default_factory=VaeShape)

    @classmethod
    def from_configs(
        cls, transformer: Mapping[str, Any], vae: Mapping[str, Any], image_encoder: Mapping[str, Any] | None = None
    ) -> Costs:
        """Read the shapes from each `config.json`. Without the image encoder's, 257 image tokens (14B) are assumed."""
        known = {k: v for k, v in transformer.items() if k in TransformerShape.__dataclass_fields__}
        if image_encoder:
            known["image_tokens"] = (image_encoder["image_size"] // image_encoder["patch_size"]) ** 2 + 1
        shape: dict[str, Any] = {
            k: tuple(v) if isinstance(v, list) else v for k, v in vae.items() if k in VaeShape.__dataclass_fields__
        }
        return cls(TransformerShape(**known), VaeShape(**shape))

    def step_tflop(self, width: int, height: int, segment_frames: int, *, guided: bool = False) -> float:
        """TFLOP of one model evaluation of one window; with CFG (`guided`) the transformer is called twice."""
        return (1 + guided) * self.transformer.forward_flop(width, height, segment_frames) / TERA

    def job_tflop(
        self, width: int, height: int, segment_frames: int, segments: int, evaluations: int, *, guided: bool = False
    ) -> float:
        """TFLOP of a whole job without caches.

        Per window, pose and scene are encoded, the model is evaluated `evaluations` times, and the frames are decoded.
        Blank frames count as others.

        Text and image encoders are not counted: under 0.1 % of a job, and run once per distinct prompt or reference.
        """
        encode = self.vae.encode_flop(width, height, segment_frames)
        decode = self.vae.decode_flop(width, height, segment_frames)
        reference = self.vae.encode_flop(width, height, 1)
        denoise = evaluations * self.step_tflop(width, height, segment_frames, guided=guided)
        return segments * (denoise + (2 * encode + decode) / TERA) + reference / TERA


PRODUCTION = Costs()

"""Autoencoder: the library's AutoencoderKLWan with a small footprint: a picture at a time where space is largest.

In:   pixels [1, 3, n, H, W] or latents [1, 16, T, H/8, W/8]. Out: the library's own values, as a whole or as they come.
Never: files, jobs, where frames go.

The library walks through a clip one latent frame (four pictures) at a time, and at full resolution each of its steps
holds several copies of four pictures of 96 channels. Beyond the last doubling in time every layer is causal and keeps
its last two inputs anyway, so that pictures go through one by one with the same sums; likewise on the way in, before
time is first halved. At 832x480 in float32 that is 5.2 GB for decoding instead of 7.8 GB, of which 3.8 GB are the kept
inputs, and 3.5 GB for encoding instead of 5.6 GB. `decode_chunks` hands out pixels as they are made: a whole clip never
lies on the device.

Two changes leave the arithmetic alone, each a switch (`prepare_vae`). Convolutions get weights with the channels
innermost (`channels_last_3d` and, for pictures, `channels_last`), the layout of cuDNN's tensor-core kernels. Norms,
which are five passes over full-size pictures in eager mode, become one kernel. Tiles double the work at the seams:
`memory_plan.py` decides on them where memory forces it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import closing
from functools import partial
from itertools import pairwise
from typing import Any

import structlog
import torch
import torch.nn.functional as F
from diffusers import AutoencoderKLWan
from diffusers.models.autoencoders.autoencoder_kl_wan import (
    CACHE_T,
    WanResidualBlock,
    unpatchify,
)
from diffusers.models.autoencoders.vae import DecoderOutput
from torch import Tensor, nn

from runner.generation.runtime.device import as_out_of_memory
from runner.generation.runtime.finite import FiniteChecks
from runner.generation.wan_animate.compiled import allow_graphs
from runner.generation.wan_animate.fixed_point import FixedPoints, find_repeats
from runner.generation.wan_animate.transformer import Switches

__all__ = [
    "FramewiseVae",
    "FusedNorm",
    "decode_latents",
    "fuse_norms",
    "prepare_vae",
    "with_channels_last",
]


# (index of the first frame in the clip, pixels [1, 3, n, h, w] of the whole picture or of a tile)
Look = Callable[[int, Tensor], None]


class FramewiseVae(AutoencoderKLWan):
    """AutoencoderKLWan that runs picture by picture; weights, config, methods and results are the library's.

    Tiled, or of the residual kind that later models have, it does what the library does.
    """

    @property
    def framewise(self) -> bool:
        """May pictures go through one by one?

        On the CPU, convolutions of very few channels, or of pictures of 32 pixels, sum in an order that depends on how
        many pictures there are: the last bit of float32 may differ. Models of few channels are left to the library.
        """
        config = self.config
        plain = not config.is_residual and config.patch_size is None and any(config.temperal_downsample)
        return plain and config.base_dim % 8 == 0

    def decode_chunks(self, latents: Tensor, look: Look | None = None) -> Iterator[Tensor]:
        """Pixels [1, 3, 1, H, W], then [1, 3, 4, H, W] for each further latent frame, in [-1, 1]; `decode` in pieces.

        Tiled, everything comes at once. Feature maps are held until the iterator ends or is closed.
        `look` gets the same pixels before they are clamped, which makes 1 of infinity; tiled, those of each tile.
        """
        ratio = self.spatial_compression_ratio
        tile = self.tile_sample_min_height // ratio, self.tile_sample_min_width // ratio
        if self.use_tiling and (latents.shape[-2] > tile[0] or latents.shape[-1] > tile[1]):
            yield self._decode_tiles(latents, look)
            return
        self.clear_cache()
        try:
            hidden = self.post_quant_conv(latents)
            at = 0
            for i in range(hidden.shape[2]):
                self._conv_idx = [0]
                pixels = self._decode_frame(hidden[:, :, i : i + 1], first=i == 0)
                if self.config.patch_size is not None:
                    pixels = unpatchify(pixels, patch_size=self.config.patch_size)
                if look is not None:
                    look(at, pixels)
                    at += pixels.shape[2]
                yield torch.clamp(pixels, min=-1.0, max=1.0)
        finally:
            self.clear_cache()

    def _decode_tiles(self, latents: Tensor, look: Look | None) -> Tensor:
        """The library's own walk: tile by tile, and in each through all latent frames, with one decoder call each."""
        if look is None:
            pixels: Tensor = self.decode(latents, return_dict=False)[0]
            return pixels
        calls = frames = 0

        def seen(_decoder: nn.Module, _inputs: Any, tile: Tensor) -> None:
            nonlocal calls, frames
            frames = 0 if calls % latents.shape[2] == 0 else frames
            look(frames, tile)
            calls, frames = calls + 1, frames + tile.shape[2]

        hook = self.decoder.register_forward_hook(seen)
        try:
            return self.decode(latents, return_dict=False)[0]
        finally:
            hook.remove()

    def _decode(self, z: Tensor, return_dict: bool = True) -> Any:
        if self.use_tiling or not self.framewise:
            return super()._decode(z, return_dict=return_dict)
        pixels = torch.cat(list(self.decode_chunks(z)), dim=2)
        return DecoderOutput(sample=pixels) if return_dict else (pixels,)

    def _encode(self, x: Tensor) -> Tensor:
        if self.use_tiling or not self.framewise:
            return super()._encode(x)
        self.clear_cache()
        try:
            later = x[:, :, 1:].split(4, dim=2) if x.shape[2] > 4 else ()
            whole = [x[:, :, :1], *(chunk for chunk in later if chunk.shape[2] == 4)]  # a shorter rest is left out
            points = FixedPoints(find_repeats(x), partial(_kept_inputs, self._enc_feat_map))
            return self.quant_conv(torch.cat([self._encode_chunk(chunk, points) for chunk in whole], dim=2))
        finally:
            self.clear_cache()

    def _encode_chunk(self, pixels: Tensor, points: FixedPoints) -> Tensor:
        encoder, cache = self.encoder, self._enc_feat_map
        self._enc_conv_idx = index = [0]
        modes = [getattr(layer, "mode", None) for layer in encoder.down_blocks]
        halving = modes.index("downsample3d") if "downsample3d" in modes else len(modes)

        def run(layers: Sequence[nn.Module], picture: Tensor, index: list[int]) -> Tensor:
            for layer in layers:
                if layer is encoder.conv_in:
                    picture = _cached(layer, picture, cache, index)
                elif isinstance(layer, WanResidualBlock):
                    picture = _res_block(layer, picture, cache, index)
                else:
                    picture = (
                        layer(picture, feat_cache=cache, feat_idx=index) if hasattr(layer, "mode") else layer(picture)
                    )
            return picture

        layers = [encoder.conv_in, *encoder.down_blocks[:halving]]
        ends = (i + 1 for i, layer in enumerate(layers) if hasattr(layer, "mode"))  # where pictures get smaller
        groups = [partial(run, layers[a:b]) for a, b in pairwise((0, *ends, len(layers))) if a < b]
        hidden = _by_picture(partial(points.run, groups), pixels, index)
        for layer in encoder.down_blocks[halving:]:
            hidden = layer(hidden, feat_cache=cache, feat_idx=index)
        hidden = encoder.mid_block(hidden, feat_cache=cache, feat_idx=index)
        hidden = encoder.nonlinearity(encoder.norm_out(hidden))
        return _cached(encoder.conv_out, hidden, cache, index)

    def _decode_frame(self, hidden: Tensor, *, first: bool) -> Tensor:
        decoder, cache, index = self.decoder, self._feat_map, self._conv_idx
        if not self.framewise:
            pixels: Tensor = decoder(hidden, feat_cache=cache, feat_idx=index, first_chunk=first)
            return pixels
        hidden = _cached(decoder.conv_in, hidden, cache, index)
        hidden = decoder.mid_block(hidden, feat_cache=cache, feat_idx=index)
        last = max((i for i, doubles in enumerate(self.temperal_upsample) if doubles), default=-1) + 1
        for block in decoder.up_blocks[:last]:
            hidden = block(hidden, feat_cache=cache, feat_idx=index, first_chunk=first)

        def finish(picture: Tensor, index: list[int]) -> Tensor:
            for block in decoder.up_blocks[last:]:
                for resnet in block.resnets:
                    picture = _res_block(resnet, picture, cache, index)
                for upsampler in block.upsamplers or ():
                    picture = upsampler(picture, feat_cache=cache, feat_idx=index)
            picture = decoder.nonlinearity(decoder.norm_out(picture))
            return _cached(decoder.conv_out, picture, cache, index)

        return _by_picture(finish, hidden, index)


def decode_latents(
    vae: Any,
    latents: torch.Tensor,
    first: int,
    last: int,
    overlap: int,
    convert: Callable[[torch.Tensor], Any],
    checks: FiniteChecks | None = None,
    offset: int = 0,
    dropped: Callable[[torch.Tensor], None] | None = None,
) -> tuple[list[Any], torch.Tensor]:
    """Of a window, whose first latent frame is the reference's: frames first..last-1, each few as `convert` gives
    them, and the pixels [1, 3, overlap, H, W] in [-1, 1] of its last ones. Never are all on the device.

    `checks` gets the frames first..last-1 before they are clamped; frame 0 of the window is frame `offset` of the job.
    `dropped` gets the pixels of the frames before `first`, [1, 3, n, H, W] in [-1, 1], as they come.
    """
    latents, config = latents.to(vae.dtype), vae.config
    mean, deviation = (
        torch.tensor(values).view(1, config.z_dim, 1, 1, 1).to(latents.device, latents.dtype)
        for values in (config.latents_mean, config.latents_std)
    )
    # The parent divides by the reciprocal; multiplying by the deviation would round otherwise.
    done: list[Any] = []
    at, tail = 0, latents.new_empty(0)

    def look(start: int, pixels: Tensor) -> None:
        begin, end = max(first - start, 0), min(last - start, pixels.shape[2])
        if checks is not None and begin < end:
            checks.add_frames("vae_decode", pixels[:, :, begin:end], offset + start + begin)

    # Closed at once if `convert` fails: it empties the cache that the next decode fills.
    with closing(vae.decode_chunks((latents / (1.0 / deviation) + mean)[:, :, 1:], look)) as chunks:
        for pixels in chunks:
            begin, end, at = max(first - at, 0), last - at, at + pixels.shape[2]
            if dropped is not None and begin:
                dropped(pixels[:, :, :begin])
            if begin < min(end, pixels.shape[2]):
                done.append(convert(pixels[:, :, begin:end]))
            tail = (torch.cat([tail, pixels], dim=2) if tail.numel() else pixels)[:, :, -overlap:]
    return done, tail.clone()


def _by_picture(run: Callable[[Tensor, list[int]], Tensor], frames: Tensor, index: list[int]) -> Tensor:
    """`run` on each picture of `frames` [B, C, n, H, W]; every one passes the same convolutions, from index[0] on."""
    begin, done = index[0], []
    for picture in frames.split(1, dim=2):
        index[0] = begin
        done.append(run(picture, index))
    return torch.cat(done, dim=2) if len(done) > 1 else done[0]


def _res_block(block: Any, x: Tensor, cache: list[Any], index: list[int]) -> Tensor:
    """The library's residual block on one picture, without copies that it need not make."""
    shortcut = block.conv_shortcut(x)
    x = _cached(block.conv1, F.silu(block.norm1(x), inplace=True), cache, index)
    x = _cached(block.conv2, F.silu(block.norm2(x), inplace=True), cache, index)
    return x.add_(shortcut)


def _cached(conv: Any, x: Tensor, cache: list[Any], index: list[int]) -> Tensor:
    """A causal convolution of one picture and the two inputs before it, which are kept in `cache`; zeros at first."""
    at = index[0]
    index[0] += 1
    before, (left, right, top, bottom, past, _) = cache[at], conv._padding
    batch, channels, count, height, width = x.shape
    innermost = x.is_contiguous(memory_format=torch.channels_last_3d) and not x.is_contiguous()
    padded = torch.empty(
        (batch, channels, past + count, height + top + bottom, width + left + right),
        dtype=x.dtype,
        device=x.device,
        memory_format=torch.channels_last_3d if innermost else torch.contiguous_format,
    ).zero_()
    inner = padded[..., top : top + height, left : left + width]
    inner[:, :, past:] = x
    if before is not None:
        inner[:, :, past - before.shape[2] : past] = before
    out: Tensor = nn.Conv3d.forward(conv, padded)
    if before is not None and before.shape[2] == CACHE_T and count == 1:
        before[:, :, 0] = before[:, :, 1]
        before[:, :, 1:] = x
    else:
        kept = x[:, :, -CACHE_T:]
        cache[at] = kept.clone() if before is None else torch.cat([before[:, :, -1:], kept], dim=2)[:, :, -CACHE_T:]
    return out


def _kept_inputs(cache: list[Any], at: int) -> Sequence[Tensor]:
    """The pictures [B, C, 1, H, W] that the convolution at `at` keeps, the one seen last at the end."""
    return () if cache[at] is None else cache[at].split(1, dim=2)


def prepare_vae(vae: Any, switches: Switches) -> dict[str, Any]:
    """What the switches ask for, to an autoencoder that is on its device; how many layers were changed."""
    said: dict[str, Any] = {}
    if switches.channels_last:
        said["vae_channels_last"] = with_channels_last(vae)
    if switches.fuse_vae_norms:
        said["vae_fused_norms"] = fuse_norms(vae)
    if said:
        structlog.get_logger().debug("vae_prepared", **said)
    return said


@torch.no_grad()
def with_channels_last(vae: nn.Module) -> int:
    """Lays out the weights of all convolutions anew; how many. Values and shapes stay."""
    count = 0
    for layer in vae.modules():
        if isinstance(layer, nn.Conv3d | nn.Conv2d):
            layout = torch.channels_last_3d if isinstance(layer, nn.Conv3d) else torch.channels_last
            layer.weight.data = layer.weight.data.contiguous(memory_format=layout)
            count += 1
    return count


def fuse_norms(vae: nn.Module, backend: str = "inductor") -> int:
    """Puts a FusedNorm in the place of each of its RMS norms; how many."""
    from diffusers.models.autoencoders.autoencoder_kl_wan import WanRMS_norm

    allow_graphs()
    names = [name for name, layer in vae.named_modules() if isinstance(layer, WanRMS_norm)]
    for name in names:
        parent, _, attribute = name.rpartition(".")
        norm = vae.get_submodule(name)
        setattr(vae.get_submodule(parent), attribute, FusedNorm(norm, backend))
    return len(names)


class FusedNorm(nn.Module):
    """A norm compiled, a graph for each of the shapes that the autoencoder's walk has; the norm itself once that has
    failed."""

    def __init__(self, norm: nn.Module, backend: str) -> None:
        super().__init__()
        self.norm = norm
        self.broken = ""
        self._compiled = torch.compile(_run_norm, backend=backend)

    def forward(self, x: Tensor) -> Tensor:
        """As the norm, within the rounding of sums in another order."""
        if not self.broken:
            try:
                return self._compiled(self.norm, x)
            except Exception as err:
                if as_out_of_memory(err, x.device, doing="running the autoencoder") is not None:
                    raise
                self.broken = type(err).__name__
                structlog.get_logger().warning("compile_failed", what="a norm of the autoencoder", why=self.broken)
        return _run_norm(self.norm, x)


def _run_norm(norm: nn.Module, x: Tensor) -> Tensor:
    result: Tensor = norm(x)
    return result

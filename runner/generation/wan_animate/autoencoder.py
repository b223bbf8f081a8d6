"""Autoencoder: the library's AutoencoderKLWan with a small footprint: a picture at a time where space is largest.

In:   pixels [1, 3, n, H, W] or latents [1, 16, T, H/8, W/8]. Out: the library's own values, as a whole or as they come.
Never: files, jobs, where frames go.

The library walks through a clip one latent frame (four pictures) at a time, and at full resolution each of its steps
holds several copies of four pictures of 96 channels. Beyond the last doubling in time every layer is causal and keeps
its last two inputs anyway, so that pictures go through one by one with the same sums; likewise on the way in, before
time is first halved. At 832x480 in float32 that is 5.5 GB for decoding instead of 7.8 GB, and 4.0 GB for encoding
instead of 5.6 GB. `decode_chunks` hands out pixels as they are made: a whole clip never lies on the device. Pictures
that repeat are not encoded anew up to there (`fixed_point.py`).

Norm and SiLU are one operation that writes into the padded inputs of the convolution behind it (`causal_slots.py`,
`norm_silu.py`); sums with the shortcut are made in place. On a GPU convolutions get weights with the channels innermost
(`channels_last_3d` and, for pictures, `channels_last`), the layout of cuDNN's tensor-core kernels, and the slots follow
(`prepare_vae`). Tiles, which double the work at the seams, go the library's way: `memory_plan.py` decides on them where
memory forces it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import closing, contextmanager
from functools import partial
from typing import Any, NamedTuple

import structlog
import torch
import torch.nn.functional as F
from diffusers import AutoencoderKLWan
from diffusers.models.autoencoders.autoencoder_kl_wan import (
    WanResample,
    WanResidualBlock,
    unpatchify,
)
from diffusers.models.autoencoders.vae import DecoderOutput
from torch import Tensor, nn

from runner.generation.runtime.finite import FiniteChecks
from runner.generation.wan_animate.causal_slots import CausalConvolutions, CausalLayer
from runner.generation.wan_animate.fixed_point import FixedPoints, find_repeats
from runner.generation.wan_animate.half_choice import shrink_residuals
from runner.generation.wan_animate.norm_silu import pick_norm
from runner.generation.wan_animate.transformer import Switches

__all__ = [
    "FramewiseVae",
    "decode_latents",
    "prepare_vae",
    "with_channels_last",
]


class Step(NamedTuple):
    """One layer of a walk; `run(layer, x, kept)` computes it."""

    run: Callable[[Any, Tensor, CausalConvolutions], Tensor]
    layer: Any


# (index of the first frame in the clip, pixels [1, 3, n, h, w] of the whole picture or of a tile)
Look = Callable[[int, Tensor], None]


class FramewiseVae(AutoencoderKLWan):
    """AutoencoderKLWan that runs picture by picture; weights, config, methods and results are the library's.

    Tiled, or of the residual kind that later models have, it does what the library does.
    """

    # Whether cuDNN chooses each convolution's kernel by stopwatch (`prepare_vae`).
    cudnn_benchmark = False
    _decoding: CausalConvolutions | None = None

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
            with _choosing_kernels(self.cudnn_benchmark):
                hidden = self.post_quant_conv(latents)
            at = 0
            for i in range(hidden.shape[2]):
                self._conv_idx = [0]
                with _choosing_kernels(self.cudnn_benchmark):
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
            with _choosing_kernels(self.cudnn_benchmark):
                return super()._decode(z, return_dict=return_dict)
        pixels = torch.cat(list(self.decode_chunks(z)), dim=2)
        return DecoderOutput(sample=pixels) if return_dict else (pixels,)

    def _encode(self, x: Tensor) -> Tensor:
        if self.use_tiling or not self.framewise:
            with _choosing_kernels(self.cudnn_benchmark):
                return super()._encode(x)
        self.clear_cache()
        try:
            later = x[:, :, 1:].split(4, dim=2) if x.shape[2] > 4 else ()
            whole = [x[:, :, :1], *(chunk for chunk in later if chunk.shape[2] == 4)]  # a shorter rest is left out
            groups, rest = _encoding_steps(self.encoder, self._halving())
            kept = CausalConvolutions(_encoding_layers(self.encoder, self._halving()))
            points = FixedPoints(find_repeats(x), lambda number: _old_inputs(groups[number], kept))

            def encode(chunk: Tensor) -> Tensor:
                begin = [partial(_run, steps, kept=kept) for steps in groups]
                return _run(rest, _joined(points.run(begin, picture) for picture in chunk.split(1, dim=2)), kept)

            with _choosing_kernels(self.cudnn_benchmark):
                return self.quant_conv(torch.cat([encode(chunk) for chunk in whole], dim=2))
        finally:
            self.clear_cache()

    def clear_cache(self) -> None:
        """Forgets the clip: the library's caches and ours."""
        super().clear_cache()
        self._decoding = None

    def _halving(self) -> int:
        """The first of the encoder's layers that halves time; before it, pictures go through one by one."""
        modes = [getattr(layer, "mode", None) for layer in self.encoder.down_blocks]
        return modes.index("downsample3d") if "downsample3d" in modes else len(modes)

    def _decode_frame(self, hidden: Tensor, *, first: bool) -> Tensor:
        decoder = self.decoder
        if not self.framewise:
            pixels: Tensor = decoder(hidden, feat_cache=self._feat_map, feat_idx=self._conv_idx, first_chunk=first)
            return pixels
        last = max((i for i, doubles in enumerate(self.temperal_upsample) if doubles), default=-1) + 1
        kept = self._decoding = self._decoding or CausalConvolutions(_decoding_layers(decoder, last))

        begin, finish = [Step(_convolve, decoder.conv_in), Step(_mid_block, decoder.mid_block)], list[Step]()
        for at, block in enumerate(decoder.up_blocks, 1):
            part = begin if at <= last else finish
            part += [Step(_res_block, resnet) for resnet in block.resnets]
            for layer in block.upsamplers or ():
                if not first and layer.mode == "upsample3d":
                    part.append(Step(_double_time, layer))
                (begin if at < last else finish).append(Step(_resize, layer))
        hidden = _run(begin, hidden, kept)
        return _joined(_run([*finish, Step(_last, decoder)], picture, kept) for picture in hidden.split(1, dim=2))


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


def _encoding_layers(encoder: Any, halving: int) -> Iterator[CausalLayer]:
    """In the order of `_encoding_steps`; chunks have one picture, then four."""
    level, count = 0, 1
    yield CausalLayer(encoder.conv_in, level, count)
    for at, layer in enumerate(encoder.down_blocks):
        if isinstance(layer, WanResidualBlock):
            yield from _layers_of(layer, level, count)
        elif isinstance(layer, WanResample):
            count = 4 if at == halving else count
            level, count = level + 1, count // 2 if layer.mode == "downsample3d" else count
    for block in encoder.mid_block.resnets:
        yield from _layers_of(block, level, count)
    yield CausalLayer(encoder.conv_out, level, count)


def _decoding_layers(decoder: Any, last: int) -> Iterator[CausalLayer]:
    """In the order of `_decode_frame`; from `up_blocks[last]` on pictures go through one by one."""
    level, count = 0, 1
    yield CausalLayer(decoder.conv_in, level, count)
    for block in decoder.mid_block.resnets:
        yield from _layers_of(block, level, count)
    for at, block in enumerate(decoder.up_blocks):
        count = 1 if at == last else count
        for resnet in block.resnets:
            yield from _layers_of(resnet, level, count)
        for layer in block.upsamplers or ():
            if layer.mode == "upsample3d":
                yield CausalLayer(layer.time_conv, level, count)
                count *= 2
            level += 1
    yield CausalLayer(decoder.conv_out, level, count)


def _layers_of(block: Any, level: int, count: int) -> Iterator[CausalLayer]:
    yield from (CausalLayer(conv, level, count) for conv in (block.conv1, block.conv2))


def _encoding_steps(encoder: Any, halving: int) -> tuple[list[list[Step]], list[Step]]:
    """(What pictures go through one by one, in a group for each size; the rest, from the layer that halves time on)."""
    groups = [[Step(_convolve, encoder.conv_in)]]
    for layer in encoder.down_blocks[:halving]:
        groups[-1].append(Step(_down, layer))
        if isinstance(layer, WanResample):
            groups.append([])
    rest = [Step(_down, layer) for layer in encoder.down_blocks[halving:]]
    return groups, [*rest, Step(_mid_block, encoder.mid_block), Step(_last, encoder)]


def _old_inputs(steps: Sequence[Step], kept: CausalConvolutions) -> Iterator[tuple[Tensor, Tensor]]:
    """The two old inputs of each causal convolution of these steps of the encoder, the last one's first."""
    for step in reversed(steps):
        if step.run is _convolve:
            yield kept.old_inputs(step.layer)
        elif isinstance(step.layer, WanResidualBlock):
            yield from (kept.old_inputs(conv) for conv in (step.layer.conv2, step.layer.conv1))


def _joined(pictures: Iterable[Tensor]) -> Tensor:
    """Pictures [B, C, 1, H, W] one behind the other."""
    done = list(pictures)
    return torch.cat(done, dim=2) if len(done) > 1 else done[0]


def _run(steps: Sequence[Step], x: Tensor, kept: CausalConvolutions) -> Tensor:
    """The steps in turn. No name here holds what a step was given: a step lets it go as soon as it has read it."""
    given = [x]
    del x
    for step in steps:
        given.append(step.run(step.layer, given.pop(), kept))
    return given.pop()


def _convolve(conv: Any, x: Tensor, kept: CausalConvolutions) -> Tensor:
    return kept.run(conv, x)


def _last(half: Any, x: Tensor, kept: CausalConvolutions) -> Tensor:
    """What the encoder and the decoder end with."""
    return kept.run(half.conv_out, x, half.norm_out)


def _res_block(block: Any, x: Tensor, kept: CausalConvolutions) -> Tensor:
    """The library's residual block, without copies that it need not make."""
    # A convolution of one pixel; the library's own forward copies its input first.
    shortcut = nn.Conv3d.forward(block.conv_shortcut, x) if isinstance(block.conv_shortcut, nn.Conv3d) else x
    return kept.run(block.conv2, kept.run(block.conv1, x, block.norm1), block.norm2).add_(shortcut)


def _mid_block(block: Any, x: Tensor, kept: CausalConvolutions) -> Tensor:
    """The library's: a residual block, then attention and a residual block, in turn."""
    x = _res_block(block.resnets[0], x, kept)
    for attention, resnet in zip(block.attentions, block.resnets[1:], strict=True):
        x = _res_block(resnet, x if attention is None else attention(x), kept)
    return x


def _down(layer: Any, x: Tensor, kept: CausalConvolutions) -> Tensor:
    """One of the encoder's layers on its way down."""
    if isinstance(layer, WanResidualBlock):
        return _res_block(layer, x, kept)
    if isinstance(layer, WanResample):
        x = _resize(layer, x, kept)
        return _halve_time(layer, x, kept) if layer.mode == "downsample3d" else x
    attended: Tensor = layer(x)
    return attended


def _halve_time(layer: Any, x: Tensor, kept: CausalConvolutions) -> Tensor:
    return kept.halve(layer.time_conv, x)


def _double_time(layer: Any, x: Tensor, kept: CausalConvolutions) -> Tensor:
    """Two pictures of each, in the layout of the convolution's result."""
    batch, channels, count, height, width = x.shape
    both = kept.run(layer.time_conv, x)  # one behind the other in the channels
    innermost = both.is_contiguous(memory_format=torch.channels_last_3d) and not both.is_contiguous()
    layout = torch.channels_last_3d if innermost else torch.contiguous_format
    size = batch, channels, 2 * count, height, width
    doubled = torch.empty(size, dtype=both.dtype, device=both.device, memory_format=layout)
    for at, half in enumerate(both.chunk(2, dim=1)):
        doubled[:, :, at::2] = half
    return doubled


def _resize(layer: Any, x: Tensor, _kept: CausalConvolutions) -> Tensor:
    """The library's halving or doubling of the sides, picture by picture."""
    batch, _, count, _, _ = x.shape
    pictures, resize = x.transpose(1, 2).flatten(0, 1), layer.resample
    del x
    if layer.mode.startswith("upsample"):
        # The library converts to float32 and back round this: the nearest pixel is the same in any dtype.
        nearest, resize = resize
        pictures = F.interpolate(pictures, scale_factor=nearest.scale_factor, mode=nearest.mode)
    resized: Tensor = resize(pictures)
    return resized.unflatten(0, (batch, count)).transpose(1, 2)


@contextmanager
def _choosing_kernels(by_stopwatch: bool) -> Iterator[None]:
    """cuDNN's convolutions within: tried out once for each shape, or chosen by its rules, as everywhere else."""
    before = torch.backends.cudnn.benchmark
    torch.backends.cudnn.benchmark = by_stopwatch or before
    try:
        yield
    finally:
        torch.backends.cudnn.benchmark = before


def prepare_vae(vae: Any, switches: Switches) -> dict[str, Any]:
    """Sets up an autoencoder that is on its device, as the switches ask; what was chosen, for the record.

    On a GPU convolutions have their channels innermost unless a switch says otherwise; on a CPU they never are by
    default, so that every sum keeps the library's order. In float16 residual sums are kept smaller (`half_choice.py`).
    """
    cuda, chosen = vae.device.type == "cuda", dict[str, Any]()
    if switches.channels_last or (switches.channels_last is None and cuda):
        chosen["vae_channels_last"] = with_channels_last(vae)
    elif switches.channels_last is False:
        with_channels_last(vae, innermost=False)
    if vae.dtype == torch.float16:
        chosen["vae_residual_scale"] = shrink_residuals(vae)
    # A kernel chosen by stopwatch may be another one in the next process, with other last bits. Recipes that compute
    # the autoencoder in float32 promise the same frames from process to process; those in 16 bits do not.
    vae.cudnn_benchmark = cuda and vae.dtype != torch.float32
    if cuda:
        norms, why = pick_norm(vae.device, vae.dtype)
        chosen |= {"vae_cudnn_benchmark": vae.cudnn_benchmark, "vae_norms": norms, "vae_norms_why": why}
    if chosen:
        structlog.get_logger().debug("vae_prepared", **chosen)
    return chosen


@torch.no_grad()
def with_channels_last(vae: nn.Module, *, innermost: bool = True) -> int:
    """Lays out the weights of all convolutions anew, or back as they were; how many. Values and shapes stay."""
    count = 0
    for layer in vae.modules():
        if isinstance(layer, nn.Conv3d | nn.Conv2d):
            layout = torch.channels_last_3d if isinstance(layer, nn.Conv3d) else torch.channels_last
            layout = layout if innermost else torch.contiguous_format
            layer.weight.data = layer.weight.data.contiguous(memory_format=layout)
            count += 1
    return count

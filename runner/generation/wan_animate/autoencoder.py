"""Autoencoder: run the library's AutoencoderKLWan with less memory, one picture at a time at high resolutions.

In:   pixels [1, 3, n, H, W] or latents [1, 16, T, H/8, W/8]. Out: the library's values, as a whole or in chunks.
Never: files, jobs, the use of frames.

The library processes a clip one latent frame (four pictures) at a time. At full resolution each of its steps keeps
several copies of four pictures of 96 channels. After the last doubling in time every layer is causal and keeps its last
two inputs anyway, so pictures can be processed one by one with the same sums. The same holds for encoding before the
first halving of time. At 832x480 in float32, decoding takes 5.5 GB instead of 7.8 GB, and encoding 4.0 GB instead of
5.6 GB. `decode_chunks` yields pixels as they are made, so a whole clip is never on the device. The layers before the
first halving of time are not run again for repeated pictures (`fixed_point.py`).

Norm and SiLU are one operation that writes into the padded input of the next convolution (`causal_slots.py`,
`norm_silu.py`). Sums with the shortcut are made in place. On a GPU the weights of convolutions have their channels
innermost (`channels_last_3d` and, for pictures, `channels_last`), the layout of cuDNN's tensor-core kernels; the slots
have the same layout (`prepare_vae`). Tiles, which double the work at the seams, are processed by the library's code;
`memory_plan.py` uses them if memory is short.
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
    """One layer of a pass through a clip; `run(layer, x, kept)` computes it."""

    run: Callable[[Any, Tensor, CausalConvolutions], Tensor]
    layer: Any


# (index of the first frame in the clip, pixels [1, 3, n, h, w] of the whole picture or of a tile)
Look = Callable[[int, Tensor], None]


class FramewiseVae(AutoencoderKLWan):
    """AutoencoderKLWan that runs picture by picture; weights, config, methods and results are the library's.

    With tiles, or if it is of the residual kind of later models, the library's code runs.
    """

    # Whether cuDNN chooses each convolution's kernel by measuring (`prepare_vae`).
    cudnn_benchmark = False
    _decoding: CausalConvolutions | None = None

    @property
    def framewise(self) -> bool:
        """Whether pictures are processed one by one.

        On the CPU, convolutions of very few channels, or of pictures of 32 pixels, sum in an order that depends on the
        number of pictures: the last bit of float32 may differ. The library's code runs models of few channels.
        """
        config = self.config
        plain = not config.is_residual and config.patch_size is None and any(config.temperal_downsample)
        return plain and config.base_dim % 8 == 0

    def decode_chunks(self, latents: Tensor, look: Look | None = None) -> Iterator[Tensor]:
        """Decode in chunks: pixels [1, 3, 1, H, W], then [1, 3, 4, H, W] per further latent frame, in [-1, 1].

        With tiles all pixels come at once. Feature maps are kept until the iterator ends or is closed.
        `look` gets the same pixels before they are clamped, which turns infinity into 1; with tiles, of each tile.
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
        """Decode by the library's code: tile by tile, each with one decoder call per latent frame."""
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
            whole = [x[:, :, :1], *(chunk for chunk in later if chunk.shape[2] == 4)]  # a shorter rest is dropped
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
        """Clear the caches of the clip, the library's and ours."""
        super().clear_cache()
        self._decoding = None

    def _halving(self) -> int:
        """Return the index of the encoder's first layer that halves time. Before it, pictures come one by one."""
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
    """Decode a window, whose first latent frame is the reference's, without having all pixels on the device.

    Returns frames first..last-1 in chunks converted by `convert`, and the pixels [1, 3, overlap, H, W] in [-1, 1] of
    the last ones. `checks` gets the frames first..last-1 before they are clamped; frame 0 of the window is frame
    `offset` of the job. `dropped` gets the pixels of the frames before `first`, [1, 3, n, H, W] in [-1, 1], in chunks.
    """
    latents, config = latents.to(vae.dtype), vae.config
    mean, deviation = (
        torch.tensor(values).view(1, config.z_dim, 1, 1, 1).to(latents.device, latents.dtype)
        for values in (config.latents_mean, config.latents_std)
    )
    # As the parent, which divides by the reciprocal; multiplying by the deviation would round differently.
    done: list[Any] = []
    at, tail = 0, latents.new_empty(0)

    def look(start: int, pixels: Tensor) -> None:
        begin, end = max(first - start, 0), min(last - start, pixels.shape[2])
        if checks is not None and begin < end:
            checks.add_frames("vae_decode", pixels[:, :, begin:end], offset + start + begin)

    # Closed at once if `convert` fails, because closing clears the cache that the next decode fills.
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
    """Yield the causal layers in the order of `_encoding_steps`; chunks have one picture, then four."""
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
    """Yield the causal layers in the order of `_decode_frame`; from `up_blocks[last]` on pictures come one by one."""
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
    """Return (groups of steps for single pictures, one per size; the steps from the first halving of time on)."""
    groups = [[Step(_convolve, encoder.conv_in)]]
    for layer in encoder.down_blocks[:halving]:
        groups[-1].append(Step(_down, layer))
        if isinstance(layer, WanResample):
            groups.append([])
    rest = [Step(_down, layer) for layer in encoder.down_blocks[halving:]]
    return groups, [*rest, Step(_mid_block, encoder.mid_block), Step(_last, encoder)]


def _old_inputs(steps: Sequence[Step], kept: CausalConvolutions) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield the two old inputs of each causal convolution of these encoder steps, the last convolution first."""
    for step in reversed(steps):
        if step.run is _convolve:
            yield kept.old_inputs(step.layer)
        elif isinstance(step.layer, WanResidualBlock):
            yield from (kept.old_inputs(conv) for conv in (step.layer.conv2, step.layer.conv1))


def _joined(pictures: Iterable[Tensor]) -> Tensor:
    """Concatenate pictures [B, C, 1, H, W] in time."""
    done = list(pictures)
    return torch.cat(done, dim=2) if len(done) > 1 else done[0]


def _run(steps: Sequence[Step], x: Tensor, kept: CausalConvolutions) -> Tensor:
    """Run the steps in order. No variable here refers to a step's input, so that the step can free it early."""
    inputs = [x]
    del x
    for step in steps:
        inputs.append(step.run(step.layer, inputs.pop(), kept))
    return inputs.pop()


def _convolve(conv: Any, x: Tensor, kept: CausalConvolutions) -> Tensor:
    return kept.run(conv, x)


def _last(half: Any, x: Tensor, kept: CausalConvolutions) -> Tensor:
    """Run the last norm and convolution of the encoder or decoder."""
    return kept.run(half.conv_out, x, half.norm_out)


def _res_block(block: Any, x: Tensor, kept: CausalConvolutions) -> Tensor:
    """Run the library's residual block without unnecessary copies."""
    # A convolution of one pixel; the library's forward would copy its input first.
    shortcut = nn.Conv3d.forward(block.conv_shortcut, x) if isinstance(block.conv_shortcut, nn.Conv3d) else x
    return kept.run(block.conv2, kept.run(block.conv1, x, block.norm1), block.norm2).add_(shortcut)


def _mid_block(block: Any, x: Tensor, kept: CausalConvolutions) -> Tensor:
    """Run the library's middle block: a residual block, then pairs of attention and residual block."""
    x = _res_block(block.resnets[0], x, kept)
    for attention, resnet in zip(block.attentions, block.resnets[1:], strict=True):
        x = _res_block(resnet, x if attention is None else attention(x), kept)
    return x


def _down(layer: Any, x: Tensor, kept: CausalConvolutions) -> Tensor:
    """Run one of the encoder's down layers."""
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
    """Make two pictures of each, in the layout of the convolution's result."""
    batch, channels, count, height, width = x.shape
    both = kept.run(layer.time_conv, x)  # both pictures, concatenated in the channels
    innermost = both.is_contiguous(memory_format=torch.channels_last_3d) and not both.is_contiguous()
    layout = torch.channels_last_3d if innermost else torch.contiguous_format
    size = batch, channels, 2 * count, height, width
    doubled = torch.empty(size, dtype=both.dtype, device=both.device, memory_format=layout)
    for at, half in enumerate(both.chunk(2, dim=1)):
        doubled[:, :, at::2] = half
    return doubled


def _resize(layer: Any, x: Tensor, _kept: CausalConvolutions) -> Tensor:
    """Halve or double the sides as the library does, picture by picture."""
    batch, _, count, _, _ = x.shape
    pictures, resize = x.transpose(1, 2).flatten(0, 1), layer.resample
    del x
    if layer.mode.startswith("upsample"):
        # The library converts to float32 and back here; the nearest pixel is the same in any dtype.
        nearest, resize = resize
        pictures = F.interpolate(pictures, scale_factor=nearest.scale_factor, mode=nearest.mode)
    resized: Tensor = resize(pictures)
    return resized.unflatten(0, (batch, count)).transpose(1, 2)


@contextmanager
def _choosing_kernels(by_stopwatch: bool) -> Iterator[None]:
    """Within the context cuDNN chooses kernels by measuring each shape once (`by_stopwatch`), else by its rules."""
    before = torch.backends.cudnn.benchmark
    torch.backends.cudnn.benchmark = by_stopwatch or before
    try:
        yield
    finally:
        torch.backends.cudnn.benchmark = before


def prepare_vae(vae: Any, switches: Switches) -> dict[str, Any]:
    """Set up an autoencoder on its device by the switches; report the choices for the record.

    By default convolutions have their channels innermost on a GPU, and not on a CPU, so that every sum keeps the
    library's order there. In float16 residual sums are scaled down (`half_choice.py`).
    """
    cuda, chosen = vae.device.type == "cuda", dict[str, Any]()
    if switches.channels_last or (switches.channels_last is None and cuda):
        chosen["vae_channels_last"] = with_channels_last(vae)
    elif switches.channels_last is False:
        with_channels_last(vae, innermost=False)
    if vae.dtype == torch.float16:
        chosen["vae_residual_scale"] = shrink_residuals(vae)
    # A kernel chosen by measuring may be another one in the next process, with other last bits. Recipes that compute
    # the autoencoder in float32 promise equal frames in every process; those in 16 bits do not.
    vae.cudnn_benchmark = cuda and vae.dtype != torch.float32
    if cuda:
        norms, why = pick_norm(vae.device, vae.dtype)
        chosen |= {"vae_cudnn_benchmark": vae.cudnn_benchmark, "vae_norms": norms, "vae_norms_why": why}
    if chosen:
        structlog.get_logger().debug("vae_prepared", **chosen)
    return chosen


@torch.no_grad()
def with_channels_last(vae: nn.Module, *, innermost: bool = True) -> int:
    """Change the memory layout of all convolutions' weights, or change it back; return how many. Values stay."""
    count = 0
    for layer in vae.modules():
        if isinstance(layer, nn.Conv3d | nn.Conv2d):
            layout = torch.channels_last_3d if isinstance(layer, nn.Conv3d) else torch.channels_last
            layout = layout if innermost else torch.contiguous_format
            layer.weight.data = layer.weight.data.contiguous(memory_format=layout)
            count += 1
    return count

"""An autoencoder in 16 bits: float16 where its activations leave room, else bfloat16; and how float16 gets that room.

In:   an autoencoder with its weights. Out: a dtype, and why. Never: recipes, devices' kernels.

float16 has three bits of mantissa more than bfloat16 (as many as TF32, in which a GPU multiplies float32), and ends at
65,504. What grows is the sum that residual blocks add to. Every block reads it through a norm, which divides by its
length: the sum may be any multiple of itself. In float16 it is kept 64 times smaller, by weights and biases of the
layers that write it; a power of two, so that no other bit changes.

The largest activation is measured so: latents are drawn as the model has them, by its own mean and deviation, and
decoded, and what came out is encoded, in float32.
"""

from __future__ import annotations

import copy
from typing import Any, Final

import torch
from diffusers import AutoencoderKLWan
from diffusers.models.autoencoders.autoencoder_kl_wan import WanAttentionBlock, WanResample, WanResidualBlock
from torch import Tensor, nn

__all__ = ["MARGIN", "RESIDUAL_SCALE", "largest_activation", "pick_half", "shrink_residuals"]

RESIDUAL_SCALE: Final = 2.0**-6
# So many times the largest activation measured must fit: a clip has millions of times the numbers of the trial.
MARGIN: Final = 16
_SIDE, _LATENT_FRAMES = 8, 3  # of the trial's latents: 64 pixels a side, and every layer that sees time sees some
_SEED: Final = 0


def pick_half(vae: Any) -> tuple[torch.dtype, str]:
    """(torch.float16 or torch.bfloat16, why). The autoencoder stays as it is; a copy in float32 runs beside it."""
    trial = copy.deepcopy(vae).to(torch.float32)
    shrink_residuals(trial)
    largest = largest_activation(trial)
    limit = torch.finfo(torch.float16).max / MARGIN
    found = f"the largest activation of a trial is {largest:.4g}"
    if largest <= limit:
        return torch.float16, f"{found}, at most {limit:.4g}, a sixteenth of float16's range"
    return torch.bfloat16, f"{found}, beyond {limit:.4g}, a sixteenth of float16's range"


@torch.no_grad()
def shrink_residuals(vae: Any) -> float:
    """Keeps the sums of residual blocks at RESIDUAL_SCALE of what they were, once; the scale. Results stay."""
    if getattr(vae, "residual_scale", 1.0) == RESIDUAL_SCALE:
        return RESIDUAL_SCALE
    vae.residual_scale = RESIDUAL_SCALE
    for half in (vae.encoder, vae.decoder):
        shrunk: list[Any] = [half.conv_in.weight, half.conv_in.bias]
        for layer in half.modules():
            if isinstance(layer, WanResidualBlock):
                shrunk += [layer.conv2.weight, layer.conv2.bias]
                if isinstance(layer.conv_shortcut, nn.Conv3d):
                    shrunk.append(layer.conv_shortcut.bias)
            elif isinstance(layer, WanAttentionBlock):
                shrunk += [layer.proj.weight, layer.proj.bias]
            elif isinstance(layer, WanResample):  # from one sum to the next: of a linear layer the bias alone
                shrunk += [conv.bias for conv in layer.modules() if isinstance(conv, nn.Conv2d | nn.Conv3d)]
        for parameter in shrunk:
            parameter.mul_(RESIDUAL_SCALE)
    return RESIDUAL_SCALE


@torch.no_grad()
def largest_activation(vae: Any) -> float:
    """The largest magnitude that any layer reads or writes, decoding and encoding a small clip; infinite where one is
    not finite. `vae` in float32, not tiled. The same for the same weights."""
    config, device = vae.config, vae.device
    generator = torch.Generator().manual_seed(_SEED)
    noise = torch.randn(1, config.z_dim, _LATENT_FRAMES, _SIDE, _SIDE, generator=generator)
    mean, deviation = (
        torch.tensor(values).view(1, config.z_dim, 1, 1, 1) for values in (config.latents_mean, config.latents_std)
    )
    worst = torch.zeros((), device=device)

    def look(_layer: nn.Module, inputs: tuple[Any, ...], out: Any) -> None:
        nonlocal worst
        for tensor in (*inputs, out):
            if isinstance(tensor, Tensor):
                worst = torch.maximum(worst, torch.nan_to_num(tensor.abs().amax(), nan=torch.inf))

    hooks = [layer.register_forward_hook(look) for layer in vae.modules() if not list(layer.children())]
    try:
        # By the library's own walk, which calls all layers as modules.
        pixels = AutoencoderKLWan._decode(vae, (noise * deviation + mean).to(device), return_dict=False)[0]
        AutoencoderKLWan._encode(vae, pixels)
    finally:
        for hook in hooks:
            hook.remove()
    return float(worst)

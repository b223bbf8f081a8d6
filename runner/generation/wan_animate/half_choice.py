"""Half choice: choose float16 or bfloat16 for an autoencoder by its largest activation, and scale it for float16.

In:   an autoencoder with its weights. Out: a dtype, and why. Never: recipes, devices' kernels.

float16 has three more bits of mantissa than bfloat16 (as many as TF32, in which a GPU multiplies float32), and ends at
65,504. The largest values are in the sum to which residual blocks add. Every block reads this sum through a norm, which
divides by its length, so a scale of the sum does not change results. For float16 the sum is scaled down by 64, in the
weights and biases of the layers that write it. 64 is a power of two, so no other bit changes.

To measure the largest activation, latents are drawn with the model's mean and deviation and decoded, and the result is
encoded, all in float32.
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
# The largest measured activation times this must fit: a clip has millions of times the numbers of the trial.
MARGIN: Final = 16
_SIDE, _LATENT_FRAMES = 8, 3  # of the trial's latents: 64 pixels per side, and enough frames for every layer in time
_SEED: Final = 0


def pick_half(vae: Any) -> tuple[torch.dtype, str]:
    """Return (torch.float16 or torch.bfloat16, why). The autoencoder is not changed; a copy in float32 is tested."""
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
    """Scale the sums of residual blocks by RESIDUAL_SCALE, once; return the scale. Results do not change."""
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
            elif isinstance(layer, WanResample):  # from one sum to the next: in a linear layer only the bias is scaled
                shrunk += [conv.bias for conv in layer.modules() if isinstance(conv, nn.Conv2d | nn.Conv3d)]
        for parameter in shrunk:
            parameter.mul_(RESIDUAL_SCALE)
    return RESIDUAL_SCALE


@torch.no_grad()
def largest_activation(vae: Any) -> float:
    """Return the largest magnitude that any layer reads or writes while a small clip is decoded and encoded.

    It is infinite if a value is not finite, and equal for equal weights. `vae` is in float32, not tiled.
    """
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
        # The library's methods call all layers as modules, so that the hooks run.
        pixels = AutoencoderKLWan._decode(vae, (noise * deviation + mean).to(device), return_dict=False)[0]
        AutoencoderKLWan._encode(vae, pixels)
    finally:
        for hook in hooks:
            hook.remove()
    return float(worst)

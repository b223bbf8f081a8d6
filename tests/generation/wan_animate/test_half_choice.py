"""Which 16 bits an autoencoder gets, and the gate: the demo's trained one in them against float32."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

import runner.demo
from runner.generation.wan_animate.autoencoder import FramewiseVae, prepare_vae
from runner.generation.wan_animate.half_choice import (
    RESIDUAL_SCALE,
    largest_activation,
    pick_half,
    shrink_residuals,
)
from runner.generation.wan_animate.transformer import Switches
from tests.system_tests import system_test

TRAINED = Path(runner.demo.__file__).parent / "weights" / "Wan2.2-Animate-14B-Diffusers" / "vae"
SMALL = {"base_dim": 8, "dim_mult": [1, 2, 2, 2], "num_res_blocks": 1}


@pytest.fixture(autouse=True)
def _one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    with torch.no_grad():
        yield
    torch.set_num_threads(before)


def trained(dtype: torch.dtype = torch.float32) -> FramewiseVae:
    vae = FramewiseVae.from_pretrained(TRAINED, local_files_only=True, torch_dtype=dtype).eval()
    prepare_vae(vae, Switches())
    return vae


def small() -> FramewiseVae:
    torch.manual_seed(0)
    return FramewiseVae(**SMALL).eval()


@pytest.mark.parametrize("make", [small, trained])
def test_smaller_residuals_change_no_bit_of_float32(make):
    vae, latents = make(), torch.randn(1, 16, 2, 6, 4)
    pixels = torch.rand(1, 3, 5, 48, 32) * 2 - 1
    wanted = vae.decode(latents).sample, vae.encode(pixels).latent_dist.mode()
    before = largest_activation(vae)
    assert shrink_residuals(vae) == shrink_residuals(vae) == RESIDUAL_SCALE  # once
    assert torch.equal(vae.decode(latents).sample, wanted[0])
    assert torch.equal(vae.encode(pixels).latent_dist.mode(), wanted[1])
    assert make is small or largest_activation(vae) == before * RESIDUAL_SCALE


def test_float16_is_picked_where_there_is_room_and_nothing_changes():
    vae = small()
    kept = {name: tensor.clone() for name, tensor in vae.state_dict().items()}
    assert pick_half(vae)[0] is torch.float16
    assert pick_half(vae) == pick_half(vae)
    assert all(torch.equal(tensor, kept[name]) for name, tensor in vae.state_dict().items())
    assert not any(layer._forward_hooks for layer in vae.modules())
    assert vae.dtype is torch.float32 and not hasattr(vae, "residual_scale")


@pytest.mark.parametrize(("largest", "picked"), [(4094, torch.float16), (4095, torch.bfloat16)])
def test_a_sixteenth_of_the_range_decides(largest, picked):
    """The last convolution writes what is measured, and no norm comes behind it."""
    vae = small()
    vae.encoder.conv_out.weight.zero_()
    vae.encoder.conv_out.bias.fill_(largest)
    vae.quant_conv.weight.zero_()
    vae.quant_conv.bias.zero_()
    found, why = pick_half(vae)
    assert found is picked
    assert f"{largest}" in why and ("at most" in why) == (picked is torch.float16)


def test_a_number_that_is_not_finite_is_beyond_any_range():
    vae = small()
    vae.decoder.conv_out.bias[1] = torch.nan
    assert largest_activation(vae) == float("inf")
    assert pick_half(vae)[0] is torch.bfloat16


def test_only_float16_is_shrunk():
    for dtype, scale in ((torch.float16, RESIDUAL_SCALE), (torch.bfloat16, None), (torch.float32, None)):
        vae = small().to(dtype)
        assert prepare_vae(vae, Switches()).get("vae_residual_scale") == scale
        assert getattr(vae, "residual_scale", None) == scale


def moving_disc(frames: int) -> torch.Tensor:
    """[1, 3, n, 64, 48] in [-1, 1]: a bright disc that goes across a sloping background."""
    y, x = torch.meshgrid(torch.linspace(-1, 1, 64), torch.linspace(-1, 1, 48), indexing="ij")
    pictures = []
    for at in torch.linspace(-0.6, 0.6, frames):
        inside = torch.sigmoid(20 * (0.3 - torch.hypot(x - at, y - 0.5 * at)))
        pictures.append(torch.stack([0.6 * x, 0.4 * y, 0.3 * x * y]) * (1 - inside) + inside * 0.8)
    return torch.stack(pictures, dim=1)[None]


def chained(vae: FramewiseVae, clip: torch.Tensor, window: int) -> torch.Tensor:
    """`clip` [1, 3, n, H, W] encoded and decoded a window at a time, each with the last decoded frame first."""
    clip = clip.to(vae.dtype)
    found, previous = [], clip[:, :, :1]
    for start in range(0, clip.shape[2] - 1, window - 1):
        given = torch.cat([previous, clip[:, :, start + 1 : start + window]], dim=2)
        decoded = vae.decode(vae.encode(given).latent_dist.mode()).sample
        found.append(decoded[:, :, 1 if start else 0 :])
        previous = decoded[:, :, -1:]
    return torch.cat(found, dim=2).float()


@pytest.mark.parametrize("segments", [1, pytest.param(8, marks=system_test)])
def test_the_picked_16_bits_are_55_db_from_float32(segments):
    """The demo's trained autoencoder, whose sums come to 55,000: beyond what float16 leaves room for."""
    clip = moving_disc(1 + 4 * segments)
    exact = trained()
    assert largest_activation(exact) > 50_000
    picked, why = pick_half(exact)
    assert picked is torch.float16, why
    half = trained(picked)
    off = (chained(half, clip, 5) - chained(exact, clip, 5)).square().mean()
    assert 10 * torch.log10(4 / off) >= 55  # of values from -1 to 1

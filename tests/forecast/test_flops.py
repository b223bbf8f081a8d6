from __future__ import annotations

import subprocess
import sys

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from runner.forecast.flops import PRODUCTION, Costs
from runner.generation.segments import plan_job
from runner.spec.options import JobOptions
from runner.spec.recipes import get_recipe
from runner.weights.resolved import ResolvedRecipe
from runner.weights.store import ModelStore

# Counted with torch's FLOP counter on the 14B model on the meta device.
COUNTED = [(832, 480, 77, 1717), (832, 480, 81, 1839), (1280, 720, 77, 6607)]
AUTOENCODER = [(832, 480, 77, 156, 262), (832, 480, 81, 163.8, 275.4), (1280, 720, 77, 363, 608)]


@pytest.mark.parametrize(("width", "height", "frames", "tflop"), COUNTED)
def test_a_step_of_the_14b_model(width, height, frames, tflop):
    assert PRODUCTION.step_tflop(width, height, frames) == pytest.approx(tflop, rel=0.01)
    assert PRODUCTION.step_tflop(width, height, frames, guided=True) == pytest.approx(2 * tflop, rel=0.01)


@pytest.mark.parametrize(("width", "height", "frames", "encode", "decode"), AUTOENCODER)
def test_the_production_autoencoder(width, height, frames, encode, decode):
    assert PRODUCTION.vae.encode_flop(width, height, frames) / 1e12 == pytest.approx(encode, rel=0.01)
    assert PRODUCTION.vae.decode_flop(width, height, frames) / 1e12 == pytest.approx(decode, rel=0.01)


@pytest.fixture(scope="module")
def tiny(tiny_store_dir):
    from diffusers import AutoencoderKLWan, WanAnimateTransformer3DModel

    store, recipe = ModelStore(tiny_store_dir), get_recipe("fp32")
    with torch.device("meta"):
        transformer = WanAnimateTransformer3DModel.from_config(ResolvedRecipe(store, recipe).config("transformer"))
        vae = AutoencoderKLWan.from_config(ResolvedRecipe(store, recipe).config("vae"))
    return ResolvedRecipe(store, recipe).costs, transformer, vae


@pytest.mark.parametrize("frames", [5, 21])
def test_every_operation_of_the_tiny_transformer_is_counted(tiny, frames):
    costs, transformer, _ = tiny
    width, height, latent = 48, 64, (frames - 1) // 4 + 1
    meta = {"device": "meta"}
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        transformer(
            hidden_states=torch.zeros(1, 36, latent + 1, height // 8, width // 8, **meta),
            timestep=torch.zeros(1, **meta),
            encoder_hidden_states=torch.zeros(1, 512, 32, **meta),
            encoder_hidden_states_image=torch.zeros(1, 5, 32, **meta),
            pose_hidden_states=torch.zeros(1, 16, latent, height // 8, width // 8, **meta),
            face_pixel_values=torch.zeros(1, 3, frames, 32, 32, **meta),
        )
    assert costs.transformer.forward_flop(width, height, frames) == counter.get_total_flops()


def test_the_weights_of_a_step_and_of_a_window(tiny):
    costs, transformer, _ = tiny
    kept = ("attn2.to_k", "attn2.to_v", "attn2.add_k_proj", "attn2.add_v_proj", ".to_kv", ".to_k", ".to_v")
    every, once = 0, 0
    for name, layer in transformer.named_modules():
        if isinstance(layer, torch.nn.Linear) and name.startswith(("blocks.", "face_adapter.")):
            shared = name.endswith(kept) and "attn1" not in name
            every, once = every + (not shared) * layer.weight.numel(), once + shared * layer.weight.numel()
    assert (costs.transformer.block_weights, costs.transformer.invariant_weights) == (every, once)
    assert PRODUCTION.transformer.self_attention_flop(832, 480, 81) / 1e12 == pytest.approx(964.9, rel=1e-4)


@pytest.mark.parametrize("frames", [1, 5, 9])
def test_every_operation_of_the_tiny_autoencoder_is_counted(tiny, frames):
    costs, _, vae = tiny
    width, height = 48, 64
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        vae.encode(torch.zeros(1, 3, frames, height, width, device="meta"))
    assert costs.vae.encode_flop(width, height, frames) == counter.get_total_flops()
    latents = torch.zeros(1, 16, (frames - 1) // 4 + 1, height // 8, width // 8, device="meta")
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        vae.decode(latents)
    assert costs.vae.decode_flop(width, height, frames) == counter.get_total_flops()


@pytest.mark.parametrize("frames", [1, 9])
def test_an_autoencoder_of_the_residual_kind(frames):
    from diffusers import AutoencoderKLWan

    config = {
        "base_dim": 8,
        "decoder_base_dim": 12,
        "z_dim": 16,
        "dim_mult": [1, 2, 2],
        "num_res_blocks": 1,
        "temperal_downsample": [True, True],
        "is_residual": True,
        "patch_size": 2,
        "in_channels": 12,
        "out_channels": 12,
        "scale_factor_temporal": 4,
        "scale_factor_spatial": 8,
    }
    with torch.device("meta"):
        vae = AutoencoderKLWan(**config)
    shape = Costs.from_configs({}, config).vae
    width, height = 48, 64
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        vae.encode(torch.zeros(1, 3, frames, height, width, device="meta"))
    assert shape.encode_flop(width, height, frames) == counter.get_total_flops()
    latents = torch.zeros(1, 16, (frames - 1) // 4 + 1, height // 8, width // 8, device="meta")
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        vae.decode(latents)
    assert shape.decode_flop(width, height, frames) == counter.get_total_flops()


def test_a_job_is_its_segments():
    plan = plan_job(161, (832, 480), JobOptions(steps=6), get_recipe("bf16"))
    assert (plan.segments, plan.segment_frames, plan.padding_frames, plan.steps) == (2, 81, 0, 6)
    by_hand = 2 * (6 * 1839 + 2 * 163.8 + 275.4) + 2.7
    assert plan.tflop == pytest.approx(by_hand, rel=0.01)


def test_a_plan_takes_the_recipes_steps_and_81_frames_in_one_window():
    plan = plan_job(81, (832, 480), JobOptions(), get_recipe("bf16"))
    assert (plan.steps, plan.segments, plan.denoised_frames, plan.padding_frames) == (20, 1, 81, 0)


def test_a_forecast_needs_no_torch():
    code = (
        "import sys; from runner.generation.segments import plan_job; from runner.weights.store import ModelStore\n"
        "import runner.generation.wan_animate.generator\n"
        "assert not {'torch', 'diffusers', 'transformers'} & set(sys.modules), 'a heavy import'"
    )
    subprocess.run([sys.executable, "-c", code], check=True)

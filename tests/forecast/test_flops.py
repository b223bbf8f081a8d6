from __future__ import annotations

import inspect
import re
import subprocess
import sys
from dataclasses import asdict, replace
from typing import Any

import pytest
import torch
from diffusers import AutoencoderKLWan, WanAnimateTransformer3DModel
from diffusers.models.transformers.transformer_wan_animate import WAN_ANIMATE_MOTION_ENCODER_CHANNEL_SIZES
from torch.utils.flop_counter import FlopCounterMode

from runner.forecast.flops import MOTION_CHANNELS, PRODUCTION, Costs, TransformerShape, VaeShape
from runner.generation.segments import plan_job
from runner.spec.options import JobOptions
from runner.spec.recipes import get_recipe
from tests.forecast.meta_models import ODD, on_meta

# Counted with torch's FLOP counter on the 14B model on the meta device.
COUNTED = [(832, 480, 77, 1717), (832, 480, 81, 1839), (1280, 720, 77, 6607)]
AUTOENCODER = [(832, 480, 77, 156, 262), (832, 480, 81, 163.8, 275.4), (1280, 720, 77, 363, 608)]


@pytest.mark.parametrize(("width", "height", "frames", "tflop"), COUNTED)
def test_step_tflop_of_14b_model_agrees_with_torch_counter(width, height, frames, tflop):
    assert PRODUCTION.step_tflop(width, height, frames) == pytest.approx(tflop, rel=0.01)
    assert PRODUCTION.step_tflop(width, height, frames, guided=True) == pytest.approx(2 * tflop, rel=0.01)


@pytest.mark.parametrize(("width", "height", "frames", "encode", "decode"), AUTOENCODER)
def test_vae_flop_of_production_autoencoder_agrees_with_torch_counter(width, height, frames, encode, decode):
    assert PRODUCTION.vae.encode_flop(width, height, frames) / 1e12 == pytest.approx(encode, rel=0.01)
    assert PRODUCTION.vae.decode_flop(width, height, frames) / 1e12 == pytest.approx(decode, rel=0.01)


def defaults(kind) -> dict[str, Any]:
    """Of a class of the library, by the names in its configs."""
    found = {name: parameter.default for name, parameter in inspect.signature(kind.__init__).parameters.items()}
    return {name: tuple(value) if isinstance(value, list) else value for name, value in found.items()}


def test_default_shapes_are_those_of_library_and_14b_model():
    """The 14B model's config leaves these as the library has them, but for the width of the image's keys."""
    shape, library = asdict(TransformerShape()), defaults(WanAnimateTransformer3DModel)
    assert shape.pop("image_tokens") == (224 // 14) ** 2 + 1  # CLIP ViT-H/14 at 224 pixels, and the class token
    assert (1, shape["patch"], shape.pop("patch")) == library["patch_size"]
    assert shape == {name: library[name] for name in shape} | {"added_kv_proj_dim": 5120}
    assert asdict(VaeShape()) == {name: defaults(AutoencoderKLWan)[name] for name in asdict(VaeShape())}
    assert MOTION_CHANNELS == WAN_ANIMATE_MOTION_ENCODER_CHANNEL_SIZES
    assert Costs(TransformerShape(), VaeShape()) == PRODUCTION


def test_costs_from_configs_take_shapes_of_configs():
    vae = {"dim_mult": [1, 3], "temperal_downsample": [True], "latents_mean": [0.0], "_class_name": "AutoencoderKLWan"}
    costs = Costs.from_configs({"num_layers": 7, "rope_max_seq_len": 64}, vae, {"image_size": 84, "patch_size": 28})
    assert costs.transformer == replace(TransformerShape(), num_layers=7, image_tokens=3 * 3 + 1)
    assert costs.vae == replace(VaeShape(), dim_mult=(1, 3), temperal_downsample=(True,))
    assert Costs.from_configs({}, {}) == PRODUCTION == Costs.from_configs({}, {}, {})


IMAGE_ENCODER = {"image_size": 30, "patch_size": 10}  # nine patches and the class token
TRANSFORMERS = {
    "odd": (ODD, (48, 80, 9)),
    "image and text in one": (ODD | {"added_kv_proj_dim": None}, (64, 48, 17)),
    "of the default faces": (
        ODD | {"motion_encoder_channel_sizes": None, "motion_encoder_size": 128},
        (48, 64, 5),
    ),
    "14B": ({"image_dim": 1280, "added_kv_proj_dim": 5120, "num_layers": 5}, (96, 64, 13)),
}


@pytest.fixture(scope="module", params=TRANSFORMERS)
def counted(request):
    """(shape, model, its window, operations of one forward pass by module) as torch counts them."""
    config, window = TRANSFORMERS[request.param]
    width, height, frames = window
    model = on_meta(WanAnimateTransformer3DModel, config)
    costs = Costs.from_configs({**model.config}, {}, IMAGE_ENCODER)
    shape, latent = costs.transformer, (frames - 1) // 4 + 1
    assert shape.image_tokens == 10

    def empty(*size):
        return torch.empty(size, device="meta")

    face = shape.motion_encoder_size
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model(
            hidden_states=empty(1, shape.in_channels, latent + 1, height // 8, width // 8),
            timestep=empty(1),
            encoder_hidden_states=empty(1, 512, shape.text_dim),
            encoder_hidden_states_image=empty(1, shape.image_tokens, shape.image_dim),
            pose_hidden_states=empty(1, shape.latent_channels, latent, height // 8, width // 8),
            face_pixel_values=empty(1, 3, frames, face, face),
        )
    by_module = {
        name.partition(".")[2]: sum(operations.values()) for name, operations in counter.get_flop_counts().items()
    }
    return shape, model, window, counter.get_total_flops(), by_module


ONCE_A_WINDOW = re.compile(
    r"pose_patch_embedding|condition_embedder\.(text|image)_embedder|motion_encoder|face_encoder"
    r"|blocks\.\d+\.attn2\.(to_k|to_v|add_k_proj|add_v_proj)|face_adapter\.\d+\.(to_k|to_v)"
)


def test_forward_flop_counts_every_operation_of_transformer(counted):
    shape, _, window, total, by_module = counted
    assert shape.forward_flop(*window) == total
    assert shape.conditioning_flop(*window) == sum(n for name, n in by_module.items() if ONCE_A_WINDOW.fullmatch(name))
    attention = sum(n for name, n in by_module.items() if re.fullmatch(r"blocks\.\d+\.attn1", name))
    projections = sum(
        n for name, n in by_module.items() if re.fullmatch(r"blocks\.\d+\.attn1\.(to_q|to_k|to_v|to_out\.0)", name)
    )
    assert shape.self_attention_flop(*window) == attention - projections


def test_block_and_conditioning_weights_equal_those_of_model(counted):
    shape, model, *_ = counted
    every, once = 0, 0
    for name, layer in model.named_modules():
        if isinstance(layer, torch.nn.Linear) and name.startswith(("blocks.", "face_adapter.")):
            shared = ONCE_A_WINDOW.fullmatch(name) is not None
            every, once = every + (not shared) * layer.weight.numel(), once + shared * layer.weight.numel()
    assert (shape.block_weights, shape.conditioning_weights) == (every, once)


def test_conditioning_bytes_equal_hand_count():
    """At 832x480 and 81 frames: 22 latent frames of 52 x 30 tokens, with the reference's; 40 blocks, 8 adapters."""
    text, image = 40 * 512 * 5120 * 2 * 2, 40 * 257 * 5120 * 2 * 2
    pose, rope = 21 * 1560 * 5120 * 2, 2 * 34_320 * 64 * 4
    motion, face = 22 * 5 * 5120 * 2, 8 * 22 * 5 * 5120 * 2 * 2
    shape = PRODUCTION.transformer
    assert shape.tokens(832, 480, 81) == 34_320
    assert shape.conditioning_bytes(832, 480, 81) == text + image + pose + motion + face + rope
    # Guided, another text and another face; the rest is shared.
    twice = 2 * (text + motion + face) + image + pose + rope
    assert shape.conditioning_bytes(832, 480, 81, guided=True) == twice
    # In float32 all is twice as large but the angles, which are float32 already.
    assert shape.conditioning_bytes(832, 480, 81, element=4, guided=True) == 2 * (twice - rope) + rope
    # Without keys of its own the image stands before the text, and each branch has both.
    joined = replace(shape, added_kv_proj_dim=None)
    assert joined.conditioning_bytes(832, 480, 81, guided=True) == twice + image


VAES = {
    "Wan 2.1": {},
    "odd": {
        "base_dim": 6,
        "z_dim": 5,
        "dim_mult": [1, 2, 3, 2],
        "num_res_blocks": 2,
        "temperal_downsample": [True, False, True],
        "out_channels": 4,
    },
    "narrow": {"base_dim": 4, "dim_mult": [1, 1, 1, 1], "num_res_blocks": 1},
    "residual": {
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
    },
}


@pytest.mark.parametrize("frames", [1, 9])
@pytest.mark.parametrize("name", VAES)
def test_vae_flop_counts_every_operation_of_autoencoder(name, frames):
    vae, shape = on_meta(AutoencoderKLWan, VAES[name]), Costs.from_configs({}, VAES[name]).vae
    width, height = 48, 80
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        vae.encode(torch.empty(1, 3, frames, height, width, device="meta"))
    assert shape.encode_flop(width, height, frames) == counter.get_total_flops()
    latent = (shape.z_dim, (frames - 1) // 4 + 1, height // shape.spatial, width // shape.spatial)
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        vae.decode(torch.empty(1, *latent, device="meta"))
    assert shape.decode_flop(width, height, frames) == counter.get_total_flops()


def test_job_tflop_is_sum_of_steps_windows_and_autoencoder():
    """Per window the pose and the scene are encoded and the frames decoded; the reference is one picture, once."""
    window = (832, 480, 81)
    step = PRODUCTION.transformer.forward_flop(*window)
    encode, decode = PRODUCTION.vae.encode_flop(*window), PRODUCTION.vae.decode_flop(*window)
    reference = PRODUCTION.vae.encode_flop(832, 480, 1)
    wanted = (3 * (7 * step + 2 * encode + decode) + reference) / 1e12
    assert PRODUCTION.job_tflop(*window, segments=3, evaluations=7) == pytest.approx(wanted, rel=1e-13)
    assert PRODUCTION.job_tflop(*window, 3, 7, guided=True) == pytest.approx(wanted + 21 * step / 1e12, rel=1e-13)
    assert PRODUCTION.step_tflop(*window, guided=True) == pytest.approx(2 * step / 1e12, rel=1e-13)


def test_plan_job_of_161_frames_has_2_segments():
    plan = plan_job(161, (832, 480), JobOptions(steps=6), get_recipe("bf16"))
    assert (plan.segments, plan.segment_frames, plan.padding_frames, plan.steps) == (2, 81, 0, 6)
    by_hand = 2 * (6 * 1839 + 2 * 163.8 + 275.4) + 2.7
    assert plan.tflop == pytest.approx(by_hand, rel=0.01)


def test_plan_job_by_default_takes_recipe_steps_and_one_window():
    plan = plan_job(81, (832, 480), JobOptions(), get_recipe("bf16"))
    assert (plan.steps, plan.segments, plan.denoised_frames, plan.padding_frames) == (20, 1, 81, 0)


def test_forecast_imports_no_torch():
    code = (
        "import sys; from runner.generation.segments import plan_job; from runner.weights.store import ModelStore\n"
        "import runner.generation.wan_animate.generator\n"
        "assert not {'torch', 'diffusers', 'transformers'} & set(sys.modules), 'a heavy import'"
    )
    subprocess.run([sys.executable, "-c", code], check=True)

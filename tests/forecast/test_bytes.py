"""Bytes against parameters of the library's models on the meta device, and against sums by hand.

`tests/generation/runtime/test_memory_plan.py` compares what a block and the autoencoder hold at their peak with live
tensors.
"""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from diffusers import AutoencoderKLWan, WanAnimateTransformer3DModel

from runner.forecast.bytes import (
    FP4_BYTES,
    Weights,
    code_bytes,
    face_bytes,
    kept_code_bytes,
    latent_bytes,
    step_bytes,
    vae_bytes,
    vae_peak,
    weights_of,
    workspace_bytes,
)
from runner.forecast.flops import Costs, TransformerShape, VaeShape
from runner.generation.runtime.compute import is_token_wise
from runner.quantization.formats.svdq_layout import SVDQ_LAYOUTS
from runner.quantization.rules import linear_shapes
from tests.forecast.meta_models import ODD, on_meta

SHAPE = TransformerShape()
CLIP = (832, 480, 81)
TOKENS, CELLS = 22 * 30 * 52, 22 * 60 * 104  # of 21 latent frames and the reference's
D, FFN = 5120, 13_824
FLOAT32 = ("time_embedder", "scale_shift_table", "norm2")  # of what is counted below, by the library's own list
CONFIGS = {
    "odd": ODD,
    "narrow keys of the image": ODD | {"added_kv_proj_dim": 40},
    "no keys of the image": ODD | {"added_kv_proj_dim": None},
    "default faces": ODD | {"motion_encoder_channel_sizes": None, "motion_encoder_size": 256},
    "14B": {"image_dim": 1280, "added_kv_proj_dim": 5120, "num_layers": 10},
}


def counted(model, part: str, *, fp4: bool, element: int) -> float:
    """Bytes of the parameters under `part`; of none of them ("rest"): matrices and convolutions alone."""
    linears = {f"{name}.weight" for name, layer in model.named_modules() if isinstance(layer, torch.nn.Linear)}
    total = 0.0
    for name, tensor in model.named_parameters():
        if part == "rest":
            small = tensor.ndim < 2 or name.endswith(("scale_shift_table", "padding_tokens"))
            if small or name.startswith(("blocks.", "face_adapter.")):
                continue
        elif not name.startswith(part):
            continue
        if fp4 and name in linears:
            each = FP4_BYTES
        else:
            each = 4 if any(kept in name.split(".") for kept in FLOAT32) else element
        total += each * tensor.numel()
    return total


@pytest.mark.parametrize(("fp4", "element"), [(False, 2), (False, 4), (True, 2)])
@pytest.mark.parametrize("name", CONFIGS)
def test_weights_of_equals_parameters_of_model(name, fp4, element):
    model = on_meta(WanAnimateTransformer3DModel, CONFIGS[name])
    found = weights_of(Costs.from_configs({**model.config}, {}).transformer, fp4=fp4, element=element)
    assert (found.blocks, found.adapters) == (len(model.blocks), len(model.face_adapter))
    assert found.block == counted(model, "blocks.1.", fp4=fp4, element=element)
    assert found.adapter == counted(model, "face_adapter.1.", fp4=fp4, element=element)
    assert found.rest == counted(model, "rest", fp4=fp4, element=element)


@pytest.mark.parametrize("compute", SVDQ_LAYOUTS)
@pytest.mark.parametrize("name", CONFIGS)
def test_weights_of_svdq_equals_layout_bytes_of_all_linears_but_last(name, compute):
    model, layout = on_meta(WanAnimateTransformer3DModel, CONFIGS[name]), SVDQ_LAYOUTS[compute]
    shapes = {layer: shape for layer, shape in linear_shapes(model).items() if layer != "proj_out"}

    def expected(part: str) -> int:
        others = counted(model, part, fp4=False, element=2)
        for layer, shape in shapes.items():
            inside = layer.startswith(part) if part != "rest" else not layer.startswith(("blocks.", "face_adapter."))
            if inside:
                plain = 4 if "time_embedder" in layer.split(".") else 2
                others += layout.bytes(*shape) - plain * shape[0] * shape[1]
        return round(others)

    shape = Costs.from_configs({**model.config}, {}).transformer
    found = weights_of(shape, fp4=True, compute=compute)
    assert found.block == expected("blocks.1.")
    assert found.adapter == expected("face_adapter.1.")
    assert found.rest == expected("rest")
    assert weights_of(shape, fp4=False, compute=compute) == weights_of(shape, fp4=False)


@pytest.mark.parametrize(
    ("compute", "size", "wider"), [("svdq-int4", 9.63e9, 0.193e9), ("svdq-nvfp4", 10.18e9, 0.193e9)]
)
def test_weights_of_14b_model_in_svdq_have_expected_size(compute, size, wider):
    """Codes and scales of 17.23 billion weights take 9.16 and 9.69 GB; factors of rank 32 .39."""
    assert weights_of(SHAPE, fp4=True, compute=compute).total == pytest.approx(size, rel=0.001)
    more = (
        weights_of(SHAPE, fp4=True, compute=compute, rank=48).total - weights_of(SHAPE, fp4=True, compute=compute).total
    )
    assert more == pytest.approx(wider, rel=0.01)


def test_weights_of_assumes_bfloat16_by_default():
    assert weights_of(SHAPE, fp4=False) == weights_of(SHAPE, fp4=False, element=2)


def test_fp4_bytes_include_share_of_scale():
    """Four bits of code, and a scale of 16 bits for 32 weights or of 8 for 16: 4.5 bits."""
    assert (4 + 16 / 32) / 8 == (4 + 8 / 16) / 8 == FP4_BYTES


def test_weights_total_is_blocks_adapters_and_rest():
    weights = Weights(block=1000.0, adapter=100.0, rest=7.0, blocks=4, adapters=3)
    assert weights.total == 4307
    assert weights.largest_part == 1100


# Hidden states of 34,320 tokens: 351 MB in bfloat16.
@pytest.mark.parametrize(("kind", "units"), [("whole", 12), ("fused", 6), ("chunked", 5.36)])
def test_step_bytes_in_units_of_hidden_states(kind, units):
    assert step_bytes(SHAPE, *CLIP, kind=kind) == units * 351_436_800
    assert step_bytes(SHAPE, *CLIP, kind=kind, element=4) == units * 702_873_600


@pytest.mark.parametrize(
    ("compute", "inside"),
    [("bf16", 2.7), ("fp8", 2.7 + 1.35), ("int8", 2.7 + 1.35), ("nvfp4", 2 * 2.7)],
)
def test_step_bytes_of_fused_block_are_hidden_states_and_feed_forward(compute, inside):
    """The caller's hidden states, the block's own and what is inside the feed-forward part, 13824/5120 as wide: its
    bf16, and beside it codes of one byte or, an assumption for NVFP4, all of it again. Six hidden states in attention,
    where that is less."""
    assert step_bytes(SHAPE, *CLIP, kind="fused", compute=compute) / 351_436_800 == pytest.approx(max(6, 2 + inside))


@pytest.mark.parametrize(("compute", "scale"), [("svdq-int4", 2 / 64), ("svdq-nvfp4", 1 / 16)])
def test_step_bytes_of_fused_svdq_block_include_codes_and_output(compute, scale):
    """Hidden states, 351 MB, twice; 2.7 of them that go in and their codes of half a byte; rank 32 in float32; and what
    comes out."""
    units = 2 + 2.7 * (1 + (0.5 + scale) / 2) + 32 * 4 / (2 * D) + 1
    assert step_bytes(SHAPE, *CLIP, kind="fused", compute=compute) / 351_436_800 == pytest.approx(units, abs=0.005)
    chunked = step_bytes(SHAPE, *CLIP, kind="chunked", compute=compute) - step_bytes(SHAPE, *CLIP, kind="chunked")
    assert chunked == pytest.approx(TOKENS * D * (0.5 + scale))


@pytest.mark.parametrize(
    ("kind", "compute", "units"),
    [
        ("fused", "bf16", 6.5),
        ("chunked", "nvfp4", 7.4),
        ("fused", "int8", 6.5),
        ("chunked", "bf16", 6.5),
        ("whole", "bf16", 12),
    ],
)
def test_step_bytes_of_8_bit_attention_include_codes(kind, compute, units):
    """Hidden states, query, key, value and result, of 351 MB each, and half of that for each of three in one byte."""
    found = step_bytes(SHAPE, *CLIP, kind=kind, compute=compute, attention_8bit=True)
    assert found == pytest.approx(units * 351_436_800)


@pytest.mark.parametrize(("width", "height", "frames", "tokens"), [(64, 96, 1, 48), (80, 48, 13, 75), (72, 56, 9, 48)])
def test_step_bytes_and_code_bytes_count_tokens_of_window(width, height, frames, tokens):
    """2, 5 and 4 latent frames with the reference's, of 6 x 4, 3 x 5 and 3 x 4 tokens; a half token is cut off."""
    assert step_bytes(SHAPE, width, height, frames, kind="whole", element=1) == 12 * tokens * D
    assert code_bytes(SHAPE, width, height, frames, compute="fp8") == tokens * FFN


def test_workspace_bytes_are_those_of_largest_product():
    time = D * 6 * D  # the time's projection, 30,720 x 5,120, is larger than the feed-forward part's
    assert workspace_bytes(SHAPE) == 2 * time
    assert workspace_bytes(SHAPE, compute="nvfp4") == 2 * time
    assert workspace_bytes(SHAPE, element=4) == 4 * time
    wide = replace(SHAPE, ffn_dim=7 * D)
    assert workspace_bytes(wide) == 2 * 7 * D * D
    # No weight that sees every token is dequantised: not even one that is larger than the time's projection.
    for word in SVDQ_LAYOUTS:
        assert workspace_bytes(wide, compute=word) == workspace_bytes(SHAPE, compute=word) == 2 * time
    # Codes of eight bits of the largest weight that sees every token.
    assert workspace_bytes(SHAPE, compute="fp8") == workspace_bytes(SHAPE, compute="int8") == 2 * time + FFN * D
    assert workspace_bytes(SHAPE, fp4=False) == 0
    assert workspace_bytes(SHAPE, fp4=False, compute="int8", element=4) == FFN * D


def test_code_bytes_of_8_bit_activations_are_one_byte_each():
    assert [code_bytes(SHAPE, *CLIP, compute=word) for word in ("bf16", "nvfp4")] == [0, 0]
    assert [code_bytes(SHAPE, *CLIP, compute=word) for word in ("fp8", "int8")] == [TOKENS * FFN] * 2
    # Rows that share a scale stay together: hidden states, their norm, and 2.7 of them twice.
    assert step_bytes(SHAPE, *CLIP, kind="chunked", compute="nvfp4") == pytest.approx((2 + 2 * 2.7) * 2 * TOKENS * D)
    # A few rows at a time: of query, key and value's input, one byte each.
    chunked = [step_bytes(SHAPE, *CLIP, kind="chunked", compute=word) for word in ("bf16", "fp8", "int8")]
    assert [more - chunked[0] for more in chunked] == pytest.approx([0, TOKENS * D, TOKENS * D])


@pytest.mark.parametrize("element", [2, 4])
def test_latent_bytes_equal_hand_count(element):
    """Of 16 channels: noise, velocity and two states in float32, the pose; the scene has 20, the model's input 36."""
    assert latent_bytes(SHAPE, *CLIP, element=element) == CELLS * (4 * 16 * 4 + (20 + 36 + 16) * element)
    assert latent_bytes(SHAPE, *CLIP) == latent_bytes(SHAPE, *CLIP, element=2)
    assert latent_bytes(SHAPE, 64, 96, 5) == 3 * 12 * 8 * (256 + 144)


def test_face_bytes_equal_hand_count():
    crops, text_and_image = 81 * 3 * 512 * 512, (512 + 257) * D
    assert face_bytes(SHAPE, 81) == 2 * (crops + text_and_image)
    assert face_bytes(SHAPE, 81, element=4) == 4 * (crops + text_and_image)


@pytest.mark.parametrize(("base", "within"), [(96, 5e-4), (48, 0.02)])
def test_vae_bytes_equal_parameters_of_autoencoder(base, within):
    count = sum(tensor.numel() for tensor in on_meta(AutoencoderKLWan, {"base_dim": base}).parameters())
    assert vae_bytes(VaeShape(base_dim=base), "float32") == pytest.approx(4 * count, rel=within)
    assert vae_bytes(VaeShape(base_dim=base), "bfloat16") == pytest.approx(2 * count, rel=within)


# Bytes a pixel of the picture at 96 channels: kept and at the peak, encoding and decoding; a tile's.
@pytest.mark.parametrize(
    ("dtype", "pixel", "encode", "decode", "tile"),
    [
        ("float32", 4, 10_060, 13_890, 19_460),
        ("bfloat16", 2, 5_100, 7_100, 10_130),
        ("float16", 2, 5_100, 7_100, 10_130),
    ],
)
@pytest.mark.parametrize("share", [1, 0.5])
def test_vae_peak_equals_hand_count(dtype, pixel, encode, decode, tile, share):
    shape, area, clip = VaeShape(base_dim=int(96 * share)), 480 * 832, 3 * 81 * 480 * 832
    given = clip * (4 + 2 * pixel)  # in float32, in its dtype, and joined to the last window's end
    found = vae_peak(shape, *CLIP, dtype=dtype)
    assert found == (given + encode * share * area, decode * share * area)
    # Tiles of 256 pixels a side overlap by a quarter; beside them lie the rows they are joined to and the whole clip.
    joined = clip * pixel * (16 / 9 + 2)
    found = vae_peak(shape, *CLIP, dtype=dtype, tiled=True)
    assert found == pytest.approx((given + tile * share * 256**2, tile * share * 256**2 + joined), rel=1e-12)


@pytest.mark.parametrize(("width", "height", "tile"), [(128, 480, 128 * 256), (480, 96, 256 * 96)])
def test_vae_peak_of_small_picture_limits_tile_to_picture(width, height, tile):
    encode, _ = vae_peak(VaeShape(), width, height, 1, dtype="bfloat16", tiled=True)
    assert encode == 3 * width * height * 8 + 10_130 * tile


@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
def test_kept_code_bytes_count_token_wise_layers(config):
    """A byte a weight and a float32 a row; tests of the generator compare the bytes that it holds."""
    model = on_meta(WanAnimateTransformer3DModel, config)
    layers = [layer for name, layer in model.named_modules() if is_token_wise(name)]
    wanted = sum(layer.weight.numel() + 4 * layer.out_features for layer in layers)
    shape = Costs.from_configs(dict(model.config), {}).transformer
    assert [kept_code_bytes(shape, compute=word) for word in ("fp8", "int8")] == [wanted] * 2
    others = ("bf16", "nvfp4", *SVDQ_LAYOUTS)
    assert [kept_code_bytes(shape, compute=word) for word in others] == [0] * 4

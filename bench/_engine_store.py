"""A model store of random weights at the real model's size, or scaled down for a CPU, for the engine's benchmark.

The 4-bit codes are drawn at random: nothing is downloaded or quantised. The scales are chosen so that every layer keeps
the magnitude of its input and nothing overflows. The output is noise.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from runner.quantization.files.quantized_header import (
    FORMAT_KEY,
    GROUP_KEY,
    LORAS_KEY,
    METHOD_KEY,
    SHA256_KEY,
    SOURCE_KEY,
    VERSION_KEY,
)
from runner.quantization.files.safetensors_stream import StreamWriter
from runner.quantization.files.text_encoder import plan_text_encoder
from runner.quantization.formats import awq
from runner.quantization.formats.e2m1 import NVFP4, VALUES
from runner.quantization.rules import kept_in_fp32, linear_shapes, stored_dtype, transformer_on_meta
from runner.spec.recipes import SOURCE_WEIGHTS, Recipe
from runner.weights.variant import TEXT_FILE, TRANSFORMER_FILE, quantized_folder

ONE_IN_E4M3 = 0x38
Specs = list[tuple[str, tuple[int, ...], torch.dtype]]


@dataclass(frozen=True)
class Scale:
    """Sizes of the models and of the clip. Values that a config leaves out are those of the published model."""

    name: str
    size: tuple[int, int]  # width, height
    frames: int
    transformer: Mapping[str, Any]
    vae: Mapping[str, Any]
    image_encoder: Mapping[str, Any]
    text_encoder: Mapping[str, Any]


FULL = Scale(
    "14B, random weights",
    (832, 480),
    81,
    {"added_kv_proj_dim": 5120, "image_dim": 1280},
    {},
    {"hidden_size": 1280, "intermediate_size": 5120, "num_hidden_layers": 32, "num_attention_heads": 16}
    | {"patch_size": 14, "image_size": 224, "projection_dim": 1024, "hidden_act": "gelu"},
    {"vocab_size": 256384, "d_model": 4096, "d_kv": 64, "d_ff": 10240, "num_layers": 24, "num_heads": 64},
)
SMALL = Scale(
    "scaled down for a CPU, random weights",
    (160, 96),
    21,
    {"num_attention_heads": 4, "attention_head_dim": 64, "text_dim": 128, "freq_dim": 64, "ffn_dim": 1024}
    | {"num_layers": 6, "image_dim": 64, "added_kv_proj_dim": 256, "rope_max_seq_len": 256}
    | {"motion_encoder_channel_sizes": {"4": 64, "8": 64, "16": 64, "32": 64, "64": 32}, "motion_encoder_size": 64}
    | {"motion_style_dim": 64, "motion_dim": 8, "motion_encoder_dim": 64, "face_encoder_hidden_dim": 128}
    | {"face_encoder_num_heads": 2, "inject_face_latents_blocks": 3},
    {"base_dim": 8, "z_dim": 16, "dim_mult": [1, 2, 2, 2], "num_res_blocks": 1},
    {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 4, "num_attention_heads": 2}
    | {"patch_size": 14, "image_size": 56, "projection_dim": 32},
    {"vocab_size": 4096, "d_model": 128, "d_kv": 32, "d_ff": 256, "num_layers": 2, "num_heads": 4},
)


def write_store(root: Path, scale: Scale, recipe: Recipe, device: torch.device) -> None:
    """Write the parts of a model store that `recipe` needs below `root`: about 16 GB at full size."""
    from diffusers import AutoencoderKLWan, WanAnimateTransformer3DModel
    from transformers import CLIPImageProcessorPil, CLIPVisionConfig, CLIPVisionModel

    from runner.demo.tiny_model import hub_scheduler, tiny_tokenizer

    plain, fp4 = root / SOURCE_WEIGHTS, root / quantized_folder(recipe)
    with torch.device("meta"):
        shape = WanAnimateTransformer3DModel(**scale.transformer)
    shape.save_config(plain / "transformer")
    config = WanAnimateTransformer3DModel.load_config(plain / "transformer")
    _write_transformer(fp4 / TRANSFORMER_FILE, config, device)
    (fp4 / "config.json").write_bytes((plain / "transformer" / "config.json").read_bytes())
    _write_text_encoder(fp4 / TEXT_FILE, scale.text_encoder, device)
    with torch.device(device):
        vae = AutoencoderKLWan(**scale.vae)
        image_encoder = CLIPVisionModel(CLIPVisionConfig(**scale.image_encoder))
    vae.cpu().save_pretrained(plain / "vae")
    image_encoder.to("cpu", torch.bfloat16).save_pretrained(plain / "image_encoder")
    side = scale.image_encoder["image_size"]
    processor = CLIPImageProcessorPil(size={"shortest_edge": side}, crop_size={"height": side, "width": side})
    processor.save_pretrained(plain / "image_processor")
    tiny_tokenizer().save_pretrained(plain / "tokenizer")
    hub_scheduler().save_pretrained(plain / "scheduler")


def _write_transformer(path: Path, config: Mapping[str, Any], device: torch.device) -> None:
    model = transformer_on_meta(config)
    linears, fp32 = linear_shapes(model), kept_in_fp32(model)
    specs: Specs = []
    for name, parameter in model.named_parameters():
        layer, _, leaf = name.rpartition(".")
        if layer in linears and leaf == "weight":
            specs += [(f"{layer}.{key}", *spec) for key, spec in NVFP4.tensors(*linears[layer]).items()]
        else:
            specs.append((name, tuple(parameter.shape), stored_dtype(name, fp32)))
    metadata = {FORMAT_KEY: NVFP4.name, METHOD_KEY: "drawn", GROUP_KEY: str(NVFP4.group), SOURCE_KEY: "f" * 64}
    metadata |= {LORAS_KEY: json.dumps([{"name": "none", "sha256": "", "strength": 0.0}]), VERSION_KEY: "0"}
    widths = {layer: columns for layer, (_, columns) in linears.items()}
    _write(path, specs, metadata, SHA256_KEY, lambda *spec: draw_four_bits(*spec, widths, device))


def draw_four_bits(
    name: str, shape: tuple[int, ...], dtype: torch.dtype, widths: Mapping[str, int], device: torch.device
) -> Tensor:
    layer, _, leaf = name.rpartition(".")
    if leaf == "weight_packed":
        return torch.randint(256, shape, dtype=torch.uint8, device=device)
    if leaf == "weight_scale":
        return torch.full(shape, ONE_IN_E4M3, dtype=torch.uint8, device=device)
    if leaf == "weight_scale_2":  # any code is as likely as any other
        spread = torch.tensor(VALUES).square().mean().sqrt() * widths[layer] ** 0.5
        return (1 / spread).reshape(shape)
    return draw_tensor(name, shape, dtype, device)


def draw_tensor(name: str, shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
    """Draw a tensor: norms are one, biases zero, all others keep the magnitude of their input."""
    leaf = name.rpartition(".")[2]
    if leaf == "bias" or len(shape) == 0:
        return torch.zeros(shape, dtype=dtype, device=device)
    if len(shape) == 1 or leaf == "gamma":
        return torch.ones(shape, dtype=dtype, device=device)
    inputs = torch.Size(shape[1:]).numel()
    return (torch.randn(shape, device=device) / inputs**0.5).to(dtype)


def _write_text_encoder(path: Path, sizes: Mapping[str, Any], device: torch.device) -> None:
    from transformers import UMT5Config

    config = UMT5Config(**sizes, decoder_start_token_id=0).to_dict()
    model = plan_text_encoder(config)
    specs: Specs = [
        (name, tuple(tensor.shape), tensor.dtype)
        for name, tensor in model.state_dict().items()
        if name != "encoder.embed_tokens.weight"  # the same tensor as shared.weight
    ]
    widths = {name: module.in_features for name, module in model.named_modules() if isinstance(module, awq.W4Linear)}

    def draw(name: str, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        layer, _, leaf = name.rpartition(".")
        if leaf == "qweight":
            return torch.randint(-(1 << 15), 1 << 15, shape, dtype=torch.int16, device=device)
        if leaf in ("scales", "scaled_zeros"):
            step = 1 / (4.6 * widths[layer] ** 0.5)  # codes 0 to 15 deviate by 4.6 from their middle
            return torch.full(shape, step if leaf == "scales" else -7.5 * step, dtype=dtype, device=device)
        return draw_tensor(name, shape, dtype, device)

    _write(path, specs, {"config": json.dumps(config), "format": "pt"}, None, draw)


def _write(path: Path, specs: Specs, metadata: Mapping[str, str], digest: str | None, draw: Any) -> None:
    with StreamWriter(path, specs, metadata, digest_key=digest) as writer:
        for name, shape, dtype in specs:
            writer.write(name, draw(name, shape, dtype))

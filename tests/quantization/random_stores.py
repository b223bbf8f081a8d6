"""Stores for tests of quantisation: a transformer's folder of random weights, in shards, of any size, quickly made."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from runner.quantization.rules import transformer_on_meta

TINY: Mapping[str, Any] = {
    "_class_name": "WanAnimateTransformer3DModel",
    "num_attention_heads": 2,
    "attention_head_dim": 32,
    "text_dim": 32,
    "freq_dim": 64,
    "ffn_dim": 128,
    "num_layers": 2,
    "image_dim": 32,
    "added_kv_proj_dim": 64,
    "rope_max_seq_len": 64,
    "motion_encoder_channel_sizes": {"4": 32, "8": 32, "16": 32, "32": 32},
    "motion_encoder_size": 32,
    "motion_style_dim": 32,
    "motion_dim": 4,
    "motion_encoder_dim": 32,
    "face_encoder_hidden_dim": 32,
    "face_encoder_num_heads": 2,
    "inject_face_latents_blocks": 2,
}
# 64 million numbers: 256 MB in float32.
WIDE = dict(TINY) | {
    "num_attention_heads": 8,
    "attention_head_dim": 64,
    "added_kv_proj_dim": 512,
    "ffn_dim": 2208,
    "num_layers": 12,
    "inject_face_latents_blocks": 4,
}


def random_weights(config: Mapping[str, Any], seed: int = 0) -> dict[str, torch.Tensor]:
    """Every parameter of the model, normal, about 1/sqrt(in) wide, float32."""
    return dict(_draw(config, seed))


def _draw(config: Mapping[str, Any], seed: int) -> Iterator[tuple[str, torch.Tensor]]:
    generator = torch.Generator().manual_seed(seed)
    for name, param in transformer_on_meta(config).named_parameters():
        yield name, torch.randn(param.shape, generator=generator) / max(1, param[0].numel()) ** 0.5


def write_store(
    folder: Path, config: Mapping[str, Any], dtype: torch.dtype = torch.float32, shard_bytes: int | None = None
) -> Path:
    """A diffusers folder of `random_weights`: one file, or shards of about `shard_bytes` and an index."""
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(dict(config), indent=2))
    if shard_bytes is None:
        weights = {name: tensor.to(dtype) for name, tensor in _draw(config, 0)}
        save_file(weights, folder / "diffusion_pytorch_model.safetensors", metadata={"format": "pt"})
        return folder
    placed: dict[str, str] = {}
    shard: dict[str, torch.Tensor] = {}
    total = 0

    def flush() -> None:
        file = f"diffusion_pytorch_model-{len(set(placed.values())) + 1:05d}.safetensors"
        save_file(shard, folder / file, metadata={"format": "pt"})
        placed.update(dict.fromkeys(shard, file))
        shard.clear()

    for name, tensor in _draw(config, 0):
        if shard and sum(t.nbytes for t in shard.values()) + tensor.nbytes > shard_bytes:
            flush()
        shard[name] = tensor.to(dtype)
        total += shard[name].nbytes
    flush()
    index = {"metadata": {"total_size": total}, "weight_map": placed}
    (folder / "diffusion_pytorch_model.safetensors.index.json").write_text(json.dumps(index))
    return folder


def inputs(dtype: torch.dtype = torch.float32) -> dict[str, Any]:
    """What one forward pass of the tiny model takes: three latent frames of 8 by 8."""
    g = torch.Generator().manual_seed(1)
    face = torch.randn(1, 3, 5, 32, 32, generator=g).clamp(-1, 1).to(dtype)
    return {
        "hidden_states": torch.randn(1, 36, 3, 8, 8, generator=g).to(dtype),
        "timestep": torch.tensor([500]),
        "encoder_hidden_states": torch.randn(1, 512, 32, generator=g).to(dtype),
        "encoder_hidden_states_image": torch.randn(1, 5, 32, generator=g).to(dtype),
        "pose_hidden_states": torch.randn(1, 16, 2, 8, 8, generator=g).to(dtype),
        "face_pixel_values": face,
        "return_dict": False,
    }

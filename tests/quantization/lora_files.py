"""LoRA files of random values, in the key pattern of the published distill LoRA, for a Wan-Animate of any size.

The pattern is `lightx2v_I2V_14B_480p_cfg_step_distill_rank64_bf16.safetensors`: 1,749 bf16 tensors for 40 blocks, with
`diffusion_model.` before names of the original implementation. Written from the model's widths alone, so that it knows
nothing of the library's names, which the code under test has to find.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

PREFIX = "diffusion_model."
PUBLISHED_BYTES = 738_005_744  # of the published file

# The transformer's config.json of Wan2.2-Animate-14B.
CONFIG_14B: dict[str, Any] = {
    "num_attention_heads": 40,
    "attention_head_dim": 128,
    "in_channels": 36,
    "latent_channels": 16,
    "out_channels": 16,
    "text_dim": 4096,
    "freq_dim": 256,
    "ffn_dim": 13824,
    "num_layers": 40,
    "image_dim": 1280,
    "added_kv_proj_dim": 5120,
    "rope_max_seq_len": 1024,
    "motion_encoder_size": 512,
    "motion_style_dim": 512,
    "motion_dim": 20,
    "motion_encoder_dim": 512,
    "face_encoder_hidden_dim": 1024,
    "face_encoder_num_heads": 4,
    "inject_face_latents_blocks": 5,
    "motion_encoder_batch_size": 8,
}


@dataclass(frozen=True)
class Widths:
    """What a LoRA's shapes follow from."""

    blocks: int
    dim: int
    ffn: int
    text: int
    freq: int
    image: int
    head: int

    @classmethod
    def of(cls, config: Mapping[str, Any]) -> Widths:
        """From a transformer's config (1 x 2 x 2 patches: four outputs a token and channel)."""
        return cls(
            blocks=config["num_layers"],
            dim=config["num_attention_heads"] * config["attention_head_dim"],
            ffn=config["ffn_dim"],
            text=config["text_dim"],
            freq=config["freq_dim"],
            image=config["image_dim"],
            head=4 * config.get("out_channels", 16),
        )


def linears(w: Widths) -> dict[str, tuple[int, int]]:
    """Original name -> (out, in), of every layer that has a low-rank pair."""
    square = (w.dim, w.dim)
    shapes: dict[str, tuple[int, int]] = {}
    for n in range(w.blocks):
        shapes |= {f"blocks.{n}.{a}_attn.{x}": square for a in ("self", "cross") for x in "qkvo"}
        shapes |= {f"blocks.{n}.cross_attn.{x}_img": square for x in "kv"}
        shapes |= {f"blocks.{n}.ffn.0": (w.ffn, w.dim), f"blocks.{n}.ffn.2": (w.dim, w.ffn)}
    return shapes | {
        "time_embedding.0": (w.dim, w.freq),
        "time_embedding.2": square,
        "time_projection.1": (6 * w.dim, w.dim),
        "text_embedding.0": (w.dim, w.text),
        "text_embedding.2": square,
        "img_emb.proj.1": (w.image, w.image),
        "img_emb.proj.3": (w.dim, w.image),
        "head.head": (w.head, w.dim),
    }


def norms(w: Widths) -> dict[str, tuple[int, ...]]:
    """Original key (with `.diff` or `.diff_b`) -> shape, of what the published file changes besides linear layers."""
    shapes: dict[str, tuple[int, ...]] = {}
    for n in range(w.blocks):
        for name in ("self_attn.norm_q", "self_attn.norm_k", "cross_attn.norm_q", "cross_attn.norm_k"):
            shapes[f"blocks.{n}.{name}.diff"] = (w.dim,)
        shapes[f"blocks.{n}.cross_attn.norm_k_img.diff"] = (w.dim,)
        shapes |= {f"blocks.{n}.norm3.{leaf}": (w.dim,) for leaf in ("diff", "diff_b")}
    shapes |= {f"img_emb.proj.0.{leaf}": (w.image,) for leaf in ("diff", "diff_b")}
    shapes |= {f"img_emb.proj.4.{leaf}": (w.dim,) for leaf in ("diff", "diff_b")}
    return shapes | {"patch_embedding.diff_b": (w.dim,)}


def published_shapes(config: Mapping[str, Any], rank: int = 64) -> dict[str, tuple[int, ...]]:
    """Key -> shape of the published pattern."""
    w = Widths.of(config)
    shapes: dict[str, tuple[int, ...]] = {}
    for name, (rows, columns) in linears(w).items():
        shapes[f"{PREFIX}{name}.lora_down.weight"] = (rank, columns)
        shapes[f"{PREFIX}{name}.lora_up.weight"] = (rows, rank)
        shapes[f"{PREFIX}{name}.diff_b"] = (rows,)
    return shapes | {f"{PREFIX}{key}": shape for key, shape in norms(w).items()}


def random_tensors(
    shapes: Mapping[str, tuple[int, ...]], seed: int = 0, dtype: torch.dtype = torch.bfloat16, size: float = 0.1
) -> dict[str, Tensor]:
    """Normal values of deviation `size`; none is zero throughout, so that a tensor left out always shows."""
    generator = torch.Generator().manual_seed(seed)
    return {key: (size * torch.randn(shape, generator=generator)).to(dtype) for key, shape in shapes.items()}


def write_published(path: Path, config: Mapping[str, Any], *, rank: int = 4, seed: int = 0) -> dict[str, Tensor]:
    """Write the published pattern for a model of this config to `path`; the tensors come back."""
    tensors = random_tensors(published_shapes(config, rank), seed)
    save_file(tensors, path)
    return tensors

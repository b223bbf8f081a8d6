"""Models of the library on torch's meta device: shapes without numbers, to be counted."""

from __future__ import annotations

from typing import Any

import torch

__all__ = ["ODD", "on_meta"]

# A config in which no two dimensions are equal, so that none can stand in another's place.
ODD: dict[str, Any] = {
    "num_attention_heads": 3,
    "attention_head_dim": 24,
    "in_channels": 30,  # two latents and four of mask
    "latent_channels": 13,
    "out_channels": 11,
    "text_dim": 44,
    "freq_dim": 26,
    "ffn_dim": 136,
    "num_layers": 6,
    "image_dim": 52,
    "added_kv_proj_dim": 72,  # the blocks' width: the embedded image has it
    "rope_max_seq_len": 64,
    "motion_encoder_channel_sizes": {"4": 34, "8": 31, "16": 22},
    "motion_encoder_size": 16,
    "motion_style_dim": 38,
    "motion_dim": 7,
    "motion_encoder_dim": 46,
    "face_encoder_hidden_dim": 28,
    "face_encoder_num_heads": 4,
    "inject_face_latents_blocks": 2,
}


def on_meta(kind: Any, config: dict[str, Any]) -> Any:
    with torch.device("meta"):
        return kind(**config)

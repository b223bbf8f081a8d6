"""The demo's models: their sizes, the frozen encoders, and the pipeline that makes the conditions for training.

In:   a random seed. Out: real classes of diffusers and transformers. Text, image and motion encoder are not trained:
they are random, but the same for training and use.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from runner.demo.tiny_model import TINY_FACE_SIZE, hub_scheduler, tiny_models, tiny_tokenizer
from runner.generation.wan_animate.loading import squash_reference
from runner.spec.options import DEFAULT_PROMPT

__all__ = ["PROMPTS", "TRANSFORMER_CONFIG", "embed_prompts", "load_vae", "make_pipeline"]

HEADS, HEAD_DIM = 5, 32
TRANSFORMER_CONFIG: dict[str, Any] = {
    "num_attention_heads": HEADS,
    "attention_head_dim": HEAD_DIM,
    "text_dim": 32,
    "freq_dim": 64,
    "ffn_dim": 384,
    "num_layers": 4,
    "image_dim": 32,
    "added_kv_proj_dim": HEADS * HEAD_DIM,
    "rope_max_seq_len": 256,
    "motion_encoder_channel_sizes": {"4": 32, "8": 32, "16": 32, "32": 32},
    "motion_encoder_size": TINY_FACE_SIZE,
    "motion_style_dim": 32,
    "motion_dim": 4,
    "motion_encoder_dim": 32,
    "face_encoder_hidden_dim": 32,
    "face_encoder_num_heads": 2,
    "inject_face_latents_blocks": 2,
}
PROMPTS = (DEFAULT_PROMPT, "a person is dancing", "", "the character of the video moves. studio light.")


def load_vae(folder: Path) -> Any:
    """Return the trained, frozen autoencoder of a training's folder, with the decoder of `decoder.pt` if it exists."""
    from _demo_vae import new_vae

    saved = torch.load(folder / "vae.pt", map_location="cpu", weights_only=True)
    vae = new_vae(latents_mean=saved["latents_mean"], latents_std=saved["latents_std"])
    later = folder / "decoder.pt"
    if later.exists():
        saved = torch.load(later, map_location="cpu", weights_only=True)
    vae.load_state_dict(saved["average"])
    return vae.eval().requires_grad_(False)


def make_pipeline(vae: Any, seed: int = 0) -> Any:
    """Return the library's pipeline with `vae`, a new transformer and the frozen encoders."""
    from diffusers import WanAnimatePipeline, WanAnimateTransformer3DModel

    torch.manual_seed(seed)
    models = tiny_models()
    transformer = WanAnimateTransformer3DModel(**TRANSFORMER_CONFIG)
    for kept in ("text_encoder", "image_encoder"):
        models[kept].eval().requires_grad_(False)
    pipe = WanAnimatePipeline(
        tokenizer=tiny_tokenizer(),
        scheduler=hub_scheduler(),
        **{**models, "vae": vae, "transformer": transformer},
    )
    squash_reference(pipe.image_processor)
    return pipe


@torch.no_grad()
def embed_prompts(pipe: Any) -> list[torch.Tensor]:
    """[1, 512, text_dim] of each of PROMPTS."""
    return [
        pipe.encode_prompt(text, do_classifier_free_guidance=False, max_sequence_length=512, device="cpu")[0]
        for text in PROMPTS
    ]

"""Tiny model: write a Wan2.2-Animate with random weights in the production layout, small enough for tests and the demo.

In:   a folder and a random seed. Out: `Wan2.2-Animate-14B-Diffusers/` in it, about 3 MB, the same bytes for the same
      seed. Never: downloads, training. It renders coloured noise that depends on every input. It has all parts of the
      real model (image cross-attention, face adapters, motion encoder, causal autoencoder), only narrower.

Every linear layer has inputs in multiples of 32, so that group-32 quantisation applies to all of them.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from runner.spec.options import DEFAULT_PROMPT

__all__ = ["TINY_FACE_SIZE", "build_tiny_store", "tiny_models", "tiny_tokenizer"]

TINY_FACE_SIZE = 32  # side in pixels of the faces that the motion encoder reads
FOLDER = "Wan2.2-Animate-14B-Diffusers"

WORDS = (
    *(
        "a",
        "the",
        "and",
        "of",
        "in",
        "on",
        "with",
        "is",
        "person",
        "man",
        "woman",
        "character",
        "hands",
        "face",
        "body",
    ),
    *(
        "dance",
        "dancing",
        "walking",
        "waving",
        "moving",
        "studio",
        "light",
        "camera",
        "video",
        "high",
        "low",
        "quality",
    ),
    *("blurry", "static", "bad"),
)
PUNCTUATION = "abcdefghijklmnopqrstuvwxyz0123456789.,'-。，、！？"
CHINESE = "人物跳舞走路挥手旋转画面静止模糊低质量丑陋背景光线男女孩角色动作视频中的在做"


def build_tiny_store(root: Path, seed: int = 0) -> None:
    """Write `root/Wan2.2-Animate-14B-Diffusers/` in float32. The global random state is not changed."""
    import torch
    from diffusers import WanAnimatePipeline

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        models = tiny_models()
    pipe = WanAnimatePipeline(tokenizer=tiny_tokenizer(), scheduler=hub_scheduler(), **models)
    pipe.save_pretrained(Path(root) / FOLDER, safe_serialization=True)


def hub_scheduler() -> Any:
    """Return the scheduler that is published with Wan2.2-Animate-14B, for a store's folder `scheduler`."""
    from diffusers import UniPCMultistepScheduler

    return UniPCMultistepScheduler(prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=5.0)


def tiny_tokenizer() -> Any:
    """Return a unigram tokenizer in T5's layout (0 pad, 1 end, 2 unknown), with the pieces above, not trained."""
    from transformers import T5Tokenizer

    characters = dict.fromkeys(PUNCTUATION + DEFAULT_PROMPT + CHINESE)
    pieces = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), ("\u2581", -2.0)]
    pieces += [("\u2581" + word, -3.0 - 0.01 * i) for i, word in enumerate(WORDS)]
    pieces += [(character, -8.0) for character in characters]
    return T5Tokenizer(vocab=pieces, extra_ids=0, model_max_length=512)


def tiny_models() -> dict[str, Any]:
    """Return the random store's models and image processor, by pipeline names. They depend on torch's random state."""
    from diffusers import AutoencoderKLWan, WanAnimateTransformer3DModel
    from transformers import CLIPImageProcessorPil, CLIPVisionConfig, CLIPVisionModel, UMT5Config, UMT5EncoderModel

    text_encoder = UMT5EncoderModel(
        UMT5Config(
            vocab_size=len(tiny_tokenizer()),
            d_model=32,
            d_kv=8,
            d_ff=64,
            num_layers=2,
            num_heads=4,
            decoder_start_token_id=0,
        )
    )
    vae = AutoencoderKLWan(
        base_dim=4, z_dim=16, dim_mult=[1, 1, 1, 1], num_res_blocks=1, temperal_downsample=[False, True, True]
    )
    image_encoder = CLIPVisionModel(
        CLIPVisionConfig(
            hidden_size=32,
            projection_dim=16,
            num_hidden_layers=2,
            num_attention_heads=2,
            image_size=28,
            patch_size=14,
            intermediate_size=64,
        )
    )
    transformer = WanAnimateTransformer3DModel(
        num_attention_heads=2,
        attention_head_dim=32,
        text_dim=32,
        freq_dim=64,
        ffn_dim=128,
        num_layers=4,
        image_dim=32,
        added_kv_proj_dim=64,
        rope_max_seq_len=256,
        motion_encoder_channel_sizes={"4": 32, "8": 32, "16": 32, "32": 32},
        motion_encoder_size=TINY_FACE_SIZE,
        motion_style_dim=32,
        motion_dim=4,
        motion_encoder_dim=32,
        face_encoder_hidden_dim=32,
        face_encoder_num_heads=2,
        inject_face_latents_blocks=2,  # must divide num_layers: else the forward pass has too few adapters
    )
    models: dict[str, Any] = {
        "text_encoder": text_encoder,
        "vae": vae,
        "image_encoder": image_encoder,
        "transformer": transformer,
    }
    models["image_processor"] = CLIPImageProcessorPil(size={"shortest_edge": 28}, crop_size={"height": 28, "width": 28})
    return models

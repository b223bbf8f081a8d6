"""A SAM 2 for video of a million random numbers: the whole architecture at 64 x 64 pixels, 20 ms a frame."""

from __future__ import annotations

from pathlib import Path

__all__ = ["SIDE", "build_sam2"]

SIDE = 64


def build_sam2(folder: Path, seed: int = 0) -> Path:
    """Write config.json and model.safetensors in transformers' layout."""
    import torch
    from transformers import Sam2VideoConfig, Sam2VideoModel

    wide, narrow = 128, 32  # object pointers are cut into pieces of the memory's 64 channels: wide must be more
    config = Sam2VideoConfig(
        vision_config={
            "model_type": "sam2_vision_model",
            "backbone_config": {
                "model_type": "sam2_hiera_det_model",
                "hidden_size": 8,
                "num_attention_heads": 1,
                "image_size": [SIDE, SIDE],
                "blocks_per_stage": [1, 1, 2, 1],
                "embed_dim_per_stage": [8, 16, 32, 64],
                "num_attention_heads_per_stage": [1, 1, 2, 2],
                "window_size_per_stage": [4, 4, 4, 2],
                "global_attention_blocks": [3],
                "window_positional_embedding_background_size": [4, 4],
            },
            "backbone_channel_list": [64, 32, 16, 8],
            "backbone_feature_sizes": [[16, 16], [8, 8], [4, 4]],
            "fpn_hidden_size": wide,
        },
        prompt_encoder_config={"hidden_size": wide, "image_size": SIDE, "patch_size": 16, "mask_input_channels": 4},
        mask_decoder_config={
            "hidden_size": wide,
            "mlp_dim": narrow,
            "num_attention_heads": 2,
            "iou_head_hidden_dim": narrow,
        },
        image_size=SIDE,
        memory_attention_hidden_size=wide,
        memory_attention_num_layers=1,
        memory_attention_feed_forward_hidden_size=narrow,
        memory_attention_rope_feat_sizes=[4, 4],
        memory_encoder_hidden_size=wide,
        memory_encoder_output_channels=64,
        mask_downsampler_embed_dim=wide,
        memory_fuser_embed_dim=wide,
        memory_fuser_intermediate_dim=narrow,
    )
    torch.manual_seed(seed)
    model = Sam2VideoModel(config)
    with torch.no_grad():
        for weight in model.parameters():
            if weight.ndim > 1:
                weight.normal_(std=1.5 / weight[0].numel() ** 0.5)  # at the usual 0.02 every picture looks the same
        model.mask_decoder.pred_obj_score_head.proj_out.bias.fill_(50.0)  # somebody is there, always
    model.save_pretrained(folder, safe_serialization=True)
    return folder

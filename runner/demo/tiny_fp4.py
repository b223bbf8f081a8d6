"""Tiny FP4: a store's FP4 file with its step-distillation LoRA merged, and such a LoRA of random values.

In:   a store with a tiny transformer. Out: the default recipe's files in it, as `quantize` makes them.
Never: training; the random LoRA distils nothing, and shows that one is found, merged and recorded.
"""

from __future__ import annotations

import json
from pathlib import Path

__all__ = ["build_tiny_fp4", "build_tiny_lora", "quantize_with"]

RANK = 4
SIZE = 0.02  # of a weight's norm, about what the published one adds


def build_tiny_lora(transformer: Path, path: Path, seed: int = 0) -> None:
    """Write `lora_down`/`lora_up` pairs and bias `diff_b`s for attention and feed-forward of every block, in bf16."""
    import torch
    from safetensors.torch import save_file

    config = json.loads((transformer / "config.json").read_text(encoding="utf-8"))
    dim = config["num_attention_heads"] * config["attention_head_dim"]
    ffn = config["ffn_dim"]
    shapes = {f"self_attn.{name}": (dim, dim) for name in "qkvo"} | {"ffn.0": (ffn, dim), "ffn.2": (dim, ffn)}
    generator = torch.Generator("cpu").manual_seed(seed)
    tensors = {}
    for block in range(config["num_layers"]):
        for name, (out, wide) in shapes.items():
            key = f"diffusion_model.blocks.{block}.{name}"
            # A linear of width `wide` starts with deviation 1/sqrt(3 wide): up @ down shall have SIZE times its norm.
            deviation = (SIZE**2 / (3 * wide * RANK)) ** 0.25
            tensors[f"{key}.lora_down.weight"] = torch.randn(RANK, wide, generator=generator) * deviation
            tensors[f"{key}.lora_up.weight"] = torch.randn(out, RANK, generator=generator) * deviation
            tensors[f"{key}.diff_b"] = torch.randn(out, generator=generator) * SIZE / wide**0.5
    path.parent.mkdir(parents=True, exist_ok=True)
    save_file({key: tensor.bfloat16().contiguous() for key, tensor in tensors.items()}, path)


def build_tiny_fp4(root: Path) -> None:
    """Write the random LoRA, and the FP4 file with it merged, into the store at `root`."""
    from runner.generation.recipes import SOURCE_WEIGHTS
    from runner.generation.variant import DISTILL_FOLDER

    lora = root / DISTILL_FOLDER / "tiny_distill_rank4.safetensors"
    build_tiny_lora(root / SOURCE_WEIGHTS / "transformer", lora)
    quantize_with(root, lora)


def quantize_with(root: Path, lora: Path) -> None:
    """Merge `lora` into the transformer of the store at `root`, and quantise that for `fp4-distill`."""
    from runner.generation.recipes import SOURCE_WEIGHTS, get_recipe
    from runner.generation.variant import TRANSFORMER_FILE, quantized_folder
    from runner.quantization.checkpoint import quantize_store
    from runner.quantization.e2m1 import FORMATS
    from runner.quantization.lora import read_lora

    target = root / quantized_folder(get_recipe("fp4-distill")) / TRANSFORMER_FILE
    source = root / SOURCE_WEIGHTS / "transformer"
    quantize_store(source, target, FORMATS["nvfp4"], loras=[read_lora(lora)], device="cpu")

"""Exports the demo's trained models in bfloat16, under their production names.

In:   the training's folder. Out: `Wan2.2-Animate-14B-Diffusers/` and `distill_lora/` in the target.
"""

from __future__ import annotations

import shutil
from pathlib import Path

import torch
from _demo_distill import RANK, published_tensors
from _demo_models import load_vae, make_pipeline

from runner.demo.tiny_model import FOLDER
from runner.weights.variant import DISTILL_FOLDER

__all__ = ["export"]


def export(folder: Path, target: Path) -> None:
    """Write the averaged weights of `folder`'s checkpoints into `target`, and replace older ones there."""
    from safetensors.torch import save_file

    pipe = make_pipeline(load_vae(folder))
    saved = torch.load(folder / "transformer.pt", map_location="cpu", weights_only=True)
    pipe.transformer.load_state_dict(saved["average"])
    for name in ("vae", "transformer", "text_encoder", "image_encoder"):
        getattr(pipe, name).to(torch.bfloat16)
    shutil.rmtree(target / FOLDER, ignore_errors=True)
    pipe.image_processor.size, pipe.image_processor.do_center_crop = {"shortest_edge": 28}, True  # as the hub's is
    pipe.save_pretrained(target / FOLDER, safe_serialization=True)
    shutil.rmtree(target / DISTILL_FOLDER, ignore_errors=True)
    if (folder / "lora.pt").exists():
        lora = torch.load(folder / "lora.pt", map_location="cpu", weights_only=True)["average"]
        (target / DISTILL_FOLDER).mkdir(parents=True)
        save_file(published_tensors(lora), target / DISTILL_FOLDER / f"demo_distill_rank{RANK}_bf16.safetensors")
    for file in (f for f in target.rglob("*") if f.is_file()):
        file.chmod(0o644)  # safetensors keeps its files to their owner
    size = sum(f.stat().st_size for f in target.rglob("*") if f.is_file())
    print(f"{target}: {size / 1e6:.2f} MB")

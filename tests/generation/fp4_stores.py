"""Stores for FP4 recipes, each with one way of having the transformer and without its source; and quick rendering."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file, save_file

from runner.generation.protocol import Request
from runner.quantization.files.checkpoint_write import quantize_store
from runner.quantization.formats.e2m1 import FORMATS
from runner.quantization.lora.apply import read_lora
from runner.quantization.rules import linear_shapes, transformer_on_meta
from runner.spec.options import JobOptions
from runner.spec.recipes import SOURCE_WEIGHTS
from runner.timing import StageTimer
from tests.generation.stub_conditions import MemoryConditions
from tests.quantization.lora_files import write_published

OWN = "Wan2.2-Animate-14B-FP4-distill/quantized_transformer.safetensors"
PLAIN = "Wan2.2-Animate-14B-FP4-plain/quantized_transformer.safetensors"
PUBLISHED = "Wan2.2-Animate-14B-FP4/quantized_transformer.safetensors"
DISTILL = "distill_lora/distill.safetensors"
STATED = {"group_size": 32, "nibble_order": "low_first", "codes": "e2m1", "scale": "multiply", "unit": "one"}
GRID = torch.tensor([0, 0.5, 1, 1.5, 2, 3, 4, 6])


class MemoryPreprocessor:
    """Stands where the real one does; every job has five frames of the same moving pictures."""

    description: Mapping[str, Any] = {"detector": "none"}

    @classmethod
    def load(cls, *_paths: Path, **_settings: Any) -> MemoryPreprocessor:
        return cls()

    def prepare(self, *_inputs: Any, **_settings: Any) -> MemoryConditions:
        return MemoryConditions(5)


def write_source(root: Path, tiny_store: Path) -> Path:
    """The tiny store with a distill LoRA, and something in place of the ONNX files."""
    shutil.copytree(tiny_store, root)
    for name in ("det/yolov10m.onnx", "pose2d/vitpose_h_wholebody.onnx"):
        file = root / "process_checkpoint" / name
        file.parent.mkdir(parents=True)
        file.write_bytes(b"graph")
    (root / DISTILL).parent.mkdir()
    write_published(root / DISTILL, transformer_config(root))
    return root


def write_own(root: Path, source: Path, *, fmt: str = "nvfp4", merged: bool = True) -> Path:
    """What `quantize` leaves, without the source's transformer and without the LoRA where it is merged."""
    copy_without_transformer(source, root)
    loras = [read_lora(source / DISTILL)] if merged else []
    out = root / (OWN if merged else PLAIN)
    quantize_store(source / SOURCE_WEIGHTS / "transformer", out, FORMATS[fmt], "mse", loras=loras, device="cpu")
    if merged:
        (root / DISTILL).unlink()
    return root


def write_seed(root: Path, source: Path, config: Mapping[str, Any] | None = STATED) -> Path:
    """Files in the manner of the published ones: absmax over groups of 32, scales in fp16; of the model its config."""
    copy_without_transformer(source, root)
    folder = root / SOURCE_WEIGHTS / "transformer"
    folder.mkdir()
    shutil.copy(source / SOURCE_WEIGHTS / "transformer/config.json", folder)
    tensors = source_weights(source)
    for layer in linear_shapes(transformer_on_meta(transformer_config(source))):
        weight = tensors.pop(f"{layer}.weight").float()
        groups = weight.reshape(weight.shape[0], -1, 32)
        scale = (groups.abs().amax(2) / 6).half()
        levels = groups / scale.float()[..., None]
        codes = (levels.abs()[..., None] - GRID).abs().argmin(-1) + 8 * (levels < 0)
        codes = codes.reshape(weight.shape).to(torch.uint8)
        tensors[f"{layer}.weight_packed"] = codes[:, 0::2] | codes[:, 1::2] << 4
        tensors[f"{layer}.weight_scale"] = scale
    (root / PUBLISHED).parent.mkdir()
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, root / PUBLISHED)
    if config is not None:
        (root / PUBLISHED).with_name("quantize_config.json").write_text(json.dumps(dict(config)))
    return root


def copy_without_transformer(source: Path, root: Path) -> None:
    shutil.copytree(source, root, ignore=shutil.ignore_patterns("transformer"))


def transformer_config(root: Path) -> dict[str, Any]:
    return dict(json.loads((root / SOURCE_WEIGHTS / "transformer/config.json").read_text()))


def source_weights(root: Path) -> dict[str, torch.Tensor]:
    return load_file(root / SOURCE_WEIGHTS / "transformer/diffusion_pytorch_model.safetensors")


def rendered(generator: Any, timer: StageTimer | None = None, **options: Any) -> np.ndarray:
    """uint8 [5, 64, 48, 3] of one job. `timer`: what generating it is timed by."""
    job = JobOptions(**{"steps": 3, "max_segment_frames": 5, **options})
    conditions = generator.prepare(Request(Path("anna.png"), Path("dance.mp4"), "a dance", job), StageTimer())
    plan = generator.plan(conditions.clip.frames, conditions.clip.size, job)
    return np.concatenate([s.frames for s in generator.generate(conditions, plan, timer or StageTimer())])


def psnr(one: np.ndarray, other: np.ndarray) -> float:
    """dB, of bytes."""
    error = float(np.mean((one.astype(np.float64) - other) ** 2))
    return 10 * float(np.log10(255**2 / error)) if error else float("inf")

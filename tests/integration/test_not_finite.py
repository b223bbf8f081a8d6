"""Weights that make NaN or infinity, through the command line: the job fails, and no output stands there."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file

from runner.cli import main

SOURCE = "Wan2.2-Animate-14B-Diffusers"


@pytest.fixture
def models(demo_models, tmp_path) -> Path:
    """The demo's store, to be damaged."""
    return Path(shutil.copytree(demo_models, tmp_path / "models"))


def run(folder: Path, models: Path, media: Path, jobs: dict[str, dict], run_id: str) -> int:
    clip = {"reference": str(media / "references/anna.png"), "video": str(media / "dances/wave.mp4")}
    options = {"size": "64x96", "fps": 8, "steps": 2, "max_frames": 5}
    listed = [{"id": name, **clip, "options": options | more} for name, more in jobs.items()]
    manifest = folder / "m.yaml"
    manifest.write_text(yaml.safe_dump({"version": 1, "recipe": "fp32", "jobs": listed}), encoding="utf-8")
    command = ["run", str(manifest), "--out", str(folder / "out"), "--models", str(models), "--run-id", run_id]
    return main([*command, "--cache", str(folder / "cache"), "--device", "cpu"])


def record(folder: Path, name: str) -> dict:
    return json.loads((folder / f"out/jobs/{name}/result.json").read_text("utf-8"))


@pytest.mark.parametrize(
    ("file", "tensor", "bad", "said"),
    [
        ("vae", "decoder.conv_out.bias", "nan", "vae_decode: NaN or infinity in output frame 0,"),
        ("transformer", "proj_out.bias", "inf", "denoise: NaN or infinity in the latents after step 1 of 2"),
    ],
)
def test_one_wrong_number_in_a_file_fails_the_job(models, demo_media, tmp_path, file, tensor, bad, said):
    path = models / SOURCE / file / "diffusion_pytorch_model.safetensors"
    tensors = load_file(path)
    tensors[tensor] = tensors[tensor].clone()
    tensors[tensor].view(-1)[0] = float(bad)
    save_file(tensors, path)
    assert run(tmp_path, models, demo_media, {"one": {}}, "r1") == 1
    error = record(tmp_path, "one")["error"]
    assert error["code"] == "output.not_finite"
    assert said in error["message"]
    assert (error["stage"], error["retryable"]) == ("generate", False)
    assert sorted(path.name for path in (tmp_path / "out/jobs/one").iterdir()) == ["result.json"]


def test_a_job_whose_own_lora_overflows_fails_alone(models, demo_media, tmp_path):
    """Every number of the LoRA is finite; their product with its strength is not."""
    bias = load_file(models / SOURCE / "transformer/diffusion_pytorch_model.safetensors")["proj_out.bias"]
    (models / "loras").mkdir()
    save_file({"proj_out.diff_b": torch.full_like(bias, 3e38)}, models / "loras/loud.safetensors")
    loud = {"loras": [{"name": "loud", "strength": 2.0}]}
    assert run(tmp_path, models, demo_media, {"before": {}, "loud": loud, "after": {"seed": 2}}, "r1") == 1
    assert record(tmp_path, "loud")["error"]["code"] == "output.not_finite"
    for name in ("before", "after"):
        assert record(tmp_path, name)["status"] == "succeeded"
        assert (tmp_path / f"out/jobs/{name}/output.mp4").stat().st_size > 0
    assert not (tmp_path / "out/jobs/loud/output.mp4").exists()
    summary = json.loads((tmp_path / "out/runs/r1/00000-of-00001.summary.json").read_text("utf-8"))
    assert summary["counts"]["succeeded"] == 2

"""The verbs `quantize` and `weights verify` as a user types them, on the demo's models."""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
import yaml
from safetensors import safe_open
from safetensors.torch import load_file

from runner.cli import main
from runner.quantization.formats.svdq import effective_weight
from runner.quantization.formats.svdq_layout import SVDQ_LAYOUTS
from runner.spec.recipes import SOURCE_WEIGHTS, get_recipe
from runner.weights.variant import TRANSFORMER_FILE, quantized_folder
from tests.quantization.lora_files import write_published

DISTILL = "distill_lora/distill.safetensors"
OWN = "Wan2.2-Animate-14B-FP4-distill/quantized_transformer.safetensors"
PLAIN = "Wan2.2-Animate-14B-FP4-plain/quantized_transformer.safetensors"
LAYERS = 65  # linears of the tiny transformer


@pytest.fixture
def models(demo_models: Path, tmp_path: Path) -> Path:
    """The demo's store as if nobody had quantised it, nor fetched a LoRA."""
    ignored = shutil.ignore_patterns(".*", "demo.json", "*-FP4*", "distill_lora", "loras")
    return Path(shutil.copytree(demo_models, tmp_path / "models", ignore=ignored))


def fetch_lora(models: Path) -> None:
    (models / DISTILL).parent.mkdir()
    config = json.loads((models / SOURCE_WEIGHTS / "transformer/config.json").read_text())
    write_published(models / DISTILL, config)


def quantize(models: Path, *flags: str) -> int:
    cache = models.parent / "cache"
    return main(["quantize", "--models", str(models), "--cache", str(cache), "--device", "cpu", *flags])


def metadata(file: Path) -> dict[str, str]:
    with safe_open(file, framework="pt") as opened:
        return dict(opened.metadata())


def write_manifest(folder: Path, media: Path, *jobs: dict[str, Any]) -> Path:
    place = {"reference": str(media / "references/anna.png"), "video": str(media / "dances/wave.mp4")}
    options = {"size": "64x96", "fps": 8, "max_frames": 5, "steps": 1}
    path = folder / "m.yaml"
    defaults = {"prompt": "a person is dancing", "options": options}
    path.write_text(yaml.safe_dump({"version": 1, "defaults": defaults, "jobs": [place | job for job in jobs]}))
    return path


def test_quantize_without_lora_of_default_recipe_exits_2(models, capsys):
    assert quantize(models) == 2
    said = capsys.readouterr().err
    assert "weights.missing" in said
    assert "merges a distill LoRA, but the folder has none" in said
    assert "video-lab weights fetch --recipe fp4-distill" in said
    assert not (models / OWN).exists()


def test_quantized_file_is_verified_and_rendered_from(models, demo_media, tmp_path, monkeypatch, capsys):
    fetch_lora(models)
    assert quantize(models) == 0
    assert f"{LAYERS} layers in nvfp4" in capsys.readouterr().out
    held = metadata(models / OWN)
    assert held["video_lab.scale_method"] == "mse"
    assert [lora["name"] for lora in json.loads(held["video_lab.loras"])] == ["distill"]
    assert sorted(p.name for p in (models / OWN).parent.iterdir()) == ["config.json", Path(OWN).name]

    shutil.rmtree(models / SOURCE_WEIGHTS / "transformer")
    (models / DISTILL).unlink()
    verify = ["weights", "verify", "--models", str(models), "--cache", str(tmp_path / "cache")]
    assert main(verify) == 0
    assert f"{OWN}  as recorded when it was made" in capsys.readouterr().out

    from runner.quantization.files import checkpoint_read

    loads: list[Path] = []
    honest = checkpoint_read.load_quantized
    monkeypatch.setattr(checkpoint_read, "load_quantized", lambda *args: (loads.append(args[1]), honest(*args))[1])
    manifest = write_manifest(tmp_path, demo_media, {"id": "a"}, {"id": "b", "options": {"seed": 7}})
    run = ["run", str(manifest), "--models", str(models), "--cache", str(tmp_path / "cache"), "--device", "cpu"]
    assert main([*run, "--out", str(tmp_path / "out")]) == 0
    assert loads == [models / OWN]
    result = json.loads((tmp_path / "out/jobs/b/result.json").read_text())
    assert (result["recipe"], result["output"]["frames"]) == ("fp4-distill", 5)
    assert result["engine"]["made_with"]["video_lab.sha256"] == held["video_lab.sha256"]
    assert result["engine"]["fp4_layers"] == LAYERS

    data = bytearray((models / OWN).read_bytes())
    data[-1] ^= 1
    (models / OWN).write_bytes(data)
    assert main(verify) == 2
    assert "corrupt" in capsys.readouterr().out
    (models / OWN).write_bytes(data[:-1])
    assert main([*run, "--out", str(tmp_path / "other")]) == 2
    assert "weights.corrupt" in capsys.readouterr().err
    assert not (tmp_path / "other/jobs").exists()
    (models / OWN).unlink()
    assert main(verify) == 2
    assert "missing" in capsys.readouterr().out


def test_quantize_with_calibration_manifest_watches_every_layer(models, demo_media, tmp_path, monkeypatch):
    """Every layer is watched with the LoRA active, and runs eagerly, without the compiled step of a GPU."""
    from runner.quantization import activations
    from runner.quantization.files import schemes

    fetch_lora(models)
    norm = "blocks.1.attn1.norm_q.weight"
    source = load_file(models / SOURCE_WEIGHTS / "transformer/diffusion_pytorch_model.safetensors")
    seen: dict[str, Any] = {}

    def watching(transformer: Any, watcher: Any) -> Any:
        seen["changed"] = not torch.equal(transformer.get_parameter(norm).float(), source[norm].float())
        return honest_watching(transformer, watcher)

    def quantize_with(fmt: Any, method: str, importance: Any) -> Any:
        seen["importance"] = importance
        return honest_scheme(fmt, method, importance)

    honest_watching, honest_scheme = activations.watching, schemes.Fp4Scheme
    monkeypatch.setattr(activations, "watching", watching)
    monkeypatch.setattr(schemes, "Fp4Scheme", quantize_with)
    monkeypatch.setattr(
        "runner.generation.wan_animate.compiled.make_block_forward",
        lambda *_: (SimpleNamespace(backend="inductor"), ""),
    )
    manifest = write_manifest(tmp_path, demo_media, {"id": "calibration"})
    assert quantize(models, "--calibrate", str(manifest)) == 0
    assert metadata(models / OWN)["video_lab.scale_method"] == "activation"
    assert seen["changed"]
    assert len(seen["importance"]) == LAYERS
    assert all(bool(torch.isfinite(mean).all()) and bool(mean.any()) for mean in seen["importance"].values())
    assert not (tmp_path / "cache/calibrate/calibration").exists()


def test_quantize_of_plain_recipe_takes_text_encoder_and_lora_flags(models, tmp_path, capsys):
    fetch_lora(models)
    flags = ["--recipe", "fp4", "--format", "g32", "--scales", "absmax", "--lora", f"{models / DISTILL}:0.5"]
    assert quantize(models, *flags, "--text-encoder") == 0
    out = capsys.readouterr().out
    assert f"{LAYERS} layers in g32" in out
    assert "in INT4" in out
    held = metadata(models / PLAIN)
    assert held["video_lab.scale_method"] == "absmax"
    assert json.loads(held["video_lab.loras"])[0]["strength"] == 0.5
    assert (models / PLAIN).with_name("quantized_text_encoder.safetensors").is_file()


@pytest.mark.parametrize("layout", SVDQ_LAYOUTS.values(), ids=SVDQ_LAYOUTS)
def test_quantize_to_svdq_works_without_and_with_calibration(models, demo_media, tmp_path, capsys, layout):
    """All linears but the last are quantised with the LoRA merged; metadata and output name the choices."""
    fetch_lora(models)
    file = models / quantized_folder(get_recipe(f"fp4-distill+{layout.name}")) / TRANSFORMER_FILE
    assert quantize(models, "--format", layout.name, "--rank", "16") == 0
    out, events = capsys.readouterr()
    assert f"{LAYERS - 1} layers in {layout.name}" in out
    assert "smoothing factors come from the weights alone" in out and "not_calibrated" in events
    held = metadata(file)
    assert held["video_lab.format"] == layout.name
    assert [lora["name"] for lora in json.loads(held["video_lab.loras"])] == ["distill"]
    chosen = {key: held[f"video_lab.{key}"] for key in ("group", "rank", "smoothing", "calibration", "refits")}
    wanted = {"group": str(layout.group), "rank": "16", "smoothing": "weights", "calibration": "{}", "refits": "0"}
    assert chosen == wanted
    plain = load_file(file)

    manifest = write_manifest(tmp_path, demo_media, {"id": "calibration", "options": {"steps": 2}})
    flags = ["--recipe", f"fp4-distill+{layout.name}", "--refits", "1", "--calibrate", str(manifest)]
    assert quantize(models, *flags) == 0
    out, events = capsys.readouterr()
    assert "smoothing factors come from the weights alone" not in out and "layer_not_calibrated" not in events
    held = metadata(file)
    assert json.loads(held["video_lab.calibration"]) == {"jobs": 1, "steps": 2, "rows": 128}
    assert [held[f"video_lab.{key}"] for key in ("rank", "smoothing", "refits")] == ["32", "calibrated", "1"]
    assert held["video_lab.scale_method"] == "activation"

    tensors = load_file(file)
    source = load_file(models / SOURCE_WEIGHTS / "transformer/diffusion_pytorch_model.safetensors")
    layers = [name.removesuffix(".qweight") for name in tensors if name.endswith(".qweight")]
    assert len(layers) == LAYERS - 1 and "proj_out.weight" in tensors
    layer = "blocks.1.ffn.net.2"
    rows, columns = source[f"{layer}.weight"].shape
    for found, rank in ((plain, 16), (tensors, 32)):
        shaped = layout.with_rank(rank)
        stored = {suffix: found[f"{layer}.{suffix}"] for suffix in shaped.tensor_table(rows, columns)}
        weight = effective_weight(stored, shaped)[:rows, :columns]
        assert (weight - source[f"{layer}.weight"].float()).norm() < 0.5 * weight.norm()  # the LoRA, and rounding
        assert found[f"{layer}.bias"].shape == (rows,)


@pytest.mark.parametrize("kind", ["lite", "cache-dit"])
def test_quantize_with_export_writes_svdq_folder(models, tmp_path, monkeypatch, capsys, kind):
    """Another module writes the folder; the verb passes the file and the path of its config."""
    given: list[Any] = []

    def export_svdq(*arguments: Any) -> Path:
        given.extend(arguments)
        return Path(arguments[2])

    exporter = ModuleType("runner.quantization.files.svdq_export")
    exporter.export_svdq = export_svdq  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, exporter.__name__, exporter)
    layout = next(iter(SVDQ_LAYOUTS.values()))
    folder = tmp_path / "exported"
    assert quantize(models, "--recipe", "fp4", "--format", layout.name, "--export", kind, str(folder)) == 0
    target = models / quantized_folder(get_recipe(f"fp4+{layout.name}"))
    assert given == [target / TRANSFORMER_FILE, kind, folder, target / "config.json"]
    assert f"{folder}: the same layers in another program's format" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (["--recipe", "bf16"], "uses the published weights, which need no quantising"),
        (["--recipe", "fp4", "--models", "s3://bucket/models"], "local folder"),
        (["--recipe", "fp4", "--lora", "gone.safetensors"], "gone.safetensors"),
        (["--recipe", "fp4", "--rule", "none"], "no rule 'none'"),
        (["--recipe", "fp4-fast", "--format", "svdq-int4"], "leaves to the device"),
        (["--format", "svdq-int4", "--export", "torch", "folder"], "must be lite or cache-dit, not 'torch'"),
        (["--format", "svdq-int4", "--rank", "17"], "multiples of 16"),
    ],
)
def test_quantize_with_unusable_flags_exits_2(models, capsys, flags, said):
    assert quantize(models, *flags) == 2
    assert said in capsys.readouterr().err
    assert not (models / PLAIN).exists()


def test_quantize_on_missing_gpu_exits_2(models, capsys, monkeypatch):
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    assert quantize(models, "--recipe", "fp4", "--device", "cuda") == 2
    assert "device 'cuda' was asked for, but" in capsys.readouterr().err
    assert not (models / PLAIN).exists()


@pytest.mark.parametrize("fmt", ["nvfp4", "g32"])
def test_weights_verify_plan_lists_every_layer(models, capsys, fmt):
    assert main(["weights", "verify", "--plan", "--models", str(models), "--format", fmt]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[-1].startswith(f"{LAYERS} layers quantised: ")
    row = next(line.split() for line in lines if line.startswith("blocks.1.ffn.net.2 "))
    per_weight = 0.5 + (1 / 16 if fmt == "nvfp4" else 2 / 32)
    assert row[1] == "64x128"
    assert int(row[2].replace(",", "")) == 64 * 128 * per_weight + (4 if fmt == "nvfp4" else 0)

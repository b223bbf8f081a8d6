"""SVDQuant as a user types it: `quantize`, `weights verify`, `plan`, `run`, on the demo's models with random weights.

Nothing is said of quality: rank 32 is a fifth of these models' width.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import yaml
from safetensors import safe_open

from runner.cli import main
from runner.quantization.formats.svdq_layout import SVDQ_LAYOUTS
from runner.spec.recipes import SOURCE_WEIGHTS
from tests.quantization.lora_files import write_published
from tests.system_tests import system_test

FORMATS = pytest.mark.parametrize("fmt", SVDQ_LAYOUTS)
LAYERS = 64  # linears of the demo's transformer without `proj_out`


@pytest.fixture
def models(demo_models: Path, tmp_path: Path) -> Path:
    """The demo's store with a distill LoRA, and no quantised file."""
    ignored = shutil.ignore_patterns(".*", "demo.json", "*-FP4*", "distill_lora", "loras")
    root = Path(shutil.copytree(demo_models, tmp_path / "models", ignore=ignored))
    (root / "distill_lora").mkdir()
    config = json.loads((root / SOURCE_WEIGHTS / "transformer/config.json").read_text())
    write_published(root / "distill_lora/distill.safetensors", config)
    return root


def write_manifest(folder: Path, media: Path, *jobs: dict[str, Any]) -> str:
    place = {"reference": str(media / "references/anna.png"), "video": str(media / "dances/wave.mp4")}
    options = {"size": "64x96", "fps": 8, "max_frames": 5, "steps": 1}
    path = folder / "m.yaml"
    defaults = {"prompt": "a person is dancing", "options": options}
    path.write_text(yaml.safe_dump({"version": 1, "defaults": defaults, "jobs": [place | job for job in jobs]}))
    return str(path)


@system_test
@FORMATS
def test_a_calibrated_file_is_made_verified_planned_and_rendered_from(fmt, models, demo_media, tmp_path, capsys):
    manifest = write_manifest(tmp_path, demo_media, {"id": "a"})
    places = ["--models", str(models), "--cache", str(tmp_path / "cache")]
    assert main(["quantize", *places, "--device", "cpu", "--format", fmt, "--calibrate", manifest]) == 0
    folder = models / f"Wan2.2-Animate-14B-{fmt.upper()}-distill"
    file = folder / "quantized_transformer.safetensors"
    with safe_open(file, framework="pt") as opened:
        held, names = dict(opened.metadata()), set(opened.keys())
    assert (held["video_lab.format"], held["video_lab.rank"], held["video_lab.smoothing"]) == (fmt, "32", "calibrated")
    assert json.loads(held["video_lab.calibration"])["jobs"] == 1
    assert [lora["name"] for lora in json.loads(held["video_lab.loras"])] == ["distill"]
    assert sum(name.endswith(".qweight") for name in names) == LAYERS
    assert "proj_out.weight" in names

    recipe = f"fp4-distill+{fmt}"
    capsys.readouterr()
    assert main(["weights", "verify", *places, "--recipe", recipe]) == 0
    assert f"{file.relative_to(models)}  as recorded when it was made" in capsys.readouterr().out
    assert main(["plan", manifest, *places, "--recipe", recipe]) == 0
    assert "GB" in capsys.readouterr().out

    run = ["run", manifest, *places, "--device", "cpu", "--recipe", recipe]
    assert main([*run, "--out", str(tmp_path / "out")]) == 0
    record = tmp_path / "out/jobs/a/result.json"
    result = json.loads(record.read_text())
    engine = result["engine"]
    assert (result["recipe"], result["output"]["frames"]) == (recipe, 5)
    assert (engine["compute"], engine["compute_product"]) == (fmt, "reference")
    assert (engine["format"], engine["made_with"]["video_lab.rank"]) == (fmt, "32")
    assert engine["made_with"]["video_lab.smoothing"] == "calibrated"
    assert engine["compute_layers"] > 0

    capsys.readouterr()
    assert main([*run, "--out", str(tmp_path / "out")]) == 0  # done already: the fingerprint is the same
    assert json.loads(record.read_text()) == result

    data = bytearray(file.read_bytes())
    data[-1] ^= 1
    file.write_bytes(data)
    assert main(["weights", "verify", *places, "--recipe", recipe]) == 2
    assert "corrupt" in capsys.readouterr().out


@FORMATS
def test_without_a_file_the_run_says_how_to_make_one(fmt, models, demo_media, tmp_path, capsys):
    manifest = write_manifest(tmp_path, demo_media, {"id": "a"})
    places = ["--models", str(models), "--cache", str(tmp_path / "cache"), "--out", str(tmp_path / "out")]
    assert main(["run", manifest, *places, "--device", "cpu", "--recipe", f"fp4-distill+{fmt}"]) == 2
    said = capsys.readouterr().err
    assert "weights.missing" in said
    assert f"video-lab quantize --recipe fp4-distill --format {fmt}" in said
    assert not (tmp_path / "out/jobs").exists()


def test_weights_of_the_source_have_no_such_word(models, demo_media, tmp_path, capsys):
    manifest = write_manifest(tmp_path, demo_media, {"id": "a"})
    places = ["--models", str(models), "--cache", str(tmp_path / "cache"), "--out", str(tmp_path / "out")]
    assert main(["run", manifest, *places, "--recipe", "bf16+svdq-int4"]) == 2
    assert "fp4+svdq-int4" in capsys.readouterr().err

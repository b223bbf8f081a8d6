"""SVDQuant as a user types it: `quantize`, `weights verify`, `plan`, `run`, on the demo's models with random weights.

Nothing is said of quality: rank 32 is a fifth of these models' width.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import av
import numpy as np
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


def psnr(found: Path, wanted: Path) -> float:
    """dB, over all frames."""
    frames = []
    for path in (found, wanted):
        with av.open(str(path)) as opened:
            frames.append(np.stack([frame.to_ndarray(format="rgb24") for frame in opened.decode(video=0)]))
    error = np.mean((frames[0].astype(np.float64) - frames[1]) ** 2)
    return float("inf") if error == 0 else float(10 * np.log10(255**2 / error))


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

    assert main([*run, "--out", str(tmp_path / "streamed"), "--memory", "stream"]) == 0
    streamed = json.loads((tmp_path / "streamed/jobs/a/result.json").read_text())
    assert (streamed["engine"]["memory"]["mode"], streamed["output"]["frames"]) == ("stream", 5)
    assert psnr(tmp_path / "streamed/jobs/a/output.mp4", tmp_path / "out/jobs/a/output.mp4") > 40

    data = bytearray(file.read_bytes())
    data[-1] ^= 1
    file.write_bytes(data)
    assert main(["weights", "verify", *places, "--recipe", recipe]) == 2
    assert "corrupt" in capsys.readouterr().out


@system_test
def test_a_job_s_lora_joins_the_low_rank_part_and_leaves_with_the_job(models, demo_media, tmp_path):
    own = models / "loras/own.safetensors"
    own.parent.mkdir()
    write_published(own, json.loads((models / SOURCE_WEIGHTS / "transformer/config.json").read_text()), seed=7)
    places = ["--models", str(models), "--cache", str(tmp_path / "cache"), "--device", "cpu"]
    assert main(["quantize", *places, "--format", "svdq-nvfp4"]) == 0
    with_lora = {"options": {"loras": [{"name": "own", "strength": 1.0}]}}
    manifest = write_manifest(tmp_path, demo_media, {"id": "a"}, {"id": "b"} | with_lora, {"id": "c"})
    run = ["run", manifest, *places, "--recipe", "fp4-distill+svdq-nvfp4", "--out", str(tmp_path / "out")]
    assert main(run) == 0
    a, b, c = (tmp_path / f"out/jobs/{name}/output.mp4" for name in "abc")
    assert a.read_bytes() == c.read_bytes()
    assert psnr(a, b) < 40


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

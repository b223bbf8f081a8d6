"""Families: a model is a row of a table. A stub that needs no detector, pose or torch goes through every verb."""

from __future__ import annotations

import ast
import json
import subprocess
import sys
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from runner.cli import main
from runner.errors import ConfigInvalid, JobWeightsMissing, WeightsMissing
from runner.forecast.seconds import DeviceSpeed
from runner.generation import families
from runner.generation.families import EngineSettings, Forecaster, get_family
from runner.generation.protocol import SegmentPlan
from runner.hashing import sha256_file
from runner.spec import recipes
from runner.spec.options import JobOptions
from runner.spec.recipes import Recipe, get_recipe
from tests.stub_generator import StubGenerator
from tests.video_files import make_clip

WEIGHTS = "echo.weights"


@dataclass(frozen=True)
class EchoForecaster:
    weights: int  # bytes

    def plan(
        self, frames: int, size: tuple[int, int], options: JobOptions, device: DeviceSpeed | None = None
    ) -> SegmentPlan:
        return StubGenerator().plan(frames, size, options)

    def memory(self, plan: SegmentPlan, options: JobOptions, device: DeviceSpeed | None = None) -> dict[str, int]:
        return {"resident": self.weights + 3 * plan.width * plan.height}

    why_eager = Forecaster.why_eager  # the protocol's own answer

    def eager_words(self, why: str, plan: SegmentPlan, options: JobOptions, device: DeviceSpeed | None) -> str:
        return why


@dataclass(frozen=True)
class EchoModel:
    weights: Path

    @property
    def identity(self) -> dict[str, str]:
        return {"echo": sha256_file(self.weights)}

    @property
    def files(self) -> tuple[Path, ...]:
        return (self.weights,)

    def job_identity(self, options: JobOptions, *, has_mask: bool) -> Mapping[str, str]:
        ECHO.check_job(self.weights.parent, options, has_mask=has_mask)
        return {}

    def load(self) -> StubGenerator:
        return StubGenerator(identity=self.identity, description={"model": "echo", "device": "none"})


@dataclass(frozen=True)
class EchoFamily:
    """All that a second model brings, beside its recipe."""

    def wanted(self, recipe: Recipe) -> Callable[[str], bool]:
        return lambda key: key == WEIGHTS

    def wanted_by_jobs(self, options: Iterable[JobOptions]) -> Callable[[str], bool]:
        return lambda key: key == WEIGHTS

    def resolve(self, models: Path, recipe: Recipe, settings: EngineSettings) -> EchoModel:
        if not (models / WEIGHTS).is_file():
            raise WeightsMissing(f"no {WEIGHTS}", where=models, todo="Put it there")
        return EchoModel(models / WEIGHTS)

    def check_job(self, models: Path, options: JobOptions, *, has_mask: bool) -> None:
        if options.loras:
            raise JobWeightsMissing("an echo has no LoRAs", where=models, todo="Leave loras out")

    def forecaster(self, recipe: Recipe, models: Path | None) -> EchoForecaster:
        return EchoForecaster(0 if models is None else (models / WEIGHTS).stat().st_size)


ECHO = EchoFamily()


@pytest.fixture
def echo(tmp_path, monkeypatch):
    """echo(verb, …): the exit code of a verb on two jobs of a recipe whose family is a row, and nothing else."""
    monkeypatch.setitem(families.FAMILIES, "echo", f"{__name__}:ECHO")
    recipe = replace(get_recipe("fp32"), name="echo", family="echo", steps=2, summary="plain frames")
    monkeypatch.setattr(recipes, "RECIPES", {**recipes.RECIPES, "echo": recipe})
    monkeypatch.setattr("runner.preprocess.prepare.Preprocessor.load", None)  # a stub has none
    models = tmp_path / "models"
    models.mkdir()
    (models / WEIGHTS).write_bytes(b"echo" * 250)
    Image.fromarray(np.full((96, 64, 3), 200, np.uint8)).save(tmp_path / "r.png")
    make_clip(tmp_path / "v.mp4", 6, 8)
    jobs = [{"id": name, "reference": "r.png", "video": "v.mp4", "prompt": name} for name in ("one", "two")]
    options = {"size": "64x48", "fps": 8}
    text = json.dumps({"version": 1, "recipe": "echo", "defaults": {"options": options}, "jobs": jobs})
    (tmp_path / "jobs.yaml").write_text(text)

    def call(verb: str, *flags: str) -> int:
        manifest = [] if verb == "doctor" else [str(tmp_path / "jobs.yaml")]
        common = ["--models", str(models), "--cache", str(tmp_path / "cache")]
        return main([verb, *manifest, *common, *flags])

    return call


def records(out: Path) -> dict[str, dict]:
    return {path.parent.name: json.loads(path.read_text()) for path in sorted(out.glob("jobs/*/result.json"))}


def test_stub_family_goes_through_every_verb(echo, tmp_path, capsys):
    out = tmp_path / "out"
    assert echo("validate") == 0
    assert echo("plan") == 0
    assert "one" in (planned := capsys.readouterr().out) and "two" in planned
    assert echo("doctor", "--recipe", "echo", "--device", "cpu") == 0
    assert "has all files of recipe echo" in capsys.readouterr().out
    assert echo("run", "--out", str(out)) == 0
    first = records(out)
    assert {name: record["status"] for name, record in first.items()} == {"one": "succeeded", "two": "succeeded"}
    assert first["one"]["fingerprint_parts"]["model.recipe.family"] == "echo"
    assert (out / "jobs/one/output.mp4").is_file()
    assert echo("run", "--out", str(out)) == 0
    assert records(out) == first


def test_stub_family_with_other_weights_renders_again(echo, tmp_path, capsys):
    out = tmp_path / "out"
    assert echo("run", "--out", str(out)) == 0
    (tmp_path / "models" / WEIGHTS).write_bytes(b"other")
    capsys.readouterr()
    assert echo("run", "--out", str(out), "--log-format", "json") == 0
    assert "model.echo: " in capsys.readouterr().err


def test_stub_family_with_missing_weights_stops_run(echo, tmp_path, capsys):
    (tmp_path / "models" / WEIGHTS).unlink()
    assert echo("run", "--out", str(tmp_path / "out")) == 2
    assert "weights.missing" in capsys.readouterr().err
    assert echo("doctor", "--recipe", "echo", "--device", "cpu") == 2


def test_stub_family_with_unsupported_job_option_fails_only_that_job(echo, tmp_path, capsys):
    manifest = json.loads((tmp_path / "jobs.yaml").read_text())
    manifest["jobs"][0]["options"] = {"loras": [{"name": "style"}]}
    (tmp_path / "jobs.yaml").write_text(json.dumps(manifest))
    assert echo("validate") == 1
    assert "an echo has no LoRAs" in capsys.readouterr().out
    assert echo("run", "--out", str(tmp_path / "out")) == 1
    assert {name: record["status"] for name, record in records(tmp_path / "out").items()} == {
        "one": "failed",
        "two": "succeeded",
    }


def test_unknown_family_is_refused_with_names_of_known_families():
    with pytest.raises(ConfigInvalid, match="'nothing'") as caught:
        get_family(replace(get_recipe("fp32"), family="nothing"))
    assert "wan-animate" in str(caught.value.todo)


def test_families_table_rows_have_all_family_methods():
    for name in families.FAMILIES:
        family = get_family(replace(get_recipe("fp32"), family=name))
        for method in ("wanted", "wanted_by_jobs", "resolve", "check_job", "forecaster"):
            assert callable(getattr(family, method)), f"{name} lacks {method}"
    assert {recipe.family for recipe in recipes.RECIPES.values()} <= families.FAMILIES.keys()


def test_cli_batch_and_verbs_import_no_model_package():
    root = Path(families.__file__).parents[1]
    for path in [root / "cli.py", *(root / "batch").glob("*.py"), *(root / "verbs").glob("*.py")]:
        if path.stem == "quantize":  # it makes this model's files
            continue
        for node in ast.walk(ast.parse(path.read_text())):
            names = [node.module or ""] if isinstance(node, ast.ImportFrom) else []
            names += [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            assert not any("wan_animate" in name for name in names), f"{path.name}, line {node.lineno}"


def test_family_is_resolved_without_torch(demo_models, tmp_path):
    code = """
import sys
from pathlib import Path
from runner.generation.families import EngineSettings, Forecaster, get_family
from runner.spec.options import JobOptions
from runner.spec.recipes import get_recipe
for name in ("fp4-distill", "bf16"):
    recipe = get_recipe(name)
    family = get_family(recipe)
    model = family.resolve(Path(sys.argv[1]), recipe, EngineSettings(cache=Path(sys.argv[2])))
    assert model.identity and model.job_identity(JobOptions(), has_mask=False) == {}
    plan = family.forecaster(recipe, Path(sys.argv[1])).plan(81, (480, 832), JobOptions())
    assert family.forecaster(recipe, None).memory(plan, JobOptions())["minimal"] > 0
assert not {"torch", "diffusers", "transformers", "onnxruntime"} & sys.modules.keys()
"""
    subprocess.run([sys.executable, "-c", code, str(demo_models), str(tmp_path)], check=True)


def test_resolved_files_are_each_weight_file_of_recipe_once(demo_models):
    """These files are read into the page cache before several processes load them: every file, each once."""
    recipe = get_recipe("fp32")
    files = get_family(recipe).resolve(demo_models, recipe, EngineSettings(device="cpu")).files
    folder = demo_models / recipe.weights
    weights = {path for path in folder.rglob("*.safetensors") if path.parent.name != "image_processor"}
    assert weights <= set(files)
    assert {path.suffix for path in files if folder not in path.parents} == {".onnx"}
    assert len(set(files)) == len(files)
    assert all(path.is_file() for path in files)

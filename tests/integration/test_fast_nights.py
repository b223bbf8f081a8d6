"""Nights with `fp4-fast` by the command line, on the CPU and with a GPU's choice forced on it: done, told, compared."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import yaml

from runner.cli import main
from runner.generation.runtime import compute
from runner.generation.wan_animate import loading

OPTIONS = {"size": "64x96", "fps": 8, "max_frames": 5, "max_segment_frames": 5, "steps": 1}


def choose_as(patch: pytest.MonkeyPatch, capability: tuple[int, int]) -> None:
    """What a GPU of this capability would choose, computed on the CPU."""
    patch.setattr(compute, "capability_of", lambda _: capability)
    patch.setattr(loading, "capability_of", lambda _: capability)


class Lab:
    def __init__(self, folder: Path, models: Path, media: Path) -> None:
        self.folder, self.models = folder, models
        job = {"id": "a", "reference": f"{media}/references/anna.png", "video": f"{media}/dances/wave.mp4"}
        self.manifest = folder / "night.yaml"
        document = {"version": 1, "recipe": "fp4-fast", "defaults": {"options": OPTIONS}, "jobs": [job]}
        self.manifest.write_text(yaml.safe_dump(document), encoding="utf-8")

    def run(self, night: str, *more: str, out: str | None = None) -> None:
        words = ["run", str(self.manifest), "--out", str(self.folder / (out or night)), "--models", str(self.models)]
        assert main([*words, "--device", "cpu", "--cache", str(self.folder / "cache"), "--run-id", night, *more]) == 0

    def record(self, night: str) -> dict:
        return json.loads((self.folder / night / "jobs/a/result.json").read_bytes())


@pytest.fixture(scope="module")
def lab(tmp_path_factory, demo_models, demo_media) -> Lab:
    """`cpu`: as the CPU chooses; `hopper` and `again`: as an H200 would; `distilled`: fp4-distill on the CPU."""
    lab = Lab(tmp_path_factory.mktemp("fast"), demo_models, demo_media)
    lab.run("cpu")
    lab.run("distilled", "--recipe", "fp4-distill")
    with pytest.MonkeyPatch.context() as patch:
        choose_as(patch, (9, 0))
        lab.run("hopper")
        lab.run("again")
    return lab


def test_records_name_the_recipe_asked_for_and_what_was_chosen(lab):
    cpu, hopper, distilled = (lab.record(night) for night in ("cpu", "hopper", "distilled"))
    assert cpu["output"]["frames_sha256"] == distilled["output"]["frames_sha256"]
    assert cpu["fingerprint"] == hopper["fingerprint"] != distilled["fingerprint"]
    assert hopper["fingerprint_parts"]["model.recipe.choice"] == "fast"
    assert hopper["fingerprint_parts"]["model.recipe.compute"] == "bf16"
    assert "model.recipe.choice" not in distilled["fingerprint_parts"]
    assert cpu["recipe"] == hopper["recipe"] == "fp4-fast"
    assert (cpu["engine"]["choice"]["compute"], hopper["engine"]["choice"]["compute"]) == ("bf16", "fp8")
    assert hopper["engine"]["choice"]["vae"] == "float16" and hopper["engine"]["choice"]["why"]["attention"]
    assert "choice" not in distilled["engine"]


def test_a_job_that_another_device_rendered_is_done(lab, capsys):
    """Its fingerprint does not say what was chosen; another recipe renders it anew."""
    before = lab.record("hopper")
    lab.run("later", out="hopper")
    assert lab.record("hopper") == before and "1 skipped" in capsys.readouterr().out
    lab.run("other", "--recipe", "fp4-distill", "--dry-run", out="hopper")
    assert "model.recipe.choice: fast → (empty)" in capsys.readouterr().out


def test_the_report_names_the_recipe(lab, capsys):
    assert main(["report", str(lab.folder / "hopper"), "--run", "hopper", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["recipe"] == "fp4-fast"
    assert main(["status", str(lab.folder / "hopper")]) == 0


def test_nights_are_compared_with_their_own_recipe_and_say_when_a_device_chose_otherwise(lab, tmp_path, capsys):
    baseline, cache = str(tmp_path / "baseline"), ["--cache", str(tmp_path / "cache")]
    nights = {night: str(lab.folder / night) for night in ("cpu", "hopper", "again", "distilled")}
    assert main(["approve", nights["hopper"], "--baseline", baseline, "--why", "looked at", *cache]) == 0

    def compared(night: str) -> tuple[int, dict]:
        report = tmp_path / night
        code = main(["compare", nights[night], "--baseline", baseline, "--report", str(report), *cache])
        found = report / "comparison.json"
        return code, json.loads(found.read_bytes()) if found.exists() else {}

    code, found = compared("again")
    (job,) = found["jobs"]
    assert code == 0 and (job["recipe"], job["verdict"], job["exact"]) == ("fp4-fast", "identical", True)
    _, found = compared("cpu")
    (job,) = found["jobs"]
    assert not job["exact"] and any(line.startswith("compute: fp8") for line in found["environment"])
    capsys.readouterr()
    assert compared("distilled")[0] == 2 and "has none of these jobs" in capsys.readouterr().err

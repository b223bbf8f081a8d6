"""A rerun with nothing to do is answered by records and headers: no model library is imported."""

from __future__ import annotations

import json
import subprocess
import sys

from runner.cli import main
from runner.generation.wan_animate.family import WanAnimateModel
from tests.stub_generator import StubGenerator

RERUN = """
import json, sys
from runner.cli import main
code = main(sys.argv[1:])
print(json.dumps({"code": code, "modules": sorted(sys.modules)}))
"""
HEAVY = {"torch", "diffusers", "transformers", "onnxruntime", "av", "cv2", "PIL", "boto3"}


def test_a_rerun_with_nothing_to_do_imports_no_model_library(demo_models, demo_media, tmp_path, monkeypatch):
    """The weights are resolved and identified as ever; only the frames of the first run are a stub's."""
    monkeypatch.setattr(WanAnimateModel, "load", lambda self: StubGenerator())
    place = {"reference": str(demo_media / "references/anna.png"), "video": str(demo_media / "dances/wave.mp4")}
    lines = [json.dumps({"id": name, **place, "prompt": name}) for name in ("a", "b", "c")]
    (tmp_path / "jobs.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")
    command = ["run", str(tmp_path / "jobs.jsonl"), "--out", str(tmp_path / "out"), "--models", str(demo_models)]
    command += ["--cache", str(tmp_path / "cache"), "--log-format", "json"]
    assert main(command) == 0
    monkeypatch.undo()

    done = subprocess.run([sys.executable, "-c", RERUN, *command], capture_output=True, text=True, check=True)
    seen = json.loads(done.stdout.splitlines()[-1])
    assert seen["code"] == 0 and "3 skipped" in done.stdout
    assert HEAVY & set(seen["modules"]) == set()


def test_weights_that_changed_are_seen_by_the_rerun(demo_models, demo_media, tmp_path, monkeypatch):
    """Else a rerun that loads nothing could call old frames done."""
    monkeypatch.setattr(WanAnimateModel, "load", lambda self: StubGenerator())
    monkeypatch.setattr(
        WanAnimateModel, "identity", property(lambda self: {**self.models.digests, "vae": "edited" + "0" * 58})
    )
    place = {"reference": str(demo_media / "references/anna.png"), "video": str(demo_media / "dances/wave.mp4")}
    (tmp_path / "jobs.jsonl").write_text(json.dumps({"id": "a", **place}) + "\n", encoding="utf-8")
    command = ["run", str(tmp_path / "jobs.jsonl"), "--out", str(tmp_path / "out"), "--models", str(demo_models)]
    command += ["--cache", str(tmp_path / "cache")]
    assert main(command) == 0
    before = json.loads((tmp_path / "out/jobs/a/result.json").read_text())
    monkeypatch.undo()
    monkeypatch.setattr(WanAnimateModel, "load", lambda self: StubGenerator())
    assert main(command) == 0
    after = json.loads((tmp_path / "out/jobs/a/result.json").read_text())
    assert after["reason"].startswith("model.vae: edited") and after["fingerprint"] != before["fingerprint"]

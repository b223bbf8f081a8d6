"""Collect what users and old records rely on, to be compared with the files beside this module.

    python -m tests.goldens.collect help fingerprints           writes help.json, fingerprints.json
    python -m tests.goldens.collect demo --cpu-seconds 66       writes demo.json from what `make demo` rendered
    python -m tests.goldens.collect examples                    writes the folders of examples/ by its page's commands

A golden file is written again only for a change that is meant, in the commit that makes it.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import shlex
from collections.abc import Iterator
from importlib import metadata
from pathlib import Path
from typing import Any

from runner.batch.fingerprint import fingerprint, fingerprint_parts
from runner.cli import main as main_of_runner
from runner.cli import parser
from runner.records.record import InputRecord
from runner.spec.manifest import load_manifest
from runner.spec.recipes import DEFAULT_RECIPE, get_recipe

__all__ = [
    "EXAMPLES",
    "FOLDER",
    "MANIFESTS",
    "demo_frames",
    "example_commands",
    "help_texts",
    "machine",
    "manifest_fingerprints",
    "read",
    "write_examples",
]

FOLDER = Path(__file__).resolve().parent
MANIFESTS = FOLDER.parents[1] / "manifests"
EXAMPLES = FOLDER.parents[1] / "examples"
WIDTH = "120"  # columns that argparse formats for
NUMERIC_PACKAGES = ("torch", "diffusers", "transformers", "onnxruntime", "numpy", "opencv-python-headless", "av")


def help_texts() -> dict[str, str]:
    """Verb → its `--help`, white space collapsed: Python versions break lines at different places."""
    before = os.environ.get("COLUMNS")
    os.environ["COLUMNS"] = WIDTH
    try:
        texts = dict(_helps("", parser()))
    finally:
        if before is None:
            del os.environ["COLUMNS"]
        else:
            os.environ["COLUMNS"] = before
    return {name: " ".join(text.split()) for name, text in texts.items()}


def _helps(name: str, verb: argparse.ArgumentParser) -> Iterator[tuple[str, str]]:
    """(name, `--help`) of a verb and of those below it: `weights`, `weights fetch`, …"""
    yield name, verb.format_help()
    for action in verb._actions:
        if isinstance(action, argparse._SubParsersAction):
            for below, made in action.choices.items():
                yield from _helps(f"{name} {below}".strip(), made)


def manifest_fingerprints() -> dict[str, dict[str, str]]:
    """Manifest's file name → job id → fingerprint, as version 0.1.0 hashed it.

    Inputs and weights stand for themselves by name, so that no file is read: what is tested are names, values and
    defaults of options and recipes, and how they are hashed.
    """
    found = {}
    for path in sorted([*MANIFESTS.glob("*.yaml"), *MANIFESTS.glob("*.jsonl")]):
        manifest = load_manifest(str(path))
        recipe = get_recipe(manifest.recipe or DEFAULT_RECIPE)
        identity = {f"recipe.{name}": str(value) for name, value in recipe.effective().items()}
        identity["transformer"] = "0" * 64
        jobs = {}
        for job in manifest.jobs:
            uris = {"reference": job.reference, "video": job.video, "mask": job.mask}
            inputs = {
                name: InputRecord(uri=uri, bytes=0, identity=f"name:{Path(uri).name}")
                for name, uri in uris.items()
                if uri
            }
            jobs[job.id] = fingerprint(fingerprint_parts(job, inputs, identity))
        found[path.name] = jobs
    return found


def machine() -> dict[str, Any]:
    """What a CPU's frames depend on beside the fingerprint: its model and the packages that compute."""
    lines = Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else []
    names = dict(line.replace("\t", "").split(":", 1) for line in lines if ":" in line)
    cpu = " ".join(names.get(key, "?").strip() for key in ("vendor_id", "cpu family", "model", "model name"))
    installed = {found.name: found.version for found in metadata.distributions()}
    packages = {name: installed.get(name) for name in NUMERIC_PACKAGES}
    return {"cpu": cpu, "cores": os.cpu_count(), "packages": packages}


def demo_frames(out: Path) -> dict[str, dict[str, str]]:
    """Job id → its fingerprint, its frames' digest and its MP4's, from the records of `out`."""
    found = {}
    for path in sorted(out.glob("jobs/*/result.json")):
        record = json.loads(path.read_text(encoding="utf-8"))
        output = record["output"]
        found[record["job_id"]] = {
            "fingerprint": record["fingerprint"],
            "frames_sha256": output["frames_sha256"],
            "sha256": output["sha256"],
        }
    return found


def example_commands() -> list[list[str]]:
    """The words of each `video-lab submit` on the page of examples/, without `video-lab`."""
    page = (EXAMPLES / "README.md").read_text(encoding="utf-8").replace("\\\n", " ")
    return [shlex.split(line)[1:] for line in page.splitlines() if line.startswith("video-lab submit ")]


def write_examples(folder: Path) -> None:
    """Type those commands in examples/, writing below `folder` instead."""
    with contextlib.chdir(EXAMPLES):
        for words in example_commands():
            at = words.index("--render-only") + 1
            words[at] = str(folder / words[at])
            if main_of_runner(words) != 0:
                raise SystemExit(f"video-lab {shlex.join(words)} failed")


def read(name: str) -> Any:
    return json.loads((FOLDER / f"{name}.json").read_text(encoding="utf-8"))


def write(name: str, value: Any) -> None:
    text = json.dumps(value, indent=1, ensure_ascii=False, sort_keys=True)
    (FOLDER / f"{name}.json").write_text(text + "\n", encoding="utf-8")


def main() -> None:
    arguments = argparse.ArgumentParser(description="Write golden files.")
    arguments.add_argument("what", choices=("help", "fingerprints", "demo", "examples"), nargs="+")
    arguments.add_argument("--out", type=Path, default=Path("out/demo"), help="demo: the output folder of `make demo`")
    arguments.add_argument("--cpu-seconds", type=float, help="demo: user and system seconds that `make demo` took")
    chosen = arguments.parse_args()
    if "help" in chosen.what:
        write("help", help_texts())
    if "fingerprints" in chosen.what:
        write("fingerprints", manifest_fingerprints())
    if "examples" in chosen.what:
        write_examples(EXAMPLES)
    if "demo" in chosen.what:
        write("demo", {"machine": machine(), "cpu_seconds": chosen.cpu_seconds, "jobs": demo_frames(chosen.out)})


if __name__ == "__main__":
    main()

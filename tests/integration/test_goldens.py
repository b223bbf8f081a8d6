"""Help texts, fingerprints and frames are those of the golden files; `tests/goldens/collect.py` writes them."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml

from runner.cli import main
from tests.goldens.collect import MANIFESTS, demo_frames, help_texts, machine, manifest_fingerprints, read

CACHE = Path(__file__).resolve().parents[2] / ".cache"
RENDERED = ("juno-jacks-with-sound", "mira-wave", "otto-replaces-the-jumper")  # two segments; one; a made mask


@pytest.mark.parametrize("verb", read("help"))
def test_help_equals_the_golden(verb):
    assert help_texts()[verb] == read("help")[verb]


def test_every_verb_has_a_golden():
    assert help_texts().keys() == read("help").keys()


def test_fingerprints_of_the_manifests_equal_the_golden():
    assert manifest_fingerprints() == read("fingerprints")


def test_demo_frames_equal_the_golden(demo_media, tmp_path):
    """Bit for bit, on a machine like the golden file's; other CPUs and other packages sum in another order."""
    from runner.demo.build import build_demo_models

    golden = read("demo")
    here = machine()
    if here != golden["machine"]:
        pytest.skip(f"frames are promised equal on equal machines: golden {golden['machine']}, here {here}")
    build_demo_models(CACHE / "demo-models")
    manifest = yaml.safe_load((MANIFESTS / "demo.yaml").read_text(encoding="utf-8"))
    kinds = ("references", "videos")
    manifest["matrix"] = {
        kind: [str((MANIFESTS / path).resolve()) for path in manifest["matrix"][kind][:1]] for kind in kinds
    }
    jobs = [job for job in manifest["jobs"] if job["id"] in RENDERED]
    for job in jobs:
        job |= {name: str((MANIFESTS / job[name]).resolve()) for name in ("reference", "video", "mask") if name in job}
    written = tmp_path / "demo.yaml"
    written.write_text(yaml.safe_dump(manifest | {"jobs": jobs}, allow_unicode=True), encoding="utf-8")
    command = ["run", str(written), "--out", str(tmp_path / "out"), "--models", str(CACHE / "demo-models")]
    assert main([*command, "--cache", str(tmp_path / "cache")]) == 0
    assert demo_frames(tmp_path / "out") == {name: golden["jobs"][name] for name in RENDERED}

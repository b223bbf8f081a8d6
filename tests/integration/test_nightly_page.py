"""docs/nightly.md: its script, its commands, its cron line, its CI job and its manifest do what the page says."""

from __future__ import annotations

import os
import re
import stat
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from runner.records.output_layout import RESULT
from runner.spec.manifest import load_manifest, parse_manifest
from runner.spec.regression_limits import RegressionLimits
from tests.system_tests import system_test

ROOT = Path(__file__).resolve().parents[2]
PAGE = (ROOT / "docs/nightly.md").read_text(encoding="utf-8")
FIELDS = ((0, 59), (0, 23), (1, 31), (1, 12), (0, 7))  # of a cron line: minute, hour, day, month, weekday


def block(language: str, number: int = 0) -> str:
    return re.findall(rf"```{language}\n(.*?)```", PAGE, flags=re.DOTALL)[number]


@pytest.fixture
def folder(tmp_path, demo_models, demo_media) -> Path:
    """As the page assumes: the script, the repository's nightly manifest with its first and its last job, shortened."""
    document = yaml.safe_load((ROOT / "manifests/nightly.yaml").read_text(encoding="utf-8"))
    document["defaults"]["options"] |= {"size": "64x96", "max_frames": 5, "steps": 1}
    document["jobs"] = document["jobs"][:2]
    (tmp_path / "manifests").mkdir()
    (tmp_path / "manifests/nightly.yaml").write_text(yaml.safe_dump(document), encoding="utf-8")
    (tmp_path / ".cache").mkdir()
    (tmp_path / ".cache/demo-media").symlink_to(demo_media)
    script = tmp_path / "nightly.sh"
    script.write_text(block("sh"), encoding="utf-8")
    script.chmod(script.stat().st_mode | stat.S_IXUSR)
    return tmp_path


def sh(folder: Path, models: Path, script: str, **more: str) -> subprocess.CompletedProcess[str]:
    environment = dict(os.environ) | {
        "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
        "VIDEO_LAB_MODELS": str(models),
        "VIDEO_LAB_CACHE": str(folder / "cache"),
    }
    return subprocess.run(
        ["sh", "-c", script], cwd=folder, env=environment | more, capture_output=True, text=True, check=False
    )


@system_test
def test_a_whole_night_as_the_page_shows_it(folder, demo_models):
    night = "./nightly.sh"
    first = sh(folder, demo_models, night)
    assert first.returncode == 2 and "has none of these jobs" in first.stderr, first.stderr
    accepted = sh(folder, demo_models, block("sh", 1))
    assert accepted.returncode == 0 and "2 approved" in accepted.stdout
    second = sh(folder, demo_models, night)
    assert second.returncode == 0 and "2 identical" in second.stdout, second.stdout + second.stderr

    (report,) = folder.glob("out/*/report")
    names = {"report.html", "junit.xml", "comparison.json", "summary.md"}
    assert {path.name for path in report.iterdir()} == names
    (history,) = folder.glob("baseline/cpu/fp32/nights/*.json")
    assert len(list(folder.glob("baseline/cpu/fp32/jobs/*/*/" + RESULT))) == 2 and history.stat().st_size > 0

    steps = yaml.safe_load(block("yaml"))["jobs"]["nightly"]["steps"]
    shown = next(step["run"] for step in steps if "summary.md" in step.get("run", ""))
    summary = sh(folder, demo_models, shown, GITHUB_STEP_SUMMARY=str(folder / "shown.md"))
    assert summary.returncode == 0
    assert (folder / "shown.md").read_bytes() == (report / "summary.md").read_bytes()
    kept = next(step["with"]["path"] for step in steps if "uses" in step)
    assert list(folder.glob(kept)) == [report]


def test_the_ci_job_and_the_cron_line_start_the_script_every_night():
    workflow = yaml.safe_load(block("yaml"))
    (schedule,) = workflow[True]["schedule"]  # YAML 1.1 reads `on` as true
    assert workflow["jobs"]["nightly"]["steps"][0] == {"run": "./nightly.sh"}
    *fields, command = block("cron").strip().split(maxsplit=5)
    assert schedule["cron"].split() == fields
    for field, (least, most) in zip(fields, FIELDS, strict=True):
        assert field == "*" or least <= int(field) <= most
    assert re.fullmatch(r"cd \S+ && VIDEO_LAB_MODELS=\S+ \./nightly\.sh >> \S+ 2>&1", command)


def test_the_manifest_of_the_page_is_read_as_it_stands():
    first = parse_manifest(block("yaml", 1), base=".").jobs[0].regression
    assert (first.psnr_min, first.ssim_min, first.seconds_max) == (28, 0.9, 1.2)
    listed = {
        name
        for cell in re.findall(r"^\| (`\w+_\w+`.*?) \|", PAGE, re.MULTILINE)
        for name in re.findall(r"`(\w+)`", cell)
    }
    assert listed == set(RegressionLimits.model_fields)


def test_the_nightly_manifest_has_limits():
    for job in load_manifest(str(ROOT / "manifests/nightly.yaml")).jobs:
        assert job.regression != RegressionLimits()

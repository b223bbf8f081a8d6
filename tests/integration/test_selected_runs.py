"""Selected runs, as a user types them: `--only`, `--limit`, `--dry-run`, and `--json` for a program that reads on."""

from __future__ import annotations

import json
import os
import pty
import subprocess
import sys
import threading
from collections.abc import Sequence
from pathlib import Path

import pytest
import yaml

from runner.cli import main
from tests.system_tests import system_test

ROOT = Path(__file__).resolve().parents[2]
PIPE = f'set -o pipefail; {sys.executable} -m runner.cli run "$@" --json | {sys.executable} -m json.tool'


@pytest.fixture
def night(tmp_path, demo_models, demo_media):
    """(folder, words): three small jobs, of which one names a video that is not there, and the words after the verb."""
    options = {"size": "64x96", "fps": 8, "max_frames": 5, "steps": 1}
    files = {"reference": str(demo_media / "references/anna.png"), "video": str(demo_media / "dances/wave.mp4")}
    jobs = [{"id": name, **files, "options": options} for name in ("anna-wave", "anna-again", "bela")]
    jobs[2]["video"] = str(tmp_path / "none.mp4")
    (tmp_path / "m.yaml").write_text(yaml.safe_dump({"version": 1, "recipe": "fp32", "jobs": jobs}), encoding="utf-8")
    flags = ["--out", str(tmp_path / "out"), "--models", str(demo_models), "--cache", str(tmp_path / "cache")]
    return tmp_path, [str(tmp_path / "m.yaml"), *flags, "--device", "cpu"]


def run_with_a_terminal(words: Sequence[str]) -> tuple[int, bytes, str]:
    """(exit code, what json.tool prints, what a terminal at standard error shows) of `run … --json | json.tool`."""
    terminal, end = pty.openpty()
    shown: list[bytes] = []

    def read() -> None:
        try:
            while data := os.read(terminal, 4096):
                shown.append(data)
        except OSError:  # the other end is closed
            pass

    reader = threading.Thread(target=read)
    reader.start()
    try:
        command = ["bash", "-c", PIPE, "bash", *words]
        done = subprocess.run(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=end, check=False, timeout=300)
    finally:
        os.close(end)
        reader.join()
    return done.returncode, done.stdout, b"".join(shown).decode(errors="replace")


@system_test
def test_only_one_job_is_told_rendered_and_then_left_alone(night, capsys):
    folder, words = night
    assert main(["run", *words, "--only", "anna-*", "--dry-run"]) == 0
    assert capsys.readouterr().out.count("would run") == 3, "two rows and their sum"
    assert [path.name for path in folder.iterdir()] == ["m.yaml"]

    code, printed, shown = run_with_a_terminal([*words, "--only", "anna-*", "--limit", "1"])
    assert code == 0, shown
    found = json.loads(printed)
    assert [(job["id"], job["status"]) for job in found["jobs"]] == [("anna-wave", "succeeded")]
    assert found["counts"]["total"] == 1 and found["error"] is None
    assert Path(found["jobs"][0]["output"]).is_file()
    assert [path.name for path in (folder / "out/jobs").iterdir()] == ["anna-wave"]
    assert "anna-wave" in shown, "the bar and the log"

    capsys.readouterr()
    assert main(["status", str(folder / "out"), "--json"]) == 3
    status = json.loads(capsys.readouterr().out)
    assert [(job["id"], job["status"]) for job in status["jobs"]] == [
        ("anna-wave", "succeeded"),
        ("anna-again", "pending"),
        ("bela", "pending"),
    ]
    assert main(["status", str(folder / "out")]) == 3
    assert "1 of 3 done · 0 failed · 2 pending" in capsys.readouterr().out

    before = {path: path.stat().st_mtime_ns for path in folder.rglob("*")}
    assert main(["run", *words, "--dry-run", "--json"]) == 1
    actions = {job["id"]: job["action"] for job in json.loads(capsys.readouterr().out)["jobs"]}
    assert actions == {"anna-wave": "skip", "anna-again": "run", "bela": "fail"}
    assert {path: path.stat().st_mtime_ns for path in folder.rglob("*")} == before

    assert main(["run", *words, "--json", "--only", "ana-wave"]) == 2
    said = capsys.readouterr()
    assert "did you mean anna-wave" in json.loads(said.out)["error"]["message"]
    assert "did you mean anna-wave" in said.err.splitlines()[-1]

"""docs/python.md: its example runs as it stands, and its table names functions that are there."""

from __future__ import annotations

import inspect
import re
from importlib import import_module
from pathlib import Path

import pytest
import yaml

from runner.verbs.commands import VERBS

PAGE = (Path(__file__).resolve().parents[2] / "docs/python.md").read_text(encoding="utf-8")
ROWS = re.findall(r"^\| `([\w.]+)` \| `(\w+)` \| (.+) \|$", PAGE, flags=re.MULTILINE)


def test_the_example_runs_as_it_stands(demo_models, demo_media, tmp_path, monkeypatch, capsys):
    """In a folder with a manifest and a model store, as the page assumes."""
    place = {"reference": str(demo_media / "references/anna.png"), "video": str(demo_media / "dances/wave.mp4")}
    options = {"size": "64x96", "fps": 8, "max_frames": 5, "steps": 1}
    jobs = [{"id": "anna-waves", **place, "options": options}, {"id": "gone", **place, "video": "none.mp4"}]
    (tmp_path / "jobs.yaml").write_text(yaml.safe_dump({"version": 1, "recipe": "fp32", "jobs": jobs}), "utf-8")
    (tmp_path / "models").symlink_to(demo_models)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("VIDEO_LAB_CACHE", str(tmp_path / "cache"))
    (example,) = re.findall(r"```python\n(.*?)```", PAGE, flags=re.DOTALL)
    exec(compile(example, "docs/python.md", "exec"), {"__name__": "example"})
    code, first, second, last = capsys.readouterr().out.splitlines()
    assert code == "exit code 1: 1 of 2 jobs succeeded"
    assert first == "anna-waves succeeded out/jobs/anna-waves/output.mp4"
    assert second.startswith("gone failed ") and "none.mp4" in second
    assert re.fullmatch(r"5 frames in \d+\.\d s", last)


@pytest.mark.parametrize(("function", "takes", "returns"), ROWS)
def test_the_table_names_functions_as_they_are(function, takes, returns):
    module, _, name = function.rpartition(".")
    signature = inspect.signature(getattr(import_module(module), name))
    assert next(iter(signature.parameters.values())).annotation == takes
    kinds = {"a list of": "list[{}]", "a mapping": "dict[str, Any]"}
    wanted = next((kind for start, kind in kinds.items() if returns.startswith(start)), "{}")
    named = re.search(r"`(\w+)`", returns)
    assert signature.return_annotation == wanted.format(named[1] if named else "")


def test_the_table_has_every_verb():
    assert {takes for _, takes, _ in ROWS} == {verb.settings.__name__ for verb in VERBS}

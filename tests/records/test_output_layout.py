"""Output layout: the keys are those of the published contract, and one module spells them."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

from runner.records import output_layout as layout

RUNNER = Path(layout.__file__).resolve().parent.parent
NAMES = (layout.RESULT, layout.ATTEMPT, layout.OUTPUT, layout.POSE, layout.POSTER, layout.FRAME_DIGESTS)
NAMES += (layout.PEOPLE,)
SUFFIXES = (layout.SUMMARY, layout.METRICS, layout.EVENTS)
SPELLED = re.compile(
    r"\b(jobs|runs|frames)/|(?<![\w-])("
    + "|".join(map(re.escape, (*NAMES, layout.REGRESSION)))
    + ")|"
    + "|".join(map(re.escape, SUFFIXES))
)


def test_keys_are_those_of_the_contract() -> None:
    assert [layout.job_key("a", name) for name in NAMES] == [
        *("jobs/a/result.json", "jobs/a/attempt.json", "jobs/a/output.mp4", "jobs/a/pose.mp4", "jobs/a/poster.jpg"),
        *("jobs/a/frames.sha256", "jobs/a/people.json"),
    ]
    assert layout.frames_folder("a", "0f") == "jobs/a/frames/0f/"
    assert [layout.run_key("night", "00000-of-00001", name) for name in SUFFIXES] == [
        "runs/night/00000-of-00001.summary.json",
        "runs/night/00000-of-00001.metrics.prom",
        "runs/night/00000-of-00001.events.jsonl",
    ]
    assert layout.run_file_key("night", layout.REGRESSION) == "runs/night/regression.json"


@pytest.mark.parametrize(
    ("key", "found"),
    [
        ("jobs/a/result.json", ("a", "result.json")),
        ("jobs/a/frames/0f/000000.png", ("a", "frames/0f/000000.png")),
        ("jobs/a/", ("a", "")),
        ("jobs/stray", None),
        ("runs/a/x.summary.json", None),
        ("other/jobs/a/result.json", None),
        ("a/result.json", None),
    ],
)
def test_split_job_key(key: str, found: tuple[str, str] | None) -> None:
    assert layout.split_job_key(key) == found


def test_records_and_marks_are_no_output() -> None:
    outputs = {name for name in (*NAMES, "frames/0f/000000.png", "frames", "notes.txt") if layout.is_output_file(name)}
    assert outputs == {"output.mp4", "pose.mp4", "poster.jpg", "frames.sha256", "people.json", "frames/0f/000000.png"}
    folder = layout.frames_folder("a", "0f")
    assert [layout.is_frame(folder + name) for name in ("000000.png", layout.AUDIO)] == [True, False]


def texts(tree: ast.Module) -> Iterator[ast.Constant]:
    """Every string of a module but docstrings, and but what describes an option to a person."""
    nodes = [node for node in ast.walk(tree) if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef)]
    bodies = [node.body[0] for node in nodes if node.body]
    spared = {id(body.value) for body in bodies if isinstance(body, ast.Expr)}
    for node in ast.walk(tree):
        if isinstance(node, ast.keyword) and node.arg in ("description", "help"):
            spared |= {id(child) for child in ast.walk(node.value)}
    for node in ast.walk(tree):
        if isinstance(node, ast.Constant) and isinstance(node.value, str) and id(node) not in spared:
            yield node


def test_no_other_module_spells_a_key() -> None:
    found = []
    for path in RUNNER.rglob("*.py"):
        source = path.read_text(encoding="utf-8")
        if path.name != "output_layout.py" and SPELLED.search(source):
            for node in texts(ast.parse(source)):
                if SPELLED.search(str(node.value)):
                    found.append(f"{path.relative_to(RUNNER)}:{node.lineno} {node.value!r}")
    assert found == []

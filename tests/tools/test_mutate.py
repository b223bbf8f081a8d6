"""Mutants of small texts; a small project whose test is thorough, and one whose test is not."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
from mutate import mutants_of

TOOL = Path(__file__).resolve().parents[2] / "tools" / "mutate.py"


@pytest.mark.parametrize(
    ("source", "mutants"),
    [
        ("x = 3", {"3  →  4", "3  →  6", "3  →  -3"}),
        ("x = True", {"True  →  False"}),
        ("x = y - z", {"y - z  →  y + z", "y - z  →  y", "y - z  →  z"}),
        ("x = y < z", {"y < z  →  y <= z"}),
        ("x = not y", {"not y  →  y"}),
        ("x = max(y, z)", {"max(y, z)  →  y", "max(y, z)  →  z"}),
        ("x = y if u else z", {"y if u else z  →  y", "y if u else z  →  z"}),
        ("x += y", {"x += y  →  x -= y", "x += y  →  pass"}),
        ("f(y)", {"f(y)  →  pass"}),
        ('def f(x: int | None) -> str:\n    return f"{x + 1:3}"', set()),  # annotations and messages stay
        ("x = zip(y, z, strict=True)", set()),
    ],
)
def test_mutants_of_a_text(source, mutants):
    assert {str(mutant).partition(": ")[2] for mutant in mutants_of(source)} == mutants


def test_a_mutant_is_the_whole_text_with_one_change_and_the_next_starts_anew():
    seen = []
    for mutant in mutants_of("x = 1\ny = x + 5"):
        space: dict[str, int] = {}
        exec(mutant.code, space)
        seen.append((mutant.line, space["x"], space["y"]))
    assert sorted(seen) == [(1, -1, 4), (1, 2, 7), (2, 1, -4), (2, 1, -4), (2, 1, 1), (2, 1, 5), (2, 1, 7), (2, 1, 11)]


AREA = "def area(a, b):\n    return a * b\n"
TEST = "from runner.shapes import area\ndef test_area():\n    assert area({}, {}) == {}\n"


@pytest.mark.parametrize(
    ("numbers", "code", "unnoticed"),
    [((4, 1, 4), 1, ["a * b  →  a / b", "a * b  →  a"]), ((3, 2, 6), 0, []), ((3, 2, 7), 2, [])],
)
def test_what_no_test_notices_is_listed_and_no_file_is_changed(tmp_path, numbers, code, unnoticed):
    module, test = tmp_path / "runner" / "shapes.py", tmp_path / "tests" / "test_shapes.py"
    for path, text in ((module, AREA), (test, TEST.format(*numbers)), (tmp_path / "pyproject.toml", "")):
        path.parent.mkdir(exist_ok=True)
        path.write_text(text)
    command = [sys.executable, str(TOOL), str(module)]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False, timeout=120)
    assert done.returncode == code, done.stderr
    *found, last = done.stdout.splitlines()
    assert [line.partition("line 2: ")[2] for line in found] == unnoticed
    assert ("fails without any change" if code == 2 else f"3 changes, {len(unnoticed)} that no test notices") in last
    assert module.read_text() == AREA

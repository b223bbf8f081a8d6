"""docs/svdquant.md: its commands are commands, its Python compiles, its tables are those of the code."""

from __future__ import annotations

import re
import shlex
import tomllib
from pathlib import Path

import pytest

from runner.cli import parse_command
from runner.forecast.precisions import PRECISIONS, REFERENCE
from runner.quantization.formats.svdq_layout import SVDQ_LAYOUTS

ROOT = Path(__file__).resolve().parents[2]
PAGE = (ROOT / "docs/svdquant.md").read_text(encoding="utf-8")
SHELL = [
    shlex.split(line)
    for block in re.findall(r"```sh\n(.*?)```", PAGE, flags=re.DOTALL)
    for line in block.replace("\\\n", " ").splitlines()
]


@pytest.mark.parametrize("words", [words for words in SHELL if words[0] == "video-lab"], ids=" ".join)
def test_every_command_of_the_page_is_one(words):
    verb, fields, _ = parse_command(words[1:])
    settings = verb.settings(**fields)
    for place in (getattr(settings, "manifest", None), getattr(settings, "calibrate", None)):
        assert place is None or (ROOT / str(place)).is_file()


def test_the_extras_that_it_installs_are_extras():
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["project"]["optional-dependencies"]
    named = re.findall(r"EXTRA=(\S+)", PAGE)
    assert len(named) == 3
    assert {extra for names in named for extra in names.split(",")} <= set(extras)
    assert any(line == "torch>=2.10,<2.13" for line in extras["svdq"]), "the page says: torch below 2.13"


@pytest.mark.parametrize("example", re.findall(r"```python\n(.*?)```", PAGE, flags=re.DOTALL))
def test_its_python_compiles(example):
    compile(example, "docs/svdquant.md", "exec")


def test_its_table_of_tensors_is_the_layout_s():
    """Names in its order; shapes with N, K, r for the sides and the rank."""
    rows = re.findall(r"^\| `(\w+)` \| (\[.+?) \| ([\w() ]+) \|", PAGE, flags=re.MULTILINE)
    found = {name: (set(re.findall(r"\[.*?\]", shapes)), dtypes) for name, shapes, dtypes in rows}
    wanted: dict[str, tuple[set[str], set[str]]] = {}
    sides = {1024: "N", 2560: "K", 1280: "K/2", 32: "r", 2560 // 64: "K/64", 2560 // 16: "K/16"}
    for layout in SVDQ_LAYOUTS.values():
        for name, (shape, dtype) in layout.tensor_table(1024, 2560).items():
            shapes, dtypes = wanted.setdefault(name, (set(), set()))
            shapes.add(f"[{', '.join(sides[side] for side in shape)}]")
            dtypes.add(dtype)
    assert found.keys() == wanted.keys()
    for name, (shapes, dtypes) in wanted.items():
        assert found[name][0] == shapes
        assert all(dtype in found[name][1] for dtype in dtypes)


def test_its_products_are_the_backends_in_their_order():
    rows = re.findall(r"^\| `(\w+)` \| (both|`[\w-]+`) \|", PAGE.partition("## Run it")[2], flags=re.MULTILINE)
    for name in SVDQ_LAYOUTS:
        wanted = [backend.name for backend in PRECISIONS[name].backends] + [REFERENCE]
        assert [product for product, formats in rows if formats in ("both", f"`{name}`")] == wanted


@pytest.mark.parametrize(
    ("capability", "row"),
    [
        ((12, 0), "RTX 50"),
        ((8, 9), "RTX 40"),
        ((8, 6), "RTX 30"),
        ((8, 0), "A100"),
        ((9, 0), "H100"),
        ((10, 0), "B200"),
    ],
)
def test_it_says_which_gpus_compute_each_format(capability, row):
    (line,) = [line for line in PAGE.splitlines() if line.startswith("| ") and row in line and line.count("|") == 4]
    nvfp4, int4 = (cell.strip().startswith("yes") for cell in line.split("|")[2:4])
    assert (nvfp4, int4) == tuple(PRECISIONS[name].runs_on(capability) for name in ("svdq-nvfp4", "svdq-int4"))

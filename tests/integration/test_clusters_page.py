"""docs/clusters.md: its commands are those of the command line, and write the jobs that the page describes."""

from __future__ import annotations

import json
import re
import shlex
from pathlib import Path

import pytest

from runner.cli import main, parse_command
from runner.verbs.commands import VERBS

ROOT = Path(__file__).resolve().parents[2]
PAGE = (ROOT / "docs/clusters.md").read_text(encoding="utf-8")


def commands() -> list[list[str]]:
    """The words of every `video-lab` command of the page, after the name."""
    lines: list[str] = []
    for block in re.findall(r"```sh\n(.*?)```", PAGE, flags=re.DOTALL):
        lines += block.replace("\\\n", " ").splitlines()
    words = [shlex.split(line, comments=True) for line in lines]
    return [line[1:] for line in words if line[:1] == ["video-lab"]]


SUBMITTED = [words for words in commands() if words[0] == "submit"]


@pytest.mark.parametrize("words", commands(), ids=" ".join)
def test_every_command_of_the_page_is_one(words):
    verb, fields, _ = parse_command(words)
    verb.settings(**fields)


def test_the_page_submits_to_every_platform():
    platforms = {verb.name for verb in VERBS if verb.name.startswith("submit ")}
    assert {" ".join(words[:2]) for words in SUBMITTED} == platforms


@pytest.mark.parametrize("words", SUBMITTED, ids=lambda words: words[1])
def test_its_jobs_are_written_down_as_it_says(words, tmp_path, capsys):
    """With a manifest of this machine in the place of the page's, whose inputs lie where the page has them."""
    store = "gs" if "gcp-batch" in words else "s3"
    manifest = tmp_path / Path(words[2]).name
    jobs = [
        {"id": f"j{number}", "reference": f"{store}://video/{number}.png", "video": f"{store}://video/dance.mp4"}
        for number in range(16)
    ]
    lines = map(json.dumps, jobs if manifest.suffix == ".jsonl" else [{"version": 1, "jobs": jobs}])
    manifest.write_text("\n".join(lines), encoding="utf-8")
    code = main([*words[:2], str(manifest), *words[3:], "--render-only", str(tmp_path / "job")])
    assert code == 0, capsys.readouterr().err
    written = {path.name for path in (tmp_path / "job").iterdir()}
    assert {"manifest.jsonl", "submit.sh"} < written
    text = "".join(path.read_text("utf-8") for path in (tmp_path / "job").iterdir())
    image = words[words.index("--image") + 1]
    assert image in text and "16" in text

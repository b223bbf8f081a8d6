"""The pages (README.md, docs/*.md, CHANGELOG.md): commands, links, manifests and tables agree with the code."""

from __future__ import annotations

import json
import re
import shlex
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any, get_args

import pytest
import yaml
from pydantic import BaseModel

from runner.cli import main, parse_command
from runner.forecast.precisions import PRECISIONS
from runner.records import output_layout
from runner.spec.manifest import Defaults, Document, Entry, Matrix, parse_manifest
from runner.spec.options import JobOptions, LoraOption
from runner.spec.recipes import FIXED, RECIPES
from runner.spec.regression_limits import RegressionLimits
from runner.verbs.commands import EXIT_CODES, VERBS
from runner.verbs.flags import flag_name, flags_of
from runner.weights.repositories import SOURCES
from tests.test_layout import make_targets

ROOT = Path(__file__).resolve().parents[1]
PAGES = {
    path.relative_to(ROOT).as_posix(): path.read_text(encoding="utf-8")
    for path in (ROOT / "README.md", ROOT / "CHANGELOG.md", ROOT / "THIRD_PARTY.md", *sorted(ROOT.glob("docs/*.md")))
    if path.is_file()
}
FENCE = re.compile(r"^```(\w*)\n(.*?)^```", flags=re.MULTILINE | re.DOTALL)
LINK = re.compile(r"!?\[(?:[^\[\]]|\[[^\]]*\])*\]\(([^()\s]+)\)")


def page(name: str) -> str:
    return PAGES[f"docs/{name}.md"]


def blocks(text: str, *languages: str) -> list[str]:
    """The code blocks of a page in these languages ("": without one), in order."""
    return [code for language, code in FENCE.findall(text) if language in languages]


def spans(text: str) -> list[str]:
    """The inline code of a page."""
    return re.findall(r"`([^`\n]+)`", FENCE.sub("", text))


def rows(text: str, columns: int) -> list[list[str]]:
    """The rows of a page's tables with so many columns, without heads; cells without surrounding spaces."""
    found = []
    for line in text.splitlines():
        cells = [cell.strip() for cell in re.split(r"(?<!\\)\|", line.strip().strip("|"))]
        if line.startswith("| ") and len(cells) == columns and not all(re.fullmatch("-+", cell) for cell in cells):
            found.append(cells)
    return found


def section(text: str, heading: str) -> str:
    """The part of a page from one heading of the second or third level to the next of its level or above."""
    found = re.search(rf"^(##+) {re.escape(heading)}$", text, flags=re.MULTILINE)
    assert found, f"no heading {heading!r}"
    rest = text[found.end() :]
    end = re.search(rf"^#{{2,{len(found[1])}}} ", rest, flags=re.MULTILINE)
    return rest[: end.start()] if end else rest


# -- commands ----------------------------------------------------------------------------------------------------------

SEPARATORS = {";", "&&", "||", "|", "&", ">", ">>", "2>&1", "(", ")"}


def simple_commands(line: str) -> Iterator[list[str]]:
    """The commands of a shell line, without prompts, variables before them, `exec` and the start of a container."""
    lexer = shlex.shlex(line, posix=True, punctuation_chars=True)
    lexer.whitespace_split, lexer.commenters = True, "#"
    words: list[str] = []
    for word in [*lexer, ";"]:
        if word not in SEPARATORS:
            words.append(word)
            continue
        while words and (words[0] in ("$", "exec", "if", "then") or re.fullmatch(r"[A-Za-z_]\w*=.*", words[0])):
            words = words[1:]
        if words[:2] in (["docker", "run"], ["apptainer", "run"]) and "video-lab" in words:
            words = words[words.index("video-lab") :]
        if words:
            yield words
        words = []


def commands(text: str) -> list[list[str]]:
    """The words of every `video-lab` command in the page's blocks of shell lines, after the program's name."""
    found = []
    for block in blocks(text, "sh", "cron", ""):
        for line in block.replace("\\\n", " ").splitlines():
            if re.search(r"(^|[\s/])video-lab\s", line) and not line.startswith("to accept"):
                for words in simple_commands(line):
                    if words[0] == "video-lab" or words[0].endswith("/video-lab"):
                        found.append(words[1:])
    return found


COMMANDS = [(name, words) for name, text in PAGES.items() for words in commands(text)]


@pytest.mark.parametrize(("name", "words"), COMMANDS, ids=[f"{name}: {' '.join(words)}" for name, words in COMMANDS])
def test_commands_in_pages_parse(name, words, capsys):
    """`--help` ends parsing as well, with code 0. A command that is refused fails here with the parser's reason."""
    try:
        verb, fields, _ = parse_command(words)
    except SystemExit as stop:
        if stop.code:
            pytest.fail(f"{name}: video-lab {shlex.join(words)}: {capsys.readouterr().err}")
        return
    settings = verb.settings(**fields)
    for place in (str(getattr(settings, "manifest", "")), str(getattr(settings, "calibrate", ""))):
        assert not place.startswith("manifests/") or (ROOT / place).is_file(), place


FLAGS = {
    verb.name: {flag_name(item) for item, flag in flags_of(verb.settings) if not flag.positional} for verb in VERBS
}
EVERYWHERE = {"--json", "--log-format", "--verbose", "--help", "--version"}
INLINE = [(name, span) for name, text in PAGES.items() for span in spans(text) if span.startswith("video-lab ")]


@pytest.mark.parametrize(("name", "span"), INLINE, ids=[f"{name}: {span}" for name, span in INLINE])
def test_commands_in_sentences_name_verbs_and_their_flags(name, span):
    """In sentences a command may be short: `video-lab inspect VIDEO`, `video-lab submit aws-batch|slurm MANIFEST …`."""
    words = re.sub(r"[…|]", " ", span).split()[1:]
    verbs = [verb for verb in FLAGS if verb.split()[0] == words[0]]
    longer = [verb for verb in verbs if verb.split() == words[: len(verb.split())]]
    assert verbs or words[0] in ("VERB", *EVERYWHERE), f"{name}: no verb {words[0]}"
    known = set().union(*(FLAGS[verb] for verb in longer or verbs)) | EVERYWHERE
    assert {word.partition("=")[0] for word in words if word.startswith("--")} <= known


ALL_FLAGS = set().union(*FLAGS.values()) | EVERYWHERE
FOREIGN_FLAGS = {"--jobs", "--unknown", "--user"}  # of sacct, tools/convert_rife.py and docker


@pytest.mark.parametrize("name", [name for name in PAGES if name != "THIRD_PARTY.md"])  # that one has FFmpeg's
def test_flags_in_sentences_exist(name):
    named = {flag for span in spans(PAGES[name]) for flag in re.findall(r"(?<![\w-])--[a-z][a-z-]*", span)}
    assert named - ALL_FLAGS - FOREIGN_FLAGS == set()


@pytest.mark.parametrize("name", PAGES)
def test_make_targets_in_pages_exist(name):
    code = "\n".join([*(code for _, code in FENCE.findall(PAGES[name])), *spans(PAGES[name])])
    assert set(re.findall(r"\bmake ([a-z][a-z-]*)", code)) <= make_targets()


def test_readme_names_two_first_commands():
    code = "\n".join(code for _, code in FENCE.findall(PAGES["README.md"]))
    assert {"demo", "test"} <= set(re.findall(r"^make ([a-z-]+)", code, flags=re.MULTILINE))


# -- links -------------------------------------------------------------------------------------------------------------


@cache
def anchors(path: Path) -> frozenset[str]:
    """The anchors that GitHub gives a page's headings."""
    found: list[str] = []
    for heading in re.findall(r"^#+ (.+)$", FENCE.sub("", path.read_text(encoding="utf-8")), flags=re.MULTILINE):
        text = LINK.sub(lambda link: link[0][1:].partition("]")[0], heading)
        slug = re.sub(r"[^\w\- ]", "", text.lower()).replace(" ", "-")
        found.append(f"{slug}-{found.count(slug)}" if slug in found else slug)
    return frozenset(found)


LINKS = [(name, target) for name, text in PAGES.items() for target in sorted(set(LINK.findall(FENCE.sub("", text))))]


@pytest.mark.parametrize(("name", "target"), LINKS, ids=[f"{name}: {target}" for name, target in LINKS])
def test_links_in_pages_lead_to_files_and_headings(name, target):
    if target.startswith(("https://", "http://", "mailto:")):
        return
    place, _, anchor = target.partition("#")
    path = (ROOT / name).parent / place if place else ROOT / name
    assert path.exists(), f"{name} links to {place}"
    assert path.resolve().is_relative_to(ROOT), f"{name} links to {place}, outside of the repository"
    if anchor:
        assert anchor in anchors(path), f"{name}: {place or name} has no heading #{anchor}"


def test_page_is_linked_from_other_page():
    linked = set()
    for name, target in LINKS:
        path = ((ROOT / name).parent / target.partition("#")[0]).resolve()
        if path != (ROOT / name).resolve():
            linked.add(path)
    assert {name for name in PAGES if name.startswith("docs/") and (ROOT / name).resolve() not in linked} == set()


# -- manifests ---------------------------------------------------------------------------------------------------------


def as_manifest(code: str) -> str | None:
    """A block of YAML as a whole manifest: itself, or what it shows of a job or of a run. None: it is no manifest."""
    document = yaml.safe_load(code)
    if isinstance(document.get("jobs"), dict) or "groups" in document:  # a CI workflow, rules of Prometheus
        return None
    job = {"id": "a", "reference": "a.png", "video": "b.mp4"}
    if set(document) <= {"options", "mask"}:
        return yaml.safe_dump({"version": 1, "jobs": [job | document]})
    if set(document) <= {"recipe", "memory", "regression"}:
        return yaml.safe_dump({"version": 1, "jobs": [job]} | document)
    return code


BLOCKS = [
    (name, number, "page.yaml", text)
    for name, page_text in PAGES.items()
    for number, code in enumerate(blocks(page_text, "yaml"))
    if (text := as_manifest(code)) is not None
] + [
    (name, number, "page.jsonl", code)
    for name, page_text in PAGES.items()
    for number, code in enumerate(blocks(page_text, "jsonl"))
]


@pytest.mark.parametrize(("name", "number", "source", "text"), BLOCKS, ids=[f"{b[0]}: {b[2]} {b[1]}" for b in BLOCKS])
def test_manifests_in_pages_are_read_without_problems(name, number, source, text):
    assert parse_manifest(text, base=".", source=source).jobs


def test_readme_is_short():
    """A new user reads all of it: details belong in docs/."""
    lines = (ROOT / "README.md").read_text(encoding="utf-8").splitlines()
    assert len(lines) <= 150
    assert max(map(len, lines)) <= 120


RUNNING = [("manifest", "jobs.yaml"), ("replace", "replace.yaml")]


@pytest.mark.parametrize(("name", "file"), RUNNING)
def test_first_manifest_of_page_renders_with_demo_models(name, file, tmp_path, demo_models, demo_media):
    """The job is shortened to fewer pixels, frames and steps."""
    document = yaml.safe_load(blocks(page(name), "yaml")[0])
    document["defaults"]["options"] |= {"size": "64x96", "max_frames": 5, "steps": 1}
    for job in document["jobs"]:
        for option in ("size", "max_frames", "max_segment_frames", "steps"):
            job.get("options", {}).pop(option, None)
    (tmp_path / ".cache").mkdir()
    (tmp_path / ".cache/demo-media").symlink_to(demo_media)
    (tmp_path / file).write_text(yaml.safe_dump(document), encoding="utf-8")
    words = ["--out", str(tmp_path / "out"), "--models", str(demo_models), "--cache", str(tmp_path / "cache")]
    assert main(["run", str(tmp_path / file), *words]) == 0
    assert len(list(tmp_path.glob("out/jobs/*/result.json"))) == len(document["jobs"])


# -- docs/manifest.md --------------------------------------------------------------------------------------------------


def options(model: type[BaseModel], prefix: str = "") -> Iterator[tuple[str, Any, dict[str, Any]]]:
    """(name as a manifest writes it, default, JSON Schema) of every option, in order of the fields."""
    schema = model.model_json_schema()
    for field, info in model.model_fields.items():
        key = info.alias or field
        inner = info.annotation
        if isinstance(inner, type) and issubclass(inner, BaseModel):
            yield from options(inner, f"{prefix}{key}.")
            continue
        default = ... if info.is_required() else info.default
        yield prefix + key, default, schema["properties"][key]
        if LoraOption in get_args(inner):
            yield from options(LoraOption, f"{prefix}{key}[].")


def written(default: Any) -> str:
    """A default as the page has it."""
    if default is ...:
        return "required"
    if isinstance(default, tuple):
        default = list(default)
    if isinstance(default, float) and default == int(default):
        default = int(default)
    return f"`{default if isinstance(default, str) else json.dumps(default)}`"


def limits(schema: Any) -> set[str]:
    """The choices and bounds in a JSON Schema, as text."""
    if not isinstance(schema, dict):
        return set()
    found = {str(value) for value in schema.get("enum", ()) if not isinstance(value, bool)}
    found |= {str(schema["const"])} if "const" in schema else set()
    found |= {f"{schema[key]:g}" for key in ("minimum", "maximum") if key in schema}
    if "exclusiveMaximum" in schema:
        found.add(str(schema["exclusiveMaximum"] - 1))
    for part in (*schema.get("anyOf", ()), *schema.get("prefixItems", ())):
        found |= limits(part)
    return found


OPTIONS = list(options(JobOptions))
OPTION_ROWS = {cells[0].strip("`"): cells for cells in rows(page("manifest"), 4)}


def test_option_table_has_every_option_in_order():
    assert [name for name in OPTION_ROWS if name != "option"] == [name for name, _, _ in OPTIONS]


@pytest.mark.parametrize(("name", "default", "schema"), OPTIONS, ids=[name for name, *_ in OPTIONS])
def test_option_table_has_default_and_limits(name, default, schema):
    _, found, values, meaning = OPTION_ROWS[name]
    assert found == written(default)
    numbers = set(re.findall(r"-?[\d.]+(?:e\+?\d+)?|\w+", values))
    assert {limit.replace("e+09", "000000000") for limit in limits(schema)} <= numbers
    assert meaning


@pytest.mark.parametrize(
    ("heading", "model"),
    [
        ("Keys of a manifest", Document),
        ("Keys of a job", Entry),
        ("Keys of `defaults`", Defaults),
        ("Keys of `matrix`", Matrix),
        ("Keys of `regression`", RegressionLimits),
    ],
)
def test_key_tables_have_every_key(heading, model):
    listed = [name.strip("`") for name, *_ in rows(section(page("manifest"), heading), 3) if name != "key"]
    assert sorted(listed) == sorted(model.model_fields)


# -- other tables ------------------------------------------------------------------------------------------------------


def test_recipe_table_has_every_recipe_with_steps_and_sampler():
    samplers = {"euler": "Euler", "unipc": "UniPC"}
    listed = {name.strip("`").split("`")[0]: steps for name, _, steps in rows(page("recipes"), 3) if "`" in name}
    wanted = {recipe.name: f"{recipe.steps}, {samplers[recipe.scheduler]}" for recipe in RECIPES.values()}
    assert {name: listed.get(name) for name in wanted} == wanted


def test_modifier_table_has_every_word():
    listed = {word for name, _ in rows(page("recipes"), 2) for word in re.findall(r"`([\w-]+)`", name)}
    assert listed == {*PRECISIONS, *FIXED, "steps4", "shift3"}


def test_forecast_table_equals_results():
    results = (ROOT / "bench/results.md").read_text(encoding="utf-8")
    table = rows(section(page("recipes"), "Forecasts"), 4)[1:]
    assert table
    for gpu, original, exact, fast in table:
        (row,) = [cells for cells in rows(results, 8) if cells[0] == gpu]
        assert [original, exact, fast] == [row[1], row[2], row[7]], gpu


def test_exit_code_tables_have_every_code():
    """The tables are that of README.md, where it has one, and that of docs/outputs.md."""
    for text in (PAGES["README.md"], page("outputs")):
        table = re.findall(r"^\| ([0-9, ]+) \|", text, flags=re.MULTILINE)
        listed = {int(code) for cell in table for code in cell.split(",") if code.strip()}
        if text is not PAGES["README.md"] or listed:
            assert listed == set().union(*(verb.codes for verb in VERBS))
            assert listed == set(EXIT_CODES)


def test_output_tree_has_every_file():
    tree = section(page("outputs"), "The output folder")
    names = [output_layout.RESULT, output_layout.ATTEMPT, *output_layout.OUTPUT_FILES, output_layout.AUDIO]
    names += [output_layout.SUMMARY, output_layout.METRICS, output_layout.EVENTS, output_layout.MANIFEST]
    names += [output_layout.RUN_JOBS, output_layout.REGRESSION, output_layout.REPORT_HTML, output_layout.REPORT_JSON]
    assert [name for name in names if name not in tree] == []


def test_parts_table_has_all_parts_that_can_be_fetched():
    listed = {name.strip("`"): (repo.strip("`"), gb) for name, repo, gb, *_ in rows(page("weights"), 5) if "`" in name}
    wanted = {part: (source.repo, f"{source.gb:g} GB") for part, source in SOURCES.items()}
    assert listed == wanted

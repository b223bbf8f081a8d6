"""The shape of the repository: who may import whom, what stays light, and that the documents name things that exist."""

from __future__ import annotations

import ast
import json
import re
import subprocess
import sys
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
RUNNER = ROOT / "runner"
HEAVY = ("torch", "diffusers", "transformers")
LONGEST = {"runner": 600, "tools": 600, "bench": 600, "tests": 600}  # lines of a file; cut at nouns, not at numbers

# Imports run downwards, or sideways within a line. A new module finds its place here before its first import.
LEVELS: tuple[tuple[str, ...], ...] = (
    ("cli",),
    (
        "session",
        "quantize",
        "doctor",
        "doctor_probes",
        "forecast",
        "inputs",
        "report",
        "status",
        "progress",
    ),  # what the verbs call
    ("launch", "regression", "demo"),
    ("batch", "delivery", "fetch", "task", "queues", "stop"),
    ("ledger", "shards", "summary", "weights"),
    ("generation",),
    ("preprocess",),
    ("quantization",),
    (
        *("record", "events", "metrics", "fingerprint"),
        *("manifest", "manifest_check", "manifest_source", "manifest_text", "matrix"),
        *("scratch", "storage", "storage_disk", "storage_s3", "storage_s3_errors", "storage_sync"),
        *("video", "video_decode", "video_write"),
    ),
    ("official", "options"),
    ("errors",),
    ("runner",),  # the package itself: its version
)
HEIGHT = {room: len(LEVELS) - depth for depth, rooms in enumerate(LEVELS) for room in rooms}

# Beyond the levels: what a room must not know of, from the design's own words.
IGNORANT = {
    "quantization": {"manifest", "options", "storage", "video", "record"},  # tensors, not jobs
    "preprocess": {"manifest", "record", "storage", "fingerprint"},  # frames, not manifests
    "generation": {"manifest", "ledger", "record", "fingerprint"},  # a model, not a batch
}


def name_of(path: Path) -> str:
    """runner/preprocess/face.py → runner.preprocess.face; a package's __init__ has the package's name."""
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def room_of(module: str) -> str:
    """runner.preprocess.face → preprocess; runner → runner."""
    return module.split(".")[1] if "." in module else module


MODULES = {name_of(path): path for path in sorted(RUNNER.rglob("*.py"))}


@cache
def tree_of(module: str) -> ast.Module:
    return ast.parse(MODULES[module].read_text(encoding="utf-8"))


def imports_of(module: str, *, on_loading: bool = False) -> set[str]:
    """The project's modules that `module` names in import statements, anywhere or only where they run on loading."""
    found: set[str] = set()
    waiting: list[ast.AST] = [tree_of(module)]
    while waiting:
        node = waiting.pop()
        if on_loading and isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda):
            continue
        if on_loading and isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
            continue
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{module}, line {node.lineno}: write the import in full"
            # `from runner.video import probe` names a module; `from runner import video` names one in its list.
            inner = {f"{node.module}.{alias.name}" for alias in node.names}
            found |= (inner & MODULES.keys()) or {str(node.module)}
        waiting.extend(ast.iter_child_nodes(node))
    return {name for name in found if name.split(".")[0] == "runner"}


@pytest.mark.parametrize("module", MODULES)
def test_imports_run_downwards(module):
    room = room_of(module)
    assert room in HEIGHT, f"{module}: give `{room}` a place in LEVELS"
    higher = {imported for imported in imports_of(module) if HEIGHT.get(room_of(imported), 0) > HEIGHT[room]}
    assert not higher, f"{module} imports {sorted(higher)}, which lies above it"


def test_no_import_needs_itself():
    """Sideways imports are allowed, circles are not; an import inside a function may close one, as a registry does."""
    graph = {module: imports_of(module, on_loading=True) & MODULES.keys() for module in MODULES}
    while leaves := {module for module, needs in graph.items() if not needs}:
        graph = {module: needs - leaves for module, needs in graph.items() if module not in leaves}
    assert graph == {}


@pytest.mark.parametrize("room", IGNORANT)
def test_rooms_know_no_more_than_they_should(room):
    for module in MODULES:
        if room_of(module) == room:
            known = {room_of(imported) for imported in imports_of(module)}
            assert not known & IGNORANT[room], f"{module} knows of {sorted(known & IGNORANT[room])}"


@pytest.mark.parametrize("module", ["runner.batch", "runner.delivery"])
def test_the_loop_knows_a_model_by_its_protocol_alone(module):
    models = {name for name in imports_of(module) if room_of(name) in ("generation", "preprocess", "quantization")}
    assert models == {"runner.generation.base"}


def test_the_checks_above_would_see_a_wrong_import(monkeypatch):
    """The graph is read from real files, and reading it finds what is there: an import inside a function too."""
    assert "runner.errors" in imports_of("runner.storage")
    source = "def f():\n    from runner.batch import Batch\n"
    monkeypatch.setitem(MODULES, "runner.video", RUNNER / "video.py")
    tree_of.cache_clear()
    monkeypatch.setattr(Path, "read_text", lambda *_args, **_kwargs: source)
    assert imports_of("runner.video") == {"runner.batch"}
    assert imports_of("runner.video", on_loading=True) == set()
    tree_of.cache_clear()


@pytest.mark.parametrize("module", MODULES)
def test_a_module_says_what_it_is_and_what_it_offers(module):
    tree = tree_of(module)
    if not tree.body and MODULES[module].name == "__init__.py":
        return  # an empty package file offers nothing
    assert ast.get_docstring(tree), f"{module} has no docstring"
    if MODULES[module].name == "__init__.py":
        return
    lists = [node for node in tree.body if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "__all__"]
    assert len(lists) == 1, f"{module} needs one __all__"
    offered = ast.literal_eval(lists[0].value)
    defined = {name for node in tree.body for name in names_defined(node)}
    assert set(offered) <= defined, f"{module} offers {sorted(set(offered) - defined)}, which it does not have"
    assert len(set(offered)) == len(offered)


def names_defined(node: ast.stmt) -> set[str]:
    """What one statement at the top of a module binds, inside `if` and `try` as well."""
    if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
        return {node.name}
    if isinstance(node, ast.Import | ast.ImportFrom):
        return {(alias.asname or alias.name).split(".")[0] for alias in node.names}
    if isinstance(node, ast.If | ast.Try):
        return {
            name for child in ast.iter_child_nodes(node) if isinstance(child, ast.stmt) for name in names_defined(child)
        }
    return {name.id for name in ast.walk(node) if isinstance(name, ast.Name) and isinstance(name.ctx, ast.Store)}


def test_no_file_is_too_long():
    too_long = {}
    for name, longest in LONGEST.items():
        folder = ROOT / name
        for path in [*folder.rglob("*.py"), *folder.rglob("*.sh")]:
            lines = len(path.read_text(encoding="utf-8").splitlines())
            if lines > longest:
                too_long[str(path.relative_to(ROOT))] = lines
    assert too_long == {}


IMPORTED_AFTER = """
import json, runpy, sys
arguments = json.loads(sys.argv[1])
sys.argv = arguments
try:
    if arguments[0].endswith(".py"):
        runpy.run_path(arguments[0], run_name="__main__")
    else:
        runpy.run_module(arguments[0], run_name="__main__")
    code = 0
except SystemExit as stop:
    code = stop.code
print(json.dumps({"code": code, "modules": sorted(sys.modules)}), file=sys.stderr)
"""


@pytest.mark.parametrize(
    "arguments",
    [
        ["runner.cli", "--help"],
        ["runner.cli", "run", "--help"],
        ["runner.cli", "--version"],
        [str(ROOT / "entrypoint.py"), "--help"],
    ],
    ids=lambda arguments: " ".join(Path(argument).name for argument in arguments),
)
def test_help_is_light(arguments):
    done = subprocess.run(
        [sys.executable, "-c", IMPORTED_AFTER, json.dumps(arguments)],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
        timeout=60,
    )
    seen = json.loads(done.stderr.splitlines()[-1])
    assert seen["code"] in (0, None)
    assert done.stdout.strip()
    assert "argparse" in seen["modules"]  # the parser ran in that very process
    assert [name for name in HEAVY if name in seen["modules"]] == []


@cache
def make_targets() -> frozenset[str]:
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    return frozenset(re.findall(r"^([a-z][a-z-]*):.*##", makefile, flags=re.MULTILINE))


def test_the_fixed_targets_exist():
    fixed = {"help", "setup", "demo", "test", "lint", "image", "bench", "bench-gpu", "soak", "clean"}
    assert fixed <= make_targets()


def test_help_of_make_lists_every_target():
    listing = subprocess.run(["make", "help"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    assert set(re.findall(r"^ +make ([a-z-]+) ", listing, flags=re.MULTILINE)) == make_targets()


def test_the_readme_names_only_targets_that_exist():
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    code = "\n".join(re.findall(r"```.*?```|`[^`\n]+`", readme, flags=re.DOTALL))
    named = set(re.findall(r"\bmake ([a-z][a-z-]*)", code))
    assert named, "the README shows no make command at all"
    assert named <= make_targets()


def test_the_image_takes_only_what_exists():
    """Every COPY of the Dockerfile names something in the repository that .dockerignore lets through."""
    copies = re.findall(r"^COPY (.+)$", (ROOT / "Dockerfile").read_text(encoding="utf-8"), flags=re.MULTILINE)
    allowed = re.findall(r"^!(.+)$", (ROOT / ".dockerignore").read_text(encoding="utf-8"), flags=re.MULTILINE)
    sources = [word for line in copies for word in line.split()[:-1]]
    assert sources
    for source in sources:
        assert (ROOT / source).exists(), source
        assert source in allowed, f"{source} is kept out by .dockerignore"

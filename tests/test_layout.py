"""The shape of the repository: who may import whom, what stays light, and that the documents name things that exist."""

from __future__ import annotations

import ast
import json
import re
import subprocess
import sys
import warnings
from contextlib import nullcontext
from functools import cache, partial
from pathlib import Path

import pytest

from runner.verbs.commands import VERBS

ROOT = Path(__file__).resolve().parent.parent
RUNNER = ROOT / "runner"
HEAVY = ("torch", "diffusers", "transformers", "boto3", "numpy", "pydantic", "rich", "structlog")
LONG = 600  # lines of a file: worth a look for a second noun in it
TOO_LONG = 900
FOLDERS, FILES = 15, 6  # at the top of runner/, at most

# The floors, from the top. A room is a folder or a file of runner/; a module belongs to the longest name that fits.
# An import stays within its room or goes to a lower floor. A new room finds its place here before its first import.
FLOORS: tuple[tuple[str, ...], ...] = (
    ("cli",),
    ("verbs",),
    ("launch",),  # its Ray driver feeds the batch loop
    ("batch", "demo", "regression"),
    ("finishing", "generation.wan_animate"),
    ("generation", "generation.runtime"),
    ("preprocess",),
    ("preprocess.masks",),
    ("preprocess.body",),
    ("preprocess.networks", "preprocess.pictures", "weights"),
    ("spec",),
    ("quantization.files",),
    ("quantization",),
    ("quantization.kernels", "quantization.lora"),
    ("quantization.formats", "records", "storage", "video"),
    ("forecast",),
    ("errors", "hashing", "redact", "timing"),
    ("__init__",),  # the package itself: its version
)
HEIGHT = {room: len(FLOORS) - depth for depth, rooms in enumerate(FLOORS) for room in rooms}

# Beyond the floors: of a lower room, a room may know these modules and no others.
KNOWS: dict[str, dict[str, set[str]]] = {
    # frames, not manifests
    "preprocess": {
        "spec": {"options"},
        "storage": {"disk", "disk_cache", "file_hashes"},
        "records": {"people"},  # the boxes that it knows, as they are kept
        "forecast": set(),
    },
    # a model, not a batch
    "generation": {
        "spec": {"options", "recipes"},
        "storage": {"disk_cache"},
        "records": {"drift_record", "people"},
        "video": {"drift"},  # measures of pictures that are there, no clips
    },
    "weights": {"spec": {"options", "recipes"}, "storage": {"file_hashes"}, "records": set(), "video": set()},
    # tensors, not jobs
    "quantization": {"forecast": {"precisions"}} | {name: set() for name in ("records", "storage", "timing", "video")},
}

# Modules that are named in a text and imported when they are first needed: where that is done, and why.
REGISTRIES = {
    "runner.forecast.precisions": "a backend's file loads torch; the table of GEMM precisions is read without it",
    "runner.generation.families": "a model is imported when a recipe names it",
    "runner.finishing.stages": "a stage is imported when the first job starts; it may load torch",
    "runner.storage.uris": "which backend serves a URI is known when it is read; boto3 takes half a second to import",
    "runner.preprocess.masks.segmenter": "which segmenter a folder holds is known when its config.json is read",
}


def name_of(path: Path) -> str:
    """runner/preprocess/body/face.py → runner.preprocess.body.face; a package's __init__ has the package's name."""
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def room_of(module: str) -> str:
    """runner.preprocess.body.face → preprocess.body; runner → __init__."""
    if module == "runner":
        return "__init__"
    parts = module.removeprefix("runner.").split(".")
    fitting = (".".join(parts[:n]) for n in range(len(parts), 0, -1))
    return next((room for room in fitting if room in HEIGHT), parts[0])


MODULES = {name_of(path): path for path in sorted(RUNNER.rglob("*.py"))}


def tree_of(module: str) -> ast.Module:
    return parse(MODULES[module])


@cache
def parse(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"))


def imports_of(module: str) -> frozenset[str]:
    """The project's modules that `module` names in import statements, wherever they stand."""
    return imports_in(MODULES[module])


@cache
def imports_in(path: Path) -> frozenset[str]:
    found: set[str] = set()
    for node in ast.walk(parse(path)):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}, line {node.lineno}: write the import in full"
            # `from runner.video import probe` names a module; `from runner.video import reader` names one in its list.
            inner = {f"{node.module}.{alias.name}" for alias in node.names}
            found |= (inner & MODULES.keys()) or {str(node.module)}
    return frozenset(name for name in found if name.split(".")[0] == "runner")


@pytest.mark.parametrize("module", MODULES)
def test_imports_go_to_lower_floor_or_stay_in_room(module):
    room = room_of(module)
    assert room in HEIGHT, f"{module}: give `{room}` a place in FLOORS"
    wrong = {name for name in imports_of(module) if (to := room_of(name)) != room and HEIGHT[to] >= HEIGHT[room]}
    assert not wrong, f"{module} imports {sorted(wrong)}, which are not below it"


def test_imports_have_no_cycle():
    """There is none inside a room either, and none by an import inside a function."""
    graph = {module: (imports_of(module) & MODULES.keys()) - {"runner"} for module in MODULES}
    while leaves := {module for module, needs in graph.items() if not needs}:
        graph = {module: needs - leaves for module, needs in graph.items() if module not in leaves}
    assert graph == {}


@pytest.mark.parametrize("room", KNOWS)
def test_room_imports_only_allowed_modules(room):
    seen = 0
    for module in MODULES:
        if module.split(".")[1:2] == [room]:
            for name in imports_of(module):
                top, _, rest = name.removeprefix("runner.").partition(".")
                if top in KNOWS[room]:
                    assert rest in KNOWS[room][top], f"{module} knows of {name}"
                    seen += 1
    assert seen or not any(KNOWS[room].values())


@pytest.mark.parametrize("module", ["runner.batch.loop", "runner.batch.task", "runner.batch.delivery"])
def test_loop_imports_only_protocol_of_generators(module):
    models = {name for name in imports_of(module) if name.split(".")[1] in ("generation", "preprocess", "quantization")}
    assert models == {"runner.generation.protocol"}


@pytest.mark.parametrize(
    ("source", "floors", "circle"),
    [
        ("from runner.errors import RunnerError", True, False),
        ("from runner.batch.loop import Batch", False, True),  # the loop delivers videos
        ("def f():\n    from runner.batch import loop", False, True),
        ("import runner.spec.manifest", False, False),
        ("from runner.records.record import ErrorRecord", False, False),  # beside it, on the same floor
        ("def f():\n    from runner.video.reader import probe", True, True),  # reader.py imports decode.py
    ],
)
def test_wrong_import_is_found(monkeypatch, tmp_path, source, floors, circle):
    """Each source stands for the content of video/decode.py."""
    file = tmp_path / "decode.py"
    file.write_text(source, encoding="utf-8")
    monkeypatch.setitem(MODULES, "runner.video.decode", file)
    for check, right in (
        (partial(test_imports_go_to_lower_floor_or_stay_in_room, "runner.video.decode"), floors),
        (test_imports_have_no_cycle, not circle),
    ):
        with nullcontext() if right else pytest.raises(AssertionError):
            check()


def test_modules_named_in_texts_exist_and_are_in_registries():
    for module in MODULES:
        for node in ast.walk(tree_of(module)):
            if isinstance(node, ast.Constant) and re.fullmatch(r"runner(\.\w+)+:\w+", str(node.value)):
                assert module in REGISTRIES, f"{module}, line {node.lineno}: {node.value}"
                named, _, attribute = str(node.value).partition(":")
                assert attribute in {name for child in tree_of(named).body for name in names_defined(child)}


def test_only_cli_module_names_argparse():
    """No text names it either: below the command line there are settings, not parsed flags."""
    knowing = {path.name for path in RUNNER.rglob("*.py") if "argparse" in path.read_text(encoding="utf-8")}
    assert knowing == {"cli.py"}


def test_only_tables_module_prints():
    """The text that it prints has no secrets in it."""
    for module in MODULES.keys() - {"runner.verbs.tables"}:
        calls = (node.func for node in ast.walk(tree_of(module)) if isinstance(node, ast.Call))
        lines = [name.lineno for name in calls if isinstance(name, ast.Name) and name.id == "print"]
        assert lines == [], f"{module} prints in line {lines}: call print_text or print_error of tables.py"


def test_top_of_package_has_few_folders_and_files():
    folders = [path for path in RUNNER.iterdir() if path.is_dir() and list(path.glob("*.py"))]
    assert len(folders) <= FOLDERS
    assert len(list(RUNNER.glob("*.py"))) <= FILES


def test_file_name_is_unique_in_tree():
    """Each file name occurs once in the whole tree. Names that differ only by an s at the end count as equal."""
    by_name: dict[str, list[str]] = {}
    for folder in ("runner", "bench", "tools", "tests"):
        for path in (ROOT / folder).rglob("*.py"):
            if path.stem not in ("__init__", "conftest"):
                by_name.setdefault(path.stem.removesuffix("s"), []).append(str(path.relative_to(ROOT)))
    assert {name: paths for name, paths in by_name.items() if len(paths) > 1} == {}


def test_class_name_is_unique_in_package():
    """Each class name occurs once in the whole package."""
    by_name: dict[str, list[str]] = {}
    for module in MODULES:
        for node in tree_of(module).body:
            if isinstance(node, ast.ClassDef):
                by_name.setdefault(node.name, []).append(module)
    assert {name: modules for name, modules in by_name.items() if len(modules) > 1} == {}


@pytest.mark.parametrize("module", MODULES)
def test_module_has_docstring_and_list_of_public_names(module):
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


def test_file_length_is_below_limit():
    """A long file is named in a warning. Split it by subject, not at a number of lines."""
    lines = {}
    for folder in ("runner", "bench", "tools", "tests"):
        for path in [*(ROOT / folder).rglob("*.py"), *(ROOT / folder).rglob("*.sh")]:
            lines[str(path.relative_to(ROOT))] = len(path.read_text(encoding="utf-8").splitlines())
    if long := {path: count for path, count in lines.items() if count > LONG}:
        warnings.warn(f"is each of these one noun? {long}", stacklevel=1)
    assert {path: count for path, count in lines.items() if count > TOO_LONG} == {}


def files_named(text: str) -> set[str]:
    """Python files and folders of the project that a text names: `loop.py`, `batch/loop.py`, `runner/batch/`."""
    return set(re.findall(r"(?<![\w./-])((?:\w+/)*\w+\.py)\b", text))


DOCUMENTS = [
    "README.md",
    *(f"docs/{path.name}" for path in sorted(ROOT.glob("docs/*.md"))),
    "bench/results.md",
    "Dockerfile",
]


@pytest.mark.parametrize("document", DOCUMENTS)
def test_documents_name_files_that_exist(document):
    text = (ROOT / document).read_text(encoding="utf-8")
    assert {name for name in files_named(text) - FOREIGN_FILES if not exists(name)} == set()


def test_architecture_names_every_room_and_no_other_folder():
    text = (ROOT / "docs" / "architecture.md").read_text(encoding="utf-8")
    named = set(re.findall(r"`(\w+(?:/\w+)*)/`", text))
    rooms = {name.replace(".", "/") for name in HEIGHT}
    files = {room for room in rooms if (RUNNER / f"{room}.py").is_file()}
    below = {room for room in rooms if room.startswith("quantization/")}  # named below it, by their own names
    wanted = (rooms - files - below) | {room.partition("/")[2] for room in below}
    assert wanted <= named
    assert {f"{room}.py" for room in files} - {"__init__.py"} <= files_named(text)
    places = (ROOT, RUNNER, RUNNER / "quantization")
    assert {name for name in named if not any((place / name).is_dir() for place in places)} == set()


@pytest.mark.parametrize("module", MODULES)
def test_docstrings_name_files_that_exist(module):
    texts = [ast.get_docstring(node) or "" for node in ast.walk(tree_of(module)) if isinstance(node, DOCUMENTED)]
    lines = MODULES[module].read_text(encoding="utf-8").splitlines()
    texts += [line.partition("#")[2] for line in lines]
    named = set().union(*(files_named(text) for text in texts)) - FOREIGN_FILES
    assert {name for name in named if not exists(name)} == set()


DOCUMENTED = ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef
FOREIGN_FILES = {"preprocess_data.py"}  # the official preprocessing script


@cache
def python_files() -> frozenset[str]:
    folders = ("runner", "bench", "tools", "tests")
    found = {str(path.relative_to(ROOT)) for folder in folders for path in (ROOT / folder).rglob("*.py")}
    return frozenset(found | {path.name for path in ROOT.glob("*.py")})


def exists(name: str) -> bool:
    """Is this the path, or the end of the path, of a Python file of the project?"""
    return any(path == name or path.endswith(f"/{name}") for path in python_files())


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
        *([*words, "--help"] for words in (["runner.cli", *verb.name.split()] for verb in VERBS)),
        ["runner.cli", "weights", "--help"],
        ["runner.cli", "--version"],
        [str(ROOT / "entrypoint.py"), "--help"],
    ],
    ids=lambda arguments: " ".join(Path(argument).name for argument in arguments),
)
def test_help_imports_no_heavy_module(arguments):
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


def test_fixed_make_targets_exist():
    fixed = {
        "help",
        "setup",
        "demo",
        "test",
        "lint",
        "image",
        "bench",
        "bench-gpu",
        "gpu-check",
        "soak",
        "flaky",
        "clean",
    }
    assert fixed <= make_targets()


def test_help_of_make_lists_every_target():
    listing = subprocess.run(["make", "help"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    assert set(re.findall(r"^ +make ([a-z-]+) ", listing, flags=re.MULTILINE)) == make_targets()


def test_image_copies_only_existing_files():
    """Every COPY of the Dockerfile names something in the repository that .dockerignore lets through."""
    copies = re.findall(r"^COPY (.+)$", (ROOT / "Dockerfile").read_text(encoding="utf-8"), flags=re.MULTILINE)
    allowed = re.findall(r"^!(.+)$", (ROOT / ".dockerignore").read_text(encoding="utf-8"), flags=re.MULTILINE)
    sources = [word for line in copies for word in line.split()[:-1]]
    assert sources
    for source in sources:
        assert (ROOT / source).exists(), source
        assert source in allowed, f"{source} is kept out by .dockerignore"

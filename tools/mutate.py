"""Mutate: change one number, sign, comparison or term of a module at a time, and run tests against each change.

    python tools/mutate.py runner/forecast/flops.py [test file …]

In:   a module of the project; test files, else the one that mirrors it. Out: the changes that no test notices, one a
line; exit code 1 where there are any. Never: a changed file on disk. A change lives in one forked process.
"""

from __future__ import annotations

import argparse
import ast
import contextlib
import copy
import importlib
import importlib.util
import os
import pickle
import select
import signal
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from importlib.machinery import ModuleSpec, SourceFileLoader
from pathlib import Path
from types import CodeType

__all__ = ["Mutant", "main", "mutants_of"]

OWN = ("runner", "tests", "bench", "tools", "conftest")
GUARDS = ("frozen", "strict", "daemon")  # arguments that refuse what no correct program does
OPPOSITE: dict[type, type] = {
    ast.Add: ast.Sub,
    ast.Sub: ast.Add,
    ast.Mult: ast.Div,
    ast.Div: ast.Mult,
    ast.FloorDiv: ast.Mult,
    ast.Mod: ast.FloorDiv,
    ast.Pow: ast.Mult,
    ast.LShift: ast.RShift,
    ast.RShift: ast.LShift,
    ast.BitAnd: ast.BitOr,
    ast.BitOr: ast.BitAnd,
    ast.And: ast.Or,
    ast.Or: ast.And,
    ast.Lt: ast.LtE,
    ast.LtE: ast.Lt,
    ast.Gt: ast.GtE,
    ast.GtE: ast.Gt,
    ast.Eq: ast.NotEq,
    ast.NotEq: ast.Eq,
    ast.Is: ast.IsNot,
    ast.IsNot: ast.Is,
    ast.In: ast.NotIn,
    ast.NotIn: ast.In,
}


@dataclass(frozen=True)
class Mutant:
    """One changed copy of a module: the line, the code there before and after, and the whole module compiled."""

    line: int
    before: str
    after: str
    code: CodeType

    def __str__(self) -> str:
        return f"line {self.line}: {self.before}  →  {self.after}"


def mutants_of(source: str, file: str = "<string>") -> Iterator[Mutant]:
    """Every mutant of a module's text, in the order of the text. SyntaxError where it is no Python."""
    tree = ast.parse(source, file)
    for line, _, parent, name, index, child in sorted(_places(tree), key=lambda place: place[:2]):
        for changed in _changes(child):
            _put(parent, name, index, ast.copy_location(changed, child))
            code = compile(ast.fix_missing_locations(tree), file, "exec")
            yield Mutant(line, _shown(child), _shown(changed), code)
            _put(parent, name, index, child)


def _places(parent: ast.AST) -> Iterator[tuple[int, int, ast.AST, str, int | None, ast.AST]]:
    """(line, column, parent, field, index in it, node) of each node below; annotations and messages are left out."""
    for name, value in ast.iter_fields(parent):
        if name in ("annotation", "returns") or isinstance(value, ast.JoinedStr):
            continue
        if isinstance(parent, ast.keyword) and parent.arg in GUARDS:
            continue
        for index, child in enumerate(value) if isinstance(value, list) else [(None, value)]:
            if isinstance(child, ast.AST) and not isinstance(child, ast.JoinedStr):
                if isinstance(child, ast.expr | ast.stmt):
                    yield child.lineno, child.col_offset, parent, name, index, child
                yield from _places(child)


def _put(parent: ast.AST, name: str, index: int | None, child: ast.AST) -> None:
    if index is None:
        setattr(parent, name, child)
    else:
        getattr(parent, name)[index] = child


def _shown(node: ast.AST) -> str:
    return " ".join(ast.unparse(node).split())[:100]


def _changes(node: ast.AST) -> Iterator[ast.AST]:
    if isinstance(node, ast.Constant) and isinstance(node.value, bool):
        yield ast.Constant(not node.value)
    elif isinstance(node, ast.Constant) and isinstance(node.value, int | float):
        yield from (ast.Constant(value) for value in {node.value * 2, node.value + 1, -node.value} - {node.value})
    elif isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.USub | ast.Not):
        yield node.operand
    elif isinstance(node, ast.IfExp):
        yield from (node.body, node.orelse)
    elif isinstance(node, ast.If | ast.While):
        changed = copy.copy(node)
        changed.test = ast.UnaryOp(ast.Not(), node.test)
        yield changed
    elif isinstance(node, ast.Expr) and isinstance(node.value, ast.Call):
        yield ast.Pass()
    if isinstance(node, ast.Compare):
        for index, op in enumerate(node.ops):
            changed = copy.copy(node)
            changed.ops = [*node.ops[:index], OPPOSITE[type(op)](), *node.ops[index + 1 :]]
            yield changed
    elif isinstance(node, ast.BinOp | ast.BoolOp | ast.AugAssign) and type(node.op) in OPPOSITE:
        changed = copy.copy(node)
        changed.op = OPPOSITE[type(node.op)]()
        yield changed
    if isinstance(node, ast.BinOp) and isinstance(node.op, ast.Add | ast.Sub | ast.Mult | ast.Div | ast.FloorDiv):
        yield from (node.left, node.right)
    elif isinstance(node, ast.BoolOp):
        yield from node.values
    elif isinstance(node, ast.AugAssign):
        yield ast.Pass()
    elif isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id in ("min", "max", "abs"):
        yield from (arg for arg in node.args if not isinstance(arg, ast.Starred | ast.GeneratorExp))


class _Loader(SourceFileLoader):
    """Loads the mutant in the module's place."""

    def __init__(self, name: str, path: str, code: CodeType) -> None:
        super().__init__(name, path)
        self.code = code

    def get_code(self, fullname: str) -> CodeType:
        return self.code


class _Finder:
    def __init__(self, name: str, path: Path, code: CodeType) -> None:
        self.name, self.path, self.code = name, path, code

    def find_spec(self, name: str, path: object = None, target: object = None) -> ModuleSpec | None:
        if name != self.name:
            return None
        loader = _Loader(name, str(self.path), self.code)
        return importlib.util.spec_from_file_location(name, self.path, loader=loader)


def _run_tests(tests: Sequence[str], finder: _Finder | None, timeout_s: float) -> tuple[bool, list[str]]:
    """(do they pass, names of the modules that they import), in a process of their own. Too slow is a failure."""
    reader, writer = os.pipe()
    child = os.fork()
    if child == 0:
        os.setpgid(0, 0)
        os.close(reader)
        for stream in (1, 2):
            os.dup2(os.open(os.devnull, os.O_WRONLY), stream)
        if finder is not None:
            sys.meta_path.insert(0, finder)  # type: ignore[arg-type]
        import pytest

        with tempfile.TemporaryDirectory() as folder:
            options = ["-x", "-q", "-p", "no:cacheprovider", "-p", "no:xdist", "--basetemp", f"{folder}/t"]
            code = pytest.main([*options, *tests])
            with os.fdopen(writer, "wb") as file:
                pickle.dump((code == 0, list(sys.modules)), file)
        os._exit(0)
    os.close(writer)
    with os.fdopen(reader, "rb") as file:
        ready, _, _ = select.select([file], [], [], timeout_s)
        answer = file.read() if ready else b""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(child, signal.SIGKILL)
    os.waitpid(child, 0)
    return pickle.loads(answer) if answer else (False, [])


def _mirror(root: Path, module: Path) -> str:
    """tests/forecast/test_flops.py of runner/forecast/flops.py, tests/bench/test_jobs.py of bench/jobs.py."""
    within = module.relative_to(root)
    folder = Path(*within.parts[1:-1]) if within.parts[0] == "runner" else within.parent
    return str(root / "tests" / folder / f"test_{within.name}")


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0], allow_abbrev=False)
    parser.add_argument("module", type=Path, help="a Python file of the project")
    parser.add_argument("tests", nargs="*", help="test files (the one that mirrors the module)")
    parser.add_argument("--lines", help="FIRST-LAST: only changes in these lines")
    asked = parser.parse_args(arguments)
    path = asked.module.resolve()
    root = next(folder for folder in path.parents if (folder / "pyproject.toml").is_file())
    tests = asked.tests or [_mirror(root, path)]
    name = ".".join(path.relative_to(root).with_suffix("").parts)
    first, last = map(int, asked.lines.split("-")) if asked.lines else (1, 1 << 30)
    sys.path.insert(0, str(root))
    _run_tests(tests, None, 600)  # compiles what is not compiled yet
    passed, modules = _run_tests(tests, None, 600)
    if not passed:
        print(f"{' '.join(tests)}: fails without any change")
        return 2
    for module in modules:  # once, not once a mutant
        if module.split(".")[0] not in OWN:
            with contextlib.suppress(Exception):
                importlib.import_module(module)
    began = time.monotonic()
    passed, _ = _run_tests(tests, _Finder(name, path, compile(path.read_bytes(), str(path), "exec")), 600)
    if not passed:
        print(f"{' '.join(tests)}: passes, but not in a fork of a process that has imported what it needs")
        return 2
    limit = 10 + 5 * (time.monotonic() - began)
    survivors, count = [], 0
    for mutant in mutants_of(path.read_text(encoding="utf-8"), str(path)):
        if first <= mutant.line <= last:
            count += 1
            if _run_tests(tests, _Finder(name, path, mutant.code), limit)[0]:
                survivors.append(mutant)
                print(f"{asked.module}, {mutant}", flush=True)
    print(f"{asked.module}: {count} changes, {len(survivors)} that no test notices")
    return 1 if survivors else 0


if __name__ == "__main__":
    sys.exit(main())

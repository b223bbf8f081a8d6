"""Installs the project's dependencies into the interpreter that runs this file, for `make setup` and the image alike.

Enters: pyproject.toml, the extras wanted, pip's settings on this machine. Leaves: an environment, by uv; with
--resolve only the list of what would be in it.

torch is the one package whose right build depends on the machine. In this order:
  1. backend `cpu` and pip's find-links hold a wheel that fits this Python: that very file (works without a network);
  2. otherwise uv's --torch-backend (`cpu`, `cu130`, …, or `auto`, which asks the driver);
  3. backend `index`: whatever the configured package index serves, like any other package.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import importlib.util
import json
import os
import re
import shutil
import subprocess
import sys
import tomllib
from collections.abc import Mapping, Sequence
from pathlib import Path

import pip_settings

__all__ = ["choose_backend", "conflict", "expand_extras", "local_torch", "main", "stale", "torch_requirement"]

RESOLVED_PLATFORM = "x86_64-manylinux_2_36"  # of --resolve: glibc 2.36, that of the image's Debian 12
CUDA_BACKEND = "cu130"  # the CUDA major of the onnxruntime-gpu wheels too; the two must agree
# Distributions that own one folder: removing one later would gut the other. Each with the extra that brings it.
SHARED_FOLDERS = (
    (("onnxruntime", "cpu"), ("onnxruntime-gpu", "gpu")),
    (("cache-dit", "test-tools"), ("cache-dit-cu13", "svdq")),
)


def choose_backend(asked: str, extras: Sequence[str], *, has_driver: bool) -> str:
    """The backend of torch: as asked, else by the driver; a GPU image built where there is no GPU still gets CUDA."""
    if asked:
        return asked
    if has_driver:
        return "auto"
    return CUDA_BACKEND if "gpu" in extras else "cpu"


def expand_extras(pyproject: Path, asked: Sequence[str]) -> list[str]:
    """The extras asked for and those that they name in turn, as `test` names `test-tools`; each once."""
    project = tomllib.loads(pyproject.read_text(encoding="utf-8"))["project"]
    itself = re.compile(re.escape(project["name"]) + r"\[(.*)\]")
    found, left = list[str](), list(asked)
    while left:
        extra = left.pop(0)
        if extra not in found:
            found.append(extra)
            lines = project.get("optional-dependencies", {}).get(extra, [])
            inner = [match[1] for line in lines if (match := itself.match(line))]
            left += [name.strip() for names in inner for name in names.split(",")]
    return found


def conflict(extras: Sequence[str]) -> str | None:
    """Why the expanded `extras` cannot be installed together; None if they can."""
    for (first, one), (second, other) in SHARED_FOLDERS:
        if one in extras and other in extras:
            return f"extras {one} and {other}: {first} and {second} install the same folder; choose one of the two"
    return None


def torch_requirement(pyproject: Path, extras: Sequence[str] = ()) -> str:
    """The project's bounds on torch and those of its expanded `extras`, e.g. `torch>=2.10,<2.14`."""
    project = tomllib.loads(pyproject.read_text(encoding="utf-8"))["project"]
    of_extras = project.get("optional-dependencies", {})
    lines = [*project["dependencies"], *(line for extra in extras for line in of_extras.get(extra, []))]
    bounds = [match[1] for line in lines if (match := re.match(r"torch\b(?!-)\s*([^;]*)", line))]
    return "torch" + ",".join(bound.strip() for bound in bounds if bound.strip())


def local_torch(requirement: str) -> str | None:
    """The version of torch that pip's find-links hold for this Python, e.g. `2.13.0+cpu`; None if they hold none."""
    command = ["install", "--quiet", "--no-index", "--no-deps", "--ignore-installed", "--dry-run", "--report", "-"]
    probe = subprocess.run(
        [sys.executable, "-m", "pip", *command, requirement], capture_output=True, text=True, check=False
    )
    if probe.returncode:
        return None
    version: str = json.loads(probe.stdout)["install"][0]["metadata"]["version"]
    return version


def stale(extras: Sequence[str], backend: str, installed: Mapping[str, str]) -> list[str]:
    """What of the `installed` versions by name must go first, when an environment changes to the expanded `extras`.

    One of the distributions that share a folder goes when the other is wanted; where both are there, both go. A CPU
    build of torch satisfies any bound, so it would stay where CUDA is asked for.
    """
    gone: list[str] = []
    for (first, one), (second, other) in SHARED_FOLDERS:
        unwanted = {first} if other in extras else {second} if one in extras else set[str]()
        if unwanted & installed.keys():
            gone += [name for name in (first, second) if name in installed]
    return gone + ["torch"] * (backend != "cpu" and installed.get("torch", "").endswith("+cpu"))


def run_uv(*arguments: str, environment: Mapping[str, str] | None = None, text: str | None = None) -> None:
    """One uv command on this interpreter; its failure ends the program with uv's own code and message.

    `text`: its standard input.
    """
    command = [sys.executable, "-m", "uv", "pip", arguments[0], "--quiet", "--python", sys.executable, *arguments[1:]]
    done = subprocess.run(command, env={**(environment or {}), **os.environ}, input=text, text=True, check=False)
    if done.returncode:
        raise SystemExit(done.returncode)


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="Install the project's dependencies into this interpreter.")
    parser.add_argument(
        "--project", type=Path, default=Path(__file__).resolve().parent.parent, help="where pyproject.toml lies"
    )
    parser.add_argument("--extras", default="", help="comma-separated extras of pyproject.toml, e.g. gpu,demo")
    parser.add_argument(
        "--backend", default="", help="torch build: auto, cpu, cu130, …, or index (default: by the driver)"
    )
    parser.add_argument("--editable", action="store_true", help="install the project itself too, in place")
    parser.add_argument(
        "--resolve",
        metavar="PYTHON",
        help="install nothing: print name==version of what an empty environment would get with this Python, e.g. 3.11, "
        "on x86_64 Linux; reads metadata alone",
    )
    args = parser.parse_args(argv)

    pyproject = args.project / "pyproject.toml"
    extras = [name.strip() for name in args.extras.split(",") if name.strip()]
    expanded = expand_extras(pyproject, extras)
    if why := conflict(expanded):
        parser.error(why)
    backend = choose_backend(args.backend, extras, has_driver=shutil.which("nvidia-smi") is not None)
    environment = pip_settings.uv_environment(pip_settings.read())

    if importlib.util.find_spec("uv") is None:
        subprocess.run([sys.executable, "-m", "pip", "install", "--quiet", "uv>=0.8,<1"], check=True)
    local = local_torch(torch_requirement(pyproject, expanded))
    if local and backend != "cpu":
        environment.pop("UV_FIND_LINKS", None)  # its `+cpu` version would win over the same release with CUDA
    exact, build = "", []
    if local and backend == "cpu":
        exact, why = f"torch=={local}", f"torch {local} from pip's find-links"
    elif backend == "index":
        why = "torch as the package index serves it"
    else:
        build, why = ["--torch-backend", backend], f"torch by uv's --torch-backend {backend}"
    wanted = [*(word for name in extras for word in ("--extra", name)), *build]
    if args.resolve:
        target = ["--python-version", args.resolve, "--python-platform", RESOLVED_PLATFORM]
        plain = ["--no-header", "--no-annotate"]
        run_uv("compile", str(pyproject), "-", *wanted, *target, *plain, environment=environment, text=exact)
        return 0
    print(f"installing [{','.join(extras)}]: {why}", flush=True)
    everything = ["-r", str(pyproject), *wanted, *([exact] if exact else [])]
    installed = {dist.name.lower(): dist.version for dist in importlib.metadata.distributions()}
    if gone := stale(expanded, backend, installed):
        run_uv(
            "install", "--dry-run", *everything, environment=environment
        )  # nothing goes before its successor is found
        run_uv("uninstall", *gone)
    run_uv("install", *everything, environment=environment)
    if args.editable:
        run_uv("install", "--no-deps", "-e", str(args.project), environment=environment)
    return 0


if __name__ == "__main__":
    sys.exit(main())

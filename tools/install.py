"""Installs the project's dependencies into the interpreter that runs this file, for `make setup` and for the image.

In:   pyproject.toml, the requested extras, pip's settings on this machine. Out: an environment, made by uv; with
--resolve only the list of its packages.

torch is the only package whose build depends on the machine. It is chosen in this order:
  1. backend `cpu`, and pip's find-links have a wheel for this Python: this file (works without a network);
  2. otherwise uv's --torch-backend (`cpu`, `cu130`, …, or `auto`, which queries the driver);
  3. backend `index`: the build of the configured package index, like any other package.
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

RESOLVED_PLATFORM = "x86_64-manylinux_2_36"  # of --resolve: glibc 2.36, as in the image's Debian 12
CUDA_BACKEND = "cu130"  # must have the CUDA major version of the onnxruntime-gpu wheels
# Distributions with the same folder: removing one would damage the other. Each with the extra that installs it.
SHARED_FOLDERS = (
    (("onnxruntime", "cpu"), ("onnxruntime-gpu", "gpu")),
    (("cache-dit", "test-tools"), ("cache-dit-cu13", "svdq")),
)


def choose_backend(asked: str, extras: Sequence[str], *, has_driver: bool) -> str:
    """Return torch's backend: the requested one, else by the driver. A GPU image always gets CUDA."""
    if asked:
        return asked
    if has_driver:
        return "auto"
    return CUDA_BACKEND if "gpu" in extras else "cpu"


def expand_extras(pyproject: Path, asked: Sequence[str]) -> list[str]:
    """Return the requested extras and those that they include, as `test` includes `test-tools`; each once."""
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
    """Return why the expanded `extras` cannot be installed together; None if they can."""
    for (first, one), (second, other) in SHARED_FOLDERS:
        if one in extras and other in extras:
            return f"extras {one} and {other}: {first} and {second} install the same folder; choose one of them"
    return None


def torch_requirement(pyproject: Path, extras: Sequence[str] = ()) -> str:
    """Return the bounds on torch of the project and its expanded `extras`, e.g. `torch>=2.10,<2.14`."""
    project = tomllib.loads(pyproject.read_text(encoding="utf-8"))["project"]
    of_extras = project.get("optional-dependencies", {})
    lines = [*project["dependencies"], *(line for extra in extras for line in of_extras.get(extra, []))]
    bounds = [match[1] for line in lines if (match := re.match(r"torch\b(?!-)\s*([^;]*)", line))]
    return "torch" + ",".join(bound.strip() for bound in bounds if bound.strip())


def local_torch(requirement: str) -> str | None:
    """Return the version of torch in pip's find-links for this Python, e.g. `2.13.0+cpu`; None if there is none."""
    command = ["install", "--quiet", "--no-index", "--no-deps", "--ignore-installed", "--dry-run", "--report", "-"]
    probe = subprocess.run(
        [sys.executable, "-m", "pip", *command, requirement], capture_output=True, text=True, check=False
    )
    if probe.returncode:
        return None
    version: str = json.loads(probe.stdout)["install"][0]["metadata"]["version"]
    return version


def stale(extras: Sequence[str], backend: str, installed: Mapping[str, str]) -> list[str]:
    """Return the `installed` packages to remove first when an environment changes to the expanded `extras`.

    Of two distributions with the same folder, one is removed if the other is requested; if both are installed, both are
    removed. A CPU build of torch satisfies any bound, so it must be removed if CUDA is requested.
    """
    gone: list[str] = []
    for (first, one), (second, other) in SHARED_FOLDERS:
        unwanted = {first} if other in extras else {second} if one in extras else set[str]()
        if unwanted & installed.keys():
            gone += [name for name in (first, second) if name in installed]
    return gone + ["torch"] * (backend != "cpu" and installed.get("torch", "").endswith("+cpu"))


def run_uv(*arguments: str, environment: Mapping[str, str] | None = None, text: str | None = None) -> None:
    """Run a uv command on this interpreter. A failure ends the program with uv's exit code and message.

    `text`: its standard input.
    """
    command = [sys.executable, "-m", "uv", "pip", arguments[0], "--quiet", "--python", sys.executable, *arguments[1:]]
    done = subprocess.run(command, env={**(environment or {}), **os.environ}, input=text, text=True, check=False)
    if done.returncode:
        raise SystemExit(done.returncode)


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="Install the project's dependencies into this interpreter.")
    parser.add_argument(
        "--project", type=Path, default=Path(__file__).resolve().parent.parent, help="folder of pyproject.toml"
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
        environment.pop("UV_FIND_LINKS", None)  # uv would prefer its `+cpu` version to the same release with CUDA
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
        )  # packages are removed only after their replacements were found
        run_uv("uninstall", *gone)
    run_uv("install", *everything, environment=environment)
    if args.editable:
        run_uv("install", "--no-deps", "-e", str(args.project), environment=environment)
    return 0


if __name__ == "__main__":
    sys.exit(main())

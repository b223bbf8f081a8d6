"""The container image as the tests build and run it: tools/image.sh, no docker engine, every container confined.

Confined is: a read-only root, no network, no capabilities and a user that is not root. The store of images
(VIDEO_LAB_IMAGE_STORE) is kept from run to run: only the first build is slow.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import tempfile
from pathlib import Path

__all__ = [
    "DEMO_MODELS",
    "ROOT",
    "as_its_owner",
    "build",
    "contain",
    "make_demo",
    "make_workplace",
    "missing",
    "output_of",
    "python",
]

ROOT = Path(__file__).resolve().parents[1]
IMAGE_SH = ROOT / "tools" / "image.sh"
CONFINED = ("--read-only", "--network", "none", "--cap-drop", "all", "--security-opt", "no-new-privileges")
DEMO_MODELS = ".cache/demo-models"  # in a workplace


def missing(gigabytes: int = 0) -> str:
    """What this machine lacks to build and run an image that may take so much of its disk; empty if nothing."""
    if os.geteuid() != 0:
        return "needs root: the build mounts file systems"
    tools = [tool for tool in ("buildah", "podman", "runc", "mmdebstrap") if shutil.which(tool) is None]
    if tools:
        return f"not installed: {' '.join(tools)}"
    store = Path(os.environ.get("VIDEO_LAB_IMAGE_STORE") or tempfile.gettempdir()).resolve()
    place = next(folder for folder in (store, *store.parents) if folder.exists())
    free = shutil.disk_usage(place).free // 10**9
    return f"{free} GB are free in {place}, the build may take {gigabytes}" if free < gigabytes else ""


def build(tag: str, extra: str, torch_backend: str) -> str:
    """The image of this working tree with the extra `cpu` or `gpu`; its tag."""
    arguments = ("--build-arg", f"EXTRA={extra}", "--build-arg", f"TORCH_BACKEND={torch_backend}")
    done = subprocess.run([str(IMAGE_SH), "build", tag, *arguments], capture_output=True, text=True, check=False)
    assert done.returncode == 0, f"{done.stdout[-2000:]}\n{done.stderr[-4000:]}"
    return tag


def contain(image: str, *arguments: str, options: tuple[str, ...] = ()) -> subprocess.CompletedProcess[str]:
    """One confined container; its exit code, what it printed."""
    command = [str(IMAGE_SH), "run", *CONFINED, *options, image, *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=False)


def python(image: str, code: str, options: tuple[str, ...] = ()) -> subprocess.CompletedProcess[str]:
    """`python -c code` in the image instead of the runner."""
    return contain(image, "-c", code, options=("--entrypoint", "python", *options))


def output_of(done: subprocess.CompletedProcess[str]) -> str:
    return f"exit {done.returncode}\n{done.stdout[-3000:]}\n{done.stderr[-3000:]}"


def make_workplace(folder: Path) -> Path:
    """Makes `folder` like a user's, seen as /data: manifests, and room for models and outputs. Owned by uid 4321."""
    folder.chmod(0o755)  # pytest makes it for its own user alone; a person's folder can be read by others
    shutil.copytree(ROOT / "manifests", folder / "manifests")
    for path in [folder, *folder.rglob("*")]:
        os.chown(path, 4321, 4321)
    return folder


def as_its_owner(workplace: Path) -> tuple[str, ...]:
    """What the documentation tells a user to pass: the mounted folder and its owner's uid."""
    return ("--user", "4321:4321", "--volume", f"{workplace}:/data", "--workdir", "/data")


def make_demo(image: str, workplace: Path) -> Path:
    """The demo, made and rendered inside: models and media, then the manifest. Returns the output folder."""
    arguments = ("--models", DEMO_MODELS, "--media", ".cache/demo-media")
    made = contain(image, "weights", "demo", *arguments, options=as_its_owner(workplace))
    assert made.returncode == 0, output_of(made)
    arguments = ("run", "manifests/demo.yaml", "--out", "out/demo", "--models", DEMO_MODELS)
    done = contain(image, *arguments, "--sheet", "out/demo/sheet.png", options=as_its_owner(workplace))
    assert done.returncode == 0, output_of(done)
    return workplace / "out" / "demo"

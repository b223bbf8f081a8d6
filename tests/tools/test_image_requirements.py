"""What the GPU image gets, resolved as the Dockerfile asks for it; metadata of packages is read, nothing downloaded."""

from __future__ import annotations

import re
import shlex
import string
import subprocess
import sys
import tomllib
from pathlib import Path

import install
import pytest

from tests.system_tests import system_test

ROOT = Path(__file__).resolve().parents[2]
INSTALL = ROOT / "tools" / "install.py"
PYTHONS = {"bookworm": "3.11", "trixie": "3.13"}  # Debian's release → its Python
CUDA_PACKAGES = ("nvidia-cublas", "nvidia-cudnn-cu13", "nvidia-cufft", "nvidia-curand", "nvidia-nccl-cu13")


def dockerfile_arguments(extra: str) -> tuple[list[str], str]:
    """(arguments of tools/install.py in the Dockerfile's build, its base's Python), with torch from the index."""
    text = (ROOT / "Dockerfile").read_text(encoding="utf-8")
    (words,) = re.findall(r"python /build/tools/install\.py (.*?)(?: \\)?$", text, re.MULTILINE)
    (release,) = re.findall(r"^ARG BASE_IMAGE=debian:(\w+)", text, re.MULTILINE)
    return shlex.split(string.Template(words).substitute(EXTRA=extra, TORCH_BACKEND="index")), PYTHONS[release]


def resolve(*arguments: str, project: Path = ROOT) -> dict[str, str]:
    """Versions by name. Skips where no index answers; a conflict fails."""
    command = [sys.executable, str(INSTALL), "--project", str(project), *arguments]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=240)
    if "Failed to fetch" in done.stderr or "network was disabled" in done.stderr:
        pytest.skip(f"no package index: {done.stderr.strip().splitlines()[-1]}")
    assert done.returncode == 0, done.stderr
    return dict(line.split("==") for line in done.stdout.splitlines() if line)


@pytest.fixture(scope="module")
def resolved() -> dict[str, str]:
    arguments, python = dockerfile_arguments("gpu")
    return resolve(*arguments, "--resolve", python)


def major(version: str) -> int:
    return int(version.partition(".")[0])


def test_the_build_names_extras_of_the_project():
    arguments, _ = dockerfile_arguments("gpu")
    assert arguments == ["--extras", "gpu,demo,compare", "--backend", "index"]
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["project"]["optional-dependencies"]
    assert {"gpu", "demo", "compare"} <= set(extras)


def test_the_gpu_image_resolves_to_cuda_builds(resolved):
    assert [name for name in resolved if name.startswith("onnxruntime")] == ["onnxruntime-gpu"]
    assert "+cpu" not in resolved["torch"]
    missing = [name for name in CUDA_PACKAGES if name not in resolved]
    assert not missing, f"torch {resolved['torch']} brings no CUDA: lacks {missing}"
    assert "comfy-kitchen" in resolved


def test_the_image_with_svdq_s_kernels_gets_a_torch_that_they_load_under():
    arguments, python = dockerfile_arguments("gpu,svdq")
    resolved = resolve(*arguments, "--resolve", python)
    assert "cache-dit-cu13" in resolved and "cache-dit" not in resolved and "nunchaku" not in resolved
    assert tuple(int(part) for part in resolved["torch"].split(".")[:2]) < (2, 13)
    assert "+cpu" not in resolved["torch"]
    assert not [name for name in CUDA_PACKAGES if name not in resolved]
    assert {"comfy-kitchen", "onnxruntime-gpu"} <= set(resolved)


def test_the_tests_pin_the_triton_that_the_image_gets(resolved):
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["project"]["optional-dependencies"]
    (pin,) = [line for line in extras["test-tools"] if line.startswith("triton")]
    assert pin.split(";")[0].strip() == f"triton=={resolved['triton']}"


def test_onnxruntime_wants_the_cuda_that_torch_brings(resolved, tmp_path):
    """With onnxruntime's own extras of CUDA and cuDNN nothing changes: its libraries are those that torch pins."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["project"]
    pins = [f"{name}=={version}" for name, version in resolved.items()]
    extended = [f"onnxruntime-gpu[cuda,cudnn]=={resolved['onnxruntime-gpu']}", *pins]
    lines = ",\n".join(f'"{line}"' for line in extended)
    (tmp_path / "pyproject.toml").write_text(
        f'[project]\nname = "agreed"\nversion = "0"\nrequires-python = "{project["requires-python"]}"\n'
        f"dependencies = [{lines}]\n"
    )
    _, python = dockerfile_arguments("gpu")
    assert resolve("--backend", "index", "--resolve", python, project=tmp_path) == resolved
    assert install.CUDA_BACKEND.startswith(f"cu{major(resolved['cuda-toolkit'])}")


@system_test
def test_a_conflict_fails_and_is_no_skip(tmp_path):
    (tmp_path / "pyproject.toml").write_text(
        '[project]\nname = "conflict"\nversion = "0"\ndependencies = ["torch>=2.10,<2.14", "triton<2"]\n'
    )
    with pytest.raises(AssertionError, match="No solution found"):
        resolve("--backend", "index", "--resolve", "3.11", project=tmp_path)


@system_test
def test_an_index_that_does_not_answer_is_a_skip_with_its_words(monkeypatch, tmp_path):
    for name in ("UV_INDEX", "UV_FIND_LINKS", "UV_EXTRA_INDEX_URL"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("PIP_CONFIG_FILE", "/dev/null")
    monkeypatch.setenv("UV_DEFAULT_INDEX", "http://127.0.0.1:9/simple")  # the discard port: nothing listens
    monkeypatch.setenv("UV_HTTP_RETRIES", "0")
    monkeypatch.setenv("UV_NO_CACHE", "1")
    (tmp_path / "pyproject.toml").write_text(
        '[project]\nname = "unreachable"\nversion = "0"\ndependencies = ["torch"]\n'
    )
    with pytest.raises(pytest.skip.Exception, match="refused"):
        resolve("--backend", "index", "--resolve", "3.11", project=tmp_path)

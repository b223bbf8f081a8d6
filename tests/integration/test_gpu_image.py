"""The image for NVIDIA GPUs, built and run where there is none: what is in it, and the demo on the CPU.

Every container here is confined (tests/container_image.py). The image takes 7 GB of the store, which is kept from run
to run; torch is the package index's, as the project's own pins resolve there.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

from tests.container_image import (
    DEMO_MODELS,
    ROOT,
    as_its_owner,
    build,
    contain,
    make_demo,
    make_workplace,
    missing,
    output_of,
    python,
)

BACKEND = "index"
WHY_NOT = missing(20)  # GB: the image, its largest layer again while it is written, and an image of before

pytestmark = [
    pytest.mark.soak,
    pytest.mark.container,
    pytest.mark.skipif(bool(WHY_NOT), reason=WHY_NOT),
    pytest.mark.timeout(3600),
]


@pytest.fixture(scope="module")
def image() -> str:
    return build("localhost/video-lab:gpu-test", "gpu", BACKEND)


@pytest.fixture(scope="module")
def workplace(image, tmp_path_factory) -> Path:
    return make_workplace(tmp_path_factory.mktemp("workplace"))


@pytest.fixture(scope="module")
def demo(image, workplace) -> Path:
    return make_demo(image, workplace)


def report_of(done: subprocess.CompletedProcess[str]) -> dict:
    """The JSON object on the last line of standard output."""
    assert done.stdout.strip(), output_of(done)
    return json.loads(done.stdout.strip().splitlines()[-1])


INSTALLED = """
import importlib.metadata, json, sys
found = {d.name.lower().replace("_", "-"): d.version for d in importlib.metadata.distributions()}
print(json.dumps({"python": "%d.%d" % sys.version_info[:2], "found": found}))
"""


def test_the_image_holds_what_resolves(image):
    """So `make test`, which resolves without a download, speaks of this image."""
    report = report_of(python(image, INSTALLED))
    arguments = ["--extras", "gpu,demo,compare", "--backend", BACKEND, "--resolve", report["python"]]
    listing = subprocess.run(
        [sys.executable, str(ROOT / "tools" / "install.py"), *arguments], capture_output=True, text=True, check=True
    )
    resolved = dict(line.split("==") for line in listing.stdout.splitlines())
    installed = report["found"]
    assert set(installed) - set(resolved) == {"pip", "uv"}
    for name, version in resolved.items():
        assert installed[name].split("+")[0] in (version, version.removesuffix(".0")), name


LIBRARIES = """
import ctypes, json, pathlib
import comfy_kitchen, onnxruntime, torch, triton
provider = pathlib.Path(onnxruntime.__file__).parent / "capi" / "libonnxruntime_providers_cuda.so"
try:
    ctypes.CDLL(str(provider))
    missing = ""
except OSError as err:
    missing = str(err).split(":")[0]
print(json.dumps({
    "cuda": torch.version.cuda,
    "available": torch.cuda.is_available(),
    "cudnn": torch.backends.cudnn.version(),
    "providers": onnxruntime.get_available_providers(),
    "missing": missing,
    "triton": triton.__version__,
    "operators": [name for name in ("int8_linear", "int8_attention") if callable(getattr(comfy_kitchen, name, None))],
    "backends": {name: row["available"] for name, row in comfy_kitchen.list_backends().items()},
}))
"""


def test_every_library_loads_without_a_driver(image):
    report = report_of(python(image, LIBRARIES))
    assert int(report["cuda"].split(".")[0]) == 13 and not report["available"]
    assert report["cudnn"] >= 91500  # earlier ones of 9.10 on are wrong or slow with 16-bit convolutions
    assert report["providers"][:2] == ["TensorrtExecutionProvider", "CUDAExecutionProvider"]
    # torch has loaded CUDA by then: were onnxruntime built for another major, its own would be what is not found.
    assert report["missing"] == "libcuda.so.1"
    assert report["operators"] == ["int8_linear", "int8_attention"]
    assert report["backends"]["eager"] and not report["backends"]["hip"]
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["project"]["optional-dependencies"]
    assert any(line.startswith(f"triton=={report['triton']};") for line in extras["test-tools"])


COMPILED = """
import json, os, pathlib, triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from runner.quantization.kernels import rowwise_triton
signature = {"x": "*bf16", "codes": "*i8", "scales": "*fp32", "columns": "i32", "largest": "fp32"}
signature |= {"smallest_scale": "fp32", "INTEGER": "constexpr", "BLOCK": "constexpr"}
source = ASTSource(rowwise_triton._quantize, signature, {"INTEGER": True, "BLOCK": 8192})
sizes = {}
for capability in (80, 90, 120):
    made = triton.compile(source, target=GPUTarget("cuda", capability, 32), options={"num_warps": 16})
    sizes[capability] = len(made.asm["cubin"])
print(json.dumps({"sizes": sizes, "kept": len(list(pathlib.Path(os.environ["TRITON_CACHE_DIR"]).rglob("*.cubin")))}))
"""


def test_triton_compiles_a_kernel_under_a_read_only_root(image):
    """Down to machine code, by the ptxas in the image, into the cache that is the one place to write."""
    done = python(image, COMPILED, ("--user", "1234:1234", "--tmpfs", "/cache:mode=1777,exec"))
    report = report_of(done)
    assert min(report["sizes"].values()) > 1000 and report["kept"] == 3, output_of(done)


UNWANTED = """
import json, pathlib
root = pathlib.Path("/opt/venv")
print(json.dumps({"found": [str(path) for name in ("*.a", "backends/hip") for path in root.rglob(name)]}))
"""


def test_what_nothing_opens_is_left_out(image):
    assert report_of(python(image, UNWANTED)) == {"found": []}


def test_doctor_without_a_driver_and_without_weights(image):
    done = contain(image, "doctor", "--json")
    assert done.returncode == 2, output_of(done)
    checks = {check["name"]: check for check in report_of(done)["checks"]}
    assert [name for name, check in checks.items() if check["status"] == "fail"] == ["weights"]
    assert {name for name, check in checks.items() if check["status"] == "warn"} >= {"driver", "gpu"}
    assert "--gpus all" in checks["driver"]["todo"]
    assert "built for CUDA 13" in checks["torch"]["found"]
    assert checks["onnxruntime"]["found"].startswith("onnxruntime-gpu ")
    assert checks["providers"]["found"].startswith("CPUExecutionProvider")
    assert "Python.h" in checks["compiler"]["found"]


def test_doctor_is_content_with_the_demos_weights(image, workplace, demo):
    arguments = ("doctor", "--json", "--models", DEMO_MODELS, "--out", "out/demo", "--recipe", "fp32")
    done = contain(image, *arguments, options=as_its_owner(workplace))
    assert done.returncode == 0, output_of(done)
    assert report_of(done)["ok"]


def test_a_gpu_that_is_not_there_is_refused(image, workplace, demo):
    arguments = ("run", "manifests/demo.yaml", "--out", "out/cuda", "--models", DEMO_MODELS, "--device", "cuda")
    done = contain(image, *arguments, options=as_its_owner(workplace))
    assert done.returncode == 2, output_of(done)
    assert "config.invalid: device 'cuda' was asked for" in done.stderr and "--gpus all" in done.stderr
    assert not list((workplace / "out" / "cuda").glob("jobs/*/output.mp4"))


def test_the_demos_frames_are_those_of_the_cpu_build(demo, workplace, tmp_path):
    """The same models and media, rendered by this environment: every frame of every job, bit for bit."""
    out = tmp_path / "here"
    arguments = ["run", str(workplace / "manifests" / "demo.yaml"), "--out", str(out)]
    done = subprocess.run(
        [sys.executable, str(ROOT / "entrypoint.py"), *arguments, "--models", str(workplace / DEMO_MODELS)],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, output_of(done)
    jobs = sorted(path.name for path in (demo / "jobs").iterdir())
    assert len(jobs) >= 4 and jobs == sorted(path.name for path in (out / "jobs").iterdir())
    for job in jobs:
        frames = (demo / "jobs" / job / "frames.sha256").read_text(encoding="utf-8")
        assert frames == (out / "jobs" / job / "frames.sha256").read_text(encoding="utf-8"), job
        record = json.loads((demo / "jobs" / job / "result.json").read_text(encoding="utf-8"))
        assert record["status"] == "succeeded"
        assert (demo / "jobs" / job / "output.mp4").stat().st_uid == 4321  # the user's own files, not root's

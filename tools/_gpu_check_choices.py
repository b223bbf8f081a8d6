"""Part `choices` of the GPU check: the choices of the engine's probes on the device, and the tests marked `gpu`."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import platform
import subprocess
import sys
import tempfile
import xml.etree.ElementTree as ET
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from _gpu_check_record import PartRecord

from runner.forecast.flops import PRODUCTION
from runner.forecast.precisions import PRECISIONS
from runner.generation.runtime.attention import LIMITS, available_backends, pick_backend
from runner.generation.runtime.compute import capability_of, decide
from runner.generation.runtime.device import free_bytes
from runner.generation.runtime.fast_choice import probe_choice
from runner.generation.runtime.memory_plan import Window, choose_plan
from runner.generation.runtime.streaming import pin, whole_pages
from runner.quantization.formats.e2m1 import FORMATS
from runner.quantization.kernels.dequantize import pick_kernel
from runner.quantization.kernels.low_bit import pick_gemm_backend
from runner.quantization.kernels.row_codes import pick_rotation, pick_rows
from runner.spec.recipes import FAST_RECIPE, get_recipe

ROOT = Path(__file__).resolve().parent.parent
PACKAGES = ("diffusers", "transformers", "triton", "comfy-kitchen", "onnxruntime-gpu", "sageattention", "flash_attn_3")
TESTS = (
    "tests/quantization",
    "tests/generation/runtime/test_attention.py",
    "tests/generation/runtime/test_device.py",
    "tests/generation/runtime/test_encoders.py",
    "tests/generation/runtime/test_tensor_cache.py",
    "tests/generation/runtime/test_streaming.py",
    "tests/generation/wan_animate/test_compiled.py",
    "tests/preprocess/networks/test_io_binding.py",
    "tests/preprocess/test_pose_batches.py",
)
TESTS_S = 15.0  # minimum seconds of the tests: an estimate
HEADS, HEAD_DIM = 40, 128  # of the 14B model


def run(part: PartRecord, device: torch.device, *, tiny: bool) -> None:
    part.measure("machine", {}, lambda: machine(device))
    for fmt in FORMATS.values():
        part.measure("kernels", {"format": fmt.name}, lambda fmt=fmt: chosen(pick_kernel(device, fmt)))
    for name, precision in PRECISIONS.items():
        if precision.layout == "rows":
            part.measure("rows", {"precision": name}, lambda name=name: chosen(pick_rows(device, name)))
        for gelu in (False, True) if precision.rotated else ():
            what = {"precision": name, "gelu": gelu}
            part.measure("rotated_rows", what, lambda name=name, gelu=gelu: chosen(pick_rotation(device, name, gelu)))
        if precision.layout != "exact":
            part.measure("products", {"precision": name}, lambda name=name: product(device, name))
    for kind in LIMITS:
        part.measure("attention", {"kind": kind}, lambda kind=kind: attention(device, eight_bit=kind == "8 bit"))
    part.measure("fast", {"recipe": FAST_RECIPE}, lambda: fast(device))
    part.measure("pinned", {}, lambda: pinned(device))
    for size in ((832, 480, 81), (1280, 720, 81)):
        part.measure("memory_plan", {"size": "x".join(map(str, size))}, lambda size=size: memory_plan(device, size))
    part.measure("gpu_tests", {}, lambda: gpu_tests(part, TESTS[2:3] if tiny else TESTS), expected=TESTS_S)


def machine(device: torch.device) -> dict[str, Any]:
    """Return versions and a description of the device."""
    found: dict[str, Any] = {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
        "cudnn": torch.backends.cudnn.version(),
    }
    for name in PACKAGES:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            found[name] = None
    if device.type != "cuda":
        return found
    capability = torch.cuda.get_device_capability(device)
    found |= {"gpu": torch.cuda.get_device_name(device), "capability": f"{capability[0]}.{capability[1]}"}
    found |= {"memory_bytes": torch.cuda.get_device_properties(device).total_memory}
    try:
        import pynvml

        pynvml.nvmlInit()
        found["driver"] = str(pynvml.nvmlSystemGetDriverVersion())
    except Exception as err:  # a container without NVML's library
        found["driver"] = f"{type(err).__name__}"
    return found


def chosen(picked: tuple[str | None, str]) -> dict[str, Any]:
    return {"chosen": picked[0], "why": picked[1]}


def product(device: torch.device, name: str) -> dict[str, Any]:
    """Return the GEMM backend that passes here; for a precision that the device lacks, the error of a run."""
    capability, formats = capability_of(device), [PRECISIONS[name].stored_format or "nvfp4"]
    has = capability is None or PRECISIONS[name].runs_on(capability)
    picked = pick_gemm_backend(device, name) if has else (None, "")
    try:
        decide(name, capability, picked, formats, str(device))
    except Exception as err:
        return chosen(picked) | {"device_has_it": has, "refused": f"{type(err).__name__}: {err}"}
    return chosen(picked) | {"device_has_it": has, "refused": None}


def attention(device: torch.device, *, eight_bit: bool) -> dict[str, Any]:
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    name, why, error = pick_backend(device, dtype, HEADS, HEAD_DIM, eight_bit=eight_bit)
    limit = LIMITS["8 bit" if eight_bit else "exact"]
    return chosen((name, why)) | {"trial_error": error, "limit": limit, "available": sorted(available_backends())}


def fast(device: torch.device) -> dict[str, Any]:
    """Return the choices on this device of the recipe that leaves them open, before its layers are tested."""
    return probe_choice(get_recipe(FAST_RECIPE), device, HEADS, HEAD_DIM).as_dict()


def pinned(device: torch.device) -> dict[str, Any]:
    """Return whether host memory can be page-locked in place, as for streamed blocks."""
    if device.type != "cuda":
        return {"pinned": None, "why": "no GPU"}
    failed = pin(whole_pages(64 << 20))
    return {"pinned": failed is None, "why": failed or "64 MiB were page-locked in place"}


def memory_plan(device: torch.device, size: tuple[int, int, int]) -> dict[str, Any]:
    recipe, free = get_recipe("fp4-distill"), free_bytes(device)
    plan, why = choose_plan("auto", recipe, PRODUCTION, free, windows=[Window(*size)], cuda=device.type == "cuda")
    return {"free_bytes": free, "mode": plan.mode, "why": why}


def gpu_tests(
    part: PartRecord, tests: tuple[str, ...], find: Callable[[str], Any] = importlib.util.find_spec
) -> Mapping[str, Any]:
    """Run this checkout's tests that need a GPU."""
    if find("pytest") is None:
        return {"not_measured": "pytest is not installed"}
    if not (ROOT / "tests").is_dir():
        return {"not_measured": "the tests are not in this installation"}
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder) / "junit.xml"
        command = [
            sys.executable,
            "-m",
            "pytest",
            "-q",
            "-m",
            "gpu",
            "--junitxml",
            str(report),
            "-p",
            "no:cacheprovider",
            *tests,
        ]
        try:
            done = subprocess.run(
                command, cwd=ROOT, capture_output=True, text=True, timeout=max(1.0, part.left() - 2), check=False
            )
        except subprocess.TimeoutExpired:
            return {"not_measured": f"the tests did not end in {part.left() + 2:.0f} s"}
        if not report.is_file():
            last = (done.stdout + done.stderr).strip().splitlines()[-1:]
            return {"not_measured": f"pytest ended with {done.returncode}: {''.join(last)}"}
        return counts(report)


def counts(report: Path) -> dict[str, Any]:
    """Return the numbers of passed, failed and skipped tests of a JUnit file, and the failed ones."""
    cases = list(ET.parse(report).getroot().iter("testcase"))
    failed = [case for case in cases if case.find("failure") is not None or case.find("error") is not None]
    skipped = [case for case in cases if case.find("skipped") is not None]
    found = {"passed": len(cases) - len(failed) - len(skipped), "failed": len(failed), "skipped": len(skipped)}
    return found | {"failures": [f"{case.get('classname')}.{case.get('name')}" for case in failed]}

"""Doctor: any machine can stand behind the probes; each failing check says what to do, and none keeps another away."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from collections import namedtuple
from pathlib import Path

import pytest

from runner.verbs import doctor
from runner.verbs.doctor import Check, run_checks
from runner.verbs.probes import IDENTITY_GRAPH, Driver, Gpu, ProbeFailed, Probes, TorchInfo
from tests.quantization.svdq_files import LAYOUTS, write_svdq

GIB = 1 << 30
H200 = Gpu("NVIDIA H200", 141 * GIB, 140 * GIB)


PLAIN = ("python_version", "torch", "cudnn", "driver", "host_memory_bytes", "compiler", "python_header", "tensorrt")


class Machine(Probes):
    """A healthy GPU box, but for what a test says."""

    def __init__(self, **said: object) -> None:
        self.said = {
            "python_version": (3, 12, 1),
            "torch": TorchInfo("2.12.0+cu130", "13.0", (("NVIDIA H200", (9, 0)),)),
            "cudnn": 92000,
            "driver": Driver("580.65.06", (H200,)),
            "host_memory_bytes": 128 * GIB,
            "providers": ["CUDAExecutionProvider", "CPUExecutionProvider"],
            "tensorrt": ProbeFailed("libnvinfer is not installed"),
            "compiler": "/usr/bin/gcc",
            "python_header": "/usr/include/python3.12/Python.h",
            "encoder": "x264",
            "extension": "1.5.0",
            "distributions": {"onnxruntime-gpu": "1.23.0"},
            "broken": (),
        } | said

    def _say(self, name: str) -> object:
        value = self.said[name]
        if isinstance(value, Exception):
            raise value
        return value

    def __getattribute__(self, name: str) -> object:
        if name in PLAIN:
            return lambda: self._say(name)
        if name in ("providers", "encoder"):
            return lambda wanted: self._say(name)
        if name == "extension":
            return lambda distribution, module: self._say(name)
        return super().__getattribute__(name)

    def distribution(self, name: str) -> str | None:
        return self.said["distributions"].get(name)  # type: ignore[attr-defined]

    def package(self, name: str) -> str:
        if name in self.said["broken"]:  # type: ignore[operator]
            raise ProbeFailed(f"{name} cannot be imported (ImportError: no)")
        return "1.0"


def ask(name: str, tmp_path: Path, device: str = "cuda", **said: object) -> Check:
    checks = {check.name: check for check in run_checks(None, None, tmp_path, device, probes=Machine(**said))}
    assert all(check.todo for check in checks.values() if check.status in ("warn", "fail"))
    assert all(check.found for check in checks.values())
    return checks[name]


@pytest.mark.parametrize("device", ["auto", "cuda", "cuda:0"])
def test_doctor_on_healthy_gpu_machine_passes_all_checks(tmp_path, device, monkeypatch):
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(doctor.shutil, "disk_usage", lambda path: usage(900 * GIB, 0, 900 * GIB))
    checks = run_checks(None, str(tmp_path / "out"), tmp_path / "cache", device, probes=Machine())
    assert {check.name: check.status for check in checks if check.status != "ok"} == {"weights": "skipped"}
    assert not list(tmp_path.iterdir())  # nothing is left behind


NO_GPU = {
    "torch": TorchInfo("2.12.0+cpu", None, ()),
    "driver": ProbeFailed("no NVIDIA driver was found (NVML Shared Library Not Found)"),
    "providers": ["CPUExecutionProvider"],
    "distributions": {"onnxruntime": "1.23.0"},
}


@pytest.mark.parametrize(
    ("device", "expected"),
    [
        ("cuda", {"torch": "fail", "driver": "fail", "gpu": "fail", "providers": "fail"}),
        ("auto", {"torch": "ok", "driver": "warn", "gpu": "warn", "providers": "ok"}),
        (
            "cpu",
            {
                "torch": "ok",
                "driver": "skipped",
                "gpu": "skipped",
                "cudnn": "skipped",
                "providers": "ok",
                "compiler": "skipped",
            },
        ),
    ],
)
def test_doctor_without_gpu_fails_only_if_gpu_was_requested(tmp_path, device, expected):
    checks = {check.name: check for check in run_checks(None, None, tmp_path, device, probes=Machine(**NO_GPU))}
    assert {name: checks[name].status for name in expected} == expected


@pytest.mark.parametrize(
    ("name", "said", "status", "words"),
    [
        ("python", {"python_version": (3, 9, 2)}, "fail", "Python 3.11 to 3.14"),
        ("python", {"python_version": (3, 15, 0)}, "fail", "Python 3.11 to 3.14"),
        ("torch", {"torch": ProbeFailed("torch cannot be imported")}, "fail", "make setup"),
        ("diffusers", {"broken": ("transformers",)}, "fail", "transformers cannot be imported"),
        ("driver", {"driver": Driver("570.133.20", (H200,))}, "fail", "Install driver 580"),
        ("driver", {"driver": Driver("580.00", (H200,))}, "ok", "580.00"),
        (
            "driver",
            {"driver": Driver("570.133.20", (H200,)), "torch": TorchInfo("2.12.0+cu126", "12.6", (("H200", (9, 0)),))},
            "ok",
            "570",
        ),
        ("driver", {"torch": ProbeFailed("no torch")}, "ok", "580"),
        ("gpu", {"torch": TorchInfo("2.12.0+cu130", "13.0", ())}, "fail", "CUDA_VISIBLE_DEVICES"),
        ("gpu", {"torch": ProbeFailed("no torch")}, "fail", "First fix the checks torch and driver"),
        ("cudnn", {}, "ok", "9.20.0"),
        ("cudnn", {"cudnn": 91002}, "warn", "cuDNN 9.10.2"),
        ("cudnn", {"cudnn": 91002}, "warn", "'nvidia-cudnn-cu13>=9.15'"),
        ("cudnn", {"cudnn": ProbeFailed("torch cannot load cuDNN (no)")}, "fail", "cannot load cuDNN"),
        ("cudnn", {"cudnn": None}, "fail", "has no cuDNN"),
        ("cudnn", {"torch": ProbeFailed("no torch")}, "skipped", "no torch"),
        ("gpu memory", {"driver": Driver("580.1", (Gpu("B", 32 * GIB, 1 * GIB),))}, "warn", "nvidia-smi"),
        ("gpu memory", {"driver": Driver("580.1", (Gpu("B", 12 * GIB, 12 * GIB),))}, "warn", "minimal"),
        ("gpu memory", {"driver": Driver("580.1", (Gpu("4090", 25_757_220_864, 25_000_000_000),))}, "ok", "4090"),
        ("gpu memory", {"driver": Driver("580.1", ())}, "fail", "that a GPU is installed"),
        ("host memory", {"host_memory_bytes": 16 * GIB}, "warn", "48 GiB"),
        ("onnxruntime", {"distributions": {}}, "fail", "video-lab-runner[gpu]"),
        (
            "onnxruntime",
            {"distributions": {"onnxruntime": "1", "onnxruntime-gpu": "1"}},
            "fail",
            "pip uninstall -y onnxruntime onnxruntime-gpu",
        ),
        ("providers", {"providers": ["CPUExecutionProvider"]}, "fail", "same CUDA major"),
        ("providers", {"providers": ProbeFailed("onnxruntime cannot be imported")}, "fail", "video-lab-runner[gpu]"),
        ("video", {"broken": ("av",)}, "fail", "install --force-reinstall av"),
        ("video", {"encoder": ProbeFailed("this build of PyAV has no libx264 encoder")}, "fail", "libx264"),
        ("compiler", {"compiler": ProbeFailed("no C compiler")}, "warn", "gcc"),
        ("compiler", {"python_header": ProbeFailed("no Python.h")}, "warn", "python3-dev"),
        ("compiler", {"compiler": ProbeFailed("no C compiler")}, "warn", "s more a step on H200 at 832x480, 81 frames"),
        ("compiler", {"broken": ("triton",)}, "warn", "which includes Triton"),
        (
            "compiler",
            {"torch": TorchInfo("2.12.0+cu130", "13.0", (("Tesla P40", (6, 1)),))},
            "warn",
            "capability 6.1 Triton needs a GPU of compute capability 7.0 or newer. Until then: The transformer's",
        ),
        ("python", {"python_version": RuntimeError("odd")}, "fail", "odd"),
    ],
)
def test_doctor_check_finds_defect_and_names_remedy(tmp_path, name, said, status, words):
    check = ask(name, tmp_path, **said)
    assert check.status == status
    assert words in f"{check.found} {check.todo}"


def test_gpu_check_shows_seconds_of_fast_recipe(tmp_path):
    check = ask("gpu", tmp_path)
    assert check.status == "ok"
    seconds = re.search(
        r"; forecast for a clip of 832x480, 81 frames: fp4-distill ([\d.]+) s, fp4-fast ([\d.]+) s", check.found
    )
    assert seconds and float(seconds[2]) < 0.9 * float(seconds[1])
    assert check.found.endswith("s (with fp8 products, exact attention, autoencoder in 16 bits)")
    old = ask("gpu", tmp_path, torch=TorchInfo("2.12.0+cu130", "13.0", (("Tesla T4", (7, 5)),)))
    assert old.found == "Tesla T4, compute capability 7.5"  # nothing is known of its speed


@pytest.mark.parametrize(
    ("gpu", "capability", "recipe"),
    [
        ("NVIDIA GeForce RTX 5090", (12, 0), "fp4-distill+svdq-nvfp4+int8-attention+bf16-vae"),
        ("NVIDIA GeForce RTX 4090", (8, 9), "fp4-distill+svdq-int4+int8-attention+bf16-vae"),
        ("NVIDIA A100-SXM4-80GB", (8, 0), None),  # no faster there than in 8 bits
    ],
)
def test_gpu_check_names_svdq_recipe_if_forecast_is_faster(tmp_path, gpu, capability, recipe):
    found = ask("gpu", tmp_path, torch=TorchInfo("2.12.0+cu130", "13.0", ((gpu, capability),))).found
    if recipe is None:
        assert "svdq" not in found
        return
    seconds = re.search(r"fp4-fast ([\d.]+) s \(with.*; (\S+) ([\d.]+) s \(its rate is an estimate\)$", found)
    assert seconds and seconds[2] == recipe and float(seconds[3]) < float(seconds[1])


WHEEL = {"cache-dit-cu13": "1.5.0"}
NO_SYMBOL = ProbeFailed(
    "_C_svdquant of cache-dit-cu13 1.5.0 does not load with torch 2.13.0 (undefined symbol: _ZN3c10)"
)


def svdq(tmp_path, recipe, *, gpu=("NVIDIA GeForce RTX 5090", (12, 0)), device="auto", distributions=WHEEL, **said):
    """The check of the kernels; None where it is not made."""
    torch = TorchInfo("2.12.1+cu130", "13.0", (gpu,) if gpu else ())
    machine = Machine(torch=torch, distributions={"onnxruntime-gpu": "1", **distributions}, **said)
    checks = run_checks(None, None, tmp_path, device, recipe=recipe, probes=machine)
    assert all(check.todo for check in checks if check.status in ("warn", "fail"))
    return next((check for check in checks if check.name == "svdq kernels"), None)


@pytest.mark.parametrize("recipe", [None, "fp4-fast", "fp4-distill+nvfp4", "no such recipe"])
def test_svdq_check_without_svdq_recipe_or_kernels_is_left_out(tmp_path, recipe):
    assert svdq(tmp_path, recipe, distributions={"comfy-kitchen": "0.2.40", "nunchaku": "1.2.0"}) is None
    assert svdq(tmp_path, recipe) == Check(
        "svdq kernels", "ok", "svdq-int4: cache-dit-cu13 1.5.0; svdq-nvfp4: cache-dit-cu13 1.5.0"
    )


INT4, NVFP4 = "fp4-distill+svdq-int4", "fp4-distill+svdq-nvfp4"
ADA, HOPPER = ("NVIDIA GeForce RTX 4090", (8, 9)), ("NVIDIA H200", (9, 0))


@pytest.mark.parametrize(
    ("recipe", "more", "status", "words"),
    [
        (INT4, {"gpu": ADA}, "ok", "svdq-int4: cache-dit-cu13 1.5.0"),
        (NVFP4, {"gpu": ADA}, "fail", "RTX 4090 has no units for svdq-nvfp4 Leave out +svdq-nvfp4, or use +int8"),
        (NVFP4, {"gpu": HOPPER}, "fail", "H200 has no units for svdq-nvfp4 Leave out +svdq-nvfp4, or use +fp8"),
        (None, {"gpu": HOPPER}, "skipped", "H200 has no units for svdq-int4, svdq-nvfp4"),
        (INT4, {"distributions": {}}, "fail", "svdq-int4: no kernels here; cache-dit-cu13 is not installed"),
        (INT4, {"distributions": {}}, "fail", "video-lab-runner[svdq]', which needs torch below 2.13"),
        (INT4, {"distributions": {"comfy-kitchen": "0.2.40"}}, "warn", "svdq-int4: comfy-kitchen 0.2.40; cache-dit"),
        (NVFP4, {"extension": NO_SYMBOL}, "warn", "svdq-nvfp4: torch 2.12.1+cu130; _C_svdquant of cache-dit-cu13"),
        (INT4, {"extension": NO_SYMBOL}, "fail", "undefined symbol: _ZN3c10"),
        (None, {"extension": NO_SYMBOL}, "warn", "undefined symbol: _ZN3c10"),
        (INT4, {"distributions": WHEEL | {"cache-dit": "1.5.3"}}, "warn", "they overwrite each other"),
        (INT4, {"distributions": WHEEL | {"nunchaku": "0.16.1"}}, "warn", "a library of statistics"),
        (None, {"distributions": {"nunchaku": "0.16.1"}}, "warn", "pip uninstall -y nunchaku"),
        (INT4, {"distributions": WHEEL | {"nunchaku": "1.2.0+torch2.8"}}, "ok", "svdq-int4: cache-dit-cu13 1.5.0"),
        (INT4, {"gpu": None}, "ok", "a CPU computes these formats in floats, slowly; cache-dit-cu13 1.5.0"),
        (INT4, {"device": "cpu", "distributions": {}}, "ok", "a CPU computes these formats in floats, slowly"),
    ],
)  # fmt: skip
def test_svdq_check_finds_kernels_or_names_remedy(tmp_path, recipe, more, status, words):
    check = svdq(tmp_path, recipe, **more)
    assert check.status == status
    assert words in f"{check.found} {check.todo}"


def test_probe_extension_loads_module_without_package():
    from importlib.metadata import version

    with pytest.raises(ProbeFailed, match=r"^pytest [\d.]+ has no _C_svdquant$"):
        Probes().extension("pytest", "_C_svdquant")
    assert Probes().extension("markupsafe", "_speedups") == version("markupsafe")


def test_probe_extension_that_does_not_load_names_reason(tmp_path, monkeypatch):
    folder = tmp_path / "broken-1.0.dist-info"
    folder.mkdir()
    (folder / "METADATA").write_text("Metadata-Version: 2.1\nName: broken\nVersion: 1.0\n")
    (folder / "RECORD").write_text("_C_svdquant.abi3.so,,\n")
    (tmp_path / "_C_svdquant.abi3.so").write_bytes(b"no library")
    monkeypatch.syspath_prepend(str(tmp_path))
    with pytest.raises(ProbeFailed, match=r"_C_svdquant of broken 1.0 does not load with torch \S+ \(.*\)$"):
        Probes().extension("broken", "_C_svdquant")


def test_gpu_check_of_missing_gpu_fails_and_names_choices(tmp_path):
    check = ask("gpu", tmp_path, device="cuda:3")
    assert (check.status, check.todo) == ("fail", "Choose cuda:0 to cuda:0")


@pytest.mark.parametrize(
    ("device", "said", "words"),
    [
        ("cuda", {}, "uses CUDAExecutionProvider, no TensorRT (libnvinfer is not installed)"),
        ("auto", {"tensorrt": "TensorrtExecutionProvider"}, "TensorrtExecutionProvider with --tensorrt on or auto"),
        ("cpu", {"providers": ["CPUExecutionProvider"]}, "(which needs pip install 'video-lab-runner[int8]')"),
        (
            "cpu",
            {"providers": ["CPUExecutionProvider"], "distributions": {"onnxruntime": "1.23.0", "onnx": "1.19.0"}},
            "uses the CPU, faster with --pose-precision int8 (with onnx 1.19.0)",
        ),
    ],
)
def test_providers_check_shows_device_for_poses(tmp_path, device, said, words):
    check = ask("providers", tmp_path, device, **said)
    assert check.status == "ok"
    assert words in check.found


def test_probe_tensorrt_without_tensorrt_names_reason():
    onnxruntime = pytest.importorskip("onnxruntime")
    if "TensorrtExecutionProvider" not in onnxruntime.get_available_providers():
        with pytest.raises(ProbeFailed, match="built without TensorRT"):
            Probes().tensorrt()


def folder_check(name: str, folder: Path) -> Check:
    out, cache = (str(folder), folder.parent) if name == "output" else (None, folder)
    return {c.name: c for c in run_checks(None, out, cache, "cpu", probes=Machine())}[name]


def test_folder_check_of_missing_folder_judges_existing_parent(tmp_path, monkeypatch):
    usage = namedtuple("usage", "total used free")
    for free, status in ((100 * GIB, "ok"), (2 * GIB, "warn"), (GIB // 2, "fail")):
        asked: list[Path] = []
        monkeypatch.setattr(
            doctor.shutil, "disk_usage", lambda path, free=free, asked=asked: asked.append(path) or usage(0, 0, free)
        )
        assert folder_check("cache", tmp_path / "a" / "b").status == status
        assert folder_check("output", tmp_path / "a" / "b").status == status
        assert set(asked) == {tmp_path}
    (tmp_path / "file").touch()
    assert "not a folder" in folder_check("output", tmp_path / "file" / "x").found


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_folder_check_of_locked_folder_fails(tmp_path):
    (tmp_path / "locked").mkdir(mode=0o500)
    check = folder_check("output", tmp_path / "locked" / "out")
    assert check.status == "fail"
    assert "--user" in check.todo


def test_doctor_checks_weights_and_output_on_s3(tmp_path, moto_s3, aws_env):
    bucket, client = aws_env(moto_s3).make_bucket(), moto_s3.client

    def statuses(models: str, out: str) -> dict[str, str]:
        checks = run_checks(models, out, tmp_path, "cpu", probes=Machine())
        assert all(check.todo for check in checks if check.status == "fail")
        return {check.name: check.status for check in checks if check.name in ("weights", "output")}

    assert statuses(f"s3://{bucket}/models", f"s3://{bucket}/out") == {"weights": "fail", "output": "ok"}
    client.put_object(Bucket=bucket, Key="models/a/config.json", Body=b"{}")
    assert statuses(f"s3://{bucket}/models", "s3://nobodys/out") == {"weights": "ok", "output": "fail"}
    assert client.list_objects_v2(Bucket=bucket)["KeyCount"] == 1  # the probe object is gone


def test_weights_check_lists_missing_files_with_remedy(tmp_path):
    checks = {c.name: c for c in run_checks(str(tmp_path), None, tmp_path, "cpu", probes=Machine())}
    assert checks["weights"].status == "fail"
    assert "process_checkpoint/det/yolov10m.onnx" in checks["weights"].found
    wrong = {c.name: c for c in run_checks(str(tmp_path), None, tmp_path, "cpu", recipe="bf61", probes=Machine())}
    assert "bf16" in f"{wrong['weights'].found} {wrong['weights'].todo}"


@pytest.mark.parametrize("layout", LAYOUTS, ids=[layout.name for layout in LAYOUTS])
def test_weights_check_names_file_of_recipe(tmp_path, demo_models, layout):
    root, recipe = tmp_path / "models", f"fp4-distill+{layout.name}"
    shutil.copytree(demo_models, root, symlinks=True)

    def weights(name: str = recipe) -> Check:
        return {c.name: c for c in run_checks(str(root), None, tmp_path, "cpu", recipe=name, probes=Machine())}[
            "weights"
        ]

    lacking = weights()
    assert (lacking.status, f"no transformer in {layout.name}" in lacking.found) == ("fail", True)
    assert f"video-lab quantize --recipe fp4-distill --format {layout.name}" in lacking.todo
    name = f"Wan2.2-Animate-14B-{layout.name.upper()}-distill/quantized_transformer.safetensors"
    config = json.loads((root / "Wan2.2-Animate-14B-Diffusers/transformer/config.json").read_text())
    write_svdq(root / name, config, layout)
    assert weights() == Check(
        "weights",
        "ok",
        f"{root} has all files of recipe {recipe}; it uses {name}, 64 layers in {layout.name}, rank 16, "
        "smoothing from calibration",
    )
    write_svdq(root / name, config, layout, smoothing="weights", calibration="{}")
    assert weights().found.endswith("rank 16, smoothing from the weights alone")
    write_svdq(root / name, config, layout, rank="48")
    assert (weights().status, "video_lab.rank says 48" in weights().found) == ("fail", True)
    assert weights("fp4-distill").found.endswith("65 layers in nvfp4")
    assert weights("bf16").found == f"{root} has all files of recipe bf16"


def test_identity_graph_runs_in_onnxruntime():
    onnxruntime = pytest.importorskip("onnxruntime")
    onnx = pytest.importorskip("onnx")
    onnx.checker.check_model(onnx.load_model_from_string(IDENTITY_GRAPH))
    session = onnxruntime.InferenceSession(IDENTITY_GRAPH, providers=["CPUExecutionProvider"])
    import numpy as np

    assert session.run(None, {"x": np.array([2.5], np.float32)})[0].tolist() == [2.5]


def test_doctor_without_torch_answers_every_check(tmp_path):
    """In a process that cannot import torch and pynvml every check gives an answer, and that of torch fails."""
    code = (
        "import sys, json; sys.modules['torch'] = sys.modules['pynvml'] = None\n"
        "from pathlib import Path; from runner.verbs.doctor import run_checks\n"
        "print(json.dumps([vars(c) for c in run_checks(None, None, Path(sys.argv[1]), 'auto')]))"
    )
    done = subprocess.run([sys.executable, "-c", code, str(tmp_path)], capture_output=True, text=True, check=True)
    checks = {check["name"]: check for check in json.loads(done.stdout.splitlines()[-1])}
    assert checks["torch"]["status"] == "fail"
    assert "torch cannot be imported" in checks["torch"]["found"]
    assert checks["driver"]["status"] == "warn"
    assert {checks[name]["status"] for name in ("python", "onnxruntime", "providers", "video")} == {"ok"}

"""tools/gpu_check.py: parts in their order and time, results that survive whatever ends them, verdicts by numbers."""

from __future__ import annotations

import argparse
import copy
import json
import os
import re
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import gpu_check
import psutil
import pytest
from _gpu_check_claims import CLAIMS, verdicts
from _gpu_check_constants import proposals
from _gpu_check_findings import Findings
from _gpu_check_record import PartRecord

from tests.system_tests import system_test

ROOT = Path(__file__).resolve().parents[2]
PAGE = (ROOT / "docs/gpu-check.md").read_text(encoding="utf-8")
NAMES = ["choices", "block", "autoencoder", "engine"]
DRIVER = """
import sys
sys.path.insert(0, sys.argv.pop(1))
import gpu_check
gpu_check.COMMAND = (sys.executable, sys.argv.pop(1))
gpu_check.GRACE_S = 2.0
sys.exit(gpu_check.main(sys.argv[1:]))
"""


def start(path: Path, *flags: str, **does: str) -> subprocess.Popen[str]:
    """The check with parts that do nothing: `does` says which dies or hangs."""
    command = [sys.executable, "-c", DRIVER, str(ROOT / "tools"), str(ROOT / "tests/tools/fake_part.py")]
    words = ["--device", "cpu", "--json", str(path), *flags]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    return subprocess.Popen([*command, *words], env=os.environ | does, cwd=path.parent, **pipes)


def states(path: Path) -> dict[str, str]:
    return {name: part["state"] for name, part in json.loads(path.read_text())["parts"].items()}


def wait_for(path: Path, part: str) -> int:
    """Until that part has a row; its process."""
    for _ in range(400):
        if path.exists() and (rows := json.loads(path.read_text())["parts"].get(part, {}).get("tables")):
            return rows["rows"][0]["process"]
        time.sleep(0.05)
    raise AssertionError(f"{part} has not begun")


def is_gone(process: int) -> bool:
    for _ in range(100):
        if not psutil.pid_exists(process) or psutil.Process(process).status() == psutil.STATUS_ZOMBIE:
            return True
        time.sleep(0.1)
    return False


def test_parts_of_names_returns_parts_in_fixed_order():
    assert [part.name for part in gpu_check.PARTS] == NAMES
    assert [part.name for part in gpu_check.parts_of("engine, choices")] == ["choices", "engine"]
    with pytest.raises(argparse.ArgumentTypeError, match="no part 'speed'; there are choices, block"):
        gpu_check.parts_of("choices,speed")
    for part in gpu_check.PARTS:
        assert (ROOT / "tools" / f"{part.module}.py").is_file()


@pytest.mark.parametrize(
    ("seconds", "takes", "limits", "refused"),
    [
        (480, {}, {"choices": 120, "block": 150, "autoencoder": 75, "engine": 468}, []),
        (480, {"choices": 40, "block": 60, "autoencoder": 60}, {"block": 150, "engine": 308}, []),
        (100, {"choices": 60}, {"choices": 88, "block": 28, "autoencoder": 28}, ["engine"]),
        (25.5, {"choices": 1}, {"choices": 13.5, "autoencoder": 12.5}, ["block", "engine"]),
        (1, {}, {}, NAMES),
    ],
)
def test_run_parts_refuses_only_parts_whose_first_rows_exceed_time_left(tmp_path, seconds, takes, limits, refused):
    now, given = [1000.0], {}

    def run(part, limit, tell):
        given[part.name] = limit
        now[0] += takes.get(part.name, 0)
        return {"part": part.name, "state": "done", "error": None, "tables": {}}

    check = gpu_check.Check(tmp_path / "check.json", "cuda", seconds)
    gpu_check.run_parts(gpu_check.PARTS, run, check, 1000.0 + seconds, lambda: now[0])
    assert list(given) == [name for name in NAMES if name not in refused]
    assert {name: given[name] for name in limits} == limits
    found = states(check.path)
    assert [name for name, state in found.items() if state == "refused"] == refused
    assert list(found) == NAMES


@pytest.mark.parametrize(
    ("device", "set_before", "wanted"),
    [
        ("cuda", "", "0"),
        ("cuda:2", "", "2"),
        ("cuda", "3,1", "3"),
        ("cuda:1", "3,GPU-8a", "GPU-8a"),
        ("cuda:2", "3", ""),
    ],
)
def test_visible_sets_one_gpu_for_child_processes(device, set_before, wanted):
    assert gpu_check.visible(device, {"CUDA_VISIBLE_DEVICES": set_before})["CUDA_VISIBLE_DEVICES"] == wanted
    with pytest.raises(SystemExit):
        gpu_check.parse(["--device", "rocm"])


def test_part_that_dies_or_hangs_keeps_its_rows_and_other_parts_run(tmp_path, monkeypatch):
    monkeypatch.setattr(gpu_check, "COMMAND", (sys.executable, str(ROOT / "tests/tools/fake_part.py")))
    monkeypatch.setattr(gpu_check, "GRACE_S", 2.0)
    monkeypatch.setenv("choices", "dies")
    monkeypatch.setenv("block", "hangs")
    path = tmp_path / "out" / "check.json"
    hanging = gpu_check.Part("block", "", 0, 1.0)
    check = gpu_check.Check(path, "cpu", 60)
    parts = (gpu_check.PARTS[0], hanging, gpu_check.PARTS[2])
    gpu_check.run_parts(parts, gpu_check.Children(check).start, check, time.monotonic() + 60)
    assert states(path) == {"choices": "failed", "block": "cut off", "autoencoder": "done"}
    found = json.loads(path.read_text())["parts"]
    assert found["choices"]["error"] == f"its process ended with {-signal.SIGABRT}"
    assert all(part["tables"]["rows"] for part in found.values())
    assert is_gone(found["block"]["tables"]["rows"][0]["process"])
    assert json.loads((tmp_path / "out" / "check.block.json").read_text())["tables"] == found["block"]["tables"]


def test_gpu_check_killed_in_part_leaves_valid_json_and_no_child(tmp_path):
    path = tmp_path / "check.json"
    check = start(path, block="hangs")
    process = wait_for(path, "block")
    check.send_signal(signal.SIGKILL)
    check.wait(10)
    assert states(path) == {"choices": "done", "block": "running"}
    assert {row["verdict"] for row in json.loads(path.read_text())["verdicts"]} == {"not measured"}
    assert is_gone(process)  # nothing goes on without the check


def test_gpu_check_on_sigterm_prints_verdicts_and_exits_143(tmp_path):
    path = tmp_path / "check.json"
    check = start(path, "--only", "choices,autoencoder", autoencoder="hangs")
    process = wait_for(path, "autoencoder")
    check.send_signal(signal.SIGTERM)
    printed, errors = check.communicate(timeout=20)
    assert check.returncode == 143, errors
    assert states(path) == {"choices": "done", "autoencoder": "cut off"}
    assert "Claims of the README:" in printed and "same seed, same frames" in printed
    assert is_gone(process)


def test_gpu_check_without_device_stops_and_exits_2(tmp_path):
    check = start(tmp_path / "check.json", choices="no device")
    _, errors = check.communicate(timeout=20)
    assert check.returncode == 2
    assert "error: config.invalid: no CUDA device" in errors and "--device cpu" in errors
    assert states(tmp_path / "check.json") == {"choices": "failed"}


def test_part_that_raises_is_recorded_with_its_error(tmp_path, monkeypatch):
    def run(record, device, *, tiny):
        record.add("rows", {"value": float("nan")})
        raise RuntimeError("an illegal memory access\nsecond line")

    monkeypatch.setitem(sys.modules, "_gpu_check_block", SimpleNamespace(run=run))
    monkeypatch.setattr(gpu_check.signal, "signal", lambda *_: None)
    monkeypatch.setattr(gpu_check, "end_with_parent", lambda parent: None)
    monkeypatch.setattr("structlog.configure", lambda **_: None)
    path = tmp_path / "block.json"
    options = gpu_check.parse(["--inside", "block", "--device", "cpu", "--json", str(path)])
    with pytest.raises(RuntimeError):
        gpu_check.run_inside(options)
    found = json.loads(path.read_text())
    assert (found["state"], found["scale"]) == ("failed", "tiny, cpu")
    assert found["error"] == "RuntimeError: an illegal memory access"
    assert found["tables"] == {"rows": [{"value": "nan"}]}


def test_measure_of_failing_or_late_row_records_error_and_continues(tmp_path):
    now, lines = [0.0], []
    record = PartRecord(tmp_path / "x.json", "x", scale="full", seconds=10, clock=lambda: now[0], show=lines.append)
    record.measure("t", {"name": "a"}, lambda: {}["missing"])
    now[0] = 8
    record.measure("t", {"name": "b"}, lambda: {"ms": 1.0}, expected=3)
    record.measure("t", {"name": "c"}, lambda: {"ms": 1.0}, expected=2)
    rows = json.loads((tmp_path / "x.json").read_text())["tables"]["t"]
    assert [row.get("error") for row in rows] == [
        "KeyError: 'missing'", "NotInTime: 3 s are expected, 2 s are left", None
    ]  # fmt: skip
    assert rows[2]["ms"] == 1.0 and len(lines) == 3


def test_gpu_tests_without_pytest_give_reason_and_junit_report_is_counted(tmp_path):
    choices = pytest.importorskip("_gpu_check_choices")
    record = PartRecord(tmp_path / "x.json", "x", scale="full", seconds=10, show=lambda line: None)
    assert choices.gpu_tests(record, (), lambda name: None) == {"not_measured": "pytest is not installed"}
    report = tmp_path / "junit.xml"
    cases = (
        '<testcase classname="a" name="good"/><testcase classname="a" name="bad"><failure/></testcase>'
        '<testcase classname="a" name="out"><skipped/></testcase>'
    )
    report.write_text(f"<testsuites><testsuite>{cases}</testsuite></testsuites>")
    assert choices.counts(report) == {"passed": 1, "failed": 1, "skipped": 1, "failures": ["a.bad"]}
    for path in choices.TESTS:
        assert (ROOT / path).exists()


def test_kernel_names_are_grouped_by_operation():
    kernels = pytest.importorskip("_gpu_check_kernels")
    names = {
        "attention": ["cudnn_generated_fort_native_sdpa_sm90_flash_fprop_wgmma", "pytorch_flash::flash_fwd_kernel"],
        "products": ["nvjet_hsh_128x256", "sm90_xmma_gemm_bf16bf16", "cutlass::device_kernel<GemmUniversal>"],
        "dequantise": ["_dequantize"],
        "quantise": ["_quantize"],
        "elementwise": ["triton_red_fused_add_mean_0", "void at::native::vectorized_elementwise_kernel<4>"],
        "other": ["fft_radix"],
    }
    for group, some in names.items():
        assert {kernels.group_of(name) for name in some} == {group}
    found = kernels.by_group([("_dequantize", 1.0), ("fft_radix", 2.0), ("nvjet_a", 3.0), ("nvjet_b", 1.0)])
    assert found["ms"]["products"] == 4.0 and found["ms"]["other"] == 2.0
    assert found["other_kernels"] == ["fft_radix"]


def good_check() -> dict:
    """A check of a made-up H200 that bears out every claim."""
    spent = {"attention": 60.0, "dequantise": 1.0, "quantise": 0.0, "products": 40.0, "elementwise": 4.0, "other": 0.0}
    block = {"broken": "", "off_eager": 0.004, "limit": 0.02, "same_bits_again": True, "attention_8bit": False}
    block |= {"ms": 105.0, "eager_ms": 125.0, "kernels": {"ms": spent}, "channels_a_block": 34_320 * 5120}
    block |= {"products_tflop_a_block": 28.0, "units": 6.0, "planned_units": 7.5}
    vae = {"layout": "channels_last", "benchmark": False, "walk": "ours", "ms": 1000.0, "tflop": 122.08}
    vae |= {"nvml_bytes": 9_000_000_000, "reserved_bytes": 8_300_000_000, "allocated_bytes": 6e9, "forecast_bytes": 5e9}
    vae |= {"what": "decode", "dtype": "float32", "traffic_bytes": 400e9}

    def mode(name: str, gb: float, step: float) -> dict:
        return {"mode": name, "NVML GB": gb, "peak GB": gb - 1, "s a step": step, "note": "", "cap, GB": 24}

    tables = {
        "choices": {
            "machine": [{"gpu": "NVIDIA H200", "comfy-kitchen": "0.2.40"}],
            "products": [
                {"precision": "fp8", "device_has_it": True, "refused": None},
                {"precision": "nvfp4", "device_has_it": False, "refused": "ConfigInvalid: no fast units"},
            ],
            "attention": [{"kind": "8 bit", "chosen": "comfy", "trial_error": 0.03, "limit": 0.06}],
            "pinned": [{"pinned": True, "why": ""}],
            "gpu_tests": [{"passed": 40, "failed": 0, "skipped": 0, "failures": []}],
        },
        "block": {
            "copy": [{"gb_s": 4000.0}],
            "blocks": [block | {"compute": "bf16", "product": ""}, block | {"compute": "fp8", "product": "scaled_mm"}],
            "attention": [
                {"kind": "exact", "backend": "cudnn", "picked": True, "ms": 40.0, "tflop_s": 600.0},
                {"kind": "exact", "backend": "flash", "picked": False, "ms": 60.0, "tflop_s": 400.0},
            ],
        },
        "autoencoder": {"autoencoder": [vae]},
        "engine": {
            "modes": [mode("resident", 22.0, 3.0), mode("stream", 7.5, 3.1), mode("minimal", 4.7, 6.0)],
            "low_bits": [{"what": "fp4-distill+fp8", "note": "scaled_mm, error 0.030 a layer; "}],
        },
    }
    return {"scale": "full", "parts": {name: {"tables": found} for name, found in tables.items()}}


def verdict_of(check: dict, claim: str) -> dict:
    (row,) = [row for row in verdicts(Findings(check)) if row["claim"] == claim]
    return row


def test_claims_are_sentences_of_readme_and_docs():
    pages = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
    texts = [" ".join(path.read_text(encoding="utf-8").split()) for path in pages]
    claims = [" ".join(claim.text.split()) for claim in CLAIMS]
    assert [claim for claim in claims if not any(claim in text for text in texts)] == []
    assert len({claim.text for claim in CLAIMS}) == len(CLAIMS)


def test_verdicts_of_good_numbers_are_met_and_of_no_numbers_not_measured():
    good = good_check()
    assert {row["verdict"] for row in verdicts(Findings(good))} == {"met"}
    assert all(row["why"] and row["judged"] for row in verdicts(Findings(good)))
    for other in ({"scale": "full", "parts": {}}, good | {"scale": "tiny, cpu"}):
        assert {row["verdict"] for row in verdicts(Findings(other))} == {"not measured"}


@pytest.mark.parametrize(
    ("words", "part", "table", "row", "change", "verdict"),
    [
        ("`stream` |", "engine", "modes", 1, {"NVML GB": 8.4}, "not met"),
        ("`stream` |", "engine", "modes", 1, {"NVML GB": None, "peak GB": 8.4}, "not met"),
        ("`stream` |", "engine", "modes", 1, {"NVML GB": None, "peak GB": None}, "not measured"),
        ("`minimal` |", "engine", "modes", 2, {"NVML GB": 5.2}, "not met"),
        ("`resident` |", "engine", "modes", 0, {"NVML GB": None, "peak GB": None, "note": "OutOfMemory: x"}, "not met"),
        ("next one is copied while one computes", "engine", "modes", 1, {"s a step": 3.5}, "not met"),
        ("next one is copied while one computes", "choices", "pinned", 0, {"pinned": False}, "not met"),
        ("blocks are compiled", "block", "blocks", 1, {"broken": "Unsupported: set_device"}, "not met"),
        ("blocks are compiled", "block", "blocks", 0, {"off_eager": "inf"}, "not met"),
        ("fastest on the GPU's architecture", "block", "attention", 1, {"ms": 30.0}, "not met"),
        (
            "fastest on the GPU's architecture",
            "block",
            "attention",
            1,
            {"error": "RuntimeError: no kernel"},
            "not measured",
        ),
        ("compute in fewer bits", "choices", "products", 0, {"refused": "ConfigInvalid: off by 0.5"}, "not met"),
        ("compute in fewer bits", "engine", "low_bits", 0, {"note": "not measured: out of time"}, "not measured"),
        ("compute in fewer bits", "engine", "low_bits", 0, {"note": "ConfigInvalid: not right"}, "not met"),
        ("No other precision is taken", "choices", "products", 1, {"refused": None}, "not met"),
        ("self-attention in 8 bits", "choices", "attention", 0, {"error": "ConfigInvalid: refused"}, "not met"),
        ("self-attention in 8 bits", "block", "blocks", 1, {"attention_8bit": True, "broken": "set_device"}, "not met"),
        ("same frames", "block", "blocks", 0, {"same_bits_again": False}, "not met"),
        ("as its CPU counterpart", "choices", "gpu_tests", 0, {"failed": 1, "failures": ["a.b"]}, "not met"),
        ("as its CPU counterpart", "choices", "gpu_tests", 0, {"passed": 0}, "not measured"),
    ],
)
def test_verdict_of_changed_number_is_not_met_or_not_measured(words, part, table, row, change, verdict):
    check = copy.deepcopy(good_check())
    check["parts"][part]["tables"][table][row] |= change
    (claim,) = [claim.text for claim in CLAIMS if words in claim.text and claim.text.count("GB") == words.count("` |")]
    assert verdict_of(check, claim)["verdict"] == verdict


def test_proposals_of_constants_come_from_measured_values():
    found = {row["constant"]: row for row in proposals(Findings(good_check()))}
    assert found["DEVICES[H200].copy_gb_s"]["new"] == 4000
    assert found["DEVICES[H200].matmul[bf16]"]["new"] == 700  # 28 TFLOP in 40 ms
    assert found["DEVICES[H200].matmul[fp8]"]["key"] == "block.blocks[fp8 scaled_mm]: kernels.ms.products"
    assert found["DEVICES[H200].attention"]["new"] == 600
    assert found["FUSED_BYTES"]["new"] == pytest.approx(4e-3 * 4e12 / (34_320 * 5120), rel=0.01)
    assert found["block units, fused, bf16"] | {"key": ""} == {
        "constant": "block units, fused, bf16", "old": 7.5, "new": 6.0, "key": ""
    }  # fmt: skip
    assert found["CONTEXT_BYTES"]["new"] == 7e8
    assert found["VAE_SHARE[float32]"]["new"] == pytest.approx(122.08 / (1 - 400 / 4055) / 763, rel=0.005)
    assert found["autoencoder's peak bytes, decode, float32"]["new"] == 6e9
    assert proposals(Findings(good_check() | {"scale": "tiny, cpu"})) == []
    assert proposals(Findings({"scale": "full", "parts": {}})) == []


def test_gpu_check_page_shows_valid_commands_and_every_part():
    lines = "".join(re.findall(r"```sh\n(.*?)```", PAGE, flags=re.DOTALL)).splitlines()
    flags = []
    for line in lines:
        words = shlex.split(line)
        if words and words[0] in (".venv/bin/python", ".venv-gpu/bin/python"):
            assert words[1] == "tools/gpu_check.py"
            flags.append(words[2:])
        else:
            assert words[0] == "make" and words[1] in ("setup", "gpu-env", "gpu-check")
            flags += [shlex.split(word.partition("=")[2]) for word in words if word.startswith("GPU_CHECK=")]
    assert len(flags) >= 5
    for some in flags:
        gpu_check.parse(some)
    assert re.findall(r"^\| `(\w+)` \|", PAGE, flags=re.MULTILINE) == NAMES
    named = gpu_check.parse([])
    assert f"--seconds {named.seconds:g} --json {named.json}" in PAGE


def test_make_gpu_check_passes_flags_to_tool(tmp_path):
    shown = subprocess.run(
        ["make", "--no-print-directory", "-n", "gpu-check", f"VENV={sys.prefix}", "GPU_CHECK=--only block"],
        cwd=ROOT, capture_output=True, text=True, check=True,
    ).stdout  # fmt: skip
    assert shown.splitlines()[-1].endswith("/bin/python tools/gpu_check.py --only block")


@system_test
@pytest.mark.timeout(600)  # a minute of CPU time, on a busy machine five
def test_gpu_check_on_cpu_runs_every_part_at_tiny_scale(tmp_path):
    path = tmp_path / "check.json"
    command = [
        sys.executable,
        str(ROOT / "tools/gpu_check.py"),
        "--device",
        "cpu",
        "--seconds",
        "1000",
        "--json",
        str(path),
    ]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=580, check=False)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    found = json.loads(path.read_text())
    assert found["scale"] == "tiny, cpu" and states(path) == dict.fromkeys(NAMES, "done")
    assert {row["verdict"] for row in found["verdicts"]} == {"not measured"} and found["constants"] == []
    tables = {name: part["tables"] for name, part in found["parts"].items()}
    errors = [row for part in tables.values() for rows in part.values() for row in rows if "error" in row]
    assert [row["kind"] for row in errors] == ["8 bit"]  # attention that no CPU has
    assert {row["format"] for row in tables["choices"]["kernels"]} == {"g32", "nvfp4"}
    blocks = tables["block"]["blocks"]
    assert [row["compute"] for row in blocks] == ["bf16", "fp8", "int8", "nvfp4"]
    assert all(not row["broken"] and row["same_bits_again"] and row["ms"] > 0 for row in blocks)
    assert all(row["kernels"]["ms"]["products"] > 0 for row in blocks)
    vae = tables["autoencoder"]["autoencoder"]
    assert {row["what"] for row in vae} == {"decode", "encode"} and all(row["finite"] for row in vae)
    assert len({row["layout"] for row in vae}) == 2 and {row["walk"] for row in vae} >= {"ours"}
    assert tables["engine"]["exact"][0]["s a step"] > 0 and tables["engine"]["ceilings"]

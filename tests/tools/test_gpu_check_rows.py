"""The rows of tools/gpu_check.py that only a GPU has, with CUDA's calls stubbed; block and autoencoder are tiny."""

from __future__ import annotations

from types import SimpleNamespace

import _gpu_check_autoencoder as autoencoder
import _gpu_check_block as block
import _gpu_check_choices as choices
import pytest
import torch
from _gpu_check_record import PartRecord

from runner.forecast.seconds import find_device
from tests.system_tests import system_test

CPU, GPU = torch.device("cpu"), SimpleNamespace(type="cuda")


@pytest.fixture
def cuda(monkeypatch):
    """torch.cuda of a made-up H200 whose allocator has handed out 10 MB, and 15 MB at the peak."""
    for name in ("empty_cache", "reset_peak_memory_stats", "synchronize"):
        monkeypatch.setattr(torch.cuda, name, lambda *_: None)
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda _: 10_000_000)
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda _: 15_000_000)
    monkeypatch.setattr(torch.cuda, "max_memory_reserved", lambda _: 20_000_000)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda _: "NVIDIA H200")
    monkeypatch.setattr(block, "capability_of", lambda device: None if device.type == "cpu" else (9, 0))


def test_variants_on_h200_are_listed_in_expected_order(cuda):
    assert list(block.variants_on(GPU)) == [
        ("bf16", "", False),
        ("fp8", "scaled_mm", False),
        ("int8", "comfy_kitchen", False),
        ("int8", "int_mm", False),
        ("bf16", "", True),
    ]
    assert [variant[0] for variant in block.variants_on(CPU)] == ["bf16", "fp8", "int8", "nvfp4"]


def test_fast_row_contains_choice_for_device(monkeypatch):
    """On a CPU nothing is chosen; with the capability of an H200 the product is tried, here by its definition."""
    assert choices.fast(CPU)["compute"] == "bf16"
    monkeypatch.setattr("runner.generation.runtime.compute.capability_of", lambda _: (9, 0))
    found = choices.fast(CPU)
    assert (found["asked"], found["compute"], found["attention"], found["vae"]) == ("fast", "fp8", "exact", "bfloat16")


def test_block_memory_counts_hidden_states_and_gives_planned_units(cuda):
    with torch.no_grad():
        case = block.BlockCase(CPU, block.SMALL, (64, 64), 5)
    case.device = GPU
    worked = []
    row = block.memory_of(case, lambda: worked.append(1), "fp8", eight_bit=False)
    assert case.hidden_bytes == 48 * 256 * 2 and worked
    assert row["peak_bytes"] == 5_000_000 + case.hidden_bytes
    assert row["units"] == row["peak_bytes"] / case.hidden_bytes and 4 < row["planned_units"] < 15
    found = block.forecast_of(case, "fp8", False, ms=50.0)
    assert found["blocks_of_a_step_s"] == pytest.approx(case.layers * 0.05)
    assert found["device"] == find_device("H200").name and 0 < found["forecast_step_s"] < 1
    # Over all blocks it is the forecast's own count.
    rate = find_device("H200").matmul["fp8"]
    assert case.layers * found["products_tflop_a_block"] / rate == pytest.approx(found["forecast_parts_s"]["products"])
    assert block.forecast_of(case, "nvfp4", False, ms=50.0)["forecast_step_s"] is None  # the H200 has none


def test_autoencoder_peak_excludes_memory_held_before(cuda, monkeypatch):
    monkeypatch.setattr(autoencoder, "milliseconds", lambda work, device, **_: float(work()))
    sampler = SimpleNamespace(window=lambda: SimpleNamespace(gpu_peak=30_000_000))
    row = autoencoder.measured(lambda: 3, GPU, sampler)
    assert row == {"ms": 3.0, "allocated_bytes": 5e6, "reserved_bytes": 20_000_000, "nvml_bytes": 30_000_000}


def test_autoencoder_setups_are_distinct_and_begin_with_current_one():
    setups = list(autoencoder.setups())
    assert len(set(setups)) == len(setups) == 3 * (2 * 2 + 1)
    assert setups[0] == autoencoder.Setup("float32", "channels_last", False)
    assert [setup.walk for setup in setups[:6]] == ["ours", "library"] * 3
    assert all(setup.benchmark == (setup.dtype != "float32") for setup in setups[:6])


@system_test
def test_block_with_failed_compilation_is_row_with_reason(tmp_path, monkeypatch):
    """A row whose compilation fails gives its reason, and the rows after it are measured."""
    monkeypatch.setattr(block, "variants_on", lambda device: iter([("bf16", "", False), ("fp8", "none", False)]))
    monkeypatch.setattr(block, "measure_attention", lambda part, case: part.add("attention", {"kind": "exact"}))
    real = block.CompiledBlocks
    monkeypatch.setattr(block, "CompiledBlocks", lambda **named: real(**named | {"backend": fails}))
    part = PartRecord(tmp_path / "block.json", "block", scale="tiny, cpu", seconds=100, show=lambda line: None)
    block.run(part, CPU, tiny=True)
    good, bad = part.tables["blocks"]
    assert "no compiler" in good["broken"] and good["ms"] > 0
    assert bad["error"] == "ValueError: no backend 'none' for 'fp8'"
    assert part.tables["attention"] == [{"kind": "exact"}]


def fails(graph, inputs):
    raise RuntimeError("no compiler")

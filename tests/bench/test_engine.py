"""The engine's benchmark runs, and its numbers hang together."""

from __future__ import annotations

import importlib.util

import pytest
import torch

from tests.bench.run_bench import ROOT, run_bench
from tests.system_tests import system_test


@system_test
def test_engine(tmp_path):
    tables, printed = run_bench("engine", tmp_path, "--quick")
    rows = {row["what"].strip(): row for row in tables["waterfall"]}
    measured = [row for row in rows.values() if isinstance(row["s a step"], float)]
    assert "not measured" in printed and len(measured) >= 5  # the rest needs a GPU and says so
    assert "the same, weights in bf16" in rows
    assert all(row["s a step"] > 0 and row["fixed s a job"] > 0 for row in measured)
    # One operation count for all rows: that of the model, whatever of it was saved.
    assert len({round(row["s a step"] * row["TFLOP/s"], 9) for row in measured}) == 1
    for row in tables["headlines"]:
        if row["ratio"] is not None:
            assert row["ratio"] == pytest.approx(row["seed, s"] / row["ours, s"])
    warm, best = tables["headlines"][0], measured[-1]
    assert warm["ours, s"] == pytest.approx(best["fixed s a job"] + 6 * best["s a step"])
    *parts, whole = tables["linears"]
    slowest, fastest = (f(row["TFLOP/s"] for row in parts) for f in (min, max))
    assert slowest <= whole["TFLOP/s"] <= fastest and whole["of the best product"] > 0
    assert [row["mode"] for row in tables["modes"]] == ["resident", "stream", "minimal"]
    assert [row["cards, GB"] for row in tables["modes"]] == ["24", "16, 12, 8", None]
    full = [row["14B forecast, GB"] for row in tables["modes"]]
    assert full == sorted(full, reverse=True) and full[0] < 24 and full[1] < 8 and full[2] < 6
    assert all(row["s a step"] > 0 for row in tables["modes"])
    assert {row["forecast, s a clip"] for row in tables["forecasts"]} >= {"RTX 5090", "H200"}


@system_test
def test_the_engines_benchmark_leaves_out_what_would_end_too_late(tmp_path):
    """The seed's way is measured whatever it takes: the rest is held against it."""
    tables, _ = run_bench("engine", tmp_path, "--quick", "--seconds", "0.001")
    first, *others = tables["waterfall"]
    assert first["s a step"] > 0
    assert {row["note"] for row in others} == {"not measured: out of time", "not measured: needs a GPU"}
    assert {row["note"] for row in tables["modes"]} == {"not measured: out of time"}
    assert {row["ours, s"] for row in tables["headlines"]} == {"not measured"}


def test_a_job_is_its_fixed_part_and_its_steps(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "bench"))

    runs = importlib.import_module("_engine_runs")
    # The first step also brought the weights: what it took beyond the others is the job's, not a step's.
    spent = runs.Spent.of([5.0, 1.0, 1.0], 12.0, 2.0, torch.device("cpu"), None)
    assert (spent.step_s, spent.fixed_s, spent.clip_s(6)) == (1.0, 7.0, 13.0)


def test_memory_of_a_gpu_is_read_where_the_driver_names_no_process(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "bench"))
    runs = importlib.import_module("_engine_runs")
    used = iter([100, 130, 90])
    read = runs.DeviceMemory(lambda: (5, None), lambda: next(used))
    assert [read(), read()] == [(5, 30), (5, 0)]
    assert runs.DeviceMemory(lambda: (5, 7), lambda: 100)() == (5, 7)
    assert runs.DeviceMemory(lambda: (5, None), lambda: None)() == (5, None)

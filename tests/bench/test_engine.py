"""The engine's benchmark runs, and its numbers hang together."""

from __future__ import annotations

import argparse
import importlib.util
import os
import sys
import time
from itertools import pairwise
from types import SimpleNamespace

import pytest
import torch

from tests.bench.run_bench import ROOT, run_bench
from tests.system_tests import system_test


@system_test
def test_engine_benchmark_with_quick_flag_gives_consistent_numbers(tmp_path):
    tables, printed = run_bench("engine", tmp_path, "--quick")
    assert tables["machine"]["threads"] == 1 and "CPU seconds, 1 thread;" in printed
    rows = {row["what"].strip(): row for row in tables["waterfall"]}
    measured = [row for row in rows.values() if isinstance(row["s a step"], float)]
    assert "not measured" in printed and len(measured) >= 5  # the rest needs a GPU and says so
    assert "the same, weights in bf16" in rows
    assert all(row["s a step"] > 0 and row["fixed s a job"] > 0 for row in measured)
    # One operation count for all rows: that of the model, whatever of it was saved.
    assert len({round(row["s a step"] * row["TFLOP/s"], 9) for row in measured}) == 1
    for row in tables["headlines"]:
        if row["ratio"] is not None:
            assert row["ratio"] == pytest.approx(row["original, s"] / row["ours, s"])
    warm, best = tables["headlines"][0], measured[-1]
    assert warm["ours, s"] == pytest.approx(best["fixed s a job"] + 6 * best["s a step"])
    *parts, whole = tables["linears"]
    slowest, fastest = (f(row["TFLOP/s"] for row in parts) for f in (min, max))
    assert slowest <= whole["TFLOP/s"] <= fastest and whole["of the best product"] > 0
    assert [row["mode"] for row in tables["modes"]] == ["resident", "stream", "minimal"]
    assert [row["cards, GB"] for row in tables["modes"]] == ["24", "16, 12, 8", None]
    full = [row["14B forecast, GB"] for row in tables["modes"]]
    assert full == sorted(full, reverse=True) and full[0] < 24 and full[1] < 12 and full[2] < 6
    assert all(row["s a step"] > 0 for row in tables["modes"])
    assert {row["forecast, s a clip"] for row in tables["forecasts"]} >= {"RTX 5090", "H200"}


@system_test
def test_engine_benchmark_with_short_time_limit_leaves_out_late_rows(tmp_path):
    """The original scripts are always measured, because the rest is compared with them."""
    tables, _ = run_bench("engine", tmp_path, "--quick", "--seconds", "0.001")
    first, *others = tables["waterfall"]
    assert first["s a step"] > 0
    assert {row["note"] for row in others} == {"not measured: out of time", "not measured: needs a GPU"}
    assert {row["note"] for row in tables["modes"]} == {"not measured: out of time"}
    assert {row["ours, s"] for row in tables["headlines"]} == {"not measured"}


def test_spent_of_job_separates_fixed_time_from_step_time(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "bench"))

    runs = importlib.import_module("_engine_runs")
    # The first step also brought the weights: what it took beyond the others is the job's, not a step's.
    spent = runs.Spent.of([5.0, 1.0, 1.0], 12.0, 2.0, torch.device("cpu"), None)
    assert (spent.step_s, spent.fixed_s, spent.clip_s(6)) == (1.0, 7.0, 13.0)


def test_device_memory_without_process_figures_is_read_from_whole_gpu(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "bench"))
    runs = importlib.import_module("_engine_runs")
    used = iter([100, 130, 90])
    read = runs.DeviceMemory(lambda: (5, None), lambda: next(used))
    assert [read(), read()] == [(5, 30), (5, 0)]
    assert runs.DeviceMemory(lambda: (5, 7), lambda: 100)() == (5, 7)
    assert runs.DeviceMemory(lambda: (5, None), lambda: None)() == (5, None)


@pytest.fixture
def engine(monkeypatch):
    """The benchmark's module, with a clock that stands and pieces that do nothing but say that they ran."""
    monkeypatch.syspath_prepend(str(ROOT / "bench"))
    module, settings = (importlib.import_module(name) for name in ("engine", "_engine_settings"))
    runs = importlib.import_module("_engine_runs")
    ran: list[str] = []
    spent = runs.Spent(1.0, 2.0, 0.0, None, None)

    def piece(name, result):
        def run(*_arguments, **_named):
            ran.append(name)
            return result

        return run

    monkeypatch.setattr(
        module, "OriginalScripts", lambda *_: SimpleNamespace(run=piece("original scripts", spent), load_s=3.0)
    )
    monkeypatch.setattr(module, "cold_manifest", piece("cold manifest", spent))
    monkeypatch.setattr(module, "free", lambda device: None)
    monkeypatch.setattr(settings, "free", lambda device: None)
    for name in ("ceilings", "linears_of", "modes", "in_hd", "walks_beside", "scenes", "forecasts"):
        monkeypatch.setattr(module, name, piece(name, [{"what": name}]))
    monkeypatch.setattr(settings.Engine, "load", lambda bench: SimpleNamespace(measure=piece("ours", spent)))
    module.ran = ran
    yield module
    del module.ran


def test_forecasts_contain_fast_recipe_and_leave_out_unreachable_rates(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "bench"))
    rows = {row["forecast, s a clip"]: row for row in importlib.import_module("engine").forecasts()}
    assert rows["RTX 5090"]["fp4-fast"] == rows["RTX 5090"]["8 bit, 8-bit attention"]
    assert rows["H200"]["8 bit, 8-bit attention"] is None
    assert rows["H200"]["fp4-fast"] == rows["H200"]["8 bit"] < rows["H200"]["exact"]
    assert rows["H200"]["it would choose"] == "fp8 products, exact attention, autoencoder in 16 bits"


def bench_of(engine, deadline=float("inf")):
    recipe = engine.get_recipe("fp4-distill")
    return engine.Bench(torch.device("cpu"), engine.SMALL, recipe, None, engine.PRODUCTION, None, deadline)


@pytest.mark.parametrize(
    ("only", "runs"),
    [
        ("forecasts", {"forecasts"}),
        ("scenes", {"scenes"}),
        ("walks", {"walks_beside"}),
        ("ceilings,linears", {"ceilings", "linears_of"}),
        ("linears", {"linears_of"}),
        ("exact", {"ours"}),
        ("modes", {"modes"}),
        ("low_bits", set()),  # on a CPU these rows say what they need
        ("headlines", {"ours", "cold manifest", "original scripts"}),
        ("waterfall", {"ours", "original scripts"}),
        ("hd", {"original scripts", "in_hd"}),
    ],
)
def test_measure_all_with_chosen_tables_runs_only_their_measurements(engine, only, runs):
    seen = []
    names = engine.names_of(only)
    tables = engine.measure_all(bench_of(engine), names, lambda tables: seen.append(set(tables)))
    assert set(engine.ran) == runs
    assert set(tables) == set(names) == seen[-1]
    engine.notes(bench_of(engine), {} if only == "modes" else {name: [] for name in tables})  # needs no table at all


def test_measure_all_without_choice_makes_and_reports_every_table(engine):
    seen = []
    tables = engine.measure_all(bench_of(engine), report=lambda tables: seen.append(list(tables)))
    assert set(tables) == set(engine.NAMES) == set(engine.TITLES)
    assert seen[0] == ["ceilings"] and all(set(a) <= set(b) for a, b in pairwise(seen))


def test_later_scenes_are_measured_encoded_whole_and_reused(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "bench"))
    alone = importlib.import_module("_engine_autoencoder")
    monkeypatch.setattr(alone, "seconds", lambda work, device, repeats: float(work().shape[2]))
    every, reused = alone.later_scenes({"base_dim": 8, "num_res_blocks": 1}, (48, 32), torch.device("cpu"), frames=21)
    assert every["s"] == reused["s"] == 6 and reused["of the first row"] == 1
    assert 0 < reused["TFLOP"] < every["TFLOP"]


def test_walks_run_both_autoencoders_on_same_weights(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "bench"))
    alone = importlib.import_module("_engine_autoencoder")
    kinds = []

    def timed(work, device, repeats):
        kinds.append(type(work.args[0]).__name__)
        return float(work().shape[2])

    monkeypatch.setattr(alone, "seconds", timed)
    encode, decode = alone.walks({"base_dim": 16, "num_res_blocks": 1}, (48, 64), torch.device("cpu"), 9)
    assert kinds == ["AutoencoderKLWan", "FramewiseVae"] * 2
    assert (encode["ours, s"], decode["the library's walk, s"], decode["ratio"]) == (3, 9, 1)
    assert encode["off"] == decode["off"] == 0


def test_original_scripts_without_time_left_run_only_for_waterfall(engine):
    """The waterfall is compared with the original scripts. For other tables they run only if time is left."""
    late = time.monotonic() - 1
    rows = engine.measure_all(bench_of(engine, late), ("headlines",))["headlines"]
    assert "original scripts" not in engine.ran
    assert [(row["original, s"], row["ratio"]) for row in rows] == [("not measured", None)] * 3
    assert rows[2]["ours, s"] == 2.0  # the cold manifest, which does not read the clock here
    (first, *_) = engine.measure_all(bench_of(engine, late), ("waterfall",))["waterfall"]
    assert first["s a step"] == 1.0 and "original scripts" in engine.ran


def test_only_flag_with_unknown_table_is_usage_error_that_lists_tables(engine, capsys, monkeypatch):
    with pytest.raises(argparse.ArgumentTypeError, match="no table 'speed'; there are ceilings, linears, exact"):
        engine.names_of("ceilings,speed")
    monkeypatch.setattr(sys, "argv", ["engine.py", "--only", "ceilings,speed"])
    with pytest.raises(SystemExit) as stopped:
        engine.main()
    assert stopped.value.code == 2 and "no table 'speed'" in capsys.readouterr().err


def test_bench_takes_after_compiling_returns_longest_measured_time(engine, monkeypatch):
    bench = bench_of(engine)
    monkeypatch.setattr(type(bench), "cuda", property(lambda _: True))
    assert bench.takes(None, compiling=True) == 25  # an estimate until then
    bench.see_compiling(0.0)  # nothing was compiled
    assert not bench.compiled
    for seconds, expected in ((9.0, 9.0), (4.0, 9.0), (12.0, 12.0)):
        bench.see_compiling(seconds)
        assert bench.takes(None, compiling=True) == expected
    assert bench.takes(None) == 0


@pytest.mark.skipif(not hasattr(os, "sched_setaffinity"), reason="this system pins no process to a core")
def test_pin_to_one_thread_sets_one_thread_on_one_core(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "bench"))
    for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS"):
        monkeypatch.setenv(name, "2")  # as before, afterwards
    threads, cores = torch.get_num_threads(), os.sched_getaffinity(0)
    torch.set_num_threads(2)
    try:
        importlib.import_module("_pinned_thread").pin_to_one_thread()
        assert torch.get_num_threads() == 1 and os.environ["OMP_NUM_THREADS"] == "1"
        assert len(os.sched_getaffinity(0)) == 1 and os.sched_getaffinity(0) <= cores
    finally:
        torch.set_num_threads(threads)
        os.sched_setaffinity(0, cores)

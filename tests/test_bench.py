"""The benchmarks run, and their numbers hang together."""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[1]


def run_bench(name: str, tmp_path: Path, *arguments: str) -> tuple[dict[str, Any], str]:
    """(what it wrote as JSON, what it printed)."""
    target = tmp_path / "out" / f"{name}.json"
    done = subprocess.run(
        [sys.executable, str(ROOT / "bench" / f"{name}.py"), *arguments, "--json", str(target)],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=240,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return json.loads(target.read_text()), done.stdout


def test_pose_int8(tmp_path):
    found, printed = run_bench("pose_int8", tmp_path, "--blocks", "1", "--crops", "2")
    products = found["products"]
    assert products["faster"] == pytest.approx(products["fp32_ms"] / products["int8_ms"], abs=0.01)
    assert 3.5 < products["fp32_bytes"] / products["int8_bytes"] < 4.1  # a byte in place of four
    assert 0.99 < products["correlation"] < 1
    assert f"{products['faster']} times as fast" in printed


def test_jobs(tmp_path, monkeypatch, capsys):
    """In this process, whose imports are paid for; frames that differ between its rows would end it."""
    monkeypatch.syspath_prepend(str(ROOT / "bench"))
    spec = importlib.util.spec_from_file_location("bench_jobs", ROOT / "bench" / "jobs.py")
    assert spec is not None and spec.loader is not None
    jobs = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, "bench_jobs", jobs)
    spec.loader.exec_module(jobs)
    import torch

    threads = torch.get_num_threads()
    try:
        assert jobs.main(["--quick", "--json", str(tmp_path / "jobs.json")]) == 0
    finally:
        torch.set_num_threads(threads)
    found, printed = json.loads((tmp_path / "jobs.json").read_text()), capsys.readouterr().out
    assert found["encoded"] == {"prompt": 1, "clip": 2, "reference": 2, "blank": 1, "pose_latents": 2}
    assert set(found["looked_up"].values()) == {found["jobs"]}
    assert found["encoder_loads"] == {"text_encoder": 1, "image_encoder": 1}
    assert found["library_ratio"] == pytest.approx(found["library_s"] / found["after_s"], abs=0.01)
    assert found["ratio"] is None and "not measured" in printed  # the process a job is left to the whole run


def test_preprocessing(tmp_path):
    found, printed = run_bench("preprocessing", tmp_path, "--frames", "6")
    assert found["frames"] == 6
    ours, official = found["ours"], found["official"]
    assert ours["stages_ms"].keys() == official["stages_ms"].keys()
    # Every stage that is named was entered: a function renamed in the code measured would leave its stage at nothing.
    idle = {"other"}
    assert all(ms > 0 for name, ms in ours["stages_ms"].items() if name not in idle)
    assert all(ms > 0 for name, ms in official["stages_ms"].items() if name not in {*idle, "repair"})
    for side in (ours, official):
        networks = sum(side["stages_ms"][name] for name in ("decode", "detector network", "pose network"))
        whole = sum(side["stages_ms"].values())
        assert side["outside_ms"] == pytest.approx(whole - networks, abs=0.02)
    assert found["outside_ratio"] == pytest.approx(official["outside_ms"] / ours["outside_ms"], abs=0.01)
    assert found["decode_differs_px"] < 1e-3  # two decodings of the same heatmaps
    assert found["decoding"]["PyAV"]["cpu_ms"] > 0
    for stage, ms in ours["stages_ms"].items():
        assert f"{stage:<22}{ms:>9.2f}" in printed
    assert "what limits it now" in printed


def test_engine(tmp_path):
    tables, printed = run_bench("engine", tmp_path, "--quick")
    rows = {row["what"].strip(): row for row in tables["waterfall"]}
    measured = [row for row in rows.values() if isinstance(row["s a step"], float)]
    assert "not measured" in printed and len(measured) >= 6  # the rest needs a GPU and says so
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


def test_the_engines_benchmark_leaves_out_what_would_end_too_late(tmp_path):
    """The seed's way is measured whatever it takes: the rest is held against it."""
    tables, _ = run_bench("engine", tmp_path, "--quick", "--seconds", "0.001")
    first, *others = tables["waterfall"]
    assert first["s a step"] > 0
    assert {row["note"] for row in others} == {"not measured: out of time", "not measured: needs a GPU"}
    assert {row["note"] for row in tables["modes"]} == {"not measured: out of time"}
    assert {row["ours, s"] for row in tables["headlines"]} == {"not measured"}


def test_the_engines_rows_for_a_gpu_run(tmp_path, monkeypatch):
    """All that only a GPU measures, on a CPU that says it is one: in bfloat16, compiled by what fuses nothing."""
    monkeypatch.syspath_prepend(str(ROOT / "bench"))
    import torch

    engine, settings = (importlib.import_module(name) for name in ("engine", "_engine_settings"))
    from runner.batch.memory_sampler import MemorySampler
    from runner.generation.wan_animate import compiled

    capped: list[float] = []
    monkeypatch.setattr(settings.Bench, "cuda", property(lambda _: True))
    monkeypatch.setattr(engine, "capability_of", lambda _: (9, 0))
    monkeypatch.setattr(engine, "HD", (96, 64))
    monkeypatch.setattr(engine, "SQUARE", 64)
    monkeypatch.setattr(settings, "fuse_norms", lambda _: None)
    monkeypatch.setattr(compiled, "CompiledStep", partial(compiled.CompiledStep, backend="eager"))
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda _: (100e9, 140e9))
    monkeypatch.setattr(torch.cuda, "set_per_process_memory_fraction", lambda part, _: capped.append(part * 140))
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    transformer = {**engine.SMALL.transformer, "num_layers": 2, "inject_face_latents_blocks": 2}
    scale = replace(engine.SMALL, size=(64, 64), frames=5, transformer=transformer)
    recipe, device, store = engine.get_recipe("fp4-distill"), torch.device("cpu"), engine.ModelStore(tmp_path)
    try:
        with MemorySampler(read=engine.DeviceMemory()) as sampler, torch.no_grad():
            engine.write_store(tmp_path, scale, recipe, device)
            bench = engine.Bench(device, scale, recipe, store, store.costs(recipe), sampler, float("inf"), 2)
            tables = engine.measure_all(bench)
    finally:
        torch.set_num_threads(threads)
        torch._dynamo.reset()
    for name in ("waterfall", "low_bits", "hd", "modes"):
        for row in tables[name]:
            assert isinstance(row["s a step"], float) and "NOT COMPILED" not in row["note"], row
    assert [row["what"].split("+")[1] for row in tables["low_bits"]] == ["fp8", "int8", "nvfp4"]
    assert all("error 0.0" in row["note"] for row in tables["low_bits"])
    assert all(row["ratio"] > 0 for row in tables["headlines"])
    assert {row["compute"] for row in tables["linears"] if row["of the best product"]} == {"bf16", "fp8"}
    assert [round(gb, 6) for gb in capped] == [7.2, 140, 5.2, 140, 23.2, 140]  # beside a context of 0.8 GB
    assert any("a streamed step takes" in line for line in engine.notes(bench, tables))


def test_a_job_is_its_fixed_part_and_its_steps(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "bench"))
    import torch

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


def test_quality(tmp_path):
    """Two clips and few steps: the measures are in order, and the table holds what it should."""
    found, printed = run_bench("quality", tmp_path, "--quick", "--models", str(tmp_path / "models"))
    rows, said = found["rows"], found["verdicts"]
    assert found["clips"] == 2
    ceiling = rows["autoencoder"]
    for name, row in rows.items():
        assert row["psnr"] <= ceiling["psnr"], name  # nothing is better than what the autoencoder can say
        assert row["psnr_inside"] < row["psnr"], name  # the dancer is the hard part
        assert -1 <= row["ssim_inside"] <= 1
        assert name in printed
    floor = rows["copy the reference"]["psnr_inside"]
    for steps, above in said["above_floor_db"].items():
        assert above == pytest.approx(rows[f"bf16 {steps} official"]["psnr_inside"] - floor)
    for column in ("psnr_own", "psnr_own_inside"):
        assert said[f"fp4_{column}"]["db"] == [rows[f"fp4 {method} 2"][column] for method in ("absmax", "mse", "nvfp4")]
    assert found["identity"]["own"]["mean"] < found["identity"]["wrong reference"]["mean"]

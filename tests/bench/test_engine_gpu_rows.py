"""The rows of the engine's benchmark that only a GPU measures."""

from __future__ import annotations

import importlib.util
from dataclasses import replace
from functools import partial

import torch

from runner.weights.resolved import ResolvedRecipe
from tests.bench.run_bench import ROOT
from tests.system_tests import system_test


@system_test
def test_engine_benchmark_with_gpu_simulated_on_cpu_measures_gpu_rows(tmp_path, monkeypatch):
    """Measure on a CPU the rows that only a GPU has: in bfloat16, compiled by a backend that fuses nothing."""
    monkeypatch.syspath_prepend(str(ROOT / "bench"))

    engine, settings = (importlib.import_module(name) for name in ("engine", "_engine_settings"))
    from runner.batch.memory_sampler import MemorySampler
    from runner.generation.wan_animate import compiled

    capped: list[float] = []
    monkeypatch.setattr(settings.Bench, "cuda", property(lambda _: True))
    monkeypatch.setattr(engine, "capability_of", lambda _: (9, 0))
    monkeypatch.setattr(engine, "HD", (96, 64))
    monkeypatch.setattr(engine, "SQUARE", 64)
    monkeypatch.setattr(compiled, "CompiledBlocks", partial(compiled.CompiledBlocks, backend="eager"))
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
            bench = engine.Bench(
                device, scale, recipe, store, ResolvedRecipe(store, recipe).costs, sampler, float("inf"), 2
            )
            tables = engine.measure_all(bench)
    finally:
        torch.set_num_threads(threads)
        torch._dynamo.reset()
    for name in ("waterfall", "low_bits", "hd", "modes"):
        for row in tables[name]:
            assert isinstance(row["s a step"], float) and "NOT COMPILED" not in row["note"], row
    *computes, fast = tables["low_bits"]
    assert [row["what"].split("+")[1] for row in computes] == ["fp8", "int8", "nvfp4"]
    assert all("error 0.0" in row["note"] for row in computes)
    assert fast["what"] == "fp4-fast" and "products, exact attention" in fast["note"]
    assert all(row["ratio"] > 0 for row in tables["headlines"])
    assert {row["compute"] for row in tables["linears"] if row["of the best product"]} == {"bf16", "fp8"}
    assert [round(gb, 6) for gb in capped] == [7.2, 140, 5.2, 140, 23.2, 140]  # beside a context of 0.8 GB
    assert any("a streamed step takes" in line for line in engine.notes(bench, tables))

"""The engine: the seed's way and ours in one run, each optimisation added in turn, beside what the machine can do.

    python bench/engine.py [--json PATH] [--seconds S] [--quick]

Full-size random weights on a CUDA device, 480x832, 81 frames, 6 steps; scaled down on a CPU, where seconds are CPU
seconds and what needs a GPU reads "not measured". A job is always a new reference and a new dance with a known prompt.
Sections in order of their worth; those that the time does not suffice for (--seconds, 450 on CUDA) are not measured.
"""

from __future__ import annotations

import argparse
import gc
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from _engine_ceilings import attentions, best, products
from _engine_runs import Clip, Seed, Spent, clock_of, run_ours
from _engine_seed import stepwise
from _engine_store import FULL, SMALL, Scale, write_store
from _quantization import NOT_MEASURED, Rows, finish, show

from runner.generation.compute import advised, capability_of
from runner.generation.cost import PRODUCTION, Costs
from runner.generation.loading import load_of, load_pipeline
from runner.generation.memory import MODES, forecast_memory, make_plan
from runner.generation.recipes import Recipe, get_recipe
from runner.generation.speed import DEVICES, Build, forecast_seconds
from runner.generation.store import ModelStore
from runner.generation.switches import Switches
from runner.generation.tuning import tune
from runner.metrics import MemorySampler

ALL_OFF = Switches(step_invariants=False, memos=False, compile=False)
CARDS_GB = (24, 16, 12, 8)
HD = (1280, 720)


@dataclass
class Bench:
    """One run: where, at what size, and how much time is left."""

    device: torch.device
    scale: Scale
    recipe: Recipe
    store: ModelStore
    costs: Costs
    sampler: MemorySampler
    steps: int
    deadline: float
    warm_up: bool = True  # a job before each that is measured
    clips: int = 0

    @property
    def cuda(self) -> bool:
        return self.device.type == "cuda"

    def clip(self, size: tuple[int, int] | None = None) -> Clip:
        """One that nothing was computed for yet."""
        self.clips += 1
        return Clip(self.scale, size or self.scale.size, self.scale.frames, self.clips, self.clips)

    def measure(self, pipeline: Any, recipe: Recipe | None = None, steps: int = 3) -> Spent:
        """A job through ours; what happens once (compiling, tuning, encoders) is done by one before it."""
        if self.warm_up:
            run_ours(pipeline, recipe or self.recipe, self.clip(), 1, self.sampler)
        return run_ours(pipeline, recipe or self.recipe, self.clip(), steps, self.sampler)

    def late(self) -> bool:
        return time.monotonic() > self.deadline

    def rate(self, step_s: float, size: tuple[int, int] | None = None) -> float:
        """TFLOP/s of a step: the model's operations, whatever of them was saved."""
        return self.costs.step_tflop(*(size or self.scale.size), self.scale.frames) / step_s

    def row(self, what: str, spent: Spent | None, why: str = "") -> dict[str, object]:
        if spent is None:
            blank = {"s a step": None, "fixed s a job": None, "TFLOP/s": None, "peak GB": None, "NVML GB": None}
            return {"what": what, **blank, "note": f"{NOT_MEASURED}: {why:.60}"}
        gb = [None if size is None else size / 1e9 for size in (spent.allocated, spent.process)]
        return {
            "what": what,
            "s a step": spent.step_s,
            "fixed s a job": spent.fixed_s,
            "TFLOP/s": self.rate(spent.step_s),
            "peak GB": gb[0],
            "NVML GB": gb[1],
            "note": f"{spent.once_s:.3g} s once" if spent.once_s else "",
        }


def waterfall(bench: Bench, pipeline: Any) -> Rows:
    """Each optimisation added to those before; the pipeline is left with all of them on."""
    rows: Rows = []
    transformer, cuda, recipe = pipeline.transformer, bench.cuda, bench.recipe

    def measure(what: str, prepare: Callable[[], Any] = lambda: None, *, needs_cuda: bool = False) -> None:
        if needs_cuda and not cuda:
            rows.append(bench.row(what, None, "needs a GPU"))
        elif bench.late():
            rows.append(bench.row(what, None, "out of time"))
        else:
            try:
                prepare()
                rows.append(bench.row(what, bench.measure(pipeline)))
            # One optimisation that fails here must not take the table with it.
            except Exception as err:
                rows.append(bench.row(what, None, f"{type(err).__name__}: {str(err).splitlines()[0]}"))

    def switch(**changes: Any) -> None:
        pipeline.switches = replace(pipeline.switches, **changes)
        tune(pipeline, recipe, bench.device)
        if not attention_chosen:
            for block in transformer.blocks:
                block.attn1.set_attention_backend("native")

    def choose_attention() -> None:
        nonlocal attention_chosen
        attention_chosen = True
        switch()

    attention_chosen = False
    pipeline.switches = ALL_OFF
    switch()
    with stepwise(transformer):
        measure("our loop, everything on the device, else the seed's way")
    measure("+ weights dequantised in one pass")
    measure("+ what a window's steps share computed once", lambda: switch(step_invariants=True))
    measure("+ what jobs share encoded once", lambda: switch(memos=True))
    measure("+ blocks compiled", lambda: switch(compile=True), needs_cuda=True)
    measure("+ attention by device", choose_attention, needs_cuda=True)
    measure("+ autoencoder in bfloat16", lambda: pipeline.vae.to(torch.bfloat16), needs_cuda=True)
    measure("+ autoencoder's layout", lambda: switch(channels_last=True), needs_cuda=True)
    measure("+ autoencoder's norms fused", lambda: switch(fuse_vae_norms=True), needs_cuda=True)
    return rows


def low_bits(bench: Bench, pipeline: Any) -> Rows:
    """The computes that this device has, beyond the exact one; not exact, each within its self-test's limit."""
    rows: Rows = []
    for compute in ("fp8", "int8", "nvfp4"):
        what, recipe = f"{bench.recipe.name}+{compute}", replace(bench.recipe, compute=compute)
        if not bench.cuda or bench.late():
            rows.append(bench.row(what, None, "out of time" if bench.cuda else "needs a GPU"))
            continue
        try:
            said = tune(pipeline, recipe, bench.device)
            row = bench.row(what, bench.measure(pipeline, recipe))
            worst = max(entry["error"] for entry in said["compute_self_test"].values())
            rows.append(row | {"note": f"{said['compute_product']}, error {worst:.3f} a layer"})
        except Exception as err:  # this device has it not, or has it wrong: that is the answer
            rows.append(bench.row(what, None, str(err).splitlines()[0]))
    for layer in pipeline.transformer.modules():
        if hasattr(layer, "set_compute"):
            layer.set_compute("exact")
    return rows


def headlines(bench: Bench, pipeline: Any, seed: Seed, seed_clip: Spent) -> Rows:
    """One warm clip, and a cold manifest of four jobs: two references, two dances, one prompt."""
    ours = run_ours(pipeline, bench.recipe, bench.clip(), bench.steps, bench.sampler)
    rows: Rows = [comparison("a warm clip, exact products", seed_clip.total_s, ours.total_s)]
    if bench.cuda:
        capability = capability_of(bench.device)
        recipe = replace(bench.recipe, compute=advised(capability))
        tune(pipeline, recipe, bench.device)
        low = bench.measure(pipeline, recipe, bench.steps)
        rows.append(comparison(f"a warm clip, {recipe.compute} products", seed_clip.total_s, low.total_s))
    else:
        rows.append({"what": "a warm clip, 8-bit products", "seed, s": None, "ours, s": NOT_MEASURED, "ratio": None})
    first = bench.clips + 1
    begin = clock_of(bench.device)()
    fresh, _ = load_pipeline(bench.store, bench.recipe, bench.device)
    spent = clock_of(bench.device)() - begin
    for reference, dance in ((0, 0), (0, 1), (1, 0), (1, 1)):
        clip = Clip(bench.scale, bench.scale.size, bench.scale.frames, first + reference, first + dance)
        spent += run_ours(fresh, bench.recipe, clip, bench.steps, bench.sampler).total_s
    bench.clips += 2
    rows.append(
        comparison("a cold manifest of four; the seed: a process a job", 4 * (seed.load_s + seed_clip.total_s), spent)
    )
    return rows


def comparison(what: str, seed: float, ours: float) -> dict[str, object]:
    return {"what": what, "seed, s": seed, "ours, s": ours, "ratio": seed / ours}


def modes(bench: Bench) -> Rows:
    """Every memory mode under a cap of what it is meant for: forecast beside the measured peak."""
    rows: Rows = []
    production = get_recipe("fp4-distill")
    width, height = bench.scale.size
    for mode in MODES:
        plan, load = make_plan(mode, bench.recipe), load_of(bench.store, bench.recipe)
        window = (width, height, bench.scale.frames)
        forecast = forecast_memory(plan, bench.recipe, bench.costs, *window, load=load, cuda=bench.cuda).peak
        full = forecast_memory(make_plan(mode, production), production, PRODUCTION, 832, 480, 81).peak / 1e9
        fits = [card for card in CARDS_GB if full <= card]
        card = min(fits) if fits else None
        row: dict[str, object] = {"mode": mode, "14B at 480x832x81, forecast GB": full, "smallest card GB": card}
        if bench.late():
            rows.append({**row, "s a step": NOT_MEASURED, "peak GB": None, "NVML GB": None})
            continue
        with capped(bench, card):
            pipeline, _ = load_pipeline(bench.store, bench.recipe, bench.device, plan=plan)
            spent = bench.measure(pipeline)
        gb = [None if size is None else size / 1e9 for size in (spent.allocated, spent.process)]
        row |= {"s a step": spent.step_s, "fixed s a job": spent.fixed_s, "peak GB": gb[0], "NVML GB": gb[1]}
        rows.append({**row, "forecast here GB": forecast / 1e9})
        del pipeline
        free(bench.device)
    columns = {name: None for row in rows for name in row}
    return [{**columns, **row} for row in rows]


@contextmanager
def capped(bench: Bench, card_gb: int | None) -> Iterator[None]:
    """On CUDA: torch's allocator may not exceed what such a card has beside the context."""
    if not bench.cuda or card_gb is None:
        yield
        return
    _, total = torch.cuda.mem_get_info(bench.device)
    torch.cuda.set_per_process_memory_fraction(min(1.0, (card_gb - 0.8) * 1e9 / total), bench.device)
    try:
        yield
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0, bench.device)


def in_hd(bench: Bench, pipeline: Any, seed: Seed) -> Rows:
    """One step each at 1280x720, 81 frames."""
    rows: Rows = []
    runs: dict[str, Callable[[], Spent]] = {
        "the seed's way": lambda: seed.run(bench.clip(HD), 2, bench.sampler),
        "ours": lambda: run_ours(pipeline, bench.recipe, bench.clip(HD), 2, bench.sampler),
    }
    for name, run in runs.items():
        what = f"{name}, 1280x720"
        if not bench.cuda or bench.late():
            rows.append(bench.row(what, None, "out of time" if bench.cuda else "needs a GPU"))
            continue
        spent = run()
        rows.append(bench.row(what, spent) | {"TFLOP/s": bench.rate(spent.step_s, HD)})
    return rows


def forecasts() -> Rows:
    """The cost model's seconds for 480x832, 81 frames, 6 steps. Forecasts, not measurements."""
    builds = {
        "seed's way": Build(stepwise=True, fused=False, shared=False, blank_again=True),
        "exact": Build(),
        "exact, bf16 VAE": Build(vae="bfloat16"),
        "8 bit": Build("int8", vae="bfloat16"),
        "8 bit, 8-bit attention": Build("int8", attention_8bit=True, vae="bfloat16"),
        "nvfp4, 8-bit attention": Build("nvfp4", attention_8bit=True, vae="bfloat16"),
    }
    rows: Rows = []
    for device in DEVICES:
        row: dict[str, object] = {"forecast, s a clip": device.name}
        for name, build in builds.items():
            row[name] = None
            if build.compute in device.matmul:
                clip = {"size": (832, 480), "segment_frames": 81, "segments": 1, "steps": 6}
                row[name] = forecast_seconds(PRODUCTION, device, build, **clip).total_s
        rows.append(row)
    return rows


def ceilings(bench: Bench) -> Rows:
    config = bench.store.config(bench.recipe, "transformer")
    heads, width = config["num_attention_heads"], config["attention_head_dim"]
    d, ffn = heads * width, config["ffn_dim"]
    tokens = bench.costs.transformer.tokens(*bench.scale.size, bench.scale.frames)
    square = 8192 if bench.cuda else 1024
    dtype = getattr(torch, bench.recipe.dtype)
    shapes = [("square", square, square, square), ("attention's", tokens, d, d)]
    shapes += [("feed-forward's first", tokens, ffn, d), ("feed-forward's second", tokens, d, ffn)]
    return products(shapes, bench.device, dtype) + attentions(heads, tokens, width, bench.device, dtype)


def free(device: torch.device) -> None:
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()


def measure_all(bench: Bench) -> dict[str, Rows]:
    tables = {"ceilings": ceilings(bench)}
    seed = Seed(bench.store, bench.recipe, bench.device)
    seed.run(bench.clip(), 1, bench.sampler)
    seed_clip = seed.run(bench.clip(), bench.steps, bench.sampler)
    rows = [bench.row("the seed's way: library's pipeline, models wait on the host", seed_clip)]
    free(bench.device)
    pipeline, _ = load_pipeline(bench.store, bench.recipe, bench.device)
    tables["waterfall"] = rows + waterfall(bench, pipeline)
    tables["low_bits"] = low_bits(bench, pipeline)
    tune(pipeline, bench.recipe, bench.device)
    tables["headlines"] = headlines(bench, pipeline, seed, seed_clip)
    tune(pipeline, bench.recipe, bench.device)
    tables["hd"] = in_hd(bench, pipeline, seed)
    del pipeline, seed
    free(bench.device)
    tables["modes"] = modes(bench)
    tables["forecasts"] = forecasts()
    return tables


def notes(bench: Bench, tables: dict[str, Rows]) -> list[str]:
    """How far we are from what the machine does."""
    found = [row for row in tables["waterfall"] if isinstance(row["TFLOP/s"], float)]
    fastest = max(found, key=lambda row: row["TFLOP/s"])
    product, attention = best(tables["ceilings"], "product"), best(tables["ceilings"], "attention")
    model, window = bench.costs.transformer, (*bench.scale.size, bench.scale.frames)
    reads = model.self_attention_flop(*window) / 1e12
    rest = (model.forward_flop(*window) - model.invariant_flop(*window)) / 1e12 - reads
    lines = [f"{bench.scale.name}; {bench.scale.size[0]}x{bench.scale.size[1]}, {bench.scale.frames} frames"]
    if product and attention:
        floor = rest / product + reads / attention
        lines.append(
            f"floor of a step, all products and attention at the best rates measured alone: {floor:.4g} s; "
            f"reached {fastest['s a step']:.4g} s ({fastest['what']}), {floor / fastest['s a step']:.0%} of it"
        )
    seconds = "CPU seconds" if not bench.cuda else "seconds"
    lines.append(f"{seconds}; forecasts come from the cost model and were not measured")
    return lines


TITLES = {
    "ceilings": "What the machine does",
    "waterfall": "Each optimisation added to those before",
    "low_bits": "Products in fewer bits, all else on",
    "headlines": "Whole jobs",
    "hd": "1280x720",
    "modes": "Memory modes",
    "forecasts": "Forecast for 480x832, 81 frames, 6 steps (no measurement)",
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, help="write the tables here too")
    parser.add_argument("--seconds", type=float, help="leave out what would begin after this many")
    parser.add_argument("--quick", action="store_true", help="a smaller clip and fewer steps: does it all run?")
    options = parser.parse_args()
    began = time.monotonic()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    scale = FULL if device.type == "cuda" else SMALL
    if options.quick:
        scale = replace(SMALL, size=(64, 64), frames=5)
    recipe = get_recipe("fp4-distill")
    if device.type == "cpu":
        recipe = replace(recipe, dtype="float32")  # what a CPU computes in
    seconds = options.seconds or (450 if device.type == "cuda" else 1e9)
    torch.manual_seed(0)
    with tempfile.TemporaryDirectory(prefix="video-lab-bench-") as folder, MemorySampler() as sampler, torch.no_grad():
        write_store(Path(folder), scale, recipe, device)
        store = ModelStore(Path(folder))
        bench = Bench(device, scale, recipe, store, store.costs(recipe), sampler, 6, began + seconds)
        if options.quick:
            bench.steps, bench.warm_up = 2, False
        tables = measure_all(bench)
    for name, rows in tables.items():
        show(TITLES[name], rows)
    finish(tables, options.json, notes(bench, tables))


if __name__ == "__main__":
    main()

"""The engine: measures the original scripts and our engine in one run, with each optimisation added in turn.

    python bench/engine.py [--json PATH] [--seconds S] [--only PART,...] [--quick]

On a CUDA device: full-size random weights, 480x832, 81 frames, beside the machine's measured limits. On a CPU: a small
model; seconds are CPU seconds of one thread on one core, and rows that need a GPU read "not measured". Each job has
a new reference and a new dance, and a known prompt. Only a few of its six steps are run; the time of a whole job is its
fixed part plus six steps. The most important tables come first. A measurement is left out ("not measured") if it would
probably not end in time (--seconds, 420 on CUDA). On a CPU each number is that of the cheapest of three jobs, also for
the original scripts. The JSON file is written again after each table.

`--only` chooses tables. If a table needs values of another one, they are measured too. The original scripts run only
for tables that compare with them: for the waterfall in any case, for headlines and hd if there is time.
"""

from __future__ import annotations

import argparse
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from _engine_autoencoder import NARROW, later_scenes, walks
from _engine_ceilings import attentions, best, linears, products
from _engine_runs import STEPS, Clip, DeviceMemory, OriginalScripts, Spent, clock_of, run_ours
from _engine_settings import ALL_OFF, Bench, NotInTime, OneEngine, all_on, attempt, free, in_gb, load_resident, settings
from _engine_store import FULL, SMALL, write_store
from _pinned_thread import pin_to_one_thread
from _quantization import NOT_MEASURED, Rows, finish, show, write_tables

from runner.batch.memory_sampler import MemorySampler
from runner.forecast.flops import PRODUCTION
from runner.forecast.precisions import DEFAULT_PRECISION, PRECISIONS, advised
from runner.forecast.seconds import DEVICES, EngineBuild, forecast_seconds
from runner.generation.runtime.compute import capability_of
from runner.generation.runtime.device import grow_segments
from runner.generation.runtime.fast_choice import choice_words, foresee, probe_choice
from runner.generation.runtime.memory_plan import (
    CONTEXT_BYTES,
    MODES,
    Load,
    MemoryPlan,
    Window,
    choose_plan,
    forecast_memory,
    make_plan,
)
from runner.generation.segments import plan_job
from runner.generation.wan_animate.loading import load_pipeline
from runner.spec.options import JobOptions
from runner.spec.recipes import FAST_RECIPE, Recipe, get_recipe
from runner.weights.resolved import ResolvedRecipe
from runner.weights.store import ModelStore

JOBS_ON_A_CPU = 3  # on a CPU the seconds differ by a fifth from job to job
CARDS_GB = (24, 16, 12, 8)
LEAST_GB = 6  # mode minimal must stay below it
HD = (1280, 720)
USUAL = (Window(832, 480, 81),)
SQUARE = 8192  # a side of the product that a GPU's ceiling is read from
ORIGINALS_S = 110.0  # seconds to load and run the original scripts on an H200: an estimate


def waterfall(engine: OneEngine, original: Spent | str, best_of_ours: Spent | str) -> dict[str, Spent | str]:
    """Return the measurement of each setting in order. `best_of_ours`: measured already."""
    bench, last = engine.bench, all_on(engine.bench)
    found: dict[str, Spent | str] = {}
    for setting in settings():
        if setting == last:
            found[setting.what] = best_of_ours
            continue
        # No row is slower than the original scripts; rows with all blocks compiled are similar to the last one.
        like = best_of_ours if setting.attention and isinstance(best_of_ours, Spent) else original
        expected = bench.takes(
            spent_or_none(like), compiling=setting.switches.compile is True and not setting.attention
        )
        found[setting.what] = engine.measure(setting, expected)
    return found


def spent_or_none(found: Spent | str) -> Spent | None:
    return found if isinstance(found, Spent) else None


def low_bits(engine: OneEngine, found: dict[str, Spent | str], like: Spent | None) -> Rows:
    """Measure the device's GEMM precisions other than exact; each passes its self-test. `found`: earlier results."""
    bench, rows = engine.bench, list[dict[str, object]]()
    for compute in [row.name for row in PRECISIONS.values() if row.layout not in ("exact", "svdq")]:  # of FP4 weights
        if compute not in found:
            found[compute] = in_fewer_bits(engine, compute, like)
        rows.append(bench.row(f"{bench.recipe.name}+{compute}", found[compute]))
    return [*rows, bench.row(FAST_RECIPE, as_chosen(engine, like))]


def as_chosen(engine: OneEngine, like: Spent | None) -> Spent | str:
    """Measure with the GEMM precision and attention that the device chooses; the autoencoder is always in 16 bits."""
    bench, shape = engine.bench, engine.bench.costs.transformer
    if not bench.cuda:
        return "needs a GPU"
    recipe = get_recipe(FAST_RECIPE)
    running = probe_choice(recipe, bench.device, shape.num_attention_heads, shape.attention_head_dim).running
    found = engine.measure(all_on(bench), bench.takes(like, compiling=True), running)
    return found if isinstance(found, str) else replace(found, note=f"{choice_words(running)}; {found.note}")


def in_fewer_bits(engine: OneEngine, compute: Any, like: Spent | None) -> Spent | str:
    bench = engine.bench
    if not bench.cuda:
        return "needs a GPU"
    expected = bench.takes(like, compiling=True)
    return engine.measure(all_on(bench), expected, replace(bench.recipe, compute=compute))


def linears_of(held: OneEngine, ceiling: float | None) -> Rows:
    """Measure the block's linears alone, exact and in the recommended 8-bit precision."""
    engine, bench, rows = held.get(), held.bench, list[dict[str, object]]()
    tokens = bench.costs.transformer.tokens(*bench.scale.size, bench.scale.frames)
    eight = advised(capability_of(bench.device)) if bench.cuda else DEFAULT_PRECISION
    for compute in dict.fromkeys((DEFAULT_PRECISION, eight)):
        recipe: Any = replace(bench.recipe, compute=compute)
        try:
            with engine.as_in(replace(all_on(bench), switches=ALL_OFF), recipe):
                found = linears(
                    engine.pipeline.transformer.blocks[0], tokens, bench.device, getattr(torch, recipe.dtype), ceiling
                )
        except Exception as err:
            found = [{"what": "linears of a block", "shape": f"{NOT_MEASURED}: {type(err).__name__}: {err!s:.60}"}]
        rows += [
            {"what": "", "compute": compute, "shape": "", "TFLOP/s": None, "of the best product": None} | row
            for row in found
        ]
    return rows


def headlines(
    original: OriginalScripts | None,
    original_clip: Spent | str,
    exact: Spent | str,
    eight: Spent | str,
    name: str,
    cold: Spent | str,
) -> Rows:
    """Return rows of one warm clip, and of a cold manifest of four jobs: two references, two dances, one prompt."""

    def total(spent: Spent | str) -> float | None:
        return spent.clip_s(STEPS) if isinstance(spent, Spent) else None

    theirs = total(original_clip)
    return [
        comparison("a warm clip, exact products", theirs, total(exact)),
        comparison(f"a warm clip, {name} products", theirs, total(eight)),
        comparison(
            "a cold manifest of four; original scripts: one process per job",
            None if theirs is None or original is None else 4 * (original.load_s + theirs),
            cold.fixed_s if isinstance(cold, Spent) else None,
        ),
    ]


def cold_manifest(bench: Bench, like: Spent | None) -> Spent:
    """Return the total seconds as `fixed_s`. Compiled code comes from disk, as after a machine's first process."""
    bench.check(30 * bench.cuda + (0.0 if like is None else 4 * like.clip_s(bench.steps)))
    first, bench.clips = bench.clips + 1, bench.clips + 2
    torch._dynamo.reset()
    clock = clock_of(bench.device)
    begin = clock()
    fresh = load_resident(bench)
    seconds = clock() - begin
    for reference, dance in ((0, 0), (0, 1), (1, 0), (1, 1)):
        clip = Clip(bench.scale, bench.scale.size, bench.scale.frames, first + reference, first + dance)
        spent = run_ours(fresh, bench.recipe, clip, bench.steps, bench.sampler)
        seconds += spent.once_s + spent.clip_s(STEPS)
    return replace(spent, fixed_s=seconds)


def comparison(what: str, original: float | None, ours: float | None) -> dict[str, object]:
    return {
        "what": what,
        "original, s": NOT_MEASURED if original is None else original,
        "ours, s": NOT_MEASURED if ours is None else ours,
        "ratio": None if original is None or ours is None else original / ours,
    }


def cards() -> dict[str, list[int]]:
    """Return memory mode -> cards, in GB, for which `auto` chooses it with the 14B model at 480x832, 81 frames."""
    recipe, found = get_recipe("fp4-distill"), dict[str, list[int]]()
    for card in CARDS_GB:
        plan, _ = choose_plan("auto", recipe, PRODUCTION, round(card * 1e9), windows=USUAL)
        found.setdefault(plan.mode, []).append(card)
    return found


def plan_of(mode: Any, card_gb: int | None, recipe: Recipe) -> MemoryPlan:
    """Return the plan of a mode that `auto` takes on a card of this size."""
    if card_gb is None or mode != "resident":
        return make_plan(mode, recipe)
    return choose_plan("resident", recipe, PRODUCTION, round(card_gb * 1e9), windows=USUAL)[0]


def modes(bench: Bench, like: Spent | None) -> Rows:
    """Measure every memory mode under the cap of the smallest card that `auto` chooses it for, with its forecast."""
    rows: dict[str, dict[str, object]] = {}
    production, chosen, size = get_recipe("fp4-distill"), cards(), (*bench.scale.size, bench.scale.frames)
    for mode in ("stream", "minimal", "resident"):
        card = min(chosen.get(mode, [LEAST_GB]))
        plan, load = plan_of(mode, card, bench.recipe), Load(**ResolvedRecipe(bench.store, bench.recipe).bytes)
        forecast = forecast_memory(plan, bench.recipe, bench.costs, *size, load=load, cuda=bench.cuda)
        full = forecast_memory(plan_of(mode, card, production), production, PRODUCTION, 832, 480, 81)

        def work(plan: MemoryPlan = plan, card: int = card) -> Spent:
            # Resident takes as long as the job before. Less memory takes longer, uncompiled blocks much longer.
            bench.check(15 * bench.cuda + bench.takes(like) * (1.2 if plan.compiled else 3))
            with capped(bench, card):
                pipeline, _ = load_pipeline(ResolvedRecipe(bench.store, bench.recipe), bench.device, plan=plan)
                return bench.measure(pipeline)

        spent = attempt(f"mode {mode}", work)
        free(bench.device)
        row: dict[str, object] = {
            "mode": mode,
            "cards, GB": ", ".join(map(str, chosen.get(mode, []))) or None,
            "cap, GB": card if bench.cuda else None,
            "14B forecast, GB": full.peak / 1e9,
            "forecast, GB": forecast.peak / 1e9,
        }
        names = ("peak GB", "NVML GB", "s a step", "fixed s a job")
        if isinstance(spent, str):
            rows[mode] = row | dict.fromkeys(names) | {"note": f"{NOT_MEASURED}: {spent:.60}"}
            continue
        found = (in_gb(spent.allocated), in_gb(spent.process), spent.step_s, spent.fixed_s)
        rows[mode] = row | dict(zip(names, found, strict=True)) | {"note": spent.note}
    return [rows[mode] for mode in MODES]


@contextmanager
def capped(bench: Bench, card_gb: int) -> Iterator[None]:
    """On CUDA: limit torch's allocator to the memory of a card of this size without the context."""
    if not bench.cuda:
        yield
        return
    _, total = torch.cuda.mem_get_info(bench.device)
    torch.cuda.set_per_process_memory_fraction(min(1.0, (card_gb * 1e9 - CONTEXT_BYTES) / total), bench.device)
    try:
        yield
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0, bench.device)


def in_hd(
    bench: Bench, engine: OneEngine, original: OriginalScripts | None, original_clip: Spent | str, like: Spent | None
) -> Rows:
    """Measure both at 1280x720, 81 frames."""
    frames, tflop = bench.scale.frames, bench.costs.step_tflop
    per_step = tflop(*HD, frames) / tflop(*bench.scale.size, frames)
    pixels = HD[0] * HD[1] / (bench.scale.size[0] * bench.scale.size[1])

    def larger(spent: Spent | None) -> Spent | None:
        return spent and replace(spent, step_s=spent.step_s * per_step, fixed_s=spent.fixed_s * pixels)

    def ours() -> Spent:
        bench.check(bench.takes(larger(like), compiling=True))
        held = engine.get()
        with held.as_in(all_on(bench)):
            return bench.measure(held.pipeline, size=HD)

    def theirs() -> Spent:
        if original is None:
            raise NotInTime(str(original_clip))
        bench.check(bench.takes(larger(spent_or_none(original_clip))))
        return original.run(bench.clip(HD), bench.steps, bench.sampler)

    rows: Rows = []
    for name, work in (("ours", ours), ("the original scripts", theirs)):
        what = f"{name}, 1280x720"
        rows.append(bench.row(what, attempt(what, work) if bench.cuda else "needs a GPU", HD))
    return rows


def forecasts() -> Rows:
    """Return the cost model's seconds for 480x832, 81 frames, 6 steps. They are forecasts, not measurements."""
    builds = {
        "original scripts": EngineBuild(stepwise=True, fused=False, shared=False, blank_again=True, library_walk=True),
        "exact": EngineBuild(),
        "exact, bf16 VAE": EngineBuild(vae="bfloat16"),
        "nvfp4, 8-bit attention": EngineBuild("nvfp4", attention_8bit=True, vae="bfloat16"),
    }
    rows: Rows = []
    for device in DEVICES:
        row: dict[str, object] = {"forecast, s a clip": device.name}
        eight = EngineBuild(advised(device.capability), vae="bfloat16")
        here = {"8 bit": eight, "8 bit, 8-bit attention": replace(eight, attention_8bit=True)}
        for name, build in (builds | here).items():
            row[name] = None
            if build.compute in device.matmul and (device.attention_8bit or not build.attention_8bit):
                clip = {"size": (832, 480), "segment_frames": 81, "segments": 1, "evaluations": 6}
                row[name] = forecast_seconds(PRODUCTION, device, build, **clip).total_s
        fast = foresee(get_recipe(FAST_RECIPE), device)
        row[FAST_RECIPE] = plan_job(81, (832, 480), JobOptions(), fast, device=device).seconds
        row["it would choose"] = choice_words(fast)
        rows.append(row)
    return rows


def ceilings(bench: Bench) -> Rows:
    config = ResolvedRecipe(bench.store, bench.recipe).config("transformer")
    heads, width = config["num_attention_heads"], config["attention_head_dim"]
    d, ffn = heads * width, config["ffn_dim"]
    tokens = bench.costs.transformer.tokens(*bench.scale.size, bench.scale.frames)
    square = SQUARE if bench.cuda else 1024
    dtype = getattr(torch, bench.recipe.dtype)
    shapes = [("square", square, square, square), ("attention's", tokens, d, d)]
    shapes += [("feed-forward's first", tokens, ffn, d), ("feed-forward's second", tokens, d, ffn)]
    return products(shapes, bench.device, dtype) + attentions(heads, tokens, width, bench.device, dtype)


def autoencoder_rows(bench: Bench, what: str, seconds: float, measure: Callable[..., Rows], *more: Any) -> Rows:
    """Measure at full size on a GPU, where it takes about `seconds`; on a CPU with a narrower autoencoder."""
    try:
        bench.check(seconds * bench.cuda)
        return measure({} if bench.cuda else NARROW, bench.scale.size, bench.device, *more)
    except Exception as err:  # a measurement that fails must not stop the others
        return [{what: f"{NOT_MEASURED}: {err!s:.60}"}]


def walks_beside(bench: Bench) -> Rows:
    """Measure a window by the library's frame loop (4 to 8 s on a GPU, a forecast) and by ours."""
    return autoencoder_rows(bench, "autoencoder", 90, walks, bench.scale.frames)


def scenes(bench: Bench) -> Rows:
    """Measure a window of 81 frames: six runs of 3 to 4 s and four shorter ones on an RTX 5090 (a forecast)."""
    return autoencoder_rows(bench, "scene of a later window", 20, later_scenes)


TITLES = {
    "ceilings": "What the machine does",
    "linears": "Linears of a block, alone",
    "exact": "Ours, exact products, everything on",
    "waterfall": "Each optimisation added to those before",
    "low_bits": "Products in fewer bits, all else on",
    "headlines": f"Whole jobs of {STEPS} steps",
    "hd": "1280x720",
    "modes": "Memory modes, each on the smallest of the cards that `auto` takes it for at 480x832, 81 frames",
    "walks": "The autoencoder's walk through a window, alone",
    "scenes": "The scene of a later window, encoded",
    "forecasts": "Forecast for 480x832, 81 frames, 6 steps (no measurement)",
}
NAMES = (
    "ceilings", "linears", "exact", "low_bits", "modes", "headlines", "waterfall", "hd", "walks", "scenes", "forecasts",
)  # fmt: skip


def names_of(text: str) -> tuple[str, ...]:
    """Return the tables that `--only` names."""
    names = tuple(name.strip() for name in text.split(","))
    wrong = [name for name in names if name not in NAMES]
    if wrong:
        raise argparse.ArgumentTypeError(f"no table {', '.join(map(repr, wrong))}; there are {', '.join(NAMES)}")
    return names


def measure_all(
    bench: Bench,
    chosen: Collection[str] = NAMES,
    report: Callable[[dict[str, Rows]], None] = lambda tables: None,
) -> dict[str, Rows]:
    """Measure the chosen tables. `report` gets all tables so far whenever one is added or grows."""
    tables: dict[str, Rows] = {}

    def wanted(*names: str) -> bool:
        return not set(names).isdisjoint(chosen)

    def keep(name: str, rows: Rows) -> None:
        if name in chosen:
            tables[name] = rows
            report(tables)

    if wanted("ceilings"):
        keep("ceilings", ceilings(bench))
    engine = OneEngine(bench)
    exact: Spent | str = "not chosen"
    if wanted("exact", "headlines", "waterfall"):
        exact = engine.measure(all_on(bench), bench.takes(None, compiling=True))
        keep("exact", [bench.row("ours, exact products", exact)])
    like = spent_or_none(exact)
    eight = advised(capability_of(bench.device)) if bench.cuda else "8-bit"
    fewer: dict[str, Spent | str] = {}
    if wanted("low_bits", "headlines"):
        fewer[eight] = in_fewer_bits(engine, eight, like)
        if eight in PRECISIONS:
            keep("low_bits", [bench.row(f"{bench.recipe.name}+{eight}", fewer[eight])])
    if wanted("linears"):
        keep("linears", linears_of(engine, best(tables.get("ceilings", []), "product")))
    if wanted("modes", "headlines", "waterfall", "hd"):
        engine.drop()  # caps, cold starts and the original scripts need the device for themselves
    if wanted("modes"):
        keep("modes", modes(bench, like))
    cold: Spent | str = "not chosen"
    if wanted("headlines"):
        cold = attempt("a cold manifest of four", lambda: bench.cheapest(lambda: cold_manifest(bench, like)))
        free(bench.device)
        keep("headlines", headlines(None, "not yet", exact, fewer[eight], eight, cold))
    original: OriginalScripts | None = None
    original_clip: Spent | str = "not chosen"
    if wanted("headlines", "waterfall", "hd"):
        original, original_clip = original_scripts(bench, at_any_time=wanted("waterfall"))
    if wanted("headlines"):
        keep("headlines", headlines(original, original_clip, exact, fewer[eight], eight, cold))
    if wanted("waterfall"):
        rows = [bench.row("the original scripts: library's pipeline, models wait on the host", original_clip)]
        rows += [bench.row(what, spent) for what, spent in waterfall(engine, original_clip, exact).items()]
        keep("waterfall", rows)
    if wanted("low_bits"):
        keep("low_bits", low_bits(engine, fewer, like))
    if wanted("hd"):
        keep("hd", in_hd(bench, engine, original, original_clip, like))
    alone: dict[str, Callable[[], Rows]] = {"walks": lambda: walks_beside(bench), "scenes": lambda: scenes(bench)}
    for name, table in (alone | {"forecasts": forecasts}).items():
        if wanted(name):
            keep(name, table())
    return {name: tables[name] for name in TITLES if name in tables}


def original_scripts(bench: Bench, *, at_any_time: bool) -> tuple[OriginalScripts | None, Spent | str]:
    """Load the original scripts and measure a clip; return (None, reason) if there is not enough time left."""
    loaded: list[OriginalScripts] = []

    def work() -> Spent:
        if not at_any_time:
            bench.check(ORIGINALS_S * bench.cuda)
        loaded.append(OriginalScripts(bench.store, bench.recipe, bench.device))
        loaded[0].run(bench.clip(frames=5), 1, bench.sampler)  # warm-up: some parts are loaded at the first run
        return bench.cheapest(lambda: loaded[0].run(bench.clip(), bench.steps, bench.sampler))

    found = attempt("the original scripts", work)
    free(bench.device)
    return (loaded[0] if loaded and isinstance(found, Spent) else None), found


def notes(bench: Bench, tables: dict[str, Rows]) -> list[str]:
    """Return notes that compare the results with the machine's limits."""
    rows = [*tables.get("waterfall", []), *tables.get("exact", [])]
    found = [row for row in rows if isinstance(row["TFLOP/s"], float)]
    fastest = max(found, key=lambda row: row["TFLOP/s"], default=None)
    ceiling = tables.get("ceilings", [])
    product, attention = best(ceiling, "product"), best(ceiling, "attention")
    model, window = bench.costs.transformer, (*bench.scale.size, bench.scale.frames)
    reads = model.self_attention_flop(*window) / 1e12
    rest = (model.forward_flop(*window) - model.conditioning_flop(*window)) / 1e12 - reads
    lines = [f"{bench.scale.name}; {bench.scale.size[0]}x{bench.scale.size[1]}, {bench.scale.frames} frames"]
    if product and attention and fastest:
        floor = rest / product + reads / attention
        lines.append(
            f"floor of a step, all products and attention at the best rates measured alone: {floor:.4g} s; "
            f"reached {fastest['s a step']:.4g} s ({fastest['what']}), {floor / fastest['s a step']:.0%} of it"
        )
    linears_alone = tables.get("linears", [])
    together = [row for row in linears_alone if row["what"] == "linears of a block" and row["of the best product"]]
    lines += [f"linears, {row['compute']}: {row['of the best product']:.0%} of the best product" for row in together]
    step = {row["mode"]: row["s a step"] for row in tables.get("modes", [])}
    stream, alone = step.get("stream"), step.get("resident")
    if bench.cuda and isinstance(stream, float) and isinstance(alone, float):
        lines.append(f"a streamed step takes {stream / alone:.3f} of a resident one's time")
    seconds = "seconds"
    if not bench.cuda:
        seconds = f"CPU seconds, {torch.get_num_threads()} thread" + "s" * (torch.get_num_threads() > 1)
    lines.append(f"{seconds}; forecasts come from the cost model and were not measured")
    return lines


def scratch(device: torch.device) -> str | None:
    """Return the folder for the store of 16 GB: in memory if there is enough, because a disk may take a minute."""
    memory = Path("/dev/shm")
    plenty = device.type == "cuda" and memory.is_dir() and shutil.disk_usage(memory).free > 50e9
    return str(memory) if plenty else None


def run(
    device: torch.device,
    *,
    chosen: Collection[str] = NAMES,
    seconds: float | None = None,
    quick: bool = False,
    report: Callable[[dict[str, Rows]], None] = lambda tables: None,
) -> tuple[dict[str, Rows], list[str]]:
    """Return the chosen tables and notes on them. Must be called before the process has used the device.

    On a CPU the process is restricted to one thread on one core.
    """
    began, memory = time.monotonic(), DeviceMemory()  # before this process uses any
    if device.type == "cpu":
        pin_to_one_thread()
    grow_segments(device)  # as a run does
    scale = FULL if device.type == "cuda" else SMALL
    if quick:
        scale = replace(SMALL, size=(64, 64), frames=5)
    recipe = get_recipe("fp4-distill")
    if device.type == "cpu":
        recipe = replace(recipe, dtype="float32")  # what a CPU computes in
    seconds = seconds or (420 if device.type == "cuda" else 1e9)
    torch.manual_seed(0)
    with (
        tempfile.TemporaryDirectory(prefix="video-lab-bench-", dir=scratch(device)) as folder,
        MemorySampler(read=memory) as sampler,
        torch.no_grad(),
    ):
        write_store(Path(folder), scale, recipe, device)
        store = ModelStore(Path(folder))
        bench = Bench(device, scale, recipe, store, ResolvedRecipe(store, recipe).costs, sampler, began + seconds)
        if quick:
            bench.steps = 2
        elif not bench.cuda:
            bench.jobs = JOBS_ON_A_CPU
        tables = measure_all(bench, chosen, report)
    return tables, notes(bench, tables)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, help="write the tables here too")
    parser.add_argument("--seconds", type=float, help="leave out measurements that would begin after so many seconds")
    parser.add_argument("--only", type=names_of, default=NAMES, metavar="PART,...", help=f"tables: {', '.join(NAMES)}")
    parser.add_argument("--quick", action="store_true", help="a smaller clip and fewer steps, to test that it runs")
    options = parser.parse_args()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # the store of 16 GB is removed then
    tables, lines = run(
        torch.device("cuda", 0) if torch.cuda.is_available() else torch.device("cpu"),
        chosen=options.only,
        seconds=options.seconds,
        quick=options.quick,
        report=lambda tables: write_tables(tables, options.json, ["not finished"]),
    )
    for name, rows in tables.items():
        show(TITLES[name], rows)
    finish(tables, options.json, lines)


if __name__ == "__main__":
    main()

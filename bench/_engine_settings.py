"""One run of the engine's benchmark: its device, sizes and time limit, and the settings of the engine."""

from __future__ import annotations

import copy
import gc
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from _engine_original import dense, stepwise
from _engine_runs import COMPILING, STEPS, Clip, Spent, get_ready, run_ours
from _engine_store import Scale
from _quantization import NOT_MEASURED

from runner.batch.memory_sampler import MemorySampler
from runner.forecast.bytes import weights_of
from runner.forecast.flops import Costs
from runner.generation.runtime.device import free_bytes
from runner.generation.runtime.memory_plan import Load, Window, choose_plan
from runner.generation.wan_animate.loading import load_pipeline, tune
from runner.generation.wan_animate.transformer import Switches
from runner.quantization.linear import release_workspace
from runner.spec.recipes import Recipe
from runner.weights.resolved import ResolvedRecipe
from runner.weights.store import ModelStore

ALL_OFF = Switches(tensor_cache=False, compile=False, channels_last=False)
# Seconds allowed for where blocks of a new kind are compiled, until this run has compiled some: an estimate, the upper
# end of 10 to 25 s for generating the code of one graph and compiling its eight to nine kernels.
COMPILING_S = 25.0


OUT_OF_TIME, NEEDS_GPU = "out of time", "needs a GPU"


class NotInTime(Exception):
    """The measurement would probably not end within the time limit."""


@dataclass
class Bench:
    """One run: its device, its sizes and its remaining time."""

    device: torch.device
    scale: Scale
    recipe: Recipe
    store: ModelStore
    costs: Costs
    sampler: MemorySampler
    deadline: float
    steps: int = 3  # that are run of a job
    jobs: int = 1  # of which the cheapest counts
    clips: int = 0
    compiling_s: float = COMPILING_S
    compiled: bool = False  # whether `compiling_s` was measured in this run

    @property
    def cuda(self) -> bool:
        return self.device.type == "cuda"

    def clip(self, size: tuple[int, int] | None = None, frames: int | None = None) -> Clip:
        """Return a new clip, for which nothing is cached."""
        self.clips += 1
        return Clip(self.scale, size or self.scale.size, frames or self.scale.frames, self.clips, self.clips)

    def measure(self, pipeline: Any, recipe: Recipe | None = None, size: tuple[int, int] | None = None) -> Spent:
        """Measure a job of our pipeline; work that happens once (compiling, tuning, encoders) is done before it."""
        recipe = recipe or self.recipe
        stages = get_ready(pipeline, recipe, self.clip(size))
        self.see_compiling(stages[COMPILING])
        once = sum(stages.values())
        spent = self.cheapest(lambda: run_ours(pipeline, recipe, self.clip(size), self.steps, self.sampler))
        notes = [f"{once:.3g} s once"] if once else []
        if pipeline.block_forward is not None and pipeline.block_forward.broken:
            notes.append(f"NOT COMPILED: {pipeline.block_forward.broken:.60}")
        return replace(spent, once_s=once, note="; ".join(notes))

    def cheapest(self, run: Callable[[], Spent]) -> Spent:
        """Run the bench's number of jobs, each on a new clip, and return the one with the shortest whole job."""
        return min((run() for _ in range(self.jobs)), key=lambda spent: spent.clip_s(STEPS))

    def see_compiling(self, seconds: float) -> None:
        """Record the seconds of compiling; 0: nothing was compiled. The longest of the run is the next estimate."""
        if seconds > 0:
            self.compiling_s = max(self.compiling_s, seconds) if self.compiled else seconds
            self.compiled = True

    def check(self, seconds: float) -> None:
        """Raise NotInTime if fewer than so many seconds are left."""
        if time.monotonic() + seconds > self.deadline:
            raise NotInTime(OUT_OF_TIME)

    def takes(self, like: Spent | None, *, compiling: bool = False) -> float:
        """Return an estimate of the seconds of `measure` for a job like `like`; None: no such job was measured."""
        job = 0.0 if like is None else 1.7 * like.fixed_s + self.steps * like.step_s
        return job + compiling * self.compiling_s * self.cuda

    def rate(self, step_s: float, size: tuple[int, int] | None = None) -> float:
        """Return the TFLOP/s of a step; all operations of the model count, also those that were skipped."""
        return self.costs.step_tflop(*(size or self.scale.size), self.scale.frames) / step_s

    def row(self, what: str, spent: Spent | str, size: tuple[int, int] | None = None) -> dict[str, object]:
        """Return a row with the measurement, or with the reason why there is none."""
        if isinstance(spent, str):
            blank = {"s a step": None, "fixed s a job": None, "TFLOP/s": None, "peak GB": None, "NVML GB": None}
            return {"what": what, **blank, "note": f"{NOT_MEASURED}: {spent:.60}"}
        return {
            "what": what,
            "s a step": spent.step_s,
            "fixed s a job": spent.fixed_s,
            "TFLOP/s": self.rate(spent.step_s, size),
            "peak GB": in_gb(spent.allocated),
            "NVML GB": in_gb(spent.process),
            "note": spent.note,
        }


def attempt(what: str, work: Callable[[], Spent]) -> Spent | str:
    """Return the measurement of `work`, or the reason of its failure, so that the other measurements still run."""
    try:
        spent = work()
    except Exception as err:
        first = str(err).splitlines()[0] if str(err) else ""
        found: Spent | str = first if isinstance(err, NotInTime) else f"{type(err).__name__}: {first}"
    else:
        found = spent
    print(f"  {what}: {found if isinstance(found, str) else f'{found.step_s:.4g} s a step'}", flush=True)
    return found


def in_gb(size: int | None) -> float | None:
    return None if size is None else size / 1e9


@dataclass(frozen=True)
class Setting:
    """One row of the waterfall: a setting of the engine."""

    what: str
    switches: Switches
    attention: bool = False  # by device
    vae: str = "float32"  # the autoencoder's dtype
    weights: str = ""  # stepwise | dense
    needs_cuda: bool = False


def settings() -> list[Setting]:
    """Return the settings. Each adds one optimisation to those before, except the second, which is a variant."""
    known = replace(ALL_OFF, tensor_cache=True)
    fused = replace(known, compile=True)
    innermost = replace(fused, channels_last=True)
    return [
        Setting("our loop, everything on the device, weights dequantised stepwise", ALL_OFF, weights="stepwise"),
        Setting("  the same, weights in bf16", ALL_OFF, weights="dense"),
        Setting("+ weights dequantised in one pass", ALL_OFF),
        Setting("+ what jobs share encoded once", known),
        Setting("+ blocks compiled", fused, needs_cuda=True),
        Setting("+ attention by device", fused, True, needs_cuda=True),
        Setting("+ autoencoder's channels innermost", innermost, True, needs_cuda=True),
        Setting("+ autoencoder in bfloat16", innermost, True, "bfloat16", needs_cuda=True),
    ]


@dataclass
class Engine:
    """Our pipeline, everything on the device, and the autoencoder in every dtype."""

    bench: Bench
    pipeline: Any
    autoencoders: dict[str, Any] = field(default_factory=dict)

    @classmethod
    def load(cls, bench: Bench) -> Engine:
        pipeline = load_resident(bench)
        return cls(bench, pipeline, {"float32": pipeline.vae})

    def autoencoder(self, name: str) -> Any:
        if name not in self.autoencoders:
            self.autoencoders[name] = copy.deepcopy(self.autoencoder("float32")).to(getattr(torch, name))
        return self.autoencoders[name]

    @contextmanager
    def as_in(self, setting: Setting, recipe: Recipe | None = None) -> Iterator[dict[str, Any]]:
        """Set up the pipeline inside a `with` block; yield the choices that were made for it."""
        recipe = recipe or self.bench.recipe
        dtype = getattr(torch, recipe.dtype)
        weights: dict[str, AbstractContextManager[None]] = {
            "stepwise": stepwise(self.pipeline.transformer),
            "dense": dense(self.pipeline.transformer, dtype),
        }
        if setting.weights == "dense" and self.bench.cuda:
            needed = weights_of(self.bench.costs.transformer, fp4=False, element=dtype.itemsize).total * 1.3
            if (there := free_bytes(self.bench.device)) < needed:
                raise MemoryError(f"{needed / 1e9:.0f} GB more are needed, {there / 1e9:.0f} are free")
        with weights.get(setting.weights, nullcontext()):
            self.pipeline.switches = setting.switches
            self.pipeline.vae = self.autoencoder(setting.vae)
            said = tune(self.pipeline, recipe, self.bench.device)
            if not setting.attention:
                for block in self.pipeline.transformer.blocks:
                    block.attn1.set_attention_backend("native")
            yield said
        if setting.weights:
            free(self.bench.device)

    def measure(self, setting: Setting, expected: float, recipe: Recipe | None = None) -> Spent | str:
        if setting.needs_cuda and not self.bench.cuda:
            return NEEDS_GPU

        def work() -> Spent:
            self.bench.check(expected)
            with self.as_in(setting, recipe) as said:
                spent = self.bench.measure(self.pipeline, recipe)
            tested = said.get("compute_self_test")
            if tested:
                worst = max(entry["error"] for entry in tested.values())
                spent = replace(spent, note=f"{said['compute_product']}, error {worst:.3f} a layer; {spent.note}")
            return spent

        return attempt(f"{setting.what.strip()}{'' if recipe is None else ', ' + recipe.compute}", work)


@dataclass
class OneEngine:
    """The engine, loaded at its first use, and again after `drop`."""

    bench: Bench
    loaded: Engine | None = None

    def get(self) -> Engine:
        if self.loaded is None:
            self.loaded = Engine.load(self.bench)
        return self.loaded

    def drop(self) -> None:
        """Free the device for a measurement that needs it alone."""
        self.loaded = None
        free(self.bench.device)

    def measure(self, setting: Setting, expected: float, recipe: Recipe | None = None) -> Spent | str:
        """See `Engine.measure`. Loads nothing for a measurement that would end too late."""
        if setting.needs_cuda and not self.bench.cuda:
            return NEEDS_GPU
        if time.monotonic() + expected > self.bench.deadline:
            return OUT_OF_TIME
        return self.get().measure(setting, expected, recipe)


def load_resident(bench: Bench) -> Any:
    """Load our pipeline with everything on the device, except encoders that do not fit."""
    size, load = (*bench.scale.size, bench.scale.frames), Load(**ResolvedRecipe(bench.store, bench.recipe).bytes)
    free = free_bytes(bench.device)
    plan, _ = choose_plan(
        "resident", bench.recipe, bench.costs, free, windows=[Window(*size)], load=load, cuda=bench.cuda
    )
    return load_pipeline(ResolvedRecipe(bench.store, bench.recipe), bench.device, plan=plan)[0]


def all_on(bench: Bench) -> Setting:
    return [setting for setting in settings() if bench.cuda or not setting.needs_cuda][-1]


def free(device: torch.device) -> None:
    gc.collect()
    release_workspace()
    if device.type == "cuda":
        torch.cuda.empty_cache()

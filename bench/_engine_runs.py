"""Runs of the engine's benchmark: a clip in memory, and one job of ours or of the original scripts, measured."""

from __future__ import annotations

import gc
import os
import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from _engine_original import dequantise_stepwise, original_job, original_pipeline
from _engine_store import Scale
from PIL import Image

from runner.batch.memory_sampler import MemorySampler, ProcessMemory
from runner.generation.runtime.device import make_probe
from runner.generation.sampling import make_sampler
from runner.generation.segments import plan_job
from runner.generation.wan_animate.loading import find_encoders, load_transformer
from runner.generation.wan_animate.pipeline import AnimatePipeline
from runner.spec.options import DEFAULT_PROMPT, JobOptions
from runner.spec.recipes import Recipe
from runner.timing import StageTimer
from runner.weights.resolved import ResolvedRecipe
from runner.weights.store import ModelStore

COMPILING = "warmup"  # the stage in which blocks are compiled
ONCE = ("load_encoders", COMPILING)  # stages that happen once per run, not in every job


@dataclass(frozen=True)
class Spent:
    """The seconds and memory of one job.

    `step_s`: median of its denoising steps, without the first if there are more. `fixed_s`: the rest of the job's time.
    `once_s`: in addition, work that happens once per run: loading encoders and compiling.
    """

    step_s: float
    fixed_s: float
    once_s: float
    allocated: int | None  # torch's peak bytes
    process: int | None  # NVML's
    note: str = ""

    @classmethod
    def of(cls, steps: list[float], total: float, once: float, device: torch.device, process: int | None) -> Spent:
        step = statistics.median(steps[1:] or steps)
        peak = torch.cuda.max_memory_allocated(device) if device.type == "cuda" else None
        return cls(step, total - once - len(steps) * step, once, peak, process)

    def clip_s(self, steps: int) -> float:
        """Return the seconds of a warm job with this number of steps."""
        return self.fixed_s + steps * self.step_s


STEPS = 6  # of a whole job


class Clip:
    """A reference and a dance, smooth noise with one seed each. Implements the conditions of a pipeline."""

    def __init__(self, scale: Scale, size: tuple[int, int], frames: int, reference: int, dance: int) -> None:
        self.frames, (self.width, self.height) = frames, size
        self.reference = Image.fromarray(_smooth(1, self.height, self.width, reference)[0])
        side = scale.transformer.get("motion_encoder_size", 512)
        self._pose = _smooth(frames, self.height, self.width, dance + 100)
        self._face = _smooth(frames, side, side, dance + 200)

    def window(self, start: int, stop: int) -> Any:
        return SimpleNamespace(pose=self._pose[start:stop], face=self._face[start:stop], background=None, mask=None)


def _smooth(frames: int, height: int, width: int, seed: int) -> np.ndarray:
    coarse = np.random.default_rng(seed).integers(0, 256, (frames, 4, 4, 3), dtype=np.uint8)
    return np.stack([np.asarray(Image.fromarray(c).resize((width, height), Image.Resampling.BICUBIC)) for c in coarse])


def clock_of(device: torch.device) -> Callable[[], float]:
    """Return a clock: CPU seconds on a CPU, because other work may run there; wall seconds after a sync on a GPU."""
    return time.process_time if device.type == "cpu" else time.perf_counter


def wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def start_peak(device: torch.device) -> None:
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(device)


def run_ours(pipeline: AnimatePipeline, recipe: Recipe, clip: Clip, steps: int, sampler: MemorySampler) -> Spent:
    """Run one job with our pipeline in its current setting."""
    device, timer = pipeline.compute_device, timer_of(pipeline, StageTimer)
    start_peak(device)
    window, begin = sampler.window(), timer.clock()
    for _ in segments(pipeline, recipe, clip, steps, timer):
        pass
    wait(device)
    return Spent.of(timer.steps, timer.clock() - begin, once_of(timer), device, window.gpu_peak)


def get_ready(pipeline: AnimatePipeline, recipe: Recipe, clip: Clip) -> dict[str, float]:
    """Do the work that happens once per run, so that it is not in a measured job. Return its seconds by stage of ONCE.

    It starts a job of the same size up to its first step, and decodes two latent frames.
    """
    timer = timer_of(pipeline, _UpToTheSteps)
    with suppress(_AllIsReady):
        for _ in segments(pipeline, recipe, clip, 1, timer):
            pass
    vae = pipeline.vae
    latents = torch.zeros(1, vae.config.z_dim, 2, clip.height // 8, clip.width // 8)
    for _ in vae.decode_chunks(latents.to(pipeline.compute_device, vae.dtype)):
        pass
    wait(pipeline.compute_device)
    return {stage: timer.seconds.get(stage, 0.0) for stage in ONCE}


class _AllIsReady(Exception):
    """Ends a job before its first step. It is not a failure."""


class _UpToTheSteps(StageTimer):
    def stage(self, name: str, *, on_device: bool = False) -> Any:
        if name == "denoise":
            raise _AllIsReady
        return super().stage(name, on_device=on_device)


def timer_of(pipeline: AnimatePipeline, kind: type[StageTimer]) -> StageTimer:
    device = pipeline.compute_device
    return kind(clock=clock_of(device), probe=_WaitOnly(make_probe(device)) if device.type == "cuda" else None)


def once_of(timer: StageTimer) -> float:
    return sum(timer.seconds.get(stage, 0.0) for stage in ONCE)


def segments(pipeline: AnimatePipeline, recipe: Recipe, clip: Clip, steps: int, timer: StageTimer) -> Iterator[Any]:
    options = JobOptions(steps=steps)
    plan = plan_job(clip.frames, (clip.width, clip.height), options, recipe)
    new_sampler = partial(make_sampler, recipe.scheduler, recipe.schedule, recipe.shift, steps)
    return pipeline.render(clip, DEFAULT_PROMPT, options, plan, new_sampler, timer)


class _WaitOnly:
    """A probe whose stages do not reset the peak, because the peak of the whole job is measured."""

    def __init__(self, inner: Any) -> None:
        self.synchronize = inner.synchronize
        self.peak = inner.peak

    def reset_peak(self) -> None: ...


class DeviceMemory:
    """Callable that returns (host RSS, GPU memory) for a MemorySampler.

    GPU memory is that of this process. If the driver does not report processes (in most containers), it is the increase
    of the GPU's used memory since this object was made.
    """

    def __init__(
        self,
        process: Callable[[], tuple[int | None, int | None]] | None = None,
        used: Callable[[], int | None] | None = None,
    ) -> None:
        self._process, self._used = process or ProcessMemory(), used or gpu_used
        self._before = self._used()

    def __call__(self) -> tuple[int | None, int | None]:
        host, gpu = self._process()
        if gpu is None and self._before is not None and (used := self._used()) is not None:
            gpu = max(0, used - self._before)
        return host, gpu


def gpu_used() -> int | None:
    """Return the bytes in use on the first GPU that CUDA may see, by all processes; None if NVML does not report it."""
    first = os.environ.get("CUDA_VISIBLE_DEVICES", "0").partition(",")[0]
    try:
        import pynvml

        pynvml.nvmlInit()
        handle = (
            pynvml.nvmlDeviceGetHandleByIndex(int(first))
            if first.isdigit()
            else pynvml.nvmlDeviceGetHandleByUUID(first)
        )
        return int(pynvml.nvmlDeviceGetMemoryInfo(handle).used)
    except Exception:  # no driver, no library, no permission, no such device
        return None


class OriginalScripts:
    """The process of the original scripts: load the models, then render clip after clip with their own code."""

    def __init__(self, store: ModelStore, recipe: Recipe, device: torch.device) -> None:
        from diffusers import AutoencoderKLWan
        from transformers import AutoTokenizer, CLIPImageProcessorPil

        self.device, self.clock = device, clock_of(device)
        begin = self.clock()
        dtype = getattr(torch, recipe.dtype)
        encoders, _ = find_encoders(ResolvedRecipe(store, recipe), dtype)
        offload_device = torch.device("cpu")  # of its models
        transformer, _ = load_transformer(ResolvedRecipe(store, recipe), offload_device, dtype)
        dequantise_stepwise(transformer)
        parts = {
            "tokenizer": AutoTokenizer.from_pretrained(store.component(recipe, "tokenizer")),
            "image_processor": CLIPImageProcessorPil.from_pretrained(store.component(recipe, "image_processor")),
            "text_encoder": encoders.text.model,
            "image_encoder": encoders.image.model,
            "transformer": transformer,
            "vae": AutoencoderKLWan.from_pretrained(store.component(recipe, "vae"), torch_dtype=torch.float32),
        }
        self.pipeline = original_pipeline(parts, device)
        self.load_s = self.clock() - begin

    def run(self, clip: Clip, steps: int, sampler: MemorySampler) -> Spent:
        start_peak(self.device)
        window, begin = sampler.window(), self.clock()
        began, ended = original_job(self.pipeline, clip, DEFAULT_PROMPT, steps, self.clock, lambda: wait(self.device))
        wait(self.device)
        total = self.clock() - begin
        taken = [after - before for before, after in zip([began, *ended], ended, strict=False)]
        return Spent.of(taken, total, 0.0, self.device, window.gpu_peak)

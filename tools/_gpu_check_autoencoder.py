"""Part `autoencoder` of the GPU check: decoding and encoding in every way it may be set up, beside the library's walk.

Random weights: no model store is needed. Memory is what torch's allocator handed out, cuDNN's workspaces among it, and
what NVML says of the process, beside the memory plan's forecast.
"""

from __future__ import annotations

import copy
import itertools
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any, NamedTuple

import torch
from _engine_runs import DeviceMemory
from _gpu_check_kernels import milliseconds, wait
from _gpu_check_record import PartRecord
from diffusers.utils import logging as diffusers_logging
from torch import Tensor
from torch._dynamo.utils import counters

from runner.batch.memory_sampler import MemorySampler
from runner.forecast.flops import PRODUCTION, Costs
from runner.generation.runtime.memory_plan import forecast_memory, make_plan
from runner.generation.wan_animate.autoencoder import FramewiseVae, FusedNorm, fuse_norms, with_channels_last
from runner.generation.wan_animate.compiled import RECOMPILE_LIMIT
from runner.spec.recipes import get_recipe

SIZE, LATENT_FRAMES = (832, 480), 5
TINY_SIZE = (64, 64)
TINY: dict[str, Any] = {"base_dim": 8, "z_dim": 16, "dim_mult": [1, 2, 2, 2], "num_res_blocks": 1}
ROW_S = 3.0  # that one row takes on an H200: an estimate
SAMPLED_EVERY_S = 0.01


class Setup(NamedTuple):
    """One way to run it. `walk`: a picture at a time, ours, or the library's."""

    dtype: str
    layout: str  # NCDHW | channels_last
    benchmark: bool  # torch.backends.cudnn.benchmark
    fused: bool  # norms compiled
    walk: str = "ours"


def setups() -> Iterator[Setup]:
    """What runs today in each dtype and the library's beside it, then one change more at a time; compiled norms come
    last, for a graph is compiled for every number of channels and layout of a picture."""
    dtypes = ("float32", "bfloat16", "float16")
    yield from (Setup(dtype, "NCDHW", False, False, walk) for dtype in dtypes for walk in ("ours", "library"))
    for layout, benchmark, fused in sorted(
        itertools.product(("NCDHW", "channels_last"), (False, True), (False, True)), key=changes
    ):
        if changes((layout, benchmark, fused)) != (False, 0):
            yield from (Setup(dtype, layout, benchmark, fused) for dtype in dtypes)


def changes(setup: tuple[str, bool, bool]) -> tuple[bool, int]:
    layout, benchmark, fused = setup
    return fused, (layout != "NCDHW") + benchmark


def run(part: PartRecord, device: torch.device, *, tiny: bool) -> None:
    torch.manual_seed(0)
    diffusers_logging.set_verbosity_error()  # it warns of every change of dtype
    memory = DeviceMemory()
    with torch.no_grad(), MemorySampler(SAMPLED_EVERY_S, read=memory) as sampler:
        with torch.device(device):
            vae = FramewiseVae(**(TINY if tiny else {})).eval()
        width, height = TINY_SIZE if tiny else SIZE
        frames = 2 if tiny else LATENT_FRAMES
        ratio = vae.spatial_compression_ratio
        latents = torch.randn(1, vae.config.z_dim, frames, height // ratio, width // ratio, device=device)
        pixels = torch.rand(1, 3, 4 * (frames - 1) + 1, height, width, device=device) * 2 - 1
        costs = Costs(PRODUCTION.transformer, PRODUCTION.vae if not tiny else replace(PRODUCTION.vae, base_dim=8))
        exact = {"decode": vae.decode(latents, return_dict=False)[0], "encode": vae._encode(pixels)}
        backend = "aot_eager" if tiny else "inductor"
        dynamo = torch._dynamo.config
        dynamo.recompile_limit = max(dynamo.recompile_limit, RECOMPILE_LIMIT)  # as a run's CompiledStep has it
        expected = {False: ROW_S * (not tiny), True: ROW_S * (not tiny)}  # by whether norms are compiled
        for setup in list(setups())[:: 7 if tiny else 1]:
            made, begin = None, time.monotonic()
            for what in ("decode", "encode"):

                def work(setup: Setup = setup, what: str = what) -> dict[str, Any]:
                    nonlocal made
                    made = made if made is not None else set_up(vae, setup, backend)
                    return measure(
                        made, setup, what, latents if what == "decode" else pixels, exact[what], sampler, costs
                    )

                part.measure("autoencoder", {"what": what} | setup._asdict(), work, expected[setup.fused])
            made, expected[setup.fused] = None, (time.monotonic() - begin) / 2
            if device.type == "cuda":
                torch.cuda.empty_cache()


def set_up(vae: Any, setup: Setup, backend: str) -> Any:
    torch._dynamo.reset()  # each setup has the graphs of a process of its own
    counters.clear()
    made = copy.deepcopy(vae).to(getattr(torch, setup.dtype))
    if setup.layout == "channels_last":
        with_channels_last(made)
    if setup.fused:
        fuse_norms(made, backend)
    if setup.walk == "library":
        made.__class__ = FramewiseVae.__mro__[1]  # the library's own class, same weights
    return made


def measure(
    vae: Any, setup: Setup, what: str, given: Tensor, exact: Tensor, sampler: MemorySampler, costs: Costs
) -> dict[str, Any]:
    device, dtype = given.device, getattr(torch, setup.dtype)
    given = given.to(dtype)

    def work() -> Tensor:
        result: Tensor = vae.decode(given, return_dict=False)[0] if what == "decode" else vae._encode(given)
        return result

    before, torch.backends.cudnn.benchmark = torch.backends.cudnn.benchmark, setup.benchmark
    try:
        found = work()  # compiles, and lets cuDNN choose
        wait(device)
        row: dict[str, Any] = compared(found, exact)
        del found
        if setup.fused:
            norms = [layer for layer in vae.modules() if isinstance(layer, FusedNorm)]
            row |= {"norms": len(norms), "norms_broken": sum(bool(norm.broken) for norm in norms)}
            row |= {"graphs": counters["stats"]["unique_graphs"]}  # of both ways, decoding first
        row |= measured(work, device, sampler)
    finally:
        torch.backends.cudnn.benchmark = before
    return row | forecast_of(setup, what, given, costs)


def compared(found: Tensor, exact: Tensor) -> dict[str, Any]:
    """Against float32 by our walk, channels not innermost: decibels of the signal's own power."""
    noise = float((found.float() - exact).square().mean())
    power = float(exact.square().mean())
    finite = bool(torch.isfinite(found).all())
    ratio = float(10 * torch.log10(torch.tensor(power / noise))) if finite and noise else None
    return {"finite": finite, "signal_to_noise_db": ratio}


def measured(work: Callable[[], Tensor], device: torch.device, sampler: MemorySampler) -> dict[str, Any]:
    """Milliseconds of one run, its peak bytes beyond the weights and what was given, and the process's by NVML."""
    if device.type != "cuda":
        return {"ms": milliseconds(work, device, repeats=1, warm=False), "allocated_bytes": None, "nvml_bytes": None}
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats(device)
    window, before = sampler.window(), torch.cuda.memory_allocated(device)
    spent = milliseconds(work, device, repeats=1, warm=False)
    reserved = torch.cuda.max_memory_reserved(device)
    peak = torch.cuda.max_memory_allocated(device) - before
    return {"ms": spent, "allocated_bytes": peak, "reserved_bytes": reserved, "nvml_bytes": window.gpu_peak}


def forecast_of(setup: Setup, what: str, given: Tensor, costs: Costs) -> dict[str, Any]:
    """Of the memory plan: the autoencoder's part, its window's own pixels included. float16 counts as bfloat16."""
    vae_dtype = "float32" if setup.dtype == "float32" else "bfloat16"
    recipe = replace(get_recipe("fp4-distill"), vae_dtype=vae_dtype)
    frames = given.shape[2] if what == "encode" else 4 * (given.shape[2] - 1) + 1
    height, width = (side * (1 if what == "encode" else 8) for side in given.shape[3:])
    parts = forecast_memory(make_plan("resident", recipe), recipe, costs, width, height, frames).parts
    flop = costs.vae.encode_flop if what == "encode" else costs.vae.decode_flop
    return {
        "forecast_bytes": parts[f"autoencoder_{what}"],
        # The model's decoding drops the reference's latent frame, which this one is given as well.
        "tflop": flop(width, height, frames) / 1e12,
        "latent_frames": given.shape[2] if what == "decode" else None,
    }

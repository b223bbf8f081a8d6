"""Part `autoencoder` of the GPU check: decoding and encoding in all settings, beside the library's frame loop.

It uses random weights and needs no model store. Memory is that of torch's allocator, including cuDNN's workspaces, and
that of the process by NVML, beside the memory plan's forecast.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any, NamedTuple, cast

import torch
from _engine_runs import DeviceMemory
from _gpu_check_kernels import milliseconds, wait
from _gpu_check_record import PartRecord
from diffusers.utils import logging as diffusers_logging
from torch import Tensor

from runner.batch.memory_sampler import MemorySampler
from runner.forecast.bytes import vae_traffic
from runner.forecast.flops import PRODUCTION, Costs
from runner.generation.runtime.memory_plan import forecast_memory, make_plan
from runner.generation.wan_animate.autoencoder import FramewiseVae, prepare_vae
from runner.generation.wan_animate.norm_silu import pick_norm
from runner.generation.wan_animate.transformer import Switches
from runner.spec.recipes import VaeDtype, get_recipe

SIZE, LATENT_FRAMES = (832, 480), 5
TINY_SIZE = (64, 64)
TINY: dict[str, Any] = {"base_dim": 8, "z_dim": 16, "dim_mult": [1, 2, 2, 2], "num_res_blocks": 1}
ROW_S = 3.0  # seconds per row on an H200: an estimate
SAMPLED_EVERY_S = 0.01


class Setup(NamedTuple):
    """One setting. `walk`: our loop, one picture at a time, or the library's."""

    dtype: str
    layout: str  # NCDHW | channels_last
    benchmark: bool  # torch.backends.cudnn.benchmark
    walk: str = "ours"


def setups() -> Iterator[Setup]:
    """Yield the current setting of each dtype with the library's, then other layouts and kernel choices."""
    for dtype in ("float32", "bfloat16", "float16"):
        today = Setup(dtype, "channels_last", dtype != "float32")
        yield from (today, today._replace(walk="library"))
    for dtype in ("float32", "bfloat16", "float16"):
        today = Setup(dtype, "channels_last", dtype != "float32")
        for layout in ("channels_last", "NCDHW"):
            other = (Setup(dtype, layout, benchmark) for benchmark in (False, True))
            yield from (setup for setup in other if setup != today)


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
        expected = ROW_S * (not tiny)
        for setup in list(setups())[:: 4 if tiny else 1]:
            made = None
            for what in ("decode", "encode"):

                def work(setup: Setup = setup, what: str = what) -> dict[str, Any]:
                    nonlocal made
                    made = made if made is not None else set_up(vae, setup)
                    return measure(
                        made, setup, what, latents if what == "decode" else pixels, exact[what], sampler, costs
                    )

                part.measure("autoencoder", {"what": what} | setup._asdict(), work, expected)
            made = None
            if device.type == "cuda":
                torch.cuda.empty_cache()


def set_up(vae: Any, setup: Setup) -> Any:
    made = copy.deepcopy(vae).to(getattr(torch, setup.dtype))
    prepare_vae(made, Switches(channels_last=setup.layout == "channels_last"))
    made.cudnn_benchmark = setup.benchmark
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
        found = work()  # cuDNN chooses its kernels
        wait(device)
        row: dict[str, Any] = compared(found, exact)
        del found
        row |= {"norms": pick_norm(device, dtype)[0] if setup.walk == "ours" else "library"}
        row |= measured(work, device, sampler)
    finally:
        torch.backends.cudnn.benchmark = before
    return row | forecast_of(setup, what, given, costs)


def compared(found: Tensor, exact: Tensor) -> dict[str, Any]:
    """Compare with float32 by our loop in NCDHW layout: decibels of the signal's power."""
    noise = float((found.float() - exact).square().mean())
    power = float(exact.square().mean())
    finite = bool(torch.isfinite(found).all())
    ratio = float(10 * torch.log10(torch.tensor(power / noise))) if finite and noise else None
    return {"finite": finite, "signal_to_noise_db": ratio}


def measured(work: Callable[[], Tensor], device: torch.device, sampler: MemorySampler) -> dict[str, Any]:
    """Return milliseconds of one run, its peak bytes without weights and inputs, and the process's bytes by NVML."""
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
    """Return the memory plan's forecast for the autoencoder, including the pixels of its window."""
    recipe = replace(get_recipe("fp4-distill"), vae_dtype=cast("VaeDtype", setup.dtype))
    frames = given.shape[2] if what == "encode" else 4 * (given.shape[2] - 1) + 1
    height, width = (side * (1 if what == "encode" else 8) for side in given.shape[3:])
    parts = forecast_memory(make_plan("resident", recipe), recipe, costs, width, height, frames).parts
    traffic = vae_traffic(costs.vae, width, height, frames, dtype=setup.dtype, library=setup.walk == "library")
    flop = costs.vae.encode_flop if what == "encode" else costs.vae.decode_flop
    return {
        "forecast_bytes": parts[f"autoencoder_{what}"],
        # The model's decoding drops the reference's latent frame, which this one is given as well.
        "tflop": flop(width, height, frames) / 1e12,
        "traffic_bytes": traffic[what == "decode"],
        "latent_frames": given.shape[2] if what == "decode" else None,
    }

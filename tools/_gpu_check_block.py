"""Part `block` of the GPU check: one transformer block of the real size, compiled, in every precision of the device.

Random FP4 weights are drawn on the device, so that no model store is needed. A step has 40 such blocks, and 8 face
adapters, embedders and last layers, which are not measured.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import torch
from _engine_store import FULL, SMALL, Scale, draw_four_bits, draw_tensor
from _gpu_check_kernels import copy_gb_s, milliseconds, profile, wait
from _gpu_check_record import PartRecord, error_text
from torch import nn

from runner.errors import ConfigInvalid
from runner.forecast.flops import Costs
from runner.forecast.precisions import DEFAULT_PRECISION, PRECISIONS, advised
from runner.forecast.seconds import EngineBuild, find_device, forecast_seconds
from runner.generation.runtime.attention import (
    apply_attention,
    available_backends,
    candidates,
    pick_backend,
    set_backend,
    trial,
)
from runner.generation.runtime.compute import capability_of, is_token_wise
from runner.generation.runtime.memory_plan import forecast_memory, make_plan
from runner.generation.wan_animate.compiled import TOLERANCES, CompiledBlocks, difference, dummies
from runner.generation.wan_animate.low_memory import choose_eager_block
from runner.generation.wan_animate.transformer import Context, KeyValue, attend, run_block
from runner.quantization.formats.e2m1 import NVFP4
from runner.quantization.kernels.low_bit import EXACT
from runner.quantization.packed_layers import swap_linears
from runner.quantization.rules import kept_in_fp32, linear_shapes, stored_dtype, transformer_on_meta
from runner.spec.recipes import get_recipe

# Seconds for a first row on an H200, compiling included: an estimate, until this run has compiled a block.
COMPILING_S = 25.0
COPY_BYTES = 1 << 30
FLASH_BACKENDS = ("_native_flash", "_native_cudnn")  # timed in addition to those of `candidates`


class BlockCase:
    """A transformer of one block with weights on `device`, and the block's inputs of a window."""

    def __init__(self, device: torch.device, scale: Scale, size: tuple[int, int], frames: int) -> None:
        from diffusers import WanAnimateTransformer3DModel

        self.device, self.size, self.frames = device, size, frames
        with torch.device("meta"):
            config = dict(WanAnimateTransformer3DModel(**dict(scale.transformer)).config)
        self.layers = config["num_layers"]
        self.costs = Costs.from_configs(config, scale.vae)
        self.model: Any = transformer_on_meta(config | {"num_layers": 1, "inject_face_latents_blocks": 1})
        widths = {name: columns for name, (_, columns) in linear_shapes(self.model).items()}
        fp32 = kept_in_fp32(self.model)
        swap_linears(self.model, NVFP4, lambda name: not name.startswith("blocks."))
        self.block: Any = self.model.blocks[0]
        for name, parameter in list(self.model.named_parameters()):
            if name.startswith("blocks."):
                dtype = parameter.dtype if is_packed(name) else stored_dtype(name, fp32)
                drawn = draw_four_bits(name, tuple(parameter.shape), dtype, widths, device)
                owner, _, leaf = name.rpartition(".")
                self.model.get_submodule(owner).register_parameter(
                    leaf, nn.Parameter(drawn.to(device), requires_grad=False)
                )
        self.model.rope.to(device)
        width = config["num_attention_heads"] * config["attention_head_dim"]
        self.heads, self.head_dim = config["num_attention_heads"], config["attention_head_dim"]
        shape = self.costs.transformer

        def tokens(count: int) -> torch.Tensor:
            return draw_tensor("context.weight", (1, count, width), torch.bfloat16, device)

        self.context = Context(tokens(shape.text_tokens), tokens(shape.image_tokens))
        self.grid = ((frames - 1) // 4 + 2, size[1] // 8, size[0] // 8)
        self.tokens = shape.tokens(*size, frames)
        self.token_wise = [
            layer for name, layer in self.model.named_modules() if is_token_wise(name) and hasattr(layer, "set_compute")
        ]

    def set_compute(self, compute: str, product: str) -> None:
        for layer in self.token_wise:
            layer.set_compute(EXACT if compute == DEFAULT_PRECISION else compute, product)

    @property
    def hidden_bytes(self) -> int:
        return self.tokens * self.heads * self.head_dim * 2


def is_packed(name: str) -> bool:
    """Return whether this tensor is part of an FP4 weight, whose dtype is fixed by the format."""
    return name.rpartition(".")[2] in ("weight_packed", "weight_scale", "weight_scale_2")


def run(part: PartRecord, device: torch.device, *, tiny: bool) -> None:
    scale = SMALL if tiny else FULL
    size, frames = ((64, 64), 5) if tiny else (scale.size, scale.frames)
    with torch.no_grad():
        part.measure("copy", {}, lambda: {"gb_s": copy_gb_s(device, COPY_BYTES >> (6 if tiny else 0))})
        case = BlockCase(device, scale, size, frames)
        backend = "aot_eager" if tiny else "inductor"
        compiling = COMPILING_S * (not tiny)
        variants = list(variants_on(device))
        for at, (compute, product, eight_bit) in enumerate(variants):
            what = {"compute": compute, "product": product, "attention_8bit": eight_bit}
            begin = time.monotonic()
            part.measure("blocks", what, lambda what=what: measure_block(case, backend, *what.values()), compiling)
            compiling = min(compiling, time.monotonic() - begin)
            if at == 0:
                measure_attention(part, case)


def variants_on(device: torch.device) -> Iterator[tuple[str, str, bool]]:
    """Yield (precision, GEMM backend, whether attention is in 8 bits), the most likely first."""
    capability = capability_of(device)
    yield DEFAULT_PRECISION, "", False
    rows = [row for row in PRECISIONS.values() if row.layout != "exact" and row.stored_format in (None, NVFP4.name)]
    for row in sorted(rows, key=lambda row: row.name != advised(capability)):
        if capability is None and row.reference is not None:
            yield row.name, row.reference.name, False
        elif capability is not None and row.runs_on(capability):
            yield from ((row.name, backend.name, False) for backend in row.backends)
    if capability is not None:
        yield DEFAULT_PRECISION, "", True


def measure_block(case: BlockCase, backend: str, compute: str, product: str, eight_bit: bool) -> dict[str, Any]:
    device, cuda = case.device, case.device.type == "cuda"
    torch._dynamo.reset()
    attention = apply_attention(case.model, device, torch.bfloat16, eight_bit=eight_bit)
    case.set_compute(compute, product)
    eager = choose_eager_block(device, chunked=False)
    step = CompiledBlocks(backend=backend, eager=eager)
    begin = time.perf_counter()
    step.warm(case.model, [case.context], case.grid)
    wait(device)
    compiling = time.perf_counter() - begin
    given = dummies(case.model, case.context, case.grid, case.block)

    def work() -> torch.Tensor:
        return step(case.block, *given)

    first = work()
    row: dict[str, Any] = {
        "attention": attention["attention"],
        "broken": step.broken,
        "off_eager": step.worst,
        "limit": TOLERANCES[torch.bfloat16],
        "same_bits_again": torch.equal(first, work()),
        "off_whole": difference(first, run_block(case.block, *given)),  # eager, no rows at a time
        "compiling_s": round(compiling, 3),
        "tokens": case.tokens,
    }
    del first
    row["ms"] = milliseconds(work, device)
    row["kernels"] = profile(work, device)
    row |= memory_of(case, work, compute, eight_bit) if cuda else {"peak_bytes": None}
    # May overwrite the hidden states: last.
    row["eager_ms"] = milliseconds(lambda: eager(case.block, *given), device, repeats=1)
    return row | forecast_of(case, compute, eight_bit, row["ms"])


def memory_of(case: BlockCase, work: Any, compute: str, eight_bit: bool) -> dict[str, Any]:
    """Return the compiled block's peak bytes with hidden states, without weights and workspace; and the plan's."""
    device = case.device
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats(device)
    before = torch.cuda.memory_allocated(device) - case.hidden_bytes  # the caller's hidden states are the block's
    work()
    wait(device)
    peak = torch.cuda.max_memory_allocated(device) - before
    plan = make_plan("stream", get_recipe("fp4-distill"))
    recipe = replace(get_recipe("fp4-distill"), compute=compute, attention="int8" if eight_bit else "exact")
    planned = forecast_memory(plan, recipe, case.costs, *case.size, case.frames).parts["activations"]
    hidden = case.hidden_bytes
    return {"peak_bytes": peak, "units": peak / hidden, "planned_bytes": planned, "planned_units": planned / hidden}


def forecast_of(case: BlockCase, compute: str, eight_bit: bool, ms: float) -> dict[str, Any]:
    """Return the seconds of all blocks of a step at this speed, beside the forecast of `forecast/seconds.py`."""
    found: dict[str, Any] = {"blocks_of_a_step_s": case.layers * ms / 1e3, "forecast_step_s": None}
    name = torch.cuda.get_device_name(case.device) if case.device.type == "cuda" else None
    speed = find_device(name)
    if speed is None or compute not in speed.matmul:
        return found
    seconds = forecast_seconds(
        case.costs,
        speed,
        EngineBuild(compute, attention_8bit=eight_bit),
        size=case.size,
        segment_frames=case.frames,
        segments=1,
        evaluations=1,
    )
    model, window = case.costs.transformer, (*case.size, case.frames)
    attention = model.self_attention_flop(*window)
    products = model.forward_flop(*window) - attention - model.conditioning_flop(*window)
    return found | {
        "forecast_step_s": seconds.step_s,
        "forecast_parts_s": dict(seconds.step),
        "device": speed.name,
        "products_tflop_a_block": products / case.layers / 1e12,
        "attention_tflop_a_block": attention / case.layers / 1e12,
        "channels_a_block": case.tokens * model.dim,
    }


def measure_attention(part: PartRecord, case: BlockCase) -> None:
    """Measure every self-attention backend that may run here: milliseconds at the block's size, and its trial error."""
    device, dtype = case.device, torch.bfloat16
    capability, available = capability_of(device), available_backends()
    named = dict.fromkeys((backend.name for backend in candidates(capability, "bfloat16", available)), False)
    if device.type == "cuda":
        named = dict.fromkeys((name for name in FLASH_BACKENDS if name in available), False) | named
        try:
            named |= dict.fromkeys(
                (b.name for b in candidates(capability, "bfloat16", available, eight_bit=True)), True
            )
        except ConfigInvalid as err:
            part.add("attention", {"kind": "8 bit", "error": error_text(err)})
    flop = case.costs.transformer.self_attention_flop(*case.size, case.frames) / case.layers
    query, key, value = (
        draw_tensor("qkv.weight", (1, case.tokens, case.heads, case.head_dim), dtype, device) * case.head_dim**0.5
        for _ in range(3)
    )
    picked = {False: pick_backend(device, dtype, case.heads, case.head_dim)[0]}
    try:
        picked[True] = pick_backend(device, dtype, case.heads, case.head_dim, eight_bit=True)[0]
    except ConfigInvalid:
        picked[True] = ""

    def measure(name: str) -> dict[str, Any]:
        set_backend(case.block.attn1, name)
        error = trial(name, device, dtype, case.heads, case.head_dim)
        ms = milliseconds(lambda: attend(case.block.attn1, query, KeyValue(key, value)), device)
        return {"trial_error": error, "ms": ms, "tflop_s": flop / ms / 1e9}

    for name, eight_bit in named.items():
        what = {"kind": "8 bit" if eight_bit else "exact", "backend": name, "picked": picked[eight_bit] == name}
        part.measure("attention", what, lambda name=name: measure(name))

"""Memory plan: choose where models and buffers are during a run, by mode, and forecast the bytes on the device.

In:   shapes, a recipe, a size, free bytes, the requested mode.
Out:  a `MemoryPlan` with its reason and its `MemoryForecast`.
Never: torch, weights. A plan is data for loading.py, pipeline.py and the preprocessing. A forecast is a pure function.

    resident   everything on the device; if they fit, in this order: the preprocessing's models, kept codes of weights
               that compute in 8 bits, the encoders
    stream     blocks are copied from page-locked memory, the next one while the last one computes; encoders on the
               host, the preprocessing's models on the device if they fit; no float32 copies of activations: blocks are
               compiled, else run a few rows at a time (low_memory.py)
    minimal    one block at a time; keys and values of text and image made again at every step; the autoencoder in
               bfloat16, in tiles above 480p; encoders on disk
    auto       the first of these, from the top, whose forecast for the largest job fits into the free memory

In float32 on a CPU all modes give the same bits. On a GPU `resident` and `stream` may differ, because products of other
shapes may round differently, and `minimal` differs by its autoencoder. Equal frames are promised for equal modes only.

`resident` first keeps on the device what saves most seconds. Preprocessing on the host takes about 1.2 s of a CPU core
per frame (ViTPose-H, derived), while an RTX 5090 renders a frame in 0.4 to 0.8 s (forecast). Kept codes
(`kept_codes.py`) save 0.3 s of each clip there (derived). Encoders on the host cost a copy of 12.6 GB, 0.5 s at 25 GB/s
(assumed), if prompt and reference are both new, and of 1.3 GB if the prompt was encoded before. Codes change no bits:
frames do not depend on whether they are kept.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

from runner.errors import ConfigInvalid
from runner.forecast.bytes import (
    face_bytes,
    kept_code_bytes,
    latent_bytes,
    step_bytes,
    vae_bytes,
    vae_peak,
    weights_of,
    workspace_bytes,
)
from runner.forecast.flops import Costs
from runner.forecast.precisions import PRECISIONS
from runner.forecast.rife_shape import RifeShape
from runner.spec.recipes import MODES, Mode, Recipe, VaeDtype

__all__ = [
    "Load",
    "MemoryForecast",
    "MemoryPlan",
    "Window",
    "choose_plan",
    "forecast_memory",
    "make_plan",
    "next_lower_mode",
]

GB = 1e9

# Assumptions, to be compared with the measured peaks in the records.
CONTEXT_BYTES = 800_000_000  # of a CUDA process: context, loaded kernels, workspaces of cuBLAS
SLACK = 0.08  # of the allocated bytes: lost by fragmentation
PREPROCESS_EXTRA = 500_000_000  # limit of ONNX Runtime's arenas, beside its models' weights
ENCODER_LAYER_BYTES = 2_200_000_000  # UMT5-XXL layer by layer: its largest layer is the embedding, in bfloat16
TILED_ABOVE = 480 * 832  # pixels; depends on the size alone, not on free memory, as tiles change the frames


@dataclass(frozen=True)
class MemoryPlan:
    """Where models and buffers are. Plain data."""

    mode: Mode
    buffers: int  # prefetch buffers on the device that blocks are copied into; 0: all blocks stay on the device
    chunked: bool  # blocks that are not compiled run a few rows at a time (low_memory.py)
    compiled: bool  # blocks may be compiled: faster, with their feed-forward part whole
    keep_text: bool  # keys and values of text and image are kept for a window, not for one step
    encoders: Literal["device", "host", "disk"]
    preprocess: Literal["device", "host"]
    vae_dtype: VaeDtype
    vae_tiles: bool  # above TILED_ABOVE
    keep_codes: bool = False  # of weights that compute in 8 bits, instead of making them at each use

    def tiled(self, width: int, height: int) -> bool:
        """Return whether the autoencoder is tiled at this size."""
        return self.vae_tiles and width * height > TILED_ABOVE

    def as_dict(self) -> dict[str, Any]:
        """The fields for the record, which calls `buffers` slots and `chunked` lean."""
        recorded = {"buffers": "slots", "chunked": "lean"}
        return {recorded.get(name, name): value for name, value in vars(self).items()}


@dataclass(frozen=True)
class Load:
    """Bytes of the models beside the transformer, which do not follow from its shape."""

    encoders: int = 11_360_000_000 + 1_260_000_000  # UMT5-XXL and CLIP ViT-H in bfloat16
    preprocess: int = 2_610_000_000  # ViTPose-H and YOLOv10m, as published
    loras: int = 0  # LoRA factors kept beside the weights


@dataclass(frozen=True)
class Window:
    """The properties of a job that decide its memory. The defaults are used if no job is known."""

    width: int = 480
    height: int = 832
    frames: int = 81
    guided: bool = False
    interpolates: bool = False
    loras: int = 0  # bytes of the job's LoRAs, beside the weights

    def __str__(self) -> str:
        """`1280x720x81, guided`."""
        words = {"guided": self.guided, "interpolated": self.interpolates, "with LoRAs": self.loras}
        return ", ".join([f"{self.width}x{self.height}x{self.frames}", *(word for word, used in words.items() if used)])


@dataclass(frozen=True)
class MemoryForecast:
    """Bytes on the device: of each part while it is there, and the peak of each stage."""

    parts: Mapping[str, int]
    stages: Mapping[str, int]

    @property
    def peak(self) -> int:
        return max(self.stages.values())

    def as_dict(self) -> dict[str, Any]:
        """For the record."""
        return {"peak": self.peak, "stages": dict(self.stages), "parts": dict(self.parts)}


def make_plan(mode: str, recipe: Recipe) -> MemoryPlan:
    """Return the plan of a mode: for `resident` the largest one without kept codes, for the others the smallest.

    Kept codes are planned only if the free memory is known. Raises ConfigInvalid for an unknown mode.
    """
    if mode == "resident":
        return MemoryPlan("resident", 0, False, True, True, "device", "device", recipe.vae_dtype, False)
    if mode == "stream":
        return MemoryPlan("stream", 2, True, True, True, "host", "host", recipe.vae_dtype, False)
    if mode == "minimal":
        # A recipe in float32 serves comparisons, so its autoencoder stays in float32.
        halves = recipe.dtype == "bfloat16" and recipe.vae_dtype == "float32"
        vae_dtype = "bfloat16" if halves else recipe.vae_dtype
        return MemoryPlan("minimal", 1, True, False, False, "disk", "host", vae_dtype, recipe.dtype == "bfloat16")
    raise ConfigInvalid(f"no memory mode {mode!r}", todo=f"Modes: auto, {', '.join(MODES)}")


def next_lower_mode(mode: Mode) -> Mode | None:
    """Return the next mode down; None below the last one."""
    at = MODES.index(mode) + 1
    return MODES[at] if at < len(MODES) else None


def _plans(recipe: Recipe) -> Iterator[MemoryPlan]:
    """Yield every plan that `auto` considers, the best one first."""
    full = make_plan("resident", recipe)
    if PRECISIONS[recipe.compute].layout == "rows":
        yield replace(full, keep_codes=True)
        yield replace(full, keep_codes=True, encoders="host")
    yield full
    yield replace(full, encoders="host")
    yield replace(full, encoders="host", preprocess="host")
    # On a CPU core ViTPose-H takes about 1.2 s per crop (derived, bench/results.md), and the device would wait for it.
    yield replace(make_plan("stream", recipe), preprocess="device")
    yield make_plan("stream", recipe)
    yield make_plan("minimal", recipe)


def forecast_memory(
    plan: MemoryPlan,
    recipe: Recipe,
    costs: Costs,
    width: int,
    height: int,
    frames: int,
    *,
    guided: bool = False,
    interpolates: bool = False,
    load: Load | None = None,
    cuda: bool = True,
) -> MemoryForecast:
    """Forecast the bytes for windows of `frames` frames. Without `cuda`, all parts are in host memory.

    `interpolates`: the frame interpolation network is on the device too, and runs between windows.
    """
    load = load or Load()
    model, vae, size = costs.transformer, costs.vae, (width, height, frames)
    element = 2 if recipe.dtype == "bfloat16" else 4
    weights = weights_of(model, fp4=recipe.fp4, element=element, compute=recipe.compute)
    encode, decode = vae_peak(vae, *size, dtype=plan.vae_dtype, tiled=plan.tiled(width, height))
    kept = model.conditioning_bytes(*size, element=element, guided=guided)
    if not plan.keep_text:
        context_tokens = (1 + guided) * model.text_tokens + (
            model.image_tokens if model.added_kv_proj_dim is not None else 0
        )
        kept -= 2 * (model.num_layers - 1) * context_tokens * model.dim * element
    if cuda:  # the chunked block runs if compilation fails, and to check the compiled block
        kinds = ("fused", "chunked") if plan.compiled else ("chunked",)
    else:
        kinds = ("chunked",) if plan.chunked else ("whole",)
    buffers = min(plan.buffers, model.num_layers)
    resident = not cuda or not buffers
    per_part = load.loras / model.num_layers
    parts: dict[str, float] = {
        "context": CONTEXT_BYTES if cuda else 0,
        "blocks": weights.total - weights.rest if resident else 0,
        "weight_codes": kept_code_bytes(model, compute=recipe.compute) if plan.keep_codes else 0,
        "slots": buffers * weights.largest_part,
        "other_weights": weights.rest,
        "loras_beside": load.loras if resident else buffers * per_part,
        "autoencoder": vae_bytes(vae, plan.vae_dtype),
        "encoders": load.encoders if plan.encoders == "device" or not cuda else 0,
        "preprocess": load.preprocess + PREPROCESS_EXTRA if plan.preprocess == "device" or not cuda else 0,
        "invariants": kept,
        "window": latent_bytes(model, *size, element=element) + face_bytes(model, frames, element=element),
        "activations": max(
            step_bytes(
                model,
                *size,
                kind=kind,
                element=element,
                compute=recipe.compute,
                attention_8bit=recipe.eight_bit_attention,
            )
            for kind in kinds
        ),
        "workspace": workspace_bytes(model, fp4=recipe.fp4, compute=recipe.compute, element=element),
        "encoder_layer": 0 if plan.encoders == "device" or not cuda else ENCODER_LAYER_BYTES,
        "autoencoder_encode": encode,
        "autoencoder_decode": decode,
        "interpolation_weights": RifeShape().weight_bytes if interpolates else 0,
        "interpolation": RifeShape().peak_bytes(width, height) if interpolates else 0,
    }
    always: tuple[str, ...] = ("blocks", "weight_codes", "other_weights", "autoencoder", "encoders", "workspace")
    always += ("interpolation_weights",) + (("loras_beside",) * resident)
    stages = {
        "encode_prompt": ("encoder_layer",),
        "encode_conditions": ("window", "autoencoder_encode"),
        "denoise": ("slots", "loras_beside", "invariants", "window", "activations")
        if not resident
        else ("invariants", "window", "activations", *(("slots",) if plan.buffers else ())),
        "vae_decode": ("autoencoder_decode",),
    }
    if interpolates:
        stages["interpolate"] = ("window", "interpolation")

    def total(names: tuple[str, ...]) -> int:
        inside = sum(parts[name] for name in (*always, *names))
        outside = parts["context"] + parts["preprocess"]  # neither is in torch's allocator
        return round(inside * (1 + SLACK) + outside)

    return MemoryForecast(
        {name: round(size) for name, size in parts.items() if size},
        {name: total(extra) for name, extra in stages.items()},
    )


def choose_plan(
    asked: str,
    recipe: Recipe,
    costs: Costs,
    free: int | None,
    *,
    windows: Sequence[Window] = (Window(),),
    load: Load | None = None,
    cuda: bool = True,
) -> tuple[MemoryPlan, str]:
    """Return the plan for `asked` (a mode, or auto) with `free` bytes (None: not known), and the reason in words.

    `windows`: at least one; for each plan the window that takes most memory counts. Raises ConfigInvalid for an unknown
    mode.
    """
    load = load or Load()

    def needs(plan: MemoryPlan, window: Window) -> int:
        return forecast_memory(
            plan,
            recipe,
            costs,
            window.width,
            window.height,
            window.frames,
            guided=window.guided,
            interpolates=window.interpolates,
            load=replace(load, loras=load.loras + window.loras),
            cuda=cuda,
        ).peak

    def peak(plan: MemoryPlan) -> int:
        return max(needs(plan, window) for window in windows)

    def forecast(plan: MemoryPlan) -> str:
        most = max(windows, key=lambda window: needs(plan, window))
        return f"{peak(plan) / GB:.1f} GB forecast at {most}"

    if asked != "auto":
        mode = make_plan(asked, recipe).mode
        fitting = [plan for plan in _plans(recipe) if plan.mode == mode]
        if free is None:
            plan = make_plan(mode, recipe)
        else:
            plan = next((p for p in fitting if peak(p) <= free), fitting[-1])
        return plan, f"asked for; {forecast(plan)}, {_free_note(free)}{_codes_note(plan)}"
    if free is None:
        return make_plan("resident", recipe), "the free memory is not known"
    if not cuda:  # streaming would copy blocks from the host to the host
        plans = [p for p in _plans(recipe) if p.mode != "stream" and p.encoders != "host"]
    else:
        plans = list(_plans(recipe))
    too_large: dict[str, int] = {}
    for plan in plans:
        if (needed := peak(plan)) <= free:
            why = f"{forecast(plan)}, {_free_note(free)}{_codes_note(plan)}"
            if plan.mode == "resident" and "device" not in (plan.encoders, plan.preprocess):
                why += "; encoders and preprocessing on the host, else it would not fit"
            elif plan.mode == "resident" and plan.encoders != "device":
                why += "; encoders on the host, else it would not fit"
            elif plan.mode == "stream" and plan.preprocess != "device":
                why += "; preprocessing on the host, else it would not fit"
            refused = [f"{mode} needs {size / GB:.1f} GB" for mode, size in too_large.items() if mode != plan.mode]
            return plan, "; ".join([why, *refused])
        too_large[plan.mode] = needed
    last = plans[-1]
    return last, f"no plan takes less memory: {forecast(last)}, {_free_note(free)}"


def _free_note(free: int | None) -> str:
    return "free memory not known" if free is None else f"{free / GB:.1f} GB free"


def _codes_note(plan: MemoryPlan) -> str:
    return "; the weights' 8-bit codes are kept" if plan.keep_codes else ""

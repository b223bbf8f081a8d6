"""Quantize: the verb that makes the FP4 file of a recipe from the published weights in the model store.

In:   `QuantizeSettings`. Out: `Wan2.2-Animate-14B-FP4-<…>/` in the store, each file whole or not at all.
Never: number formats or files' layouts; quantization/ has those.
"""

from __future__ import annotations

import shutil
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import structlog

from runner.errors import ConfigInvalid, WeightsMissing
from runner.records.events import default_logging
from runner.spec.recipes import RECIPES, Recipe, get_recipe
from runner.storage import is_remote
from runner.timing import StageTimer
from runner.verbs.settings import SCALES, QuantizeSettings
from runner.verbs.validate import read_manifest
from runner.weights.variant import DISTILL_FOLDER, TEXT_FILE, TRANSFORMER_FILE, quantized_folder

if TYPE_CHECKING:
    from torch import Tensor

    from runner.quantization.files.checkpoint_write import Summary
    from runner.quantization.files.text_encoder import SavedTextEncoder
    from runner.spec.manifest import Manifest

__all__ = ["Quantized", "quantize"]

SAY_EVERY_S = 5.0


@dataclass(frozen=True)
class Quantized:
    """What was written: the transformer's file, and the text encoder's where it was asked for."""

    transformer: Summary
    text_encoder: SavedTextEncoder | None


@default_logging()
def quantize(settings: QuantizeSettings) -> Quantized:
    """The verb `quantize`. Raises WeightsMissing, WeightsCorrupt, ConfigInvalid, StorageFull; calibrating, input.*."""
    from runner.generation.runtime.device import pick_device
    from runner.quantization.files.checkpoint_write import quantize_store
    from runner.quantization.files.text_encoder import quantize_text_encoder
    from runner.quantization.formats.e2m1 import FORMATS
    from runner.quantization.lora.apply import read_lora
    from runner.quantization.rules import get_rule

    recipe = get_recipe(settings.recipe)
    if not recipe.fp4:
        known = ", ".join(name for name, known in RECIPES.items() if known.fp4)
        raise ConfigInvalid(f"recipe {recipe.name!r} runs the source as it is", todo=f"Quantise for one of: {known}")
    if not settings.models or is_remote(settings.models):
        raise WeightsMissing("the weights must be in a local folder", where=settings.models, todo="Pass --models DIR")
    pick_device(settings.device)  # a device that is not there is said now, not after an hour of calibration
    root = Path(settings.models)
    target = root / quantized_folder(recipe)
    loras = [read_lora(path, strength) for path, strength in _lora_files(root, recipe, settings.lora)]
    importance = None
    scales: Literal["mse", "absmax", "activation"] = settings.scales or SCALES[0]
    if settings.calibrate:
        importance = _calibrate(settings, settings.calibrate, root, loras)
        scales = "activation"
    log = structlog.get_logger()
    summary = quantize_store(
        root / recipe.weights / "transformer",
        target / TRANSFORMER_FILE,
        FORMATS[settings.format],
        scales,
        get_rule(settings.rule).keep,
        loras,
        importance,
        settings.device,
        _say_progress(log),
    )
    log.info(
        "quantized",
        file=str(summary.path),
        layers=summary.layers,
        gb=round(summary.bytes / 1e9, 3),
        seconds=round(summary.seconds, 1),
        device=summary.device,
        untargeted=len(summary.untargeted),
        uncalibrated=len(summary.uncalibrated),
    )
    for key in summary.untargeted:
        log.warning("lora_without_target", tensor=key)
    made = None
    if settings.text_encoder:
        made = quantize_text_encoder(root / recipe.weights / "text_encoder", target / TEXT_FILE, device=settings.device)
    return Quantized(summary, made)


def _lora_files(root: Path, recipe: Recipe, given: Sequence[str]) -> list[tuple[Path, float]]:
    """What to merge: the distill LoRA where the recipe has it, then `--lora FILE[:STRENGTH]`."""
    found: list[tuple[Path, float]] = []
    if recipe.distilled:
        distill = sorted((root / DISTILL_FOLDER).glob("*.safetensors"))
        if not distill:
            raise WeightsMissing(
                f"recipe {recipe.name!r} merges a distill LoRA, and there is none",
                where=root / DISTILL_FOLDER,
                todo=f"video-lab weights fetch --recipe {recipe.name}, or put its .safetensors there",
            )
        found += [(path, 1.0) for path in distill]
    for text in given:
        name, colon, number = text.rpartition(":")
        try:
            found.append((Path(name), float(number)) if colon and name else (Path(text), 1.0))
        except ValueError:
            found.append((Path(text), 1.0))
    return found


def _calibrate(settings: QuantizeSettings, jobs: str | Manifest, root: Path, loras: Sequence[Any]) -> dict[str, Tensor]:
    """Render the jobs of a manifest with the source weights, the LoRAs attached, and watch the linears' inputs."""
    from runner.generation.families import EngineSettings
    from runner.generation.protocol import Request
    from runner.generation.wan_animate.generator import WanAnimateGenerator
    from runner.quantization.activations import watching
    from runner.storage import fetch_input
    from runner.weights.resolved import resolve_recipe
    from runner.weights.store import ModelStore

    manifest = read_manifest(jobs)
    ready = next((job.id for job in manifest.jobs if job.official), None)
    if ready is not None:
        raise ConfigInvalid(f"job {ready!r} brings the official script's files", todo="Calibrate with clips")
    target = get_recipe(settings.recipe)
    # The source's weights under the solver and steps that the file will be run with.
    recipe = replace(
        get_recipe("bf16"), steps=target.steps, scheduler=target.scheduler, grid=target.grid, shift=target.shift
    )
    models = resolve_recipe(ModelStore(root), recipe)
    generator = WanAnimateGenerator.load(models, EngineSettings(device=settings.device))
    log = structlog.get_logger()
    begin = time.monotonic()
    try:
        with generator.calibrating(loras) as transformer, watching(transformer) as moments:
            for job in manifest.jobs:
                scratch = settings.cache / "calibrate" / job.id
                reference, video = fetch_input(job.reference, scratch), fetch_input(job.video, scratch)
                mask = fetch_input(job.mask, scratch) if job.mask else None
                request = Request(reference, video, job.prompt, job.options, mask=mask)
                timer = StageTimer()
                conditions = generator.prepare(request, timer)
                try:
                    plan = generator.plan(conditions.clip.frames, conditions.clip.size, job.options)
                    for _ in generator.generate(conditions, plan, timer):
                        pass
                finally:
                    conditions.close()
                    shutil.rmtree(scratch, ignore_errors=True)
                log.info("calibrated", job=job.id, seconds=round(time.monotonic() - begin, 1))
    finally:
        generator.close()
    return moments.means()


def _say_progress(log: Any) -> Callable[[Any], None]:
    said = [0.0]

    def say(progress: Any) -> None:
        now = time.monotonic()
        if now - said[0] >= SAY_EVERY_S or progress.bytes == progress.of_bytes:
            said[0] = now
            log.info(
                "quantizing",
                tensors=f"{progress.tensors}/{progress.of_tensors}",
                gb=f"{progress.bytes / 1e9:.2f}/{progress.of_bytes / 1e9:.2f}",
                gb_per_s=round(progress.gb_per_s, 3),
                seconds_left=round(progress.seconds_left),
            )

    return say

"""Quantize: the verb that makes the FP4 or SVDQ file of a recipe from the published weights in the model store.

In:   `QuantizeSettings`. Out: `Wan2.2-Animate-14B-FP4-<…>/` or `…-SVDQ-<…>/` in the store, each file written completely
or not at all; with `export` also a folder for another program.
Never: number formats or file layouts; quantization/ has those.
"""

from __future__ import annotations

import shutil
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import structlog

from runner.errors import ConfigInvalid, WeightsMissing
from runner.quantization.formats.svdq_layout import SVDQ_LAYOUTS
from runner.records.events import default_logging
from runner.spec.recipes import RECIPES, Recipe, get_recipe
from runner.storage import is_remote
from runner.timing import StageTimer
from runner.verbs.settings import SCALES, QuantizeSettings
from runner.verbs.validate import read_manifest
from runner.weights.variant import DISTILL_FOLDER, TEXT_FILE, TRANSFORMER_FILE, quantized_folder

if TYPE_CHECKING:
    from runner.quantization.activations import Watcher
    from runner.quantization.files.checkpoint_write import Summary
    from runner.quantization.files.schemes import Scheme
    from runner.quantization.files.text_encoder import SavedTextEncoder
    from runner.spec.manifest import Manifest

__all__ = ["Quantized", "quantize"]

LOG_EVERY_S = 5.0
# Measured on 1536 x 1536 random layers with rank 32, 256 tokens that calibration did not see: relative error of the
# output, weights and activations in four bits; one input channel in a hundred is 20 times as large as the others.
UNCALIBRATED_COST: Final = (
    "smoothing factors come from the weights alone, so outliers of activations are not reduced. On random layers with "
    "outlier channels the error of the output is .23 (int4) or .12 (nvfp4); with --calibrate it is .07 or .06"
)


@dataclass(frozen=True)
class Quantized:
    """The written files: the transformer's; if requested, the text encoder's and another program's folder."""

    transformer: Summary
    text_encoder: SavedTextEncoder | None
    exported: Path | None = None
    remarks: tuple[str, ...] = ()  # the accuracy cost of the chosen settings


@default_logging()
def quantize(settings: QuantizeSettings) -> Quantized:
    """The verb `quantize`. Raises WeightsMissing, WeightsCorrupt, ConfigInvalid, StorageFull; calibrating, input.*."""
    from runner.generation.runtime.device import pick_device
    from runner.quantization.files.checkpoint_write import write_checkpoint
    from runner.quantization.files.text_encoder import quantize_text_encoder
    from runner.quantization.lora.apply import read_lora
    from runner.quantization.rules import get_rule

    recipe = get_recipe(settings.target_recipe)
    if not recipe.fp4:
        known = ", ".join(name for name, known in RECIPES.items() if known.fp4)
        raise ConfigInvalid(
            f"recipe {recipe.name!r} uses the published weights, which need no quantising",
            todo=f"Name one of these recipes: {known}",
        )
    if not settings.models or is_remote(settings.models):
        raise WeightsMissing("the weights must be in a local folder", where=settings.models, todo="Pass --models DIR")
    pick_device(settings.device)  # raises for a missing device now, not after an hour of calibration
    root = Path(settings.models)
    target = root / quantized_folder(recipe)
    loras = [read_lora(path, strength) for path, strength in _lora_files(root, recipe, settings.lora)]
    svdq = settings.number_format in SVDQ_LAYOUTS
    log = structlog.get_logger()
    scheme = _svdq_scheme(settings, root, loras) if svdq else _fp4_scheme(settings, root, loras)
    remarks = (UNCALIBRATED_COST,) if svdq and settings.calibrate is None else ()
    for remark in remarks:
        log.warning("not_calibrated", said=remark)
    summary = write_checkpoint(
        root / recipe.weights / "transformer",
        target / TRANSFORMER_FILE,
        scheme,
        get_rule(settings.rule).keep,
        loras,
        settings.device,
        _log_progress(log),
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
        **_errors(summary),
    )
    for key in summary.untargeted:
        log.warning("lora_without_target", tensor=key)
    if svdq:
        for layer in summary.uncalibrated:
            log.warning("layer_not_calibrated", layer=layer)
    made = exported = None
    if settings.text_encoder:
        made = quantize_text_encoder(root / recipe.weights / "text_encoder", target / TEXT_FILE, device=settings.device)
    if settings.export is not None:
        from runner.quantization.files.svdq_export import export_svdq

        kind, folder = settings.export
        exported = export_svdq(summary.path, kind, folder, target / "config.json")
    return Quantized(summary, made, exported, remarks)


def _errors(summary: Summary) -> dict[str, float]:
    """Return mean and largest relative error of the layers' weights; empty if not known."""
    errors = summary.errors.values()
    if not errors:
        return {}
    return {"mean_error": round(sum(errors) / len(errors), 4), "largest_error": round(max(errors), 4)}


def _fp4_scheme(settings: QuantizeSettings, root: Path, loras: Sequence[Any]) -> Scheme:
    from runner.quantization.activations import ChannelMoments
    from runner.quantization.files.schemes import Fp4Scheme
    from runner.quantization.formats.e2m1 import FORMATS

    fmt = FORMATS[settings.number_format]
    if settings.calibrate is None:
        return Fp4Scheme(fmt, settings.scales or SCALES[0])
    moments = ChannelMoments()
    _calibrate(settings, settings.calibrate, root, loras, moments)
    return Fp4Scheme(fmt, "activation", moments.means())


def _svdq_scheme(settings: QuantizeSettings, root: Path, loras: Sequence[Any]) -> Scheme:
    from runner.quantization.activations import InputSamples
    from runner.quantization.files.schemes import SvdqScheme

    layout = SVDQ_LAYOUTS[settings.number_format]
    if settings.rank is not None:
        layout = layout.with_rank(settings.rank)
    refits = settings.refits or 0
    if settings.calibrate is None:
        return SvdqScheme(layout, refits)
    samples = InputSamples()
    watched = _calibrate(settings, settings.calibrate, root, loras, samples)
    return SvdqScheme(layout, refits, samples.inputs(), watched | {"rows": samples.rows})


def _lora_files(root: Path, recipe: Recipe, flags: Sequence[str]) -> list[tuple[Path, float]]:
    """Return (file, strength) of the LoRAs to merge: the recipe's distill LoRA, then each `--lora FILE[:STRENGTH]`."""
    found: list[tuple[Path, float]] = []
    if recipe.distilled:
        distill = sorted((root / DISTILL_FOLDER).glob("*.safetensors"))
        if not distill:
            raise WeightsMissing(
                f"recipe {recipe.name!r} merges a distill LoRA, but the folder has none",
                where=root / DISTILL_FOLDER,
                todo=f"Run video-lab weights fetch --recipe {recipe.name}, or put the .safetensors there",
            )
        found += [(path, 1.0) for path in distill]
    for text in flags:
        name, colon, number = text.rpartition(":")
        try:
            found.append((Path(name), float(number)) if colon and name else (Path(text), 1.0))
        except ValueError:
            found.append((Path(text), 1.0))
    return found


def _calibrate(
    settings: QuantizeSettings, jobs: str | Manifest, root: Path, loras: Sequence[Any], watcher: Watcher
) -> dict[str, int]:
    """Render the jobs of a manifest with the published weights and LoRAs; `watcher` gets the inputs of the linears.

    Return the number of jobs, and of denoising steps of all segments together.
    """
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
        raise ConfigInvalid(
            f"job {ready!r} uses files of the official preprocessing", todo="Calibrate with jobs that have a video"
        )
    target = get_recipe(settings.recipe)
    # The published weights, with the sampler and steps that the quantised file will be used with.
    recipe = replace(
        get_recipe("bf16"), steps=target.steps, scheduler=target.scheduler, schedule=target.schedule, shift=target.shift
    )
    models = resolve_recipe(ModelStore(root), recipe)
    generator = WanAnimateGenerator.load(models, EngineSettings(device=settings.device))
    log = structlog.get_logger()
    begin, steps = time.monotonic(), 0
    try:
        with generator.calibrating(loras) as transformer, watching(transformer, watcher):
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
                    steps += plan.segments * plan.steps
                finally:
                    conditions.close()
                    shutil.rmtree(scratch, ignore_errors=True)
                log.info("calibrated", job=job.id, seconds=round(time.monotonic() - begin, 1))
    finally:
        generator.close()
    return {"jobs": len(manifest.jobs), "steps": steps}


def _log_progress(log: Any) -> Callable[[Any], None]:
    logged_at = [0.0]

    def note(progress: Any) -> None:
        now = time.monotonic()
        if now - logged_at[0] >= LOG_EVERY_S or progress.bytes == progress.of_bytes:
            logged_at[0] = now
            log.info(
                "quantizing",
                tensors=f"{progress.tensors}/{progress.of_tensors}",
                gb=f"{progress.bytes / 1e9:.2f}/{progress.of_bytes / 1e9:.2f}",
                gb_per_s=round(progress.gb_per_s, 3),
                seconds_left=round(progress.seconds_left),
            )

    return note

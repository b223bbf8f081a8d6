"""Quantize: the verb that makes the FP4 file of a recipe from the published weights in the model store.

In:   the parsed flags. Out: `Wan2.2-Animate-14B-FP4-<…>/` in the store, each file whole or not at all.
Never: number formats or files' layouts; quantization/ has those.
"""

from __future__ import annotations

import argparse
import shutil
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import structlog

from runner.errors import ConfigInvalid, WeightsMissing
from runner.spec.recipes import RECIPES, Recipe, get_recipe
from runner.storage import is_remote
from runner.timing import StageTimer
from runner.verbs.tables import print_text
from runner.weights.variant import DISTILL_FOLDER, TEXT_FILE, TRANSFORMER_FILE, quantized_folder

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["quantize_models"]

SAY_EVERY_S = 5.0


def quantize_models(arguments: argparse.Namespace) -> int:
    """The verb `quantize`. Raises WeightsMissing, WeightsCorrupt, ConfigInvalid, StorageFull."""
    from runner.generation.runtime.device import pick_device
    from runner.quantization.files.checkpoint_write import quantize_store
    from runner.quantization.files.text_encoder import quantize_text_encoder
    from runner.quantization.formats.e2m1 import FORMATS
    from runner.quantization.lora.apply import read_lora
    from runner.quantization.rules import get_rule

    recipe = get_recipe(arguments.recipe)
    if not recipe.fp4:
        known = ", ".join(name for name, known in RECIPES.items() if known.fp4)
        raise ConfigInvalid(f"recipe {recipe.name!r} runs the source as it is", todo=f"Quantise for one of: {known}")
    if not arguments.models or is_remote(arguments.models):
        raise WeightsMissing("the weights must be in a local folder", where=arguments.models, todo="Pass --models DIR")
    pick_device(arguments.device)  # a device that is not there is said now, not after an hour of calibration
    root = Path(arguments.models)
    target = root / quantized_folder(recipe)
    loras = [read_lora(path, strength) for path, strength in _lora_files(root, recipe, arguments.lora)]
    importance = None
    if arguments.calibrate and arguments.scales:
        raise ConfigInvalid("--calibrate chooses the scales itself", todo="Leave --scales out")
    arguments.scales = arguments.scales or "mse"
    if arguments.calibrate:
        importance = _calibrate(arguments, root, loras)
        arguments.scales = "activation"
    log = structlog.get_logger()
    summary = quantize_store(
        root / recipe.weights / "transformer",
        target / TRANSFORMER_FILE,
        FORMATS[arguments.format],
        arguments.scales,
        get_rule(arguments.rule).keep,
        loras,
        importance,
        arguments.device,
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
    print_text(f"{summary.path}: {summary.layers} layers in {summary.format}, {summary.bytes / 1e9:.3f} GB")
    if arguments.text_encoder:
        made = quantize_text_encoder(
            root / recipe.weights / "text_encoder", target / TEXT_FILE, device=arguments.device
        )
        print_text(f"{made.path}: {made.linears} layers in INT4, {made.bytes_written / 1e9:.3f} GB")
    return 0


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


def _calibrate(arguments: argparse.Namespace, root: Path, loras: Sequence[Any]) -> dict[str, Tensor]:
    """Render the jobs of a manifest with the source weights, the LoRAs attached, and watch the linears' inputs."""
    from runner.generation.families import EngineSettings
    from runner.generation.protocol import Request
    from runner.generation.wan_animate.generator import WanAnimateGenerator
    from runner.quantization.activations import watching
    from runner.quantization.lora.apply import attached
    from runner.spec.manifest import load_manifest
    from runner.storage import fetch_input
    from runner.weights.resolved import resolve_recipe
    from runner.weights.store import ModelStore

    manifest = load_manifest(arguments.calibrate)
    ready = next((job.id for job in manifest.jobs if job.official), None)
    if ready is not None:
        raise ConfigInvalid(f"job {ready!r} brings the official script's files", todo="Calibrate with clips")
    target = get_recipe(arguments.recipe)
    # The source's weights under the solver and steps that the file will be run with.
    recipe = replace(
        get_recipe("bf16"), steps=target.steps, scheduler=target.scheduler, grid=target.grid, shift=target.shift
    )
    models = resolve_recipe(ModelStore(root), recipe)
    generator = WanAnimateGenerator.load(models, EngineSettings(device=arguments.device))
    log = structlog.get_logger()
    assert generator.pipeline is not None
    # Compiled, blocks would be traced with the hooks in them, a graph for each, and warmed up on noise that they count.
    generator.pipeline.block_step = None
    transformer = generator.pipeline.transformer
    begin = time.monotonic()
    try:
        with attached(transformer, loras), watching(transformer) as moments:
            generator.loras = None  # only what will be in the file
            for job in manifest.jobs:
                scratch = arguments.cache / "calibrate" / job.id
                paths = [fetch_input(uri, scratch) if uri else None for uri in (job.reference, job.video, job.mask)]
                assert paths[0] is not None and paths[1] is not None
                request = Request(paths[0], paths[1], job.prompt, job.options, mask=paths[2])
                timer = StageTimer()
                conditions = generator.prepare(request, timer)
                try:
                    size = (conditions.width, conditions.height)
                    plan = generator.plan(conditions.frames, size, job.options)
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

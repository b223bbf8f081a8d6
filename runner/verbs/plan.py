"""Plan: what each job of a manifest will denoise and cost, from its inputs' sizes and the models' shapes.

In:   jobs, a recipe, the costs of the models, the name of a GPU. Out: a `Forecast` a job; one with an error where an
input cannot be read. Never: weights. Without a model store the published model's shapes are assumed.
"""

from __future__ import annotations

import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from runner.errors import ConfigInvalid, RunnerError
from runner.forecast.seconds import DEVICES, DeviceSpeed, find_device
from runner.generation.families import Forecaster, get_family
from runner.generation.protocol import SegmentPlan
from runner.preprocess.pictures.images import image_size
from runner.preprocess.pictures.sizing import output_size
from runner.records.events import default_logging
from runner.spec.manifest import Job, Manifest
from runner.spec.recipes import DEFAULT_RECIPE, Recipe, get_recipe
from runner.storage import fetch_input, is_remote
from runner.storage.roots import check_inside, parse_roots
from runner.verbs.chosen_jobs import choose_jobs
from runner.verbs.settings import PlanSettings, RunSettings
from runner.verbs.validate import input_places
from runner.video import VideoReader

__all__ = ["Forecast", "RunForecast", "choose_gpu", "forecast_job", "forecast_jobs", "forecast_seconds", "plan"]

FORECAST_S = 20.0  # seconds that forecasts may take before a run begins


@dataclass(frozen=True)
class Forecast:
    job_id: str
    plan: SegmentPlan | None
    error: RunnerError | None = None
    memory: Mapping[str, int] = field(default_factory=dict)  # mode -> peak bytes on the device, in its leanest form


@dataclass(frozen=True)
class RunForecast:
    """A row a job of the shard, in order, and the GPU whose seconds they name; None where none is known."""

    jobs: tuple[Forecast, ...]
    gpu: str | None


@default_logging()
def plan(settings: PlanSettings) -> RunForecast:
    """The verb `plan`. Raises ManifestInvalid, ConfigInvalid, storage.* for the manifest itself."""
    manifest, jobs, _, _ = choose_jobs(settings)
    rows, gpu = forecast_jobs(jobs, settings, manifest)
    return RunForecast(tuple(rows), gpu)


def choose_gpu(asked: str | None, recipe: Recipe) -> DeviceSpeed | None:
    """The GPU whose seconds are forecast: the one asked for, else this machine's first; None where there is none.

    Raises ConfigInvalid for one of which nothing is known, or which has not the recipe's compute.
    """
    gpu = find_device(asked or _first_gpu())
    if asked and gpu is None:
        raise ConfigInvalid(f"nothing is known of a GPU {asked!r}", todo=f"Known: {', '.join(d.name for d in DEVICES)}")
    if asked and gpu is not None and recipe.compute not in gpu.matmul:
        raise ConfigInvalid(
            f"{gpu.name} has no {recipe.compute}, which recipe {recipe.name!r} asks for",
            todo=f"It has {', '.join(gpu.matmul)}",
        )
    return gpu


def _first_gpu() -> str | None:
    """By the driver, which answers without torch."""
    from runner.verbs.probes import ProbeFailed, Probes

    try:
        gpus = Probes().driver().gpus
    except ProbeFailed:
        return None
    return gpus[0].name if gpus else None


def forecast_jobs(jobs: Sequence[Job], settings: PlanSettings, manifest: Manifest) -> tuple[list[Forecast], str | None]:
    """One row a job, in order, and the GPU whose seconds they name. S3 inputs are downloaded to be measured."""
    recipe = get_recipe(settings.recipe or manifest.recipe or DEFAULT_RECIPE)
    local = settings.models if settings.models and not is_remote(settings.models) else None
    forecaster = get_family(recipe).forecaster(recipe, Path(local) if local else None)
    gpu = choose_gpu(settings.gpu, recipe)
    roots = parse_roots(settings.input_root)
    rows = []
    for job in jobs:
        try:
            for _, uri in input_places(job):
                check_inside(uri, roots)
            plan = forecast_job(job, forecaster, gpu)
            rows.append(Forecast(job.id, plan, memory=forecaster.memory(plan, job.options)))
        except RunnerError as error:
            rows.append(Forecast(job.id, None, error))
    return rows, gpu.name if gpu is not None else None


def forecast_seconds(
    jobs: Sequence[Job], settings: RunSettings, manifest: Manifest, within_s: float = FORECAST_S
) -> dict[str, float]:
    """Job id → forecast seconds on this machine's first GPU, or its TFLOP where none is known, to compare jobs by.

    No job costs a download here, and all together at most about `within_s`: a job whose inputs lie elsewhere or cannot
    be read, and those after that time, have none.
    """
    recipe = get_recipe(settings.recipe or manifest.recipe or DEFAULT_RECIPE)
    local = settings.models if settings.models and not is_remote(settings.models) else None
    forecaster = get_family(recipe).forecaster(recipe, Path(local) if local else None)
    gpu = choose_gpu(None, recipe)
    roots = parse_roots(settings.input_root)
    deadline = time.monotonic() + within_s
    found: dict[str, float] = {}
    for job in jobs:
        if time.monotonic() > deadline:
            break
        places = [uri for _, uri in input_places(job)]
        if any(is_remote(uri) for uri in places):
            continue
        try:
            for uri in places:
                check_inside(uri, roots)
            plan = forecast_job(job, forecaster, gpu)
        except (RunnerError, OSError):  # the worker that gets the job says so
            continue
        found[job.id] = plan.tflop if plan.seconds is None else plan.seconds
    return found


def forecast_job(job: Job, forecaster: Forecaster, gpu: DeviceSpeed | None = None) -> SegmentPlan:
    """The plan that `run` would make. Raises input.* and storage.* as it would."""
    options = job.options
    with tempfile.TemporaryDirectory(prefix="video-lab-") as folder:
        reference = fetch_input(job.reference, Path(folder) / "reference")
        with VideoReader(fetch_input(job.video, Path(folder) / "video")) as reader:
            video_size = (reader.info.width, reader.info.height)
            if job.official:  # rate and size are the files' own
                sampled = reader.sample("source", options.start_s, options.max_frames)
                size = video_size
            else:
                parity = options.preprocess.parity
                sampled = reader.sample(options.fps, options.start_s, options.max_frames, parity=parity)
                size = output_size(options, image_size(reference), video_size)
    return forecaster.plan(len(sampled.indices), size, options, gpu)

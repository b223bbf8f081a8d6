"""Plan: forecasts frames, cost, memory and seconds of each job, from the sizes of its inputs and the models' shapes.

In:   jobs, a recipe, the costs of the models, the name of a GPU. Out: one `Forecast` per job; it has an error if an
input cannot be read. Never: weights. Without a model store the published model's shapes are assumed.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from fractions import Fraction
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Self

from runner.errors import ConfigInvalid, RunnerError, as_runner_error
from runner.finishing.interpolation import InterpolationForecast, forecast_interpolation
from runner.forecast.precisions import PRECISIONS
from runner.forecast.seconds import DEVICES, DeviceSpeed, find_device
from runner.generation.families import Forecaster, get_family
from runner.generation.protocol import SegmentPlan
from runner.generation.runtime.fast_choice import choice_words, foresee
from runner.preprocess.pictures.images import image_size
from runner.preprocess.pictures.sizing import output_size
from runner.preprocess.pose_cache import POSES_FOLDER
from runner.preprocess.prepare import foreseen_warnings
from runner.records.events import default_logging
from runner.spec.manifest import Job, Manifest
from runner.spec.recipes import DEFAULT_RECIPE, FAST_RECIPE, Recipe, get_recipe
from runner.storage import fetch_input, is_remote, stat_input
from runner.storage.disk_cache import DiskCache
from runner.storage.roots import check_inside, parse_roots
from runner.verbs.chosen_jobs import choose_jobs
from runner.verbs.settings import ModelSettings, PlanSettings, RunSettings
from runner.verbs.validate import input_places
from runner.video import Sampled, VideoReader

if TYPE_CHECKING:
    from runner.verbs.probes import Gpu

__all__ = [
    "FastForecast",
    "Forecast",
    "RunForecast",
    "SvdqForecast",
    "choose_gpu",
    "forecast_jobs",
    "forecast_seconds",
    "foreseen_mode",
    "plan",
]

LEAST_GAIN = 0.05  # of the seconds: a smaller difference is within the error of the forecast
FORECAST_S = 20.0  # time limit of the forecasts before a run begins, seconds


@dataclass(frozen=True)
class Forecast:
    """The forecast of one job."""

    job_id: str
    plan: SegmentPlan | None
    error: RunnerError | None = None
    memory: Mapping[str, int] = field(default_factory=dict)  # mode -> peak bytes on the device, at the mode's lowest
    fps: Fraction | None = None  # of the frames that are generated
    interpolation: InterpolationForecast | None = None  # None: not requested
    warnings: tuple[str, ...] = ()  # those warnings of the job's record that are known before the run

    @property
    def tflop(self) -> float:
        """TFLOP of generation and interpolation; 0 for a job that cannot be planned."""
        between = self.interpolation
        return (0.0 if self.plan is None else self.plan.tflop) + (0.0 if between is None else between.tflop)

    @property
    def seconds(self) -> float | None:
        """Seconds of generation and interpolation on the GPU; None without a known GPU."""
        if self.plan is None or self.plan.seconds is None:
            return None
        return self.plan.seconds + (0.0 if self.interpolation is None else self.interpolation.seconds or 0.0)


@dataclass(frozen=True)
class FastForecast:
    """What FAST_RECIPE runs as on the GPU, and its seconds for all jobs compared with those of the run's recipe.

    `running`: the recipe as it runs on the GPU if every self-test passes. `asked_s`: seconds of the run's recipe; None
    if FAST_RECIPE is the run's recipe.
    """

    running: Recipe
    forecast_s: float
    asked_s: float | None = None

    def __str__(self) -> str:
        saved = "" if self.asked_s is None else f"{self.asked_s:.3g} → "
        return f"{self.running.name}: {saved}{self.forecast_s:.3g} s (forecast), with {choice_words(self.running)}"


@dataclass(frozen=True)
class SvdqForecast:
    """The file of a recipe in an SVDQuant format, and the seconds for all jobs on every known GPU that computes it.

    `stored`: whether the size is that of the file in the store; otherwise it is a forecast. `seconds`: name of a GPU →
    seconds. `estimated`: those of these GPUs whose GEMM rate is an estimate.
    """

    compute: str
    file_bytes: int
    stored: bool
    seconds: Mapping[str, float]
    estimated: frozenset[str]

    def __str__(self) -> str:
        origin = "in the store" if self.stored else "forecast"
        size = f"{self.compute}: {self.file_bytes / 1e9:.3g} GB of weights ({origin})"
        each = [f"{gpu} {'~' * (gpu in self.estimated)}{s:.3g} s" for gpu, s in self.seconds.items()]
        if not each:
            return size
        marks = "; ~: the GEMM rate is an estimate" if self.estimated else ""
        return f"{size}; forecast for all jobs: {', '.join(each)}{marks}"


@dataclass(frozen=True)
class RunForecast:
    """One row per job of the shard, in order, and the GPU of the forecast seconds; None if no GPU is known."""

    jobs: tuple[Forecast, ...]
    gpu: str | None
    warnings: tuple[str, ...] = ()  # of the whole run
    fast: FastForecast | None = None  # None: it would save no time, or no GPU is known
    svdq: SvdqForecast | None = None  # None: the recipe uses no SVDQuant format


@default_logging()
def plan(settings: PlanSettings) -> RunForecast:
    """The verb `plan`. Raises ManifestInvalid, ConfigInvalid, storage.* for the manifest itself."""
    manifest, jobs, _, _ = choose_jobs(settings)
    rows, gpu = forecast_jobs(jobs, settings, manifest)
    warnings = tuple(_warn_of_eager_blocks(jobs, rows, settings, manifest))
    recipe = get_recipe(settings.recipe or manifest.recipe or DEFAULT_RECIPE)
    fast = _forecast_fast(jobs, rows, recipe, settings, find_device(gpu))
    return RunForecast(tuple(rows), gpu, warnings, fast, _forecast_svdq(jobs, rows, recipe, settings))


def _forecast_svdq(
    jobs: Sequence[Job], rows: Sequence[Forecast], recipe: Recipe, settings: PlanSettings
) -> SvdqForecast | None:
    """Return the SvdqForecast, or None for another recipe. Jobs that cannot be planned count as 0 seconds."""
    if not recipe.fp4 or PRECISIONS[recipe.compute].layout != "svdq":
        return None
    forecaster = get_family(recipe).forecaster(recipe, _local_models(settings))
    if (file := forecaster.file_bytes()) is None:
        return None
    seconds = dict[str, float]()
    gpus = [gpu for gpu in DEVICES if recipe.compute in gpu.matmul]
    for job, row in zip(jobs, rows, strict=True):
        if row.plan is None or row.fps is None:
            continue
        for gpu in gpus:
            plan = forecaster.plan(row.plan.frames, (row.plan.width, row.plan.height), job.options, gpu)
            between = forecast_interpolation(plan, row.fps, job.options, gpu)
            taken = (plan.seconds or 0.0) + (0.0 if between is None else between.seconds or 0.0)
            seconds[gpu.name] = seconds.get(gpu.name, 0.0) + taken
    estimated = frozenset(gpu.name for gpu in gpus if gpu.name in seconds and gpu.estimates(recipe.compute))
    return SvdqForecast(recipe.compute, *file, seconds, estimated)


def _forecast_fast(
    jobs: Sequence[Job], rows: Sequence[Forecast], recipe: Recipe, settings: PlanSettings, gpu: DeviceSpeed | None
) -> FastForecast | None:
    """Return the forecast of the run's recipe if it depends on the device, or of FAST_RECIPE if the run uses the
    default recipe; None otherwise, or if FAST_RECIPE saves no time."""
    own_seconds = [row.seconds for row in rows if row.seconds is not None]
    if gpu is None or not own_seconds or (recipe.name != DEFAULT_RECIPE and not recipe.choice):
        return None
    if recipe.choice:
        return FastForecast(foresee(recipe, gpu), sum(own_seconds))
    fast = get_recipe(FAST_RECIPE)
    forecaster, found = get_family(fast).forecaster(fast, _local_models(settings)), list[float]()
    for job, row in zip(jobs, rows, strict=True):
        if row.plan is None or row.seconds is None:
            continue
        between = row.seconds - (row.plan.seconds or 0.0)  # of interpolation, which does not depend on the recipe
        plan = forecaster.plan(row.plan.frames, (row.plan.width, row.plan.height), job.options, gpu)
        found.append((plan.seconds or 0.0) + between)
    if sum(found) > (1 - LEAST_GAIN) * sum(own_seconds):
        return None
    return FastForecast(foresee(fast, gpu), sum(found), sum(own_seconds))


def choose_gpu(asked: str | None, recipe: Recipe) -> DeviceSpeed | None:
    """Return the GPU whose seconds are forecast: `asked`, else this machine's first; None if there is none.

    Raises ConfigInvalid if the GPU `asked` is unknown or does not compute in the recipe's precision.
    """
    here = None if asked else _first_gpu()
    gpu = find_device(asked or (here.name if here else None))
    if asked and gpu is None:
        raise ConfigInvalid(f"GPU {asked!r} is not known", todo=f"Use one of {', '.join(d.name for d in DEVICES)}")
    if asked and gpu is not None and recipe.compute not in gpu.matmul:
        raise ConfigInvalid(
            f"{gpu.name} has no {recipe.compute}, which recipe {recipe.name!r} needs",
            todo=f"Use a recipe in one of its precisions: {', '.join(gpu.matmul)}",
        )
    return gpu


def _first_gpu() -> Gpu | None:
    """Return this machine's first GPU, from the driver, without torch; None if there is none."""
    from runner.verbs.probes import ProbeFailed, Probes

    try:
        gpus = Probes().driver().gpus
    except ProbeFailed:
        return None
    return gpus[0] if gpus else None


def foreseen_mode(asked: str, peaks: Sequence[Mapping[str, int]], free: int | None) -> str | None:
    """Return the memory mode of a run: `asked`, or for `auto` the first that fits every job; None if not known.

    `peaks`: for each job, mode → bytes, the mode with the most memory first. `free`: bytes on the GPU; None: not known.
    """
    if asked != "auto":
        return asked
    if free is None or not peaks:
        return None
    most = {mode: max(peak[mode] for peak in peaks) for mode in peaks[0]}
    return next((mode for mode, peak in most.items() if peak <= free), list(most)[-1])


def _warn_of_eager_blocks(
    jobs: Sequence[Job], rows: Sequence[Forecast], settings: PlanSettings, manifest: Manifest
) -> list[str]:
    """Return at most one warning, for the largest job, that blocks will run eagerly on the GPU. Empty without a GPU."""
    here = None if settings.gpu else _first_gpu()
    planned = [(row.plan, job.options) for job, row in zip(jobs, rows, strict=True) if row.plan is not None]
    if not planned or not (settings.gpu or here):
        return []
    forecaster, recipe = _open_forecaster(settings, manifest)
    peaks = [row.memory for row in rows if row.memory]
    mode = foreseen_mode(manifest.memory or "auto", peaks, here.free_bytes if here else None)
    why = forecaster.why_eager(mode) if mode is not None else ""
    if not why:
        return []
    largest = max(planned, key=lambda one: one[0].width * one[0].height * one[0].segment_frames)
    return [forecaster.eager_words(why, *largest, choose_gpu(settings.gpu, recipe))]


def forecast_jobs(jobs: Sequence[Job], settings: PlanSettings, manifest: Manifest) -> tuple[list[Forecast], str | None]:
    """Return one row per job, in order, and the name of the GPU of the forecast seconds.

    Inputs on S3 are downloaded to read their sizes, each once, even if many jobs use it.
    """
    forecaster, recipe = _open_forecaster(settings, manifest)
    gpu = choose_gpu(settings.gpu, recipe)
    roots = parse_roots(settings.input_root)
    poses = DiskCache(settings.cache / POSES_FOLDER)
    rows: list[Forecast | None] = [None] * len(jobs)
    with _OpenInputs() as inputs:
        for number in sorted(range(len(jobs)), key=lambda number: jobs[number].video):
            rows[number] = _forecast_row(jobs[number], forecaster, gpu, roots, inputs, poses)
    return [row for row in rows if row is not None], gpu.name if gpu is not None else None


def forecast_seconds(
    jobs: Sequence[Job], settings: RunSettings, manifest: Manifest, within_s: float = FORECAST_S
) -> dict[str, float]:
    """Return job id → forecast seconds on this machine's first GPU, or TFLOP without a known GPU, to compare jobs.

    Inputs in a bucket are fetched to read their sizes. After about `within_s` seconds no further job is forecast. The
    result lacks those jobs, and jobs whose inputs cannot be read.
    """
    forecaster, recipe = _open_forecaster(settings, manifest)
    gpu = choose_gpu(None, recipe)
    roots = parse_roots(settings.input_root)
    deadline = time.monotonic() + within_s
    found: dict[str, float] = {}
    with _OpenInputs() as inputs:
        for job in sorted(jobs, key=lambda job: job.video):
            if time.monotonic() > deadline:
                break
            row = _forecast_row(job, forecaster, gpu, roots, inputs)
            if row.plan is not None:  # else the worker that gets the job reports the error
                found[job.id] = row.tflop if row.seconds is None else row.seconds
    return found


def _open_forecaster(settings: ModelSettings, manifest: Manifest) -> tuple[Forecaster, Recipe]:
    recipe = get_recipe(settings.recipe or manifest.recipe or DEFAULT_RECIPE)
    return get_family(recipe).forecaster(recipe, _local_models(settings)), recipe


def _local_models(settings: ModelSettings) -> Path | None:
    return Path(settings.models) if settings.models and not is_remote(settings.models) else None


def _forecast_row(
    job: Job,
    forecaster: Forecaster,
    gpu: DeviceSpeed | None,
    roots: Sequence[str],
    inputs: _OpenInputs,
    poses: DiskCache | None = None,
) -> Forecast:
    """Forecast one job. `poses`: the pose cache, to foresee the run's warnings; without it there are none."""
    try:
        for _, uri in input_places(job):
            check_inside(uri, roots)
        size, reader, sampled = _shape(job, inputs)
        plan = forecaster.plan(len(sampled.indices), size, job.options, gpu)
        warnings: list[str] = []
        if poses is not None and not job.official:
            warnings = foreseen_warnings(job.options, reader, sampled, size, poses)
        return Forecast(
            job.id,
            plan,
            memory=forecaster.memory(plan, job.options, gpu),
            fps=sampled.fps,
            interpolation=forecast_interpolation(plan, sampled.fps, job.options, gpu),
            warnings=tuple(warnings),
        )
    except (RunnerError, OSError) as error:
        return Forecast(job.id, None, as_runner_error(error, where=job.id))


def _shape(job: Job, inputs: _OpenInputs) -> tuple[tuple[int, int], VideoReader, Sampled]:
    """Return (output size, video, sampled frames) as `run` chooses them. Raises input.*, storage.*."""
    options = job.options
    if job.official:
        stat_input(job.reference)
    reference = None if job.official else inputs.image_size(job.reference)
    reader = inputs.video(job.video, parity=options.preprocess.parity and not job.official)
    video_size = (reader.info.width, reader.info.height)
    if reference is None:  # official files: the video has the job's rate and size already
        sampled = reader.sample("source", options.start_s, options.max_frames)
        size = video_size
    else:
        parity = options.preprocess.parity
        sampled = reader.sample(options.fps, options.start_s, options.max_frames, parity=parity)
        size = output_size(options, reference, video_size)
    return size, reader, sampled


class _OpenInputs:
    """Inputs shared by jobs. Each is fetched once if jobs with the same video follow one another."""

    def __init__(self) -> None:
        self._sizes: dict[str, tuple[int, int]] = {}
        self._video: tuple[tuple[str, bool], VideoReader] | None = None  # (place, parity), the open video
        self._held = ExitStack()  # the open video and its folder

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._held.close()

    def image_size(self, place: str) -> tuple[int, int]:
        """(width, height)."""
        if place not in self._sizes:
            with TemporaryDirectory(prefix="video-lab-") as folder:
                self._sizes[place] = image_size(fetch_input(place, Path(folder)))
        return self._sizes[place]

    def video(self, place: str, *, parity: bool) -> VideoReader:
        """Return the video. It stays open until another one is requested."""
        if self._video is None or self._video[0] != (place, parity):
            self._held.close()
            self._video = None
            folder = self._held.enter_context(TemporaryDirectory(prefix="video-lab-"))
            reader = VideoReader(fetch_input(place, Path(folder)), parity=parity)
            self._video = (place, parity), self._held.enter_context(reader)
        return self._video[1]

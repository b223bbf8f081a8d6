"""Forecast: what each job of a manifest will denoise and cost, from its inputs' sizes and the models' shapes.

In:   jobs, a recipe, the costs of the models. Out: a `Forecast` a job; one with an error where an input cannot be read.
Never: weights. Without a model store the published model's shapes are assumed.
"""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from runner.errors import RunnerError
from runner.generation.base import SegmentPlan
from runner.generation.cost import PRODUCTION, Costs
from runner.generation.plan import plan_job
from runner.generation.recipes import DEFAULT_RECIPE, Recipe, get_recipe
from runner.generation.store import ModelStore
from runner.manifest import Job, Manifest
from runner.preprocess.images import image_size
from runner.preprocess.sizing import output_size
from runner.storage import fetch_input, is_remote
from runner.video import VideoReader

__all__ = ["Forecast", "forecast_job", "forecast_jobs"]


@dataclass(frozen=True)
class Forecast:
    job_id: str
    plan: SegmentPlan | None
    error: RunnerError | None = None


def forecast_jobs(jobs: Sequence[Job], arguments: argparse.Namespace, manifest: Manifest) -> list[Forecast]:
    """One row a job, in order. S3 inputs are downloaded to be measured, and removed again."""
    recipe = get_recipe(arguments.recipe or manifest.recipe or DEFAULT_RECIPE)
    local = arguments.models and not is_remote(arguments.models)
    costs = ModelStore(Path(arguments.models)).costs(recipe) if local else PRODUCTION
    rows = []
    for job in jobs:
        try:
            rows.append(Forecast(job.id, forecast_job(job, recipe, costs)))
        except RunnerError as error:
            rows.append(Forecast(job.id, None, error))
    return rows


def forecast_job(job: Job, recipe: Recipe, costs: Costs) -> SegmentPlan:
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
    return plan_job(len(sampled.indices), size, options, recipe, costs)

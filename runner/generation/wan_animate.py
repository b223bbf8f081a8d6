"""Wan-Animate: Wan2.2-Animate-14B as a `Generator`: loaded once, every job streams through it.

In:   a model store, a recipe, a device; then requests. Out: segments of frames.
Never: manifests, outputs, retries. A failed or abandoned job leaves nothing behind that another job could see.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import TYPE_CHECKING, Any

from runner.errors import RunnerError, WeightsCorrupt
from runner.generation.base import OnStep, Request, Segment, SegmentPlan
from runner.generation.cost import Costs
from runner.generation.device import as_out_of_memory, make_probe, pick_device
from runner.generation.job_loras import JobLoras
from runner.generation.loading import load_pipeline
from runner.generation.plan import plan_job
from runner.generation.recipes import Recipe
from runner.generation.schedule import make_scheduler
from runner.generation.store import ModelStore
from runner.metrics import StageTimer
from runner.options import JobOptions

if TYPE_CHECKING:
    from runner.generation.pipeline import AnimatePipeline, ConditionWindow

__all__ = ["AnimateConditions", "WanAnimateGenerator"]


@dataclass
class AnimateConditions:
    """One prepared job: skeletons, faces and scene by the window, and what was asked of them."""

    source: Any  # preprocess.pipeline.PoseConditions
    prompt: str
    options: JobOptions

    @property
    def frames(self) -> int:
        return self.source.frames

    @property
    def fps(self) -> Fraction:
        return self.source.fps

    @property
    def width(self) -> int:
        return self.source.width

    @property
    def height(self) -> int:
        return self.source.height

    @property
    def start_s(self) -> float:
        return self.source.start_s

    @property
    def report(self) -> Mapping[str, Any]:
        return self.source.report

    @property
    def reference(self) -> Any:
        """The character, PIL RGB."""
        return self.source.reference

    def window(self, start: int, stop: int) -> ConditionWindow:
        return self.source.window(start, stop)

    def close(self) -> None:
        self.source.close()


class WanAnimateGenerator:
    """Fulfils `base.Generator`. Made by `load`; the constructor takes what `load` found."""

    def __init__(
        self,
        pipeline: AnimatePipeline,
        recipe: Recipe,
        preprocessor: Any,
        *,
        costs: Costs,
        identity: Mapping[str, str],
        description: Mapping[str, Any],
        loras: JobLoras | None = None,
    ) -> None:
        self.pipeline: AnimatePipeline | None = pipeline
        self.recipe = recipe
        self.preprocessor = preprocessor
        self.costs = costs
        self.identity = dict(identity)
        self.description = dict(description)
        self.probe = make_probe(pipeline.compute_device)
        self.loras = loras

    @classmethod
    def load(
        cls,
        store: ModelStore,
        recipe: Recipe,
        *,
        device: str = "auto",
        assume: Mapping[str, str] | None = None,
        cache: Path | None = None,
    ) -> WanAnimateGenerator:
        """Check the store, load every model onto the device, say what was chosen and why.

        `assume`: how to read a published FP4 file where it does not say itself. `cache`: folder to keep poses in.
        Raises WeightsMissing, WeightsCorrupt, ConfigInvalid (a device that is not there) or OutOfMemory.
        """
        from runner.preprocess.cache import PoseCache
        from runner.preprocess.pipeline import Preprocessor

        picked, why = pick_device(device)
        store.check(recipe)
        poses = PoseCache(cache / "poses") if cache is not None else None
        preprocessor = Preprocessor.load(
            store.detector,
            store.pose,
            device=picked.type,
            dwpose=store.dwpose,
            segmenter=store.segmenter,
            cache=poses,
        )
        begin = time.monotonic()
        pipeline, placement = load_pipeline(store, recipe, picked, assume)
        loras = JobLoras(pipeline.transformer, store, recipe)
        beside = loras.use(JobOptions())  # those of every job, now: one that does not fit is no job's fault
        if beside:
            placement = {**placement, "loras_beside": dict(beside)}
        description = {
            "model": "Wan2.2-Animate-14B",
            "recipe": recipe.as_dict(),
            "device": str(picked),
            "device_why": why,
            **placement,
            "load_s": round(time.monotonic() - begin, 3),
            "preprocess": dict(preprocessor.description),
        }
        return cls(
            pipeline,
            recipe,
            preprocessor,
            costs=store.costs(recipe),
            identity=store.identities(recipe),
            description=description,
            loras=loras,
        )

    def plan(self, frames: int, size: tuple[int, int], options: JobOptions) -> SegmentPlan:
        return plan_job(frames, size, options, self.recipe, self.costs)

    def prepare(self, request: Request, timer: StageTimer) -> AnimateConditions:
        face_size = self._loaded.transformer.config.motion_encoder_size
        if request.official is not None:
            from runner.preprocess.official_files import OfficialConditions

            made = OfficialConditions.open(request.official, request.options, face_size=face_size, timer=timer)
            return AnimateConditions(made, request.prompt, request.options)
        source = self.preprocessor.prepare(
            request.reference,
            request.video,
            request.options,
            mask=request.mask,
            face_size=face_size,
            timer=timer,
        )
        return AnimateConditions(source, request.prompt, request.options)

    def generate(
        self, conditions: AnimateConditions, plan: SegmentPlan, timer: StageTimer, on_step: OnStep | None = None
    ) -> Iterator[Segment]:
        pipeline, recipe = self._loaded, self.recipe
        scheduler = make_scheduler(recipe.scheduler, grid=recipe.grid, shift=recipe.shift)  # its history is the job's
        if self.loras is not None:
            with timer.stage("attach_loras", on_device=True):
                try:
                    self.loras.use(conditions.options)
                except WeightsCorrupt as error:
                    error.stops_run = False  # this job asked for that LoRA, the others did not
                    raise
        try:
            yield from pipeline.render(
                conditions, conditions.prompt, conditions.options, plan, scheduler, timer, on_step
            )
        except RunnerError:
            raise
        except (RuntimeError, MemoryError) as err:
            exhausted = as_out_of_memory(
                err,
                pipeline.compute_device,
                doing=f"rendering {plan.segment_frames} frames of {plan.width}x{plan.height}",
            )
            if exhausted is None:
                raise
            raise exhausted from err

    def close(self) -> None:
        self.pipeline = None
        if self.probe is not None:
            import torch

            torch.cuda.empty_cache()

    @property
    def _loaded(self) -> AnimatePipeline:
        if self.pipeline is None:
            raise RuntimeError("the generator was closed")
        return self.pipeline

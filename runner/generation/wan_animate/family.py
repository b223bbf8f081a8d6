"""Family: implement `Family` for Wan2.2-Animate-14B: its files in a model store, its costs, and its generator.

In:   a folder of models, a recipe, the run's settings. Out: digests, forecasts, a loaded generator.
Never: manifests, outputs. Nothing here imports torch before a model is loaded.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING

from runner.forecast.bytes import weights_of
from runner.forecast.flops import PRODUCTION, Costs
from runner.generation.families import EngineSettings
from runner.generation.protocol import SegmentPlan
from runner.generation.runtime.eager_blocks import eager_by_plan, eager_cost, eager_words
from runner.generation.runtime.fast_choice import foresee, foresee_any
from runner.generation.runtime.memory_plan import Window, choose_plan, forecast_memory, make_plan
from runner.generation.segments import plan_job
from runner.generation.wan_animate.loras import check_job_extras, digest_job_extras
from runner.spec.options import JobOptions
from runner.spec.recipes import MODES, Mode, Recipe
from runner.weights.digests import FileDigests
from runner.weights.resolved import ResolvedRecipe, resolve_recipe
from runner.weights.store import ModelStore, wanted, wanted_by_jobs

if TYPE_CHECKING:
    from runner.forecast.seconds import DeviceSpeed
    from runner.generation.wan_animate.generator import WanAnimateGenerator

__all__ = ["WAN_ANIMATE", "WanAnimateFamily", "WanAnimateForecaster", "WanAnimateModel"]


@dataclass(frozen=True)
class WanAnimateForecaster:
    """Implements `families.Forecaster`. `transformer`: its file or folder in a store; None: no store is known."""

    recipe: Recipe
    costs: Costs
    transformer: Path | None = None

    def plan(
        self, frames: int, size: tuple[int, int], options: JobOptions, device: DeviceSpeed | None = None
    ) -> SegmentPlan:
        return plan_job(frames, size, options, foresee(self.recipe, device), self.costs, device)

    def memory(self, plan: SegmentPlan, options: JobOptions, device: DeviceSpeed | None = None) -> dict[str, int]:
        recipes = foresee_any(self.recipe) if device is None else (foresee(self.recipe, device),)
        return {mode: max(self._peak(mode, recipe, plan, options) for recipe in recipes) for mode in MODES}

    def _peak(self, mode: Mode, recipe: Recipe, plan: SegmentPlan, options: JobOptions) -> int:
        window = (plan.width, plan.height, plan.segment_frames)
        leanest, _ = choose_plan(mode, recipe, self.costs, 0, windows=[Window(*window)])
        return forecast_memory(
            leanest,
            recipe,
            self.costs,
            *window,
            guided=options.guidance_scale > 1,
            interpolates=options.output.interpolate > 1,
        ).peak

    def file_bytes(self) -> tuple[int, bool]:
        if self.transformer is not None and self.transformer.is_file():
            return self.transformer.stat().st_size, True
        shape, recipe = self.costs.transformer, self.recipe
        return round(weights_of(shape, fp4=recipe.fp4, compute=recipe.compute).total), False

    def why_eager(self, mode: str) -> str:
        return eager_by_plan(make_plan(mode, self.recipe))

    def eager_words(self, why: str, plan: SegmentPlan, options: JobOptions, device: DeviceSpeed | None) -> str:
        size, guided = (plan.width, plan.height), options.guidance_scale > 1
        return eager_words(why, eager_cost(self.costs, device, size, plan.segment_frames, guided=guided))


@dataclass(frozen=True)
class WanAnimateModel:
    """Implements `families.ResolvedModel`."""

    models: ResolvedRecipe
    settings: EngineSettings

    @cached_property
    def identity(self) -> Mapping[str, str]:
        """Digests of the weights, and the settings that change poses or the reading of weights."""
        identity = dict(self.models.digests)
        identity |= {f"assume.{name}": value for name, value in self.settings.assume.items()}
        if self.settings.pose_precision != "fp32":  # other poses, other frames
            identity["pose_precision"] = self.settings.pose_precision
        return identity

    @property
    def files(self) -> tuple[Path, ...]:
        """Every file that decides the frames, component by component."""
        return tuple(path for files in self.models.files.values() for path in files)

    def job_identity(self, options: JobOptions, *, has_mask: bool) -> Mapping[str, str]:
        return digest_job_extras(self.models.store, options, has_mask, self.settings.cache)

    def load(self) -> WanAnimateGenerator:
        from runner.generation.wan_animate.generator import WanAnimateGenerator

        return WanAnimateGenerator.load(self.models, self.settings)


@dataclass(frozen=True)
class WanAnimateFamily:
    """Implements `families.Family`."""

    def wanted(self, recipe: Recipe) -> Callable[[str], bool]:
        return wanted(recipe)

    def wanted_by_jobs(self, options: Iterable[JobOptions]) -> Callable[[str], bool]:
        return wanted_by_jobs(options)

    def resolve(self, models: Path, recipe: Recipe, settings: EngineSettings) -> WanAnimateModel:
        store = ModelStore(models, FileDigests(saves=settings.saves))
        return WanAnimateModel(resolve_recipe(store, recipe, settings.cache), settings)

    def check_job(self, models: Path, options: JobOptions, *, has_mask: bool) -> None:
        check_job_extras(ModelStore(models), options, has_mask)

    def forecaster(self, recipe: Recipe, models: Path | None) -> WanAnimateForecaster:
        if models is None:
            return WanAnimateForecaster(recipe, PRODUCTION)
        resolved = ResolvedRecipe(ModelStore(models), recipe)
        return WanAnimateForecaster(recipe, resolved.costs, resolved.variant.transformer)


WAN_ANIMATE = WanAnimateFamily()

"""Families: the model families that a recipe can name, one row each, and what starting a run asks of a family.

In:   a recipe's `family`. Out: the `Family`, imported when it is first asked for. Never: weights, devices, jobs.

A second model is one folder beside this file that has a `Family`, a row of FAMILIES, and a recipe that names it. What
starts a run (`run`, `plan`, `validate`, `doctor`) knows a model by these protocols alone.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from runner.errors import ConfigInvalid
from runner.generation.protocol import Generator, JobDemand, SegmentPlan
from runner.spec.options import JobOptions
from runner.spec.recipes import Recipe

if TYPE_CHECKING:
    from runner.forecast.seconds import DeviceSpeed
    from runner.preprocess.networks.providers import Precision, TensorrtMode

__all__ = ["FAMILIES", "EngineSettings", "Family", "Forecaster", "ResolvedModel", "get_family"]

# Name → "module:attribute" of its Family. Imported when a recipe names it.
FAMILIES: dict[str, str] = {
    "wan-animate": "runner.generation.wan_animate.family:WAN_ANIMATE",
}


@dataclass(frozen=True)
class EngineSettings:
    """What a run says about the engine, beside the recipe. Of the run, never of a job."""

    device: str = "auto"  # auto | cpu | cuda | cuda:N
    memory: str = "auto"  # a memory mode, or auto
    cache: Path | None = None  # folder for poses, embeddings, digests, compiled code; None: nothing is kept
    assume: Mapping[str, str] = field(default_factory=dict)  # how to read a file where it does not say
    pose_precision: Precision = "fp32"
    tensorrt: TensorrtMode = "off"
    saves: bool = True  # False: what `cache` keeps is read, and nothing is added to it while the model is resolved
    processes: int = 1  # that share this machine: caches in its memory are divided among them
    # Of the jobs to be ready for, asked when the model is loaded, since it may read inputs; none: nothing is known.
    demands: Callable[[], Sequence[JobDemand]] = tuple


class Forecaster(Protocol):
    """What jobs will cost, from shapes alone: no weights, no torch, no device."""

    def plan(
        self, frames: int, size: tuple[int, int], options: JobOptions, device: DeviceSpeed | None = None
    ) -> SegmentPlan:
        """Segments and cost of `frames` frames at `size` (width, height); with a `device` also its seconds."""
        ...

    def memory(self, plan: SegmentPlan, options: JobOptions, device: DeviceSpeed | None = None) -> Mapping[str, int]:
        """Memory mode → peak bytes on the device while a job of this plan is rendered, in the mode's leanest form.

        What a recipe leaves to the device is as `device` would choose; without one, what takes most.
        """
        ...

    def file_bytes(self) -> tuple[int, bool] | None:
        """Bytes of the file of the model's weights, and whether it lies in a store: else they are forecast from shapes.
        None where nothing is known of it."""
        return None

    def why_eager(self, mode: str) -> str:
        """Why the model's blocks run eagerly on a GPU in memory mode `mode`; empty where they are compiled."""
        return ""

    def eager_words(self, why: str, plan: SegmentPlan, options: JobOptions, device: DeviceSpeed | None) -> str:
        """The sentence that blocks run eagerly on a GPU, because of `why`, with the cost for jobs of this plan."""
        ...


class ResolvedModel(Protocol):
    """A recipe's model, found and checked in one store, not loaded."""

    @property
    def identity(self) -> Mapping[str, str]:
        """Name → identity of all that decides the frames beside the recipe's fields and the jobs; for fingerprints."""
        ...

    @property
    def files(self) -> Sequence[Path]:
        """Those that `load` reads."""
        ...

    def job_identity(self, options: JobOptions, *, has_mask: bool) -> Mapping[str, str]:
        """The same of what one job adds, e.g. its LoRAs. Raises JobWeightsMissing, JobWeightsCorrupt, ConfigInvalid."""
        ...

    def load(self) -> Generator[Any]:
        """Load it. Raises WeightsCorrupt, ConfigInvalid (a device that is not there), OutOfMemory."""
        ...


class Family(Protocol):
    """One model family. Everything but `ResolvedModel.load` works without torch."""

    def wanted(self, recipe: Recipe) -> Callable[[str], bool]:
        """Which keys of a remote model store to copy for `recipe`."""
        ...

    def wanted_by_jobs(self, options: Iterable[JobOptions]) -> Callable[[str], bool]:
        """Which keys of a remote model store to copy to check what jobs ask for beyond their recipe."""
        ...

    def resolve(self, models: Path, recipe: Recipe, settings: EngineSettings) -> ResolvedModel:
        """Find and check the recipe's files in the folder `models`. Raises WeightsMissing, WeightsCorrupt."""
        ...

    def check_job(self, models: Path, options: JobOptions, *, has_mask: bool) -> None:
        """Is there what one job asks for beyond its recipe? Headers only. Raises JobWeightsMissing and the like."""
        ...

    def forecaster(self, recipe: Recipe, models: Path | None) -> Forecaster:
        """Of the models in the folder `models`, else of the published ones. Raises WeightsMissing, WeightsCorrupt."""
        ...


def get_family(recipe: Recipe) -> Family:
    """The family that `recipe` names. Raises ConfigInvalid for one that is not in FAMILIES."""
    row = FAMILIES.get(recipe.family)
    if row is None:
        raise ConfigInvalid(
            f"recipe {recipe.name!r} names the model family {recipe.family!r}, which is not known",
            todo=f"Families: {', '.join(FAMILIES)}",
        )
    module, _, attribute = row.partition(":")
    family: Family = getattr(import_module(module), attribute)
    return family

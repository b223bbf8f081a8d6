"""Families: list the model families that a recipe can name, and define the interface of a family.

In:   a recipe's `family`. Out: the `Family`, imported at its first use. Never: weights, devices, jobs.

A second model is a folder beside this file with a `Family`, a row of FAMILIES, and a recipe that names it. The verbs
that start a run (`run`, `plan`, `validate`, `doctor`) use a model only through these protocols.
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
    """Settings of the engine for a whole run, beside the recipe."""

    device: str = "auto"  # auto | cpu | cuda | cuda:N
    memory: str = "auto"  # a memory mode, or auto
    cache: Path | None = None  # folder for poses, embeddings, digests, compiled code; None: nothing is cached
    assume: Mapping[str, str] = field(default_factory=dict)  # how to read a file that does not define it
    pose_precision: Precision = "fp32"
    tensorrt: TensorrtMode = "off"
    saves: bool = True  # False: `cache` is read, and nothing is written to it while the model is resolved
    processes: int = 1  # processes on this machine, which share the memory for caches
    # Demands of the jobs to come. Called when the model is loaded, as it may read inputs. Empty: not known.
    demands: Callable[[], Sequence[JobDemand]] = tuple


class Forecaster(Protocol):
    """Forecast what jobs will cost, from shapes alone: without weights, torch or a device."""

    def plan(
        self, frames: int, size: tuple[int, int], options: JobOptions, device: DeviceSpeed | None = None
    ) -> SegmentPlan:
        """Return segments and cost of `frames` frames at `size` (width, height), with seconds if `device` is given."""
        ...

    def memory(self, plan: SegmentPlan, options: JobOptions, device: DeviceSpeed | None = None) -> Mapping[str, int]:
        """Memory mode → peak bytes on the device while a job of this plan is rendered, with the mode's smallest plan.

        Choices that a recipe leaves to the device are made for `device`; without one, the largest forecast counts.
        """
        ...

    def file_bytes(self) -> tuple[int, bool] | None:
        """Bytes of the weights' file, and whether the file is in a store: else they are forecast from shapes.

        None if nothing is known.
        """
        return None

    def why_eager(self, mode: str) -> str:
        """Why the model's blocks run eagerly on a GPU in memory mode `mode`; empty if they are compiled."""
        return ""

    def eager_words(self, why: str, plan: SegmentPlan, options: JobOptions, device: DeviceSpeed | None) -> str:
        """Return the sentence that blocks run eagerly on a GPU, with the reason and the cost for jobs of this plan."""
        ...


class ResolvedModel(Protocol):
    """A recipe's model, found and checked in one store, but not loaded."""

    @property
    def identity(self) -> Mapping[str, str]:
        """Name → digest of all that decides the frames beside the recipe's fields and the jobs; for fingerprints."""
        ...

    @property
    def files(self) -> Sequence[Path]:
        """The files that `load` reads."""
        ...

    def job_identity(self, options: JobOptions, *, has_mask: bool) -> Mapping[str, str]:
        """The same for a job's extras, e.g. its LoRAs. Raises JobWeightsMissing, JobWeightsCorrupt, ConfigInvalid."""
        ...

    def load(self) -> Generator[Any]:
        """Load the model. Raises WeightsCorrupt, ConfigInvalid (no such device), OutOfMemory."""
        ...


class Family(Protocol):
    """One model family. Everything except `ResolvedModel.load` works without torch."""

    def wanted(self, recipe: Recipe) -> Callable[[str], bool]:
        """Return a test for the keys of a remote model store that `recipe` needs."""
        ...

    def wanted_by_jobs(self, options: Iterable[JobOptions]) -> Callable[[str], bool]:
        """Return a test for the keys of a remote model store that are needed to check the extras of jobs."""
        ...

    def resolve(self, models: Path, recipe: Recipe, settings: EngineSettings) -> ResolvedModel:
        """Find and check the recipe's files in the folder `models`. Raises WeightsMissing, WeightsCorrupt."""
        ...

    def check_job(self, models: Path, options: JobOptions, *, has_mask: bool) -> None:
        """Check the headers of the job's extras. Raises JobWeightsMissing, JobWeightsCorrupt, ConfigInvalid."""
        ...

    def forecaster(self, recipe: Recipe, models: Path | None) -> Forecaster:
        """Return the forecaster of the models in `models`, else of the published ones.

        Raises WeightsMissing, WeightsCorrupt.
        """
        ...


def get_family(recipe: Recipe) -> Family:
    """Return the family that `recipe` names. Raises ConfigInvalid if it is not in FAMILIES."""
    row = FAMILIES.get(recipe.family)
    if row is None:
        raise ConfigInvalid(
            f"recipe {recipe.name!r} names the model family {recipe.family!r}, which is not known",
            todo=f"Families: {', '.join(FAMILIES)}",
        )
    module, _, attribute = row.partition(":")
    family: Family = getattr(import_module(module), attribute)
    return family

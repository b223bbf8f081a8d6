"""LoRAs of jobs: what is added to the transformer for the job at hand, and taken away again for the next.

In:   the loaded transformer, the store, a job's options. Out: the transformer as if the LoRAs were merged; the identity
of what one job uses beyond the recipe's models, or JobWeightsMissing for what the store lacks.
Never: the weights' files. Nothing is reloaded or requantised: FP4 layers get the factors beside their weights.
"""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import structlog

from runner.errors import job_weight_errors
from runner.spec.options import JobOptions
from runner.weights.resolved import ResolvedRecipe
from runner.weights.store import ModelStore, check_lora

__all__ = [
    "JobLoras",
    "check_own",
    "lora_parts",
    "own_parts",
]

Wanted = tuple[tuple[Path, float], ...]


def lora_parts(store: ModelStore, options: JobOptions, cache: Path | None = None) -> dict[str, str]:
    """`lora.<name>` → sha256 and strength of a job's own LoRAs, for its fingerprint.

    Raises JobWeightsMissing, ConfigInvalid, and JobWeightsCorrupt for a damaged header or a wrong dtype: before the
    first job, not when its turn comes.
    """
    found = _checked_loras(store, options)
    with job_weight_errors():
        digests = store.file_digests([path for path, _ in found.values()], cache)
    return {f"lora.{name}": f"{digests[path]} x {strength:g}" for name, (path, strength) in found.items()}


def check_own(store: ModelStore, options: JobOptions, has_mask: bool) -> None:
    """Whether what one job asks for beyond the recipe's models is there and whole, as far as headers tell.

    Raises JobWeightsMissing, JobWeightsCorrupt, ConfigInvalid. Nothing is hashed.
    """
    _checked_loras(store, options)
    store.own_models(options, has_mask)


def _checked_loras(store: ModelStore, options: JobOptions) -> dict[str, tuple[Path, float]]:
    found = store.loras(_named(options), replace=options.mode == "replace")
    with job_weight_errors():
        for path, _ in found.values():
            check_lora(path)
    return found


def _named(options: JobOptions) -> tuple[tuple[str, float], ...]:
    return tuple((lora.name, lora.strength) for lora in options.loras)


class JobLoras:
    """Keeps track of what is attached, so that jobs with the same LoRAs in a row share the work.

    Of the files, those in use now and those of every job are held on the host, and no others.
    """

    def __init__(self, transformer: Any, models: ResolvedRecipe) -> None:
        self._transformer, self._store = transformer, models.store
        self._always: Wanted = tuple((path, 1.0) for path in models.variant.loras)
        self._attached: Wanted = ()
        self._read: dict[Path, Any] = {}

    def use(self, options: JobOptions) -> Mapping[str, int]:
        """Attach what this job wants and nothing else. Returns tensors applied, and how many found no target.

        Raises JobWeightsMissing, JobWeightsCorrupt; WeightsCorrupt where the job has no LoRA of its own. A file that
        cannot be read changes nothing; one that does not fit leaves the transformer without any LoRA. Either way the
        next call attaches what its job wants.
        """
        own = self._store.loras(_named(options), replace=options.mode == "replace")
        with job_weight_errors() if own else nullcontext():
            return self._use((*self._always, *own.values()))

    def _use(self, wanted: Wanted) -> Mapping[str, int]:
        from runner.quantization.lora.apply import attach, detach

        if wanted == self._attached:
            return {}
        loras = [self._lora(path, strength) for path, strength in wanted]
        keep = {path for path, _ in wanted + self._always}
        self._read = {path: lora for path, lora in self._read.items() if path in keep}
        self._attached = ()
        if not loras:
            detach(self._transformer)
            return {}
        plan = attach(self._transformer, loras)
        self._attached = wanted
        log = structlog.get_logger()
        names = ", ".join(f"{path.stem} x {strength:g}" for path, strength in wanted)
        log.debug("loras_attached", loras=names, tensors=plan.tensors, untargeted=len(plan.untargeted))
        for key in plan.untargeted[:5]:
            log.warning("lora_without_target", tensor=key)
        return {"tensors": plan.tensors, "untargeted": len(plan.untargeted)}

    def _lora(self, path: Path, strength: float) -> Any:
        from dataclasses import replace

        from runner.quantization.lora.apply import read_lora

        if path not in self._read:
            self._read[path] = read_lora(path)
        return replace(self._read[path], strength=strength)


def own_parts(store: ModelStore, options: JobOptions, has_mask: bool, cache: Path | None = None) -> dict[str, str]:
    """Asked of every job before the first one starts, so that what is missing is known then. Raises as `check_own`."""
    parts = lora_parts(store, options, cache)
    for name, files in store.own_models(options, has_mask).items():
        with job_weight_errors():
            digests = store.file_digests(files, cache)
        parts[name] = " ".join(digests[path] for path in files)
    return parts

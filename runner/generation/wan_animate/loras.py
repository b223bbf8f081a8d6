"""LoRAs of jobs: attach a job's LoRAs to the transformer, and detach them before the next job.

In:   the loaded transformer, the store, a job's options. Out: a transformer that computes as if the LoRAs were merged;
digests of the job's extras (files that it needs beyond the recipe's models), or JobWeightsMissing.
Never: files of the recipe's models. Nothing is reloaded or requantised: FP4 layers keep LoRA factors beside their
weights.
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
    "check_job_extras",
    "digest_job_extras",
    "lora_parts",
]

FilesAndStrengths = tuple[tuple[Path, float], ...]


def lora_parts(store: ModelStore, options: JobOptions, cache: Path | None = None) -> dict[str, str]:
    """Return `lora.<name>` → sha256 and strength of a job's LoRAs, for its fingerprint.

    Raises JobWeightsMissing, ConfigInvalid, and JobWeightsCorrupt for a damaged header or a wrong dtype. This is called
    before the first job starts.
    """
    found = _checked_loras(store, options)
    with job_weight_errors():
        digests = store.file_digests([path for path, _ in found.values()], cache)
    return {f"lora.{name}": f"{digests[path]} x {strength:g}" for name, (path, strength) in found.items()}


def check_job_extras(store: ModelStore, options: JobOptions, has_mask: bool) -> None:
    """Check by their headers that the job's extras are in the store and whole. Nothing is hashed.

    Raises JobWeightsMissing, JobWeightsCorrupt, ConfigInvalid.
    """
    _checked_loras(store, options)
    store.job_extras(options, has_mask)


def _checked_loras(store: ModelStore, options: JobOptions) -> dict[str, tuple[Path, float]]:
    found = store.loras(_named(options), replace=options.mode == "replace")
    with job_weight_errors():
        for path, _ in found.values():
            check_lora(path)
    return found


def _named(options: JobOptions) -> tuple[tuple[str, float], ...]:
    return tuple((lora.name, lora.strength) for lora in options.loras)


class JobLoras:
    """Attach LoRAs, and keep them attached while the next job has the same ones.

    The LoRAs in use and those of every job stay in host memory, and no others.
    """

    def __init__(self, transformer: Any, models: ResolvedRecipe) -> None:
        self._transformer, self._store = transformer, models.store
        self._always: FilesAndStrengths = tuple((path, 1.0) for path in models.variant.loras)
        self._attached: FilesAndStrengths = ()
        self._read: dict[Path, Any] = {}

    def use(self, options: JobOptions) -> Mapping[str, int]:
        """Attach this job's LoRAs and no others. Return how many tensors were applied, and how many have no target.

        Raises JobWeightsMissing, JobWeightsCorrupt, or WeightsCorrupt if the job has no LoRAs. A file that cannot be
        read changes nothing. A file that does not fit leaves the transformer without any LoRA. In both cases the next
        call attaches the LoRAs of its job.
        """
        loras = self._store.loras(_named(options), replace=options.mode == "replace")
        with job_weight_errors() if loras else nullcontext():
            return self._use((*self._always, *loras.values()))

    def _use(self, wanted: FilesAndStrengths) -> Mapping[str, int]:
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


def digest_job_extras(
    store: ModelStore, options: JobOptions, has_mask: bool, cache: Path | None = None
) -> dict[str, str]:
    """Digest the job's extras. Called for every job before the first one starts. Raises as `check_job_extras`."""
    parts = lora_parts(store, options, cache)
    for name, files in store.job_extras(options, has_mask).items():
        with job_weight_errors():
            digests = store.file_digests(files, cache)
        parts[name] = " ".join(digests[path] for path in files)
    return parts

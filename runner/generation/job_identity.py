"""Job identity: what one job uses beyond the recipe's models, by content, for its fingerprint.

In:   the store, a job's options. Out: name → digest, or WeightsMissing for what the store lacks: LoRAs, DWPose, the
segmenter of a replace job without a mask. Never: loading them.
"""

from __future__ import annotations

from pathlib import Path

from runner.generation.job_loras import lora_parts
from runner.generation.store import ModelStore
from runner.options import JobOptions

__all__ = ["own_parts"]


def own_parts(store: ModelStore, options: JobOptions, has_mask: bool, cache: Path | None = None) -> dict[str, str]:
    """Asked of every job before the first one starts, so that what is missing is known then."""
    parts = lora_parts(store, options, cache)
    for name, files in store.own_models(options, has_mask).items():
        digests = store.lora_identities(files, cache)
        parts[name] = " ".join(digests[path] for path in files)
    return parts

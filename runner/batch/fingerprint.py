"""Fingerprint: one digest of everything that determines a job's frames.

In:   a job, the digests of its inputs, of the recipe and of the weights. Out: flat parts and one sha256 over them.
Never: devices, memory modes, the position in a batch: these must not change the frames.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from typing import Any

from runner.records.record import InputRecord
from runner.redact import redact, redact_tree
from runner.spec.hashed_fields import OPTION_KEYS, RECIPE_KEYS, hashed_values, introduced_defaults
from runner.spec.manifest import Job
from runner.spec.options import JobOptions
from runner.spec.recipes import Recipe

__all__ = ["OUTPUT_VERSION", "differences", "fingerprint", "fingerprint_parts", "public_parts", "settings_digest"]

READER = "reader"  # a part of jobs whose driving video must be read by decord; other jobs do not have it
OUTPUT_VERSION = 2  # increase it when the same parts give other frames: then every job runs again


def fingerprint_parts(
    job: Job, inputs: Mapping[str, InputRecord], model: Mapping[str, str], reader: str | None = None
) -> dict[str, Any]:
    """Return the parts, flat, JSON-able and sorted: `input.video`, `prompt`, `options.seed`, `model.transformer`, …

    `model`: the digests of recipe and weights by name. Of an input, only the content counts, not its place.
    `reader`: the driving video's, from `InputIndex.find_reader`. None (PyAV) adds no part.
    """
    parts: dict[str, Any] = {"output_version": OUTPUT_VERSION, "prompt": job.prompt}
    if reader is not None:
        parts[READER] = reader
    parts |= {f"input.{name}": record.identity for name, record in inputs.items()}
    parts |= {f"options.{key}": value for key, value in hashed_values(job.options, OPTION_KEYS).items()}
    parts |= {f"model.{name}": value for name, value in model.items()}
    return dict(sorted(parts.items()))


def fingerprint(parts: Mapping[str, Any]) -> str:
    """Return the sha256 (hex) of `parts`."""
    text = json.dumps(parts, sort_keys=True, ensure_ascii=False, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()


def settings_digest(parts: Mapping[str, Any]) -> str:
    """Return 16 hex digits of a sha256 over `parts` without the inputs and the reader.

    It shows whether a record was made with the job's present settings, without reading an input. `parts`: those of a
    record, or `public_parts` of a job (both are equal).
    """
    settings = {key: value for key, value in parts.items() if key != READER and not key.startswith("input.")}
    return fingerprint(settings)[:16]


def public_parts(parts: Mapping[str, Any]) -> dict[str, Any]:
    """Return the parts as a record contains them: with secrets masked."""
    found: dict[str, Any] = redact_tree(dict(parts))
    return found


def differences(old: Mapping[str, Any], new: Mapping[str, Any]) -> list[str]:
    """Return the changes as texts for people: `options.seed: 41 → 42`.

    If one side lacks an option or recipe field that was added later, its default at that time counts.
    """
    changes = []
    defaults = _defaults_when_added()
    for key in sorted(old.keys() | new.keys()):
        unset = defaults.get(key, "(unset)")
        before, after = old.get(key, unset), new.get(key, unset)
        if before != after:
            changes.append(f"{key}: {_short(before)} → {_short(after)}")
    return changes


def _defaults_when_added() -> dict[str, Any]:
    """Return part → the value that counts if a record lacks the part."""
    options, recipe = introduced_defaults(JobOptions, OPTION_KEYS), introduced_defaults(Recipe, RECIPE_KEYS)
    found = {f"options.{key}": value for key, value in options.items()}
    found[READER] = "pyav"
    return found | {f"model.recipe.{key}": str(value) for key, value in recipe.items()}


def _short(value: Any, length: int = 24) -> str:
    text = redact(str(value)) or "(empty)"  # redact before cutting: half a password is not recognised
    if text.startswith("sha256:"):
        text = text[: len("sha256:") + 8]
    return text if len(text) <= length else text[: length - 1] + "…"

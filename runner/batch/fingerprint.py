"""Fingerprint: the identity of all that decides a job's frames.

In:   a job, its inputs' contents, the recipe's and weights' identities. Out: flat parts and one sha256 over them.
Never: devices, memory modes, places in a batch; these must not change the frames.
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

READER = "reader"  # the part of jobs whose driving video decord reads otherwise than PyAV; the others do not have it
OUTPUT_VERSION = 2  # raise when the same parts would render other frames: every job then runs again


def fingerprint_parts(
    job: Job, inputs: Mapping[str, InputRecord], identity: Mapping[str, str], reader: str | None = None
) -> dict[str, Any]:
    """Flat, JSON-able, sorted: `input.video`, `prompt`, `options.seed`, `model.transformer`, …

    `identity` is the generator's: recipe and weights. Where an input lies is no part of it, only what it holds.
    `reader`: of the driving video, as `InputIndex.find_reader` gives it; None, for PyAV, adds no part.
    """
    parts: dict[str, Any] = {"output_version": OUTPUT_VERSION, "prompt": job.prompt}
    if reader is not None:
        parts[READER] = reader
    parts |= {f"input.{name}": record.identity for name, record in inputs.items()}
    parts |= {f"options.{key}": value for key, value in hashed_values(job.options, OPTION_KEYS).items()}
    parts |= {f"model.{name}": value for name, value in identity.items()}
    return dict(sorted(parts.items()))


def fingerprint(parts: Mapping[str, Any]) -> str:
    text = json.dumps(parts, sort_keys=True, ensure_ascii=False, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()


def settings_digest(parts: Mapping[str, Any]) -> str:
    """16 hex digits over `parts` without the inputs' contents and the reader that these need.

    It shows whether a record was made with the settings that a job has now; no input has to be read for it. `parts`:
    those that a record keeps, or `public_parts` of a job: these are equal.
    """
    settings = {key: value for key, value in parts.items() if key != READER and not key.startswith("input.")}
    return fingerprint(settings)[:16]


def public_parts(parts: Mapping[str, Any]) -> dict[str, Any]:
    """The parts as a record keeps them: secrets are masked."""
    found: dict[str, Any] = redact_tree(dict(parts))
    return found


def differences(old: Mapping[str, Any], new: Mapping[str, Any]) -> list[str]:
    """What changed, in words that a person can act on: `options.seed: 41 → 42`.

    A later option or recipe field that one side lacks has the default there that it was introduced with.
    """
    changes = []
    introduced = _introduced()
    for key in sorted(old.keys() | new.keys()):
        unset = introduced.get(key, "(unset)")
        before, after = old.get(key, unset), new.get(key, unset)
        if before != after:
            changes.append(f"{key}: {_short(before)} → {_short(after)}")
    return changes


def _introduced() -> dict[str, Any]:
    """Part → what it means that a record does not have it."""
    options, recipe = introduced_defaults(JobOptions, OPTION_KEYS), introduced_defaults(Recipe, RECIPE_KEYS)
    found = {f"options.{key}": value for key, value in options.items()}
    found[READER] = "pyav"
    return found | {f"model.recipe.{key}": str(value) for key, value in recipe.items()}


def _short(value: Any, length: int = 24) -> str:
    text = redact(str(value)) or "(empty)"  # before it is cut: half a password is not known for one
    if text.startswith("sha256:"):
        text = text[: len("sha256:") + 8]
    return text if len(text) <= length else text[: length - 1] + "…"

"""Frozen manifest: write a manifest as JSON lines that mean the same on every machine and at any time.

In:   a `Manifest`. Out: its text, with absolute paths and URIs; the same manifest with other paths.
Never: opens the inputs.

The first line has the run keys and what all jobs have in common. Each further line is a job. Options that are not set
in the manifest are left out, so that a job has the same fingerprint as when the manifest itself is run.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from typing import Any

from runner.errors import ConfigInvalid, InternalError, ManifestInvalid
from runner.spec.manifest import Job, Manifest, parse_manifest
from runner.spec.options import DEFAULT_PROMPT, POSE, REFERENCE
from runner.spec.source import MAX_BYTES

__all__ = ["freeze_manifest", "replace_places", "write_manifest"]


def freeze_manifest(manifest: Manifest) -> bytes:
    """Return the text of `write_manifest` as UTF-8, after reading it again and comparing the jobs.

    Raises ConfigInvalid if it is too large to be read.
    """
    data = write_manifest(manifest).encode()
    too_large = ConfigInvalid(
        f"the manifest with its {len(manifest.jobs)} jobs written out is too large",
        where=manifest.source,
        todo="Split it into several manifests, or take a part with --only or --limit",
    )
    if len(data) > MAX_BYTES:
        raise too_large
    try:
        found = parse_manifest(data.decode(), base="/", source="frozen.jsonl", foreign=_schemes(manifest))
    except ManifestInvalid as error:
        if "split it" in error.message:  # more than MAX_VALUES values
            raise too_large from error
        raise InternalError(f"the frozen manifest cannot be read: {error.message}", where=manifest.source) from error
    written = [replace(job, line=None) for job in found.jobs]
    expected = [replace(job, line=None) for job in replace_places(manifest, lambda place: place).jobs]
    if (written, found.recipe, found.memory) != (expected, manifest.recipe, manifest.memory):
        raise InternalError(
            "the frozen manifest differs from the manifest", where=manifest.source, todo="Please report it"
        )
    return data


def write_manifest(manifest: Manifest) -> str:
    """Return the manifest as JSON lines. `parse_manifest` reads equal jobs from them, in the same order."""
    lines = [_job_line(job) for job in manifest.jobs]
    defaults: dict[str, Any] = {}
    for key in ("prompt", "options"):
        if (common := _common([line.get(key) for line in lines])) is not None:
            defaults[key] = common
    header: dict[str, Any] = {"version": manifest.version, "recipe": manifest.recipe, "memory": manifest.memory}
    header = {key: value for key, value in header.items() if value is not None}
    if defaults:
        header["defaults"] = defaults
    if (limits := _common([line.get("regression") for line in lines])) is not None:
        header["regression"] = limits
    for line in lines:
        for key, common in (*defaults.items(), ("regression", limits)):
            line[key] = _without(line.get(key), common)
    rows = [header, *({key: value for key, value in line.items() if value is not None} for line in lines)]
    return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)


def replace_places(manifest: Manifest, place: Callable[[str], str]) -> Manifest:
    """Return the manifest with each input path (reference, video, mask, folder of official files) mapped by `place`."""
    return replace(manifest, jobs=tuple(_replaced(job, place) for job in manifest.jobs))


def _replaced(job: Job, place: Callable[[str], str]) -> Job:
    if job.official is None:
        mask = None if job.mask is None else place(job.mask)
        return replace(job, reference=place(job.reference), video=place(job.video), mask=mask)
    folder = place(job.official)
    preprocess = job.options.preprocess.model_copy(update={"official": folder})
    options = job.options.model_copy(update={"preprocess": preprocess})
    reference, video = f"{folder}/{REFERENCE}", f"{folder}/{POSE}"
    return replace(job, reference=reference, video=video, official=folder, options=options)


def _job_line(job: Job) -> dict[str, Any]:
    line: dict[str, Any] = {"id": job.id}
    options = _drop_empty(job.options.model_dump(mode="json", exclude_unset=True)) or {}
    if job.official is None:
        line |= {"reference": job.reference, "video": job.video, "mask": job.mask}
    else:
        options["preprocess"] = options.get("preprocess", {}) | {"from": job.official}
    line["prompt"] = None if job.prompt == DEFAULT_PROMPT else job.prompt
    line["options"] = options or None
    line["regression"] = job.regression.model_dump(mode="json", exclude_none=True) or None
    return line


def _drop_empty(value: Any) -> Any:
    """Return `value` without nulls and empty mappings, which mean the same as a missing key."""
    if not isinstance(value, dict):
        return value
    found = {key: _drop_empty(item) for key, item in value.items()}
    return {key: item for key, item in found.items() if item is not None} or None


def _common(values: list[Any]) -> Any:
    """Return what all values have in common: the value if all are equal; of mappings, the equal keys; None: nothing."""
    first = values[0]
    written = json.dumps(first)  # compared as text: -0.0 equals 0.0, but has another fingerprint
    if all(json.dumps(value) == written for value in values[1:]):
        return first
    if not all(isinstance(value, dict) for value in values):
        return None
    keys = [key for key in first if all(key in value for value in values)]
    common = {key: _common([value[key] for value in values]) for key in keys}
    return {key: value for key, value in common.items() if value is not None} or None


def _without(value: Any, common: Any) -> Any:
    """Return `value` without what is in `common`; None if nothing remains."""
    if common is None or value is None or not isinstance(common, dict):
        return value if common is None else None
    rest = {key: _without(item, common.get(key)) for key, item in value.items()}
    return {key: item for key, item in rest.items() if item is not None} or None


def _schemes(manifest: Manifest) -> set[str]:
    """The schemes of the URIs among the inputs."""
    places = [place for job in manifest.jobs for place in (job.reference, job.video, job.mask or "")]
    return {place.partition("://")[0] for place in places if "://" in place}

"""Submitted places: finds the places of a run that its tasks cannot use, and the local inputs to copy for them.

In:   a manifest, OUT and model store, a platform. Out: the local inputs to copy; ConfigInvalid with every refused place
and its jobs. Never: sending anything.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from runner.errors import ConfigInvalid, RunnerError, as_runner_error, first_few
from runner.launch.platform import Platform
from runner.redact import redact
from runner.spec.manifest import Job, Manifest
from runner.spec.options import official_names
from runner.storage import stat_input

__all__ = ["check_places"]

JOBS_NAMED = 3  # of those that use one place


def _inputs(jobs: Iterable[Job]) -> dict[tuple[str, str], list[Job]]:
    """Return (role, place) → the jobs that read it. Official files are listed by their folder."""
    found: dict[tuple[str, str], list[Job]] = {}
    for job in jobs:
        roles = {"reference": job.reference, "video": job.video, "mask": job.mask}
        for role, place in roles.items() if job.official is None else [("official files", job.official)]:
            if place is not None:
                found.setdefault((role, place), []).append(job)
    return found


def check_places(
    platform: Platform, manifest: Manifest, common: Mapping[str, str], upload_inputs: str | None
) -> dict[str, set[str]]:
    """Return the local inputs to copy: place → names of files in that folder (empty if the place is a file).

    common: places of the whole run, by role. upload_inputs: where local inputs are copied to; None: they are refused.
    Raises ConfigInvalid with every place that the tasks cannot use.
    """
    problems = []
    for role, place in common.items():
        if (problem := _problem(platform, place)) is not None:
            problems.append(f"{role} {place} {problem}")
    if upload_inputs is not None and (problem := _problem(platform, upload_inputs)) is not None:
        problems.append(f"--upload-inputs {upload_inputs} {problem}")
    local: dict[str, set[str]] = {}
    refused = 0
    for (role, place), jobs in _inputs(manifest.jobs).items():
        if upload_inputs is not None and "://" not in place:
            names = {name for job in jobs if job.official for name in official_names(job.options.mode).values()}
            local.setdefault(place, set()).update(names)
            problem = _problem_of_files(place, names)
        else:
            problem = _problem(platform, place)
            refused += problem is not None
        if problem is not None:
            ids = first_few([job.id for job in jobs], JOBS_NAMED)
            problems.append(f"{role} {place} of {ids} {problem}")
    if problems:
        todo = "Put the files where the tasks can read them"
        if refused and platform.problem_of_place("s3://bucket/prefix") is None:
            todo += ", or give --upload-inputs s3://bucket/prefix to copy local inputs"
        places = "1 place" if len(problems) == 1 else f"{len(problems)} places"
        lines = "".join(f"\n  {problem}" for problem in problems)
        raise ConfigInvalid(f"nothing was sent: the tasks cannot use {places}. {todo}{lines}", where=manifest.source)
    return local


def _problem(platform: Platform, place: str) -> str | None:
    if redact(place) != place:
        return "seems to hold a credential, and would be written into files"
    return platform.problem_of_place(place)


def _problem_of_files(place: str, names: Iterable[str]) -> str | None:
    """Return why a local input cannot be copied; None if it can."""
    try:
        for path in [f"{place}/{name}" for name in sorted(names)] or [place]:
            stat_input(path)
    except (RunnerError, OSError) as error:
        found = as_runner_error(error)
        return f"cannot be copied: {found.what}" if found.where == place else f"cannot be copied: {found.message}"
    return None

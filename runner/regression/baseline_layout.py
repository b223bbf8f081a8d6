"""Baseline layout: the keys of all files in a baseline, and the folder of a record.

In:   records, ids, names of devices and recipes. Out: keys. Never: reading or writing.

    <device>/<recipe>/jobs/<id>/approved.json          the approvals of a job, newest first
    <device>/<recipe>/jobs/<id>/<token>/result.json    one approved render: its record,
                                        output.mp4     its output, or its frames: frames/000000.png, …
                                        frames.sha256, people.json, pose.mp4, poster.jpg
    <device>/<recipe>/nights/<time>.<run-id>.json      one night of the history

A device is `cpu` for every CPU, or the name of a GPU.
"""

from __future__ import annotations

import hashlib
import re
from datetime import UTC
from typing import NamedTuple

from runner.records.approval import parse_time
from runner.records.output_layout import FRAMES, JOBS
from runner.records.record import ResultRecord
from runner.spec.matrix import check_id

__all__ = [
    "APPROVALS",
    "CPU",
    "FRAMES_FOLDER",
    "JobName",
    "approvals_key",
    "device_folder",
    "is_night_of",
    "job_prefix",
    "jobs_prefix",
    "name_job",
    "night_key",
    "nights_prefix",
    "recipe_folder",
    "render_prefix",
]

APPROVALS = "approved.json"
FRAMES_FOLDER = FRAMES
CPU = "cpu"
_NIGHTS = "nights/"
_LONGEST = 80  # characters of a device's or recipe's folder
_CPU_NAME = re.compile(r".*, \d+ threads")  # how the generator names a CPU in `computed_by`
_RECIPE = re.compile(r"[a-z0-9]+(?:[+.-][a-z0-9]+)*")


class JobName(NamedTuple):
    """The name of a job's baseline."""

    device: str  # as `device_folder` gives it
    recipe: str  # as `recipe_folder` gives it
    job_id: str


def name_job(record: ResultRecord) -> JobName:
    """Return the baseline's name of a record. Raises ValueError if the record's job id cannot be a folder's name."""
    return JobName(device_folder(record), recipe_folder(record.recipe), check_id(record.job_id))


def device_folder(record: ResultRecord) -> str:
    """Return `cpu`, or the GPU's name as a folder: `NVIDIA H200` becomes `nvidia-h200`.

    Two names share a folder only if they have the same words of ASCII letters and digits; upper case does not matter.
    """
    engine = str(record.engine.get("device", ""))
    computed = record.computed_by.get("device", "")
    if engine.partition(":")[0] == CPU or _CPU_NAME.fullmatch(computed):
        return CPU
    gpus = record.environment.get("gpus")
    listed = str(gpus[0]) if isinstance(gpus, list) and gpus else ""
    return _slug(computed or listed or engine)


def recipe_folder(recipe: str) -> str:
    """Return a recipe's name as a folder: `fp4-distill+fp8` stays unchanged."""
    return recipe if _RECIPE.fullmatch(recipe) and len(recipe) <= _LONGEST and _is_id(recipe) else _slug(recipe)


def _slug(name: str) -> str:
    """Return `name` in lower case with dashes between its words, and with a hash if more than spaces was replaced."""
    slug = "-".join(re.findall("[a-z0-9]+", name.lower() if name.isascii() else ""))
    plain = re.fullmatch("[A-Za-z0-9]+(?:[ -][A-Za-z0-9]+)*", name) is not None
    if plain and slug != CPU and len(slug) <= _LONGEST and _is_id(slug):
        return slug
    digest = hashlib.sha256(name.encode(errors="surrogatepass")).hexdigest()[:16]
    return f"{slug[: _LONGEST - 17] or 'unnamed'}-{digest}".lstrip("-")


def _is_id(name: str) -> bool:
    """Return whether this can be a folder's name on every system. A plus (as in recipes) is allowed inside it."""
    try:
        check_id(name.replace("+", "-"))
    except ValueError:
        return False
    return True


def jobs_prefix(device: str, recipe: str) -> str:
    """Return the prefix of all jobs' folders, with a slash at the end."""
    return f"{device}/{recipe}/{JOBS}"


def job_prefix(name: JobName) -> str:
    """Return the prefix of one job's folder, with a slash at the end."""
    return f"{jobs_prefix(name.device, name.recipe)}{name.job_id}/"


def approvals_key(name: JobName) -> str:
    return job_prefix(name) + APPROVALS


def render_prefix(name: JobName, token: str) -> str:
    """Return the prefix of one approved render's folder, with a slash at the end."""
    return f"{job_prefix(name)}{token}/"


def nights_prefix(device: str, recipe: str) -> str:
    """Return the prefix of all nights, with a slash at the end."""
    return f"{device}/{recipe}/{_NIGHTS}"


def night_key(device: str, recipe: str, made_at: str, run_id: str) -> str:
    """Return the key of a night; keys sort by time. `made_at`: ISO 8601. Raises ValueError for another format."""
    moment = parse_time(made_at).astimezone(UTC).strftime("%Y%m%dT%H%M%SZ")
    return f"{nights_prefix(device, recipe)}{moment}.{_run_name(run_id)}.json"


def is_night_of(key: str, run_id: str) -> bool:
    """Return whether this is the key of a night of `run_id`."""
    return key.rpartition("/")[2].partition(".")[2] == f"{_run_name(run_id)}.json"


def _run_name(run_id: str) -> str:
    return run_id if _is_id(run_id) and "+" not in run_id else _slug(run_id)

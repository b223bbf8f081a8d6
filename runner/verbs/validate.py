"""Validate: checks that the input files of jobs exist, can be opened in their role, and fit together.

In:   jobs, the model store. Out: (job id, error) for every input and every LoRA of a job that a render could not use,
before any GPU time is spent. Never: people in pictures, the recipe's weights, outputs. Pixels are decoded only with
`deep`.
"""

from __future__ import annotations

import tempfile
from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from pathlib import Path

from runner.errors import InputUnreadable, RunnerError, as_runner_error
from runner.records.events import default_logging
from runner.spec.manifest import Job, Manifest, load_manifest
from runner.spec.options import official_names
from runner.spec.recipes import DEFAULT_RECIPE, Recipe, get_recipe
from runner.storage import fetch_input, is_remote, stat_input
from runner.storage.roots import check_inside, parse_roots
from runner.verbs.selection import select_jobs
from runner.verbs.settings import ValidateSettings

__all__ = ["Validation", "check_inputs", "check_models", "input_places", "read_manifest", "validate"]

Problems = Sequence[tuple[str, RunnerError]]  # (job id, error)


@dataclass(frozen=True)
class Validation:
    """A manifest and the problems of its jobs' inputs and models. Without problems every job can be rendered."""

    manifest: Manifest  # with the jobs that `only` and `limit` leave, and no others
    problems: tuple[tuple[str, RunnerError], ...]  # (job id, error), in the order of the jobs


@default_logging()
def validate(settings: ValidateSettings) -> Validation:
    """The verb `validate`. Raises ManifestInvalid, ConfigInvalid, WeightsMissing, storage.*."""
    manifest = read_manifest(settings.manifest)
    manifest = replace(manifest, jobs=tuple(select_jobs(manifest.jobs, settings.only, settings.limit)))
    roots = parse_roots(settings.input_root)
    problems = [] if settings.no_inputs else check_inputs(manifest.jobs, deep=settings.deep, roots=roots)
    if settings.models:
        recipe = get_recipe(manifest.recipe or DEFAULT_RECIPE)
        problems += check_models(manifest.jobs, recipe, settings.models, settings.cache)
        position = {job.id: number for number, job in enumerate(manifest.jobs)}
        problems.sort(key=lambda problem: position[problem[0]])  # stable: a job's inputs before its models
    return Validation(manifest, tuple(problems))


def read_manifest(manifest: str | Manifest) -> Manifest:
    """Return the manifest at a path or URI, or from standard input (`-`). A Manifest is returned as it is."""
    return load_manifest(manifest) if isinstance(manifest, str) else manifest


@dataclass
class _Input:
    """One file in one role, and the jobs that use it in this role."""

    uri: str
    role: str  # reference | video | mask, or that of an official file: pose | face | background | mask
    jobs: list[Job] = field(default_factory=list)


@dataclass
class _Group:
    """Files that must fit each other: a mask and its video, or the files of an official folder."""

    uris: dict[str, str]  # role → file; for an official folder its name
    official: bool
    jobs: list[Job] = field(default_factory=list)


def check_inputs(
    jobs: Iterable[Job], *, deep: bool = False, workers: int = 8, roots: Sequence[str] = ()
) -> list[tuple[str, RunnerError]]:
    """Return the problems of the inputs, in the order of the jobs; empty if all can be used.

    Local images and videos are opened: their headers are read, and a video must have the frames that the job needs.
    Then related files are compared: a mask with its video, the official files of one folder with each other. S3 objects
    must exist and not be empty. Each file is checked once, even if many jobs use it.

    `deep`: S3 objects are fetched, opened and removed again: one file, or one group of related files, per worker at a
    time. Images are decoded completely. A mask must not be black in all frames that the job renders. `roots`: from
    `parse_roots`; a file outside them is refused and not opened.
    """
    jobs = list(jobs)
    inputs: dict[tuple[str, str], _Input] = {}
    groups: dict[tuple[str, ...], _Group] = {}
    for job in jobs:
        for role, uri in input_places(job):
            inputs.setdefault((uri, role), _Input(uri, role)).jobs.append(job)
        uris = {job.official: job.official} if job.official else {"video": job.video, "mask": job.mask or ""}
        if job.official or job.mask:
            mode = job.options.mode if job.official else ""
            groups.setdefault((*uris.values(), mode), _Group(uris, bool(job.official))).jobs.append(job)
    found: dict[str, list[RunnerError]] = defaultdict(list)
    with ThreadPoolExecutor(max_workers=max(1, workers), thread_name_prefix="inputs") as pool:
        for problems in pool.map(lambda item: _check(item, deep, roots), inputs.values()):
            for job_id, error in problems:
                found[job_id].append(error)
        valid = [_without(group, set(found)) for group in groups.values()]  # one reason per job is enough
        for problems in pool.map(lambda group: _check_together(group, deep), valid):
            for job_id, error in problems:
                found[job_id].append(error)
    return [(job.id, error) for job in jobs for error in found.get(job.id, ())]


def check_models(jobs: Sequence[Job], recipe: Recipe, models: str, cache: Path) -> list[tuple[str, RunnerError]]:
    """Return (job id, error) for each job whose LoRA or optional network is missing from the store or damaged.

    `models`: a folder or s3:// URI. From a bucket, the files of the jobs are copied into `cache`. Only headers are
    read. Raises WeightsMissing if the store itself is missing; storage.*.
    """
    from runner.generation.families import get_family
    from runner.storage.sync import sync_models

    family = get_family(recipe)
    store = sync_models(models, cache / "models", family.wanted_by_jobs([job.options for job in jobs]))
    problems = []
    for job in jobs:
        try:
            family.check_job(store, job.options, has_mask=bool(job.mask or job.official))
        except (RunnerError, OSError) as err:
            problems.append((job.id, as_runner_error(err, where=job.id)))
    return problems


def input_places(job: Job) -> Iterator[tuple[str, str]]:
    """Return (role, place) of each input file of a job."""
    if job.official:
        for role, name in official_names(job.options.mode).items():
            yield role, f"{job.official}/{name}"
        return
    yield "reference", job.reference
    yield "video", job.video
    if job.mask is not None:
        yield "mask", job.mask


def _without(group: _Group, jobs: set[str]) -> _Group:
    return _Group(group.uris, group.official, [job for job in group.jobs if job.id not in jobs])


def _check(item: _Input, deep: bool, roots: Sequence[str]) -> Problems:
    """Return (job id, error) for each job that cannot use `item`."""
    try:
        place = check_inside(item.uri, roots)
        info = stat_input(place)
        if info.bytes == 0:
            raise InputUnreadable("the file is empty (0 bytes)", where=item.uri, todo="Copy or upload it again")
        if is_remote(item.uri) and not deep:
            return []
        with tempfile.TemporaryDirectory(prefix="video-lab-") as folder:
            return _open(item, fetch_input(place, Path(folder)), deep)
    except Exception as err:  # a decoder may raise anything; the other inputs are still checked
        error = _error_at(err, item.uri)
        return [(job.id, error) for job in item.jobs]


def _open(item: _Input, path: Path, deep: bool) -> Problems:
    from runner.preprocess.pictures.images import image_size, is_image, load_image

    if item.role == "reference" or (item.role == "mask" and is_image(path)):
        if deep:
            load_image(path)
        else:
            image_size(path)
        return []
    from runner.video import VideoReader

    problems = []
    with ExitStack() as opened:
        readers = {False: opened.enter_context(VideoReader(path))}
        for job in item.jobs if item.role == "video" else ():
            options = job.options
            parity = options.preprocess.parity and not job.official
            try:
                if parity not in readers:
                    readers[parity] = opened.enter_context(VideoReader(path, parity=parity))
                readers[parity].sample(
                    options.fps, options.start_s, options.max_frames, parity=options.preprocess.parity
                )
            except Exception as err:  # of this job alone: others may need fewer frames
                problems.append((job.id, _error_at(err, item.uri)))
    return problems


def _check_together(group: _Group, deep: bool) -> Problems:
    """Return (job id, error) for each job whose inputs are each valid but do not fit together."""
    if not group.jobs or (not deep and any(is_remote(uri) for uri in group.uris.values())):
        return []
    with tempfile.TemporaryDirectory(prefix="video-lab-") as folder:
        if not group.official:
            return _check_mask(group, Path(folder), deep)
        (official,) = group.uris
        where = Path(official)
        if is_remote(official):
            where = Path(folder)
            try:
                for name in official_names(group.jobs[0].options.mode).values():
                    fetch_input(f"{official}/{name}", where).rename(where / name)
            except (RunnerError, OSError) as err:
                return [(job.id, _error_at(err, official)) for job in group.jobs]
        return [problem for job in group.jobs for problem in _check_official(job, where, official)]


def _check_official(job: Job, folder: Path, uri: str) -> Problems:
    from runner.preprocess.official_files import OfficialConditions

    try:
        OfficialConditions.open(folder, job.options).close()
    except Exception as err:
        return [(job.id, _error_at(err, uri))]
    return []


def _check_mask(group: _Group, folder: Path, deep: bool) -> Problems:
    from runner.preprocess.masks.given import GivenMask
    from runner.video import VideoReader

    problems = []
    uri = group.uris["mask"]
    try:
        video, mask = (fetch_input(place, folder / role) for role, place in group.uris.items())
    except (RunnerError, OSError) as err:
        return [(job.id, _error_at(err, uri)) for job in group.jobs]
    for job in group.jobs:
        options = job.options
        try:
            with VideoReader(video, parity=options.preprocess.parity) as reader:
                sampled = reader.sample(
                    options.fps, options.start_s, options.max_frames, parity=options.preprocess.parity
                )
                given = GivenMask(mask, reader.info, sampled)
                try:
                    if deep:
                        given.check_not_empty()
                finally:
                    given.close()
        except Exception as err:
            problems.append((job.id, _error_at(err, uri)))
    return problems


def _error_at(err: Exception, uri: str) -> RunnerError:
    """Return a RunnerError that names the input as in the manifest, not its copy in a scratch folder."""
    error = as_runner_error(err, where=uri)
    if is_remote(uri):
        error.where = uri
    return error

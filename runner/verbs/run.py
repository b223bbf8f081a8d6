"""Run: puts one `run` together from its flags: manifest, shard, storage, weights, engine, batch; then runs it.

In:   the parsed flags. Out: the exit code, a table, and what the batch leaves on the output storage.
Never: how any of the pieces works.
"""

from __future__ import annotations

import argparse
import os
from collections.abc import Callable, Sequence
from contextlib import suppress
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import structlog

from runner.batch.ledger import Ledger
from runner.batch.loop import Batch, Engine
from runner.batch.memory_sampler import MemorySampler
from runner.batch.progress import choose_progress
from runner.batch.scratch import scratch_folder
from runner.batch.shards import Shard, choose_shard, run_id_from_env
from runner.batch.stop import Stop
from runner.batch.summary import SummaryWriter
from runner.errors import ConfigInvalid, RunnerError, WeightsMissing, as_runner_error
from runner.records.events import EventLog
from runner.spec.manifest import Job, Manifest, load_manifest
from runner.storage import check_key, open_storage, probe_writable
from runner.storage.file_hashes import FileHashes
from runner.storage.roots import check_inside, parse_roots
from runner.storage.sync import sync_models
from runner.verbs.sheet import try_draw_sheet
from runner.verbs.tables import print_run
from runner.verbs.validate import input_places

if TYPE_CHECKING:
    from runner.preprocess.networks.providers import NetworkOptions

__all__ = ["build_engine", "choose_jobs", "local_models", "network_options", "run_manifest"]


def run_manifest(arguments: argparse.Namespace) -> int:
    """The verb `run`: everything that can be wrong for all jobs is found before the first starts."""
    manifest, jobs, shard, why = choose_jobs(arguments)
    run_id = arguments.run_id or run_id_from_env(os.environ) or datetime.now(UTC).strftime("%Y%m%dT%H%M%SZ")
    try:
        check_key(f"runs/{run_id}/summary.json")
    except ConfigInvalid as error:
        raise ConfigInvalid(error.what, where="--run-id", todo="It is a folder's name: write e.g. night-7") from error
    roots = parse_roots(arguments.input_root)
    storage = open_storage(arguments.out)
    probe_writable(storage)
    engine = build_engine(arguments, manifest)
    log = structlog.get_logger()
    for job in jobs:  # a LoRA that is not there is told now, not in the middle of the night
        try:
            engine.own(job)
        except (RunnerError, OSError) as error:
            found = as_runner_error(error, where=job.id)
            if found.stops_run:
                raise
            log.warning("job_cannot_run", job=job.id, code=found.code, message=found.message)
    log.info("run", id=run_id, jobs=len(jobs), shard=f"{shard.index}/{shard.count} ({why})", recipe=engine.recipe)

    with scratch_folder(arguments.cache) as scratch:
        progress = choose_progress(len(jobs), arguments.log_format)
        name = f"{shard.index:05d}-of-{shard.count:05d}"
        write_events = partial(storage.append_lines, f"runs/{run_id}/{name}.events.jsonl")
        events = EventLog(write_events, at_once=storage.appends)
        hashes = FileHashes(arguments.cache / "file-hashes.json")
        summary = SummaryWriter(
            storage,
            run_id=run_id,
            shard=name,
            shard_reason=why,
            manifest=manifest.source,
            recipe=engine.recipe,
            job_ids=[job.id for job in jobs],
            events=events,
        )
        stop = Stop(arguments.drain_s)
        batch = Batch(
            jobs,
            engine,
            storage,
            Ledger(
                storage,
                max_attempts=arguments.max_attempts,
                force=arguments.force,
                retry_failed=arguments.retry_failed,
                hashes=hashes,
            ),
            summary,
            events,
            stop=stop,
            scratch=scratch / "jobs",
            progress=progress,
            sampler=MemorySampler(),
            input_roots=roots,
        )
        try:
            with stop.listening():
                code = batch.run()
        finally:
            progress.close()
            with suppress(OSError, RunnerError):  # hashing again is all that it costs
                hashes.save()
        where = [f"outputs: {storage.root}/jobs/", f"summary: {storage.root}/runs/{run_id}/"]
        if arguments.sheet is not None:
            drawn = [job for job in jobs if _lies_inside(job, roots)]
            where.append(try_draw_sheet(drawn, storage, arguments.sheet, scratch, stop))
        with suppress(OSError):  # a full disk behind standard output changes no job
            print_run(summary.lines, summary.counts, where)
        return code


def _lies_inside(job: Job, roots: Sequence[str]) -> bool:
    try:
        for _, uri in input_places(job):
            check_inside(uri, roots)
    except RunnerError:
        return False
    return True


def choose_jobs(arguments: argparse.Namespace) -> tuple[Manifest, list[Job], Shard, str]:
    """The manifest, this shard's jobs of it, the shard, and where the shard came from."""
    manifest = load_manifest(arguments.manifest)
    shard, why = choose_shard(arguments.shard, arguments.shard_count, os.environ)
    return manifest, list(shard.take(manifest.jobs)), shard, why


def build_engine(arguments: argparse.Namespace, manifest: Manifest) -> Engine:
    """The recipe's engine, its weights found and their headers checked, nothing loaded yet.

    Raises WeightsMissing, WeightsCorrupt, ConfigInvalid.
    """
    from runner.generation.families import EngineSettings, get_family
    from runner.generation.runtime.memory_plan import MODES
    from runner.spec.recipes import DEFAULT_RECIPE, get_recipe

    recipe = get_recipe(arguments.recipe or manifest.recipe or DEFAULT_RECIPE)
    family = get_family(recipe)
    memory = arguments.memory or manifest.memory or "auto"
    if memory not in ("auto", *MODES):  # a manifest's was checked with the manifest
        raise ConfigInvalid(f"no memory mode {memory!r}", where="--memory", todo=f"Modes: auto, {', '.join(MODES)}")
    assume: dict[str, str] = {}
    if arguments.assume:
        from runner.quantization.files.assumptions import parse_assumptions

        assume = parse_assumptions(arguments.assume)
    settings = EngineSettings(
        device=arguments.device,
        memory=memory,
        cache=arguments.cache,
        assume=assume,
        pose_precision=arguments.pose_precision,
        tensorrt=arguments.tensorrt,
    )
    model = family.resolve(local_models(arguments, family.wanted(recipe)), recipe, settings)
    return Engine(
        recipe=recipe.name,
        identity={f"recipe.{name}": str(value) for name, value in recipe.effective().items()} | dict(model.identity),
        load=model.load,
        effective=lambda options: options.model_copy(update={"steps": options.steps or recipe.steps}),
        own=lambda job: model.job_identity(job.options, has_mask=bool(job.mask or job.official)),
    )


def network_options(arguments: argparse.Namespace) -> NetworkOptions:
    """What the flags say about the preprocessing's networks."""
    from runner.preprocess.networks.providers import NetworkOptions

    return NetworkOptions(arguments.pose_precision, arguments.tensorrt, arguments.cache)


def local_models(arguments: argparse.Namespace, wanted: Callable[[str], bool]) -> Path:
    """The model store as a local folder, synced from S3 where it is there."""
    if not arguments.models:
        raise WeightsMissing(
            "no model store was named",
            todo="Pass --models DIR or s3://…, or set VIDEO_LAB_MODELS; `video-lab weights demo` makes a tiny one",
        )
    return sync_models(arguments.models, arguments.cache / "models", wanted)

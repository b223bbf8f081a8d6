"""Run: builds one `run` from its settings (manifest, shard, storage, weights, engine, batch) and runs it.

In:   `RunSettings`. Out: a `RunOutcome`; the files that the batch writes to the output storage.
Never: how any of the parts works; printing.
"""

from __future__ import annotations

import hashlib
import os
import threading
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext, suppress
from dataclasses import replace
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from types import MappingProxyType
from typing import Any

import structlog

from runner.batch.job_checkpoint import Checkpoints
from runner.batch.job_source import JobSource, ShardJobs
from runner.batch.ledger import Ledger
from runner.batch.loop import FRAME_BUFFER_BYTES, Batch, Engine
from runner.batch.memory_sampler import MemorySampler
from runner.batch.progress import Progress, SilentProgress
from runner.batch.run_jobs import keep_run_jobs
from runner.batch.scratch import scratch_folder
from runner.batch.shards import AnyShard, Shard, run_id_from_env
from runner.batch.shared_run import SharedRun
from runner.batch.spot import watch
from runner.batch.stop import Stop
from runner.batch.summary import SummaryWriter, exit_code_of_lines
from runner.batch.survey import job_parts
from runner.batch.worker_link import MachineShare
from runner.errors import ConfigInvalid, RunnerError, WeightsMissing, as_runner_error
from runner.finishing.stages import StageSettings, open_stages
from runner.generation.protocol import Generator, JobDemand
from runner.generation.runtime.device import free_host_bytes
from runner.launch.ray_address import parse_on
from runner.launch.ray_cluster import RayCluster
from runner.launch.ray_driver import RayWork, run_on_ray
from runner.preprocess.networks.providers import usable_cpus
from runner.records.events import EventLog, default_logging
from runner.records.library_messages import library_messages_in
from runner.records.output_layout import EVENTS, JOBS, RUN_JOBS, run_file_key, run_folder, run_key
from runner.regression.kept_limits import keep_limits
from runner.spec.manifest import Job, Manifest
from runner.storage import Storage, is_remote, open_storage, probe_conditions, probe_writable
from runner.storage.file_hashes import FileHashes
from runner.storage.roots import parse_roots
from runner.storage.sync import sync_models
from runner.timing import now
from runner.verbs.chosen_jobs import choose_jobs
from runner.verbs.dry_run import decide_lines
from runner.verbs.gpus import find_gpus, places_for, run_processes
from runner.verbs.job_demands import find_demands
from runner.verbs.outcome import RunOutcome, counts_of_lines
from runner.verbs.ray_machine import find_own_gpus, worker_variables
from runner.verbs.settings import ModelSettings, RunSettings
from runner.verbs.sheet import try_draw_sheet
from runner.weights.page_cache import read_into_page_cache

__all__ = ["RunOutcome", "build_engine", "local_models", "run"]

HASHES = "file-hashes.json"  # of inputs and outputs, in the cache folder
ONE_RUNNER = "Run one manifest at a time into this output folder, or give each run its own --out"


@default_logging()
def run(
    settings: RunSettings,
    progress: Progress | None = None,
    *,
    source: JobSource | None = None,
    share: MachineShare | None = None,
) -> RunOutcome:
    """The verb `run`. An error that concerns all jobs is raised before the first job starts.

    `source`: gives the jobs instead of this shard of the manifest, e.g. a mailbox. The manifest's run keys still apply.
    `share`: for one of the processes that `settings.gpus` or `settings.on` starts.

    Blocks until the run has ended. In the main thread SIGINT and SIGTERM end it as on the command line. In another
    thread signals are not handled, and the event `signals_ignored` is logged. Raises ManifestInvalid, ConfigInvalid,
    WeightsMissing, WeightsCorrupt, storage.*. An error of one job is in that job's line.
    """
    begun = now()
    if source is not None and (settings.only or settings.limit is not None or settings.dry_run):
        raise ConfigInvalid(
            "--only, --limit and --dry-run select jobs of the manifest, but these jobs come from a source",
            todo="Leave out these flags",
        )
    if settings.dry_run:
        return _dry_run(settings, begun)
    if settings.gpus is not None:
        return _run_on_gpus(settings, progress or SilentProgress(), source)
    if settings.on is not None:
        return _run_on_ray(settings, progress or SilentProgress(), source)
    manifest, chosen, shard, why = choose_jobs(settings)
    jobs: Sequence[Job] = chosen if source is None else source.jobs
    every_job = manifest.jobs if source is None else jobs
    source = source or ShardJobs(shard.arrange(chosen))
    run_id = _choose_run_id(settings)
    roots = parse_roots(settings.input_root)
    storage = open_storage(settings.out)
    not_exclusive = probe_conditions(storage)
    engine = _build_engine_for(jobs, settings, manifest, roots, share)
    log = structlog.get_logger()
    _check_job_extras(engine, jobs)
    if every_job:  # else the driver that fills the source has written them
        _keep_manifest(storage, run_id, every_job, settings, manifest, engine)
    _log_run(run_id, jobs, engine, storage, {} if shard == Shard(0, 1) else {"shard": f"{shard} ({why})"}, share)

    progress = progress or SilentProgress()
    with scratch_folder(settings.cache) as scratch:
        write_events = partial(storage.append_lines, run_key(run_id, shard.name, EVENTS))
        events = EventLog(write_events, at_once=storage.appends)
        hashes = FileHashes(settings.cache / HASHES)
        summary = SummaryWriter(
            storage,
            run_id=run_id,
            shard=shard.name,
            shard_reason=why,
            manifest=manifest.source,
            recipe=engine.recipe,
            job_ids=[job.id for job in jobs],
            events=events,
        )
        stop = Stop(settings.drain_s) if share is None else share.stop
        ledger = Ledger(
            storage,
            max_attempts=settings.max_attempts,
            force=settings.force,
            retry_failed=settings.retry_failed,
            hashes=hashes,
            since=begun,
            exclusive=not_exclusive is None,
        )
        if not_exclusive is not None:
            events.emit("leases_are_warnings", level="warning", reason=not_exclusive, todo=ONE_RUNNER)
        batch = Batch(
            source,
            engine,
            storage,
            ledger,
            summary,
            events,
            stop=stop,
            scratch=scratch / "jobs",
            progress=progress,
            sampler=MemorySampler(),
            input_roots=roots,
            checkpoints=_checkpoints(settings, storage, ledger),
            frame_buffer_bytes=FRAME_BUFFER_BYTES // (1 if share is None else share.processes),
        )
        in_main_thread = threading.current_thread() is threading.main_thread()
        if not in_main_thread and share is None:  # Python hands signals to the main thread alone
            log.info("signals_ignored", why="the run is not in the main thread")
        progress.started(len(jobs))
        try:
            listening = stop.listening() if in_main_thread and share is None else nullcontext()
            with listening, watch(settings.spot, stop, events), library_messages_in(events.note):
                code = batch.run()
        finally:
            progress.close()
            with suppress(OSError, RunnerError):  # without the file the next run hashes again
                hashes.save()
        sheet = None
        if settings.sheet is not None:
            sheet = try_draw_sheet(jobs, summary.lines, storage, settings.sheet, scratch, stop, roots)
    return RunOutcome(
        exit_code=code,
        run_id=run_id,
        shard=shard,
        shard_reason=why,
        counts=MappingProxyType(summary.counts),
        lines=tuple(summary.lines),
        outputs=f"{storage.root}/{JOBS}",
        summary=f"{storage.root}/{run_folder(run_id)}",
        sheet=sheet,
        error=batch.error,
    )


def _keep_manifest(
    storage: Storage, run_id: str, jobs: Sequence[Job], settings: RunSettings, manifest: Manifest, engine: Engine
) -> None:
    """Write the parts of the manifest that later commands need: its jobs and their regression limits."""
    keep_limits(storage, run_id, jobs)
    keep_run_jobs(
        storage,
        run_id,
        jobs,
        lambda job: job_parts(engine, job, {}, engine.own(job)),
        manifest=manifest.source,
        recipe=engine.recipe,
        force=settings.force,
    )


def _check_job_extras(engine: Engine, jobs: Sequence[Job]) -> None:
    """Warn, before the run starts, of each job whose weights are missing."""
    for job in jobs:
        try:
            engine.own(job)
        except (RunnerError, OSError) as error:
            found = as_runner_error(error, where=job.id)
            if found.stops_run:
                raise
            structlog.get_logger().warning("job_cannot_run", job=job.id, code=found.code, message=found.message)


def _dry_run(settings: RunSettings, begun: str) -> RunOutcome:
    """Return what a run would do now. No GPU is needed, not even for `--gpus`, and no cluster for `--on`."""
    reason = ""
    if settings.gpus is not None:
        reason = f"--gpus {settings.gpus}: all jobs, shared among its processes"
    elif settings.on is not None:
        reason = f"--on {settings.on}: all jobs, handed out to its workers"
    if reason:
        settings = replace(settings, gpus=None, on=None, workers=None, shard="any", shard_count=None)
    manifest, jobs, shard, why = choose_jobs(settings)
    roots = parse_roots(settings.input_root)
    engine = build_engine(settings, manifest)
    ledger = Ledger(
        open_storage(settings.out),
        max_attempts=settings.max_attempts,
        force=settings.force,
        retry_failed=settings.retry_failed,
        hashes=FileHashes(settings.cache / HASHES),
        since=begun,
    )
    found = decide_lines(jobs, engine, ledger, roots)
    lines = tuple(line for line, _ in found)
    return RunOutcome(
        exit_code=exit_code_of_lines(lines),
        run_id=_choose_run_id(settings),
        shard=shard,
        shard_reason=reason or why,
        counts=MappingProxyType(counts_of_lines(lines)),
        lines=lines,
        outputs=f"{ledger.storage.root}/{JOBS}",
        summary="",
        sheet=None if settings.sheet is None else "contact sheet: not drawn, this is a dry run",
        actions=MappingProxyType({line.id: action for line, action in found}),
    )


def _checkpoints(settings: RunSettings, storage: Storage, ledger: Ledger) -> Checkpoints | None:
    """Return the place for finished segments; None if they are not kept."""
    if settings.checkpoint == "off":
        return None
    if settings.checkpoint == "out":
        return Checkpoints(storage, ledger.leases.fence)
    root = storage.root if is_remote(storage.root) else os.path.abspath(storage.root)
    name = hashlib.sha256(os.fsencode(root)).hexdigest()[:16]
    return Checkpoints(open_storage(settings.cache / "checkpoints" / name))


def _run_on_gpus(settings: RunSettings, progress: Progress, source: JobSource | None) -> RunOutcome:
    """Run one process per GPU. An error that concerns all of them is raised here, once."""
    if source is not None:
        raise ConfigInvalid(
            "--gpus takes its jobs from the manifest, not from a source",
            todo="Start one process per GPU and call run() in each",
        )
    gpus = find_gpus(str(settings.gpus), os.environ)
    shared = replace(settings, gpus=None, shard="any", shard_count=None, device="cuda")
    manifest, jobs, shard, _ = choose_jobs(shared)
    run_id = _choose_run_id(settings)
    parse_roots(settings.input_root)  # raises for an invalid root
    storage = open_storage(settings.out)
    probe_writable(storage)
    engine = build_engine(shared, manifest)
    places, stop = places_for(gpus, os.environ), Stop(settings.drain_s)
    _log_run(run_id, jobs, engine, storage, {"gpus": [place.name for place in places]})
    found = run_processes(
        replace(shared, manifest=manifest, run_id=run_id, sheet=None),
        places,
        run,
        [job.id for job in jobs],
        progress,
        stop=stop,
        read_files=lambda go_on: read_into_page_cache(engine.files(), free_host_bytes(), go_on),
    )
    reason = f"--gpus {settings.gpus}: one process on each of {', '.join(place.name for place in places)}"
    return _shared_outcome(settings, found, (shard, reason), run_id, jobs, storage, stop)


def _run_on_ray(settings: RunSettings, progress: Progress, source: JobSource | None) -> RunOutcome:
    """Run workers of a Ray cluster: one per GPU, or on CPUs. An error that concerns all of them is raised here."""
    from runner.verbs.plan import forecast_seconds  # imports readers of images and videos, which other runs do without

    if source is not None:
        raise ConfigInvalid(
            "--on takes its jobs from the manifest, not from a source", todo="Call run() in each worker instead"
        )
    gpus = find_own_gpus(settings.workers) if parse_on(str(settings.on)) is None else []
    device = settings.device if settings.workers is None else "cpu"
    shared = replace(settings, on=None, workers=None, shard="any", shard_count=None, device=device)
    manifest, jobs, shard, _ = choose_jobs(shared)
    run_id = _choose_run_id(settings)
    roots = parse_roots(settings.input_root)
    storage = open_storage(settings.out)
    probe_writable(storage)
    engine = build_engine(shared, manifest)
    stop = Stop(settings.drain_s)
    _check_job_extras(engine, jobs)
    _log_run(run_id, jobs, engine, storage, {"on": settings.on})

    def keep() -> tuple[str, bytes] | None:
        _keep_manifest(storage, run_id, manifest.jobs, settings, manifest, engine)
        key = run_file_key(run_id, RUN_JOBS)
        kept = None if is_remote(storage.root) else storage.read_bytes(key)
        return None if kept is None else (key, kept)

    work = RayWork(
        run,
        # Each worker is sent its jobs, one at a time.
        replace(shared, manifest=replace(manifest, jobs=()), run_id=run_id, sheet=None, only=(), limit=None),
        jobs,
        forecast_seconds(jobs, shared, manifest),
        demands=find_demands(jobs, roots),
        workers=settings.workers,
        variables=worker_variables,
        keep=keep,
    )
    cluster = RayCluster(parse_on(str(settings.on)), cpus=settings.workers or max(1, usable_cpus({})), gpus=len(gpus))
    found = run_on_ray(cluster, work, progress, stop=stop)
    workers = "one worker on each GPU" if settings.workers is None else f"{settings.workers} workers at most"
    reason = f"--on {settings.on}: handed out to {workers}"
    return _shared_outcome(settings, found, (shard, reason), run_id, jobs, storage, stop)


def _shared_outcome(
    settings: RunSettings,
    found: SharedRun,
    shard: tuple[Shard | AnyShard, str],
    run_id: str,
    jobs: Sequence[Job],
    storage: Storage,
    stop: Stop,
) -> RunOutcome:
    """Return the outcome of a run from its workers' merged result `found`, and draw the contact sheet once.

    `shard`: the shard and its reason.
    """
    sheet = None
    if settings.sheet is not None:
        roots = parse_roots(settings.input_root)
        with scratch_folder(settings.cache) as scratch:
            sheet = try_draw_sheet(jobs, found.lines, storage, settings.sheet, scratch, stop, roots)
    return RunOutcome(
        exit_code=found.exit_code,
        run_id=run_id,
        shard=shard[0],
        shard_reason=shard[1],
        counts=MappingProxyType(counts_of_lines(found.lines)),
        lines=found.lines,
        outputs=f"{storage.root}/{JOBS}",
        summary=f"{storage.root}/{run_folder(run_id)}",
        sheet=sheet,
        error=found.error,
    )


def _log_run(
    run_id: str,
    jobs: Sequence[Job],
    engine: Engine,
    storage: Storage,
    where: Mapping[str, object],
    share: MachineShare | None = None,
) -> None:
    """Log the first event, at level debug in a process whose parent has logged it already for all processes."""
    log = structlog.get_logger().info if share is None else structlog.get_logger().debug
    log("run", id=run_id, jobs=len(jobs), recipe=engine.recipe, out=storage.root, **where)


def _build_engine_for(
    jobs: Sequence[Job], settings: RunSettings, manifest: Manifest, roots: Sequence[str], share: MachineShare | None
) -> Engine:
    """Return the engine, prepared for all of `jobs`, finished ones too.

    So the memory mode does not depend on how many jobs an earlier run has finished. Neither does the question whether
    a job can be resumed, which depends on the mode.
    """
    if share is None:
        return build_engine(settings, manifest, 1, partial(find_demands, jobs, roots))
    known = share.demands
    demands = (lambda: known) if known else partial(find_demands, jobs, roots)
    engine = build_engine(settings, manifest, share.processes, demands)
    return replace(engine, load=partial(_load_in_turn, share.before_load, engine.load))


def _load_in_turn(before_load: Callable[[], None], load: Callable[[], Generator[Any]]) -> Generator[Any]:
    before_load()
    return load()


def _choose_run_id(settings: RunSettings) -> str:
    return settings.run_id or run_id_from_env(os.environ) or datetime.now(UTC).strftime("%Y%m%dT%H%M%SZ")


def build_engine(
    settings: RunSettings,
    manifest: Manifest,
    processes: int = 1,
    demands: Callable[[], Sequence[JobDemand]] = tuple,
) -> Engine:
    """Return the recipe's engine. Its weights are found and their headers checked; nothing is loaded yet.

    `processes`: number of processes on this machine that share the memory for caches. `demands`: returns the memory
    demands of the jobs; called when the model is loaded.

    Raises WeightsMissing, WeightsCorrupt, ConfigInvalid.
    """
    from runner.generation.families import EngineSettings, get_family
    from runner.spec.recipes import DEFAULT_RECIPE, get_recipe

    recipe = get_recipe(settings.recipe or manifest.recipe or DEFAULT_RECIPE)
    family = get_family(recipe)
    assume: dict[str, str] = {}
    if settings.assume:
        from runner.quantization.files.read_options import parse_read_options

        assume = parse_read_options(settings.assume)
    engine = EngineSettings(
        device=settings.device,
        memory=settings.memory or manifest.memory or "auto",
        cache=settings.cache,
        assume=assume,
        pose_precision=settings.pose_precision,
        tensorrt=settings.tensorrt,
        saves=not settings.dry_run,
        processes=processes,
        demands=demands,
    )
    models = local_models(settings, family.wanted(recipe), download=not settings.dry_run)
    model = family.resolve(models, recipe, engine)
    return Engine(
        recipe=recipe.name,
        identity={f"recipe.{name}": str(value) for name, value in recipe.effective().items()} | dict(model.identity),
        load=model.load,
        effective=lambda options: options.model_copy(update={"steps": options.steps or recipe.steps}),
        own=lambda job: model.job_identity(job.options, has_mask=bool(job.mask or job.official)),
        files=lambda: model.files,
        stages=partial(open_stages, settings=StageSettings(models, settings.device)),
    )


def local_models(settings: ModelSettings, wanted: Callable[[str], bool], *, download: bool = True) -> Path:
    """Return the model store as a local folder. A store on S3 is synced into the cache first.

    Without `download` a store on S3 must be in the cache already.

    Raises WeightsMissing, storage.*.
    """
    if not settings.models:
        raise WeightsMissing(
            "no model store was named",
            todo="Pass --models DIR or s3://…, or set VIDEO_LAB_MODELS; `video-lab weights demo` makes a tiny one",
        )
    return sync_models(settings.models, settings.cache / "models", wanted, download=download)

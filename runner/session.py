"""Session: puts one `run` together from its flags: manifest, shard, storage, weights, engine, batch; then runs it.

In:   the parsed flags. Out: the exit code, a table, and what the batch leaves on the output storage.
Never: how any of the pieces works.
"""

from __future__ import annotations

import argparse
import json
import os
import tempfile
from collections.abc import Callable, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

import structlog
import yaml

from runner.batch import Batch, Engine
from runner.errors import ConfigInvalid, RunnerError, WeightsMissing, as_runner_error
from runner.events import EventLog
from runner.generation.base import Generator
from runner.ledger import Ledger
from runner.manifest import Job, Manifest, load_manifest, parse_manifest
from runner.metrics import MemorySampler
from runner.progress import choose_progress
from runner.report import print_run
from runner.scratch import scratch_folder
from runner.shards import Shard, choose_shard, run_id_from_env
from runner.stop import Stop
from runner.storage import Storage, check_key, fetch_input, open_storage, probe_writable, sync_models
from runner.storage_disk import os_errors
from runner.summary import SummaryWriter

if TYPE_CHECKING:
    from runner.demo.sheet import SheetRow
    from runner.preprocess.providers import NetworkOptions

__all__ = ["build_engine", "choose_jobs", "draw_sheet", "preprocess_one", "run_manifest"]


def run_manifest(arguments: argparse.Namespace) -> int:
    """The verb `run`: everything that can be wrong for all jobs is found before the first starts."""
    manifest, jobs, shard, why = choose_jobs(arguments)
    run_id = arguments.run_id or run_id_from_env(os.environ) or datetime.now(UTC).strftime("%Y%m%dT%H%M%SZ")
    try:
        check_key(f"runs/{run_id}/summary.json")
    except ConfigInvalid as error:
        raise ConfigInvalid(error.what, where="--run-id", todo="It is a folder's name: write e.g. night-7") from error
    storage = open_storage(arguments.out)
    probe_writable(storage)
    engine = build_engine(arguments, manifest)
    for job in jobs:
        engine.own(job)  # a LoRA that is not there is found now, not in the middle of the night
    log = structlog.get_logger()
    log.info("run", id=run_id, jobs=len(jobs), shard=f"{shard.index}/{shard.count} ({why})", recipe=engine.recipe)

    with scratch_folder(arguments.cache) as scratch:
        progress = choose_progress(len(jobs), arguments.log_format)
        events_file = scratch / "events.jsonl"
        summary = SummaryWriter(
            storage,
            run_id=run_id,
            shard=f"{shard.index:05d}-of-{shard.count:05d}",
            shard_reason=why,
            manifest=manifest.source,
            recipe=engine.recipe,
            job_ids=[job.id for job in jobs],
            events_file=events_file,
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
            ),
            summary,
            EventLog(events_file),
            stop=stop,
            scratch=scratch / "jobs",
            progress=progress,
            sampler=MemorySampler(),
        )
        try:
            with stop.listening():
                code = batch.run()
        finally:
            progress.close()
        where = [f"outputs: {storage.root}/jobs/", f"summary: {storage.root}/runs/{run_id}/"]
        if arguments.sheet is not None:
            where.append(_sheet(jobs, storage, arguments.sheet, scratch, stop))
        print_run(summary.lines, summary.counts, where)
        return code


def preprocess_one(arguments: argparse.Namespace) -> int:
    """The verb `preprocess`: what drives the model, as the official script's files, and what was done as JSON."""
    from runner.generation.device import pick_device
    from runner.generation.store import ModelStore
    from runner.preprocess.cache import PoseCache
    from runner.preprocess.official_files import run_preprocess
    from runner.preprocess.pipeline import Preprocessor

    words = {"id": "preprocess", "reference": arguments.reference, "video": arguments.video}
    words |= {"mask": arguments.mask} if arguments.mask else {}
    try:
        options = yaml.safe_load(arguments.options)
    except yaml.YAMLError as error:
        raise ConfigInvalid(f"--options is no YAML ({error})", todo="Write e.g. '{fps: 30, size: 480x832}'") from error
    text = json.dumps({"version": 1, "jobs": [{**words, "options": options}]}, ensure_ascii=False)
    (job,) = parse_manifest(text, base=os.getcwd(), source="the command line").jobs
    store = ModelStore(_local_models(arguments, lambda key: key.startswith("process_checkpoint/")))
    device, _ = pick_device(arguments.device)
    preprocessor = Preprocessor.load(
        store.detector,
        store.pose,
        device=device.type,
        dwpose=store.dwpose,
        segmenter=store.segmenter,
        cache=PoseCache(arguments.cache / "poses"),
        networks=_network_options(arguments),
    )
    arguments.cache.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=arguments.cache) as scratch:
        paths = [fetch_input(uri, Path(scratch)) if uri else None for uri in (job.reference, job.video, job.mask)]
        assert paths[0] is not None and paths[1] is not None
        done = run_preprocess(paths[0], paths[1], arguments.out, job.options, preprocessor, mask=paths[2])
    print(json.dumps(done, indent=2, ensure_ascii=False))
    return 0


def _sheet(jobs: Sequence[Job], storage: Storage, path: Path, scratch: Path, stop: Stop) -> str:
    """Where the sheet is, or why there is none: the jobs are done, and it is no reason to end as if they were not."""
    if stop.draining:
        return "contact sheet: not drawn, the run was stopped"
    try:
        with os_errors(path, writing=True):
            return draw_sheet(jobs, storage, path, scratch)
    except Exception as error:
        return f"contact sheet: not drawn ({as_runner_error(error, where=path).message})"


def draw_sheet(jobs: Sequence[Job], storage: Storage, path: Path, scratch: Path) -> str:
    """Draw every MP4 of `jobs` that is there, whenever it was rendered; where to look, or why there is nothing."""
    from runner.demo.sheet import contact_sheet

    rows, without = [], []
    for job in jobs:
        if storage.exists(f"jobs/{job.id}/output.mp4"):
            try:
                rows.append(_sheet_row(job, storage, scratch / "sheet" / job.id))
            except RunnerError:  # an input or a preview that is gone since
                without.append(job.id)
    if not rows:
        return "contact sheet: no MP4 to draw"
    contact_sheet(rows, path)
    return f"contact sheet: {path}" + (f", without {', '.join(without)}: files are missing" if without else "")


def _sheet_row(job: Job, storage: Storage, folder: Path) -> SheetRow:
    from runner.demo.sheet import job_row

    folder.mkdir(parents=True)
    for name in ("output.mp4", "pose.mp4"):
        storage.fetch(f"jobs/{job.id}/{name}", folder / name)
    reference = fetch_input(job.reference, folder / "reference")
    driver = fetch_input(job.video, folder / "driver")
    start_s = job.options.start_s
    return job_row(job.id, reference, driver, folder / "pose.mp4", folder / "output.mp4", start_s=start_s)


def choose_jobs(arguments: argparse.Namespace) -> tuple[Manifest, list[Job], Shard, str]:
    """The manifest, this shard's jobs of it, the shard, and where the shard came from."""
    manifest = load_manifest(arguments.manifest)
    shard, why = choose_shard(arguments.shard, arguments.shard_count, os.environ)
    return manifest, list(shard.take(manifest.jobs)), shard, why


def build_engine(arguments: argparse.Namespace, manifest: Manifest) -> Engine:
    """The recipe's engine, its weights found and their headers checked, nothing loaded yet.

    Raises WeightsMissing, WeightsCorrupt, ConfigInvalid.
    """
    from runner.generation.job_identity import own_parts
    from runner.generation.memory import MODES
    from runner.generation.recipes import DEFAULT_RECIPE, get_recipe
    from runner.generation.store import ModelStore, wanted

    recipe = get_recipe(arguments.recipe or manifest.recipe or DEFAULT_RECIPE)
    memory = arguments.memory or manifest.memory or "auto"
    if memory not in ("auto", *MODES):  # a manifest's was checked with the manifest
        raise ConfigInvalid(f"no memory mode {memory!r}", where="--memory", todo=f"Modes: auto, {', '.join(MODES)}")
    store = ModelStore(_local_models(arguments, wanted(recipe)))
    store.check(recipe)
    identity = {f"recipe.{name}": str(value) for name, value in recipe.effective().items()}
    identity |= store.identities(recipe, arguments.cache)
    assume: dict[str, str] = {}
    if arguments.assume:
        from runner.quantization.assumptions import parse_assumptions

        assume = parse_assumptions(arguments.assume)
    identity |= {f"assume.{name}": value for name, value in assume.items()}
    networks = _network_options(arguments)
    if networks.pose_precision != "fp32":  # other poses, other frames
        identity["pose_precision"] = networks.pose_precision

    def load() -> Generator[Any]:
        from runner.generation.wan_animate import WanAnimateGenerator

        return WanAnimateGenerator.load(
            store,
            recipe,
            device=arguments.device,
            assume=assume,
            cache=arguments.cache,
            memory=memory,
            networks=networks,
        )

    return Engine(
        recipe=recipe.name,
        identity=identity,
        load=load,
        effective=lambda options: options.model_copy(update={"steps": options.steps or recipe.steps}),
        own=lambda job: own_parts(store, job.options, bool(job.mask or job.official), arguments.cache),
    )


def _network_options(arguments: argparse.Namespace) -> NetworkOptions:
    """What the flags say about the preprocessing's networks."""
    from runner.preprocess.providers import NetworkOptions

    return NetworkOptions(arguments.pose_precision, arguments.tensorrt, arguments.cache)


def _local_models(arguments: argparse.Namespace, wanted: Callable[[str], bool]) -> Path:
    """The model store as a local folder, synced from S3 where it is there."""
    if not arguments.models:
        raise WeightsMissing(
            "no model store was named",
            todo="Pass --models DIR or s3://…, or set VIDEO_LAB_MODELS; `video-lab weights demo` makes a tiny one",
        )
    return sync_models(arguments.models, arguments.cache / "models", wanted)

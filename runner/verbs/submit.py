"""Submit: submits one run to a batch platform as an array of tasks, with its manifest frozen beside it.

In:   `SubmitSettings` and the platform that they name. Out: a `Submitted`: what the platform has accepted, or the files
that describe the job. Never: the format of a platform (launch/ has it); printing.

Steps that change nothing come first: checks of the manifest, the places and the platform's limits, the forecast, and
requests that only read. Then inputs are copied, the manifest is stored, and the job is submitted last.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from pathlib import Path, PurePosixPath
from types import MappingProxyType

import structlog

from runner.errors import ConfigInvalid, InputUnreadable
from runner.launch.aws_batch import AwsBatch
from runner.launch.gcp_batch import GcpBatch
from runner.launch.input_upload import InputUpload, plan_uploads, send_uploads
from runner.launch.kubernetes import Kubernetes
from runner.launch.platform import Platform
from runner.launch.slurm import Slurm
from runner.launch.submission import Submission, SubmittedJob
from runner.launch.task_count import TaskCount, count_tasks, limit_tasks
from runner.records.events import default_logging
from runner.records.output_layout import MANIFEST, run_file_key
from runner.spec.frozen_manifest import freeze_manifest, replace_places
from runner.spec.manifest import Manifest, load_manifest
from runner.storage import local_path
from runner.verbs.flag_values import AUTO, parse_age
from runner.verbs.plan import forecast_jobs
from runner.verbs.selection import select_jobs
from runner.verbs.settings import PlanSettings
from runner.verbs.submit_settings import (
    STARTUP,
    WITHIN,
    SubmitAwsBatchSettings,
    SubmitGcpBatchSettings,
    SubmitKubernetesSettings,
    SubmitSettings,
    SubmitSlurmSettings,
)
from runner.verbs.submitted_places import check_places
from runner.verbs.validate import input_places

__all__ = ["Submitted", "submit_aws_batch", "submit_gcp_batch", "submit_kubernetes", "submit_slurm", "submit_to"]

FOREIGN = ("gs",)  # schemes of inputs that a platform can mount for its tasks, and that the runner does not read
NAME_LENGTH = 40  # characters of a name made here, which every platform accepts


@dataclass(frozen=True)
class Submitted:
    """A run that was submitted, or written to a folder.

    out: as the user named it. folder: of the files, if they were written instead of submitted. ids: of the accepted
    jobs. watch: command lines. uploaded: number of input files sent.
    """

    platform: str
    name: str
    run_id: str
    out: str
    manifest: str  # the frozen manifest, as the tasks name it
    tasks: TaskCount
    jobs: int
    files: tuple[str, ...]
    folder: str | None = None
    ids: tuple[SubmittedJob, ...] = ()
    watch: tuple[str, ...] = ()
    uploaded: int = 0


@default_logging()
def submit_aws_batch(settings: SubmitAwsBatchSettings) -> Submitted:
    """The verb `submit aws-batch`. Raises as `submit_to` does."""
    platform = AwsBatch(
        queue=settings.queue,
        report_queue=settings.report_queue,
        job_role=settings.job_role,
        execution_role=settings.execution_role,
        region=settings.region,
        log_group=settings.log_group,
        share_identifier=settings.share_identifier,
        cache_folder=settings.cache_folder,
    )
    return submit_to(platform, settings)


@default_logging()
def submit_gcp_batch(settings: SubmitGcpBatchSettings) -> Submitted:
    """The verb `submit gcp-batch`. Raises as `submit_to` does."""
    platform = GcpBatch(
        location=settings.location,
        machine_type=settings.machine_type,
        gpu_type=settings.gpu_type,
        project=settings.project,
        service_account=settings.service_account,
    )
    return submit_to(platform, settings)


@default_logging()
def submit_kubernetes(settings: SubmitKubernetesSettings) -> Submitted:
    """The verb `submit kubernetes`. Raises as `submit_to` does."""
    platform = Kubernetes(
        namespace=settings.namespace or Kubernetes.namespace,
        service_account=settings.service_account,
        secret=settings.secret,
        node_selector=settings.node_selector,
        tolerations=settings.toleration,
        context=settings.context,
    )
    return submit_to(platform, settings)


@default_logging()
def submit_slurm(settings: SubmitSlurmSettings) -> Submitted:
    """The verb `submit slurm`. Raises as `submit_to` does."""
    platform = Slurm(
        partition=settings.partition,
        account=settings.account,
        qos=settings.qos,
        constraint=settings.constraint,
        sbatch_flags=settings.sbatch_flag,
        bind=settings.bind,
        cache=settings.cache_folder,
        report_partition=settings.report_partition,
    )
    return submit_to(platform, settings)


def submit_to(platform: Platform, settings: SubmitSettings) -> Submitted:
    """Submit the run, or write it into `render_only`.

    Raises ManifestInvalid, ConfigInvalid, InputUnreadable for jobs that cannot be forecast, ClusterDenied,
    ClusterUnavailable, storage.*.
    """
    manifest = _read_chosen(settings)
    name = settings.name or _name_after(manifest.source)
    run_id = settings.run_id or f"{name}-{datetime.now(UTC):%Y%m%dT%H%M%SZ}"
    out, models = _absolute(settings.out), _absolute(str(settings.models))
    key = run_file_key(run_id, MANIFEST)
    local = check_places(platform, manifest, {"OUT": out, "the model store": models}, settings.upload_inputs)
    draft = _draft(settings, name, run_id, *(platform.place(place) for place in (out, f"{out}/{key}", models)))
    platform.check(draft)  # before a forecast reads inputs for minutes
    tasks = _count_tasks(settings, manifest)
    if tasks.order is not None:
        manifest = replace(manifest, jobs=tuple(manifest.jobs[place] for place in tasks.order))
    structlog.get_logger().info("tasks", tasks=tasks.tasks, reason=tasks.reason)

    uploads = _plan_uploads(local, settings.upload_inputs)
    moved = {upload.place: upload.uri for upload in uploads}
    seen = replace_places(manifest, lambda place: platform.place(moved.get(place, place)))
    frozen = freeze_manifest(seen)
    inputs = {place for job in seen.jobs for _, place in input_places(job)}
    submission = replace(draft, shards=tasks.tasks, inputs=tuple(sorted(inputs)))
    platform.check(submission)
    files = platform.render(submission)
    made = Submitted(
        platform=platform.name,
        name=name,
        run_id=run_id,
        out=out,
        manifest=submission.manifest,
        tasks=tasks,
        jobs=len(manifest.jobs),
        files=(*files, MANIFEST),
    )
    if settings.render_only is not None:
        _write(settings.render_only, files, frozen)
        return replace(made, folder=str(settings.render_only))

    platform.ask(submission)
    _check_run_is_new(platform, out, key, frozen)
    uploaded = send_uploads(uploads, settings.upload_inputs) if settings.upload_inputs else 0
    platform.keep_manifest(out, key, frozen)
    ids = platform.submit(submission, files)
    return replace(made, ids=ids, watch=platform.watch(submission, ids), uploaded=uploaded)


def _draft(settings: SubmitSettings, name: str, run_id: str, out: str, manifest: str, models: str) -> Submission:
    """Return the submission, with one task if their number is not known yet. Places are those seen by a task."""
    return Submission(
        name=name,
        run_id=run_id,
        manifest=manifest,
        out=out,
        models=models,
        image=settings.image,
        shards=1 if settings.shards == AUTO else int(settings.shards),
        share=settings.share,
        gpus_per_task=settings.gpus_per_task,
        cpus=settings.cpus,
        memory_gib=settings.memory_gib,
        disk_gib=settings.disk_gib,
        spot=settings.spot,
        attempts=settings.attempts,
        drain_s=settings.drain_s,
        time_limit_s=round(parse_age(settings.time_limit)),
        environment=_environment(settings.env),
        run_flags=_run_flags(settings),
        gpu_hour=settings.gpu_hour,
    )


def _read_chosen(settings: SubmitSettings) -> Manifest:
    """Return the manifest with the jobs that `only` and `limit` select."""
    place = settings.manifest
    manifest = load_manifest(place, foreign=FOREIGN) if isinstance(place, str) else place
    return replace(manifest, jobs=tuple(select_jobs(manifest.jobs, settings.only, settings.limit)))


def _name_after(source: str) -> str:
    """Return a name that every platform accepts, with a letter first: `manifests/Night 7.yaml` → `night-7`."""
    stem = "run" if source == "-" else PurePosixPath(source).stem
    words = re.sub(r"[^a-z0-9]+", "-", stem.lower()).strip("-") or "run"
    return (words if words[0].isalpha() else f"run-{words}")[:NAME_LENGTH].rstrip("-")


def _absolute(uri: str) -> str:
    return uri.rstrip("/") if "://" in uri else os.path.abspath(local_path(uri))


def _environment(texts: Iterable[str]) -> Mapping[str, str]:
    pairs = (text.partition("=") for text in texts)
    return MappingProxyType({name: value for name, _, value in pairs})


def _run_flags(settings: SubmitSettings) -> tuple[str, ...]:
    flags = (
        ("--recipe", settings.recipe),
        ("--memory", settings.memory),
        ("--max-attempts", settings.max_attempts),
    )
    return tuple(word for name, value in flags if value is not None for word in (name, str(value)))


def _plan_uploads(local: Mapping[str, Iterable[str]], root: str | None) -> list[InputUpload]:
    if root is None or not local:
        return []
    structlog.get_logger().info("hashing_inputs", inputs=len(local))
    return plan_uploads(local, root)


# -- tasks -------------------------------------------------------------------------------------------------------------


def _count_tasks(settings: SubmitSettings, manifest: Manifest) -> TaskCount:
    """Return the requested number of tasks, or the number from the forecast.

    Raises InputUnreadable, which names every job without a forecast.
    """
    if settings.shards != AUTO:
        return limit_tasks(int(settings.shards), len(manifest.jobs), settings.gpus_per_task)
    planned = PlanSettings(manifest=manifest, gpu=settings.gpu, recipe=settings.recipe, models=settings.models)
    rows, gpu = forecast_jobs(manifest.jobs, planned, manifest)
    if wrong := [row for row in rows if row.error is not None]:
        lines = "".join(f"\n  {row.job_id}: {row.error.message}" for row in wrong if row.error is not None)
        jobs = "1 job" if len(wrong) == 1 else f"{len(wrong)} jobs"
        raise InputUnreadable(
            f"nothing was sent: --shards auto forecasts the jobs, but the inputs of {jobs} cannot be read here. "
            f"Give the number of tasks with --shards N, or repair the inputs{lines}",
            where=manifest.source,
        )
    seconds = [row.seconds or 0.0 for row in rows if row.plan is not None]
    longest = max(range(len(seconds)), key=seconds.__getitem__)
    found = count_tasks(
        seconds,
        within_s=parse_age(settings.within or WITHIN),
        startup_s=parse_age(settings.startup or STARTUP),
        gpus_per_task=settings.gpus_per_task,
        share=settings.share,
        longest=f"job {rows[longest].job_id}",
    )
    return replace(found, reason=f"--shards auto on {gpu}: {found.reason}")


# -- files -------------------------------------------------------------------------------------------------------------


def _write(folder: Path, files: Mapping[str, str], frozen: bytes) -> None:
    """Write the job's files. Other files of the folder are kept."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for name, text in files.items():
            (folder / name).write_text(text, encoding="utf-8", newline="\n")
            if name.endswith(".sh"):
                (folder / name).chmod(0o755)
        (folder / MANIFEST).write_bytes(frozen)
    except (FileExistsError, NotADirectoryError) as error:
        raise ConfigInvalid("is not a folder", where=folder, todo="Name a folder") from error


def _check_run_is_new(platform: Platform, out: str, key: str, frozen: bytes) -> None:
    """Refuse a run id that was submitted with another manifest. With the same manifest, finished jobs are kept."""
    kept = platform.kept_manifest(out, key)
    if kept is not None and kept != frozen:
        raise ConfigInvalid(
            "another manifest was submitted with this run id", where=f"{out}/{key}", todo="Give another --run-id"
        )

"""Commands: one row per verb of the command line: purpose, settings, common flags, exit codes, examples, output.

In:   settings, how results are shown. Out: tables or JSON on standard output, an exit code. Never: parsing; how a verb
works. A command imports its modules when it runs.
"""

from __future__ import annotations

import os
import shlex
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, redirect_stdout, suppress
from dataclasses import dataclass
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, Literal

from runner.verbs.flags import Settings
from runner.verbs.settings import (
    ApproveSettings,
    CleanSettings,
    CompareSettings,
    DemoSettings,
    DoctorSettings,
    FetchSettings,
    InspectSettings,
    PlanSettings,
    PreprocessSettings,
    QuantizeSettings,
    ReportSettings,
    RunSettings,
    StatusSettings,
    ValidateSettings,
    VerifySettings,
)
from runner.verbs.submit_settings import (
    SubmitAwsBatchSettings,
    SubmitGcpBatchSettings,
    SubmitKubernetesSettings,
    SubmitSlurmSettings,
)

if TYPE_CHECKING:
    from runner.verbs.submit import Submitted

__all__ = ["EXIT_CODES", "GROUPS", "ONE_OBJECT", "VERBS", "Display", "Verb"]

EXIT_CODES: Mapping[int, str] = MappingProxyType(
    {
        0: "success: every job is done, every check passed",
        1: "some jobs failed, or their inputs cannot be used",
        2: "wrong usage, manifest, weights or credentials: fix it, then run again",
        3: "infrastructure failed, or jobs are left: run the same command again",
        4: "a render differs from its baseline",
        130: "SIGINT",
        143: "SIGTERM",
    }
)
ONE_OBJECT = "one JSON object on standard output, and nothing else"  # of an error too


@dataclass(frozen=True)
class Verb:
    """One verb of the command line; `weights` and `submit` have several, with two words.

    text: the purpose, one line. common: fields of the flags that `--help` shows first, in this order; empty: all.
    codes: keys of EXIT_CODES. json_prints: what --json prints; empty: the verb has no --json.
    """

    name: str
    text: str
    settings: type[Settings]
    call: Callable[[Any, Display], int]
    codes: tuple[int, ...]
    examples: tuple[str, str]
    common: tuple[str, ...] = ()
    json_prints: str = ""


@dataclass(frozen=True)
class Display:
    """How results and events are shown: flags of the command line that are not settings of a verb."""

    log_format: Literal["auto", "console", "json"] = "auto"
    verbose: bool = False
    json: bool = False


@contextmanager
def _only_json(display: Display) -> Iterator[None]:
    """Inside, with --json, what else is written to standard output goes to standard error.

    That of libraries, native ones and processes that a verb starts as well, which write to the descriptor.
    """
    if not display.json:
        yield
        return
    with suppress(OSError, ValueError):
        sys.stdout.flush()
    kept = os.dup(1)
    os.dup2(2, 1)
    try:
        with redirect_stdout(sys.stderr):
            yield
    finally:
        os.dup2(kept, 1)
        os.close(kept)


def _run(settings: RunSettings, display: Display) -> int:
    from runner.batch.progress import choose_progress
    from runner.verbs.json_objects import run_object
    from runner.verbs.run import run
    from runner.verbs.tables import print_error, print_json, print_run

    with _only_json(display):
        outcome = run(settings, choose_progress(display.log_format))
    with suppress(OSError):  # a full disk behind standard output changes no job
        if display.json:
            print_json(run_object(outcome))
        else:
            print_run(outcome)
    if outcome.error is not None:  # the last line, as after an error before the first job
        print_error(f"{outcome.error.code}: {outcome.error.message}")
    return outcome.exit_code


def _validate(settings: ValidateSettings, display: Display) -> int:
    from runner.verbs.json_objects import validation_object
    from runner.verbs.tables import print_json, print_problems
    from runner.verbs.validate import validate

    with _only_json(display):
        found = validate(settings)
    if display.json:
        print_json(validation_object(found, inputs_checked=not settings.no_inputs))
    else:
        print_problems(found.manifest, found.problems, checked=not settings.no_inputs)
    return 1 if found.problems else 0


def _plan(settings: PlanSettings, display: Display) -> int:
    from runner.verbs.json_objects import plan_object
    from runner.verbs.plan import plan
    from runner.verbs.tables import print_json, print_plan

    with _only_json(display):
        forecast = plan(settings)
    if display.json:
        print_json(plan_object(forecast))
    else:
        print_plan(forecast.jobs, forecast.gpu, forecast.warnings, forecast.fast, forecast.svdq)
    return 1 if any(row.error for row in forecast.jobs) else 0


def _status(settings: StatusSettings, display: Display) -> int:
    from runner.verbs.status import status
    from runner.verbs.status_table import StatusWatch, print_status

    if settings.watch and not display.json:
        with StatusWatch() as watch:
            found = status(settings, watch.show)
    else:
        found = status(settings)
    print_status(found, as_json=display.json, all_rows=settings.all)
    return found.exit_code


def _report(settings: ReportSettings, display: Display) -> int:
    from runner.verbs.report import report
    from runner.verbs.report_table import print_report

    print_report(report(settings), as_json=display.json)
    return 0


def _compare(settings: CompareSettings, display: Display) -> int:
    from runner.verbs.compare import compare
    from runner.verbs.tables import print_comparison

    found = compare(settings)
    print_comparison(found, as_json=display.json)
    return found.comparison.exit_code


def _approve(settings: ApproveSettings, display: Display) -> int:
    from runner.verbs.approve import approve
    from runner.verbs.tables import print_approved

    rows = approve(settings)
    print_approved(settings.baseline, rows, as_json=display.json)
    return 1 if any(row.action == "refused" for row in rows) else 0


def _clean(settings: CleanSettings, display: Display) -> int:
    from runner.verbs.clean import clean
    from runner.verbs.tables import print_clean

    rows = clean(settings)
    words = ["video-lab", "clean", settings.out, "--older-than", settings.older_than]
    words += ["--checkpoints", "--yes"] if settings.checkpoints else ["--yes"]
    print_clean(settings.out, rows, shlex.join(words), as_json=display.json)
    for row in rows:
        if row.error is not None:
            raise row.error
    return 0


def _doctor(settings: DoctorSettings, display: Display) -> int:
    from runner.verbs.doctor import doctor
    from runner.verbs.json_objects import checks_object
    from runner.verbs.tables import print_checks, print_json

    with _only_json(display):
        checks = doctor(settings)
    if display.json:
        print_json(checks_object(checks))
    else:
        print_checks(checks)
    return 2 if any(check.status == "fail" for check in checks) else 0


def _preprocess(settings: PreprocessSettings, display: Display) -> int:
    from runner.verbs.preprocess import preprocess
    from runner.verbs.tables import print_json

    print_json(preprocess(settings), indent=2)
    return 0


def _inspect(settings: InspectSettings, display: Display) -> int:
    from runner.verbs.inspect import inspect
    from runner.verbs.inspection_table import print_inspection

    with _only_json(display):
        found = inspect(settings)
    print_inspection(found, as_json=display.json)
    return 0


def _quantize(settings: QuantizeSettings, display: Display) -> int:
    from runner.verbs.quantize import quantize
    from runner.verbs.tables import print_quantized

    print_quantized(quantize(settings))
    return 0


def _submit_aws_batch(settings: SubmitAwsBatchSettings, display: Display) -> int:
    from runner.verbs.submit import submit_aws_batch

    return _show_submitted(display, lambda: submit_aws_batch(settings))


def _submit_gcp_batch(settings: SubmitGcpBatchSettings, display: Display) -> int:
    from runner.verbs.submit import submit_gcp_batch

    return _show_submitted(display, lambda: submit_gcp_batch(settings))


def _submit_kubernetes(settings: SubmitKubernetesSettings, display: Display) -> int:
    from runner.verbs.submit import submit_kubernetes

    return _show_submitted(display, lambda: submit_kubernetes(settings))


def _submit_slurm(settings: SubmitSlurmSettings, display: Display) -> int:
    from runner.verbs.submit import submit_slurm

    return _show_submitted(display, lambda: submit_slurm(settings))


def _show_submitted(display: Display, submit: Callable[[], Submitted]) -> int:
    from runner.verbs.json_objects import submitted_object
    from runner.verbs.tables import print_json, print_submitted

    with _only_json(display):
        found = submit()
    if display.json:
        print_json(submitted_object(found))
    else:
        print_submitted(found)
    return 0


def _fetch(settings: FetchSettings, display: Display) -> int:
    from runner.verbs.tables import print_fetched, print_text
    from runner.verbs.weights import fetch

    print_fetched(fetch(settings, print_text), dry_run=settings.dry_run)
    return 0


def _verify(settings: VerifySettings, display: Display) -> int:
    from runner.verbs.tables import print_verification
    from runner.verbs.weights import verify

    found = verify(settings)
    print_verification(found)
    return 0 if found.sound else 2


def _demo(settings: DemoSettings, display: Display) -> int:
    from runner.verbs.tables import print_text
    from runner.verbs.weights import demo

    folders = demo(settings)
    print_text(f"models: {folders.models}\nmedia:  {folders.media}")
    return 0


GROUPS = {
    "submit": "send a run to AWS Batch, GCP Batch, Kubernetes or Slurm, as an array of tasks",
    "weights": "download, verify or make model files: fetch, verify, demo",
}
SUBMIT_CODES = (0, 1, 2, 3)
VERBS = (
    Verb(
        "run",
        "render the jobs of a manifest that are not done",
        RunSettings,
        _run,
        (0, 1, 2, 3, 130, 143),
        (
            "video-lab run manifests/demo.yaml --out out/demo --models .cache/demo-models",
            "video-lab run s3://bucket/night.yaml --out s3://bucket/out --models s3://bucket/models --shard 3/16",
        ),
        common=("out", "models", "recipe", "memory", "only", "limit", "dry_run", "retry_failed", "force"),
        json_prints=ONE_OBJECT,
    ),
    Verb(
        "validate",
        "check a manifest and open its inputs; renders nothing",
        ValidateSettings,
        _validate,
        (0, 1, 2, 3),
        (
            "video-lab validate manifests/demo.yaml",
            "video-lab validate s3://bucket/night.yaml --deep --models s3://bucket/models",
        ),
        json_prints=ONE_OBJECT,
    ),
    Verb(
        "plan",
        "forecast frames, memory and seconds of each job; renders nothing",
        PlanSettings,
        _plan,
        (0, 1, 2, 3),
        (
            "video-lab plan manifests/nightly.yaml --gpu 'RTX 5090'",
            "video-lab plan manifests/batch.jsonl --models models --recipe fp4-distill+fp8",
        ),
        common=("models", "recipe", "gpu", "only", "limit"),
        json_prints=ONE_OBJECT,
    ),
    Verb(
        "status",
        "show how many jobs of a run are done, failed, running or pending",
        StatusSettings,
        _status,
        (0, 1, 2, 3),
        ("video-lab status out/demo --watch", "video-lab status s3://bucket/out --run night-7 --wait --timeout 8h"),
        json_prints=ONE_OBJECT,
    ),
    Verb(
        "report",
        "report seconds, memory, cost and failures of a run, over all its shards",
        ReportSettings,
        _report,
        (0, 2, 3),
        (
            "video-lab report out/demo",
            "video-lab report s3://bucket/out --run night-7 --gpu-hour 2.49 --to s3://bucket/reports/night-7",
        ),
        json_prints=ONE_OBJECT,
    ),
    Verb(
        "compare",
        "compare a night's renders with the approved ones, and report the differences",
        CompareSettings,
        _compare,
        (0, 1, 2, 3, 4),
        (
            "video-lab compare out/2026-01-31 --baseline baseline --report out/2026-01-31/report",
            "video-lab compare s3://bucket/out --baseline s3://bucket/baseline --only 'anna-*' --record",
        ),
        common=("baseline", "report", "only", "models", "record"),
        json_prints="one JSON object per night",
    ),
    Verb(
        "approve",
        "accept a night's renders as the baseline of later nights",
        ApproveSettings,
        _approve,
        (0, 1, 2, 3),
        (
            "video-lab approve out/2026-01-31 --baseline baseline --why 'the first night, looked at'",
            "video-lab approve s3://bucket/out --baseline s3://bucket/baseline --job 'anna-*' --why 'sharper hands'",
        ),
        common=("baseline", "why", "job", "who"),
        json_prints="one JSON object per job",
    ),
    Verb(
        "clean",
        "list or remove files that killed runs left in an output folder",
        CleanSettings,
        _clean,
        (0, 2, 3),
        ("video-lab clean out/demo", "video-lab clean s3://bucket/out --older-than 2d --yes"),
        json_prints="one JSON object per file",
    ),
    Verb(
        "doctor",
        "check device, driver, libraries, weights, disk and S3, with remedies",
        DoctorSettings,
        _doctor,
        (0, 2),
        (
            "video-lab doctor --models models",
            "video-lab doctor --models s3://bucket/models --out s3://bucket/out --device cuda",
        ),
        json_prints=ONE_OBJECT,
    ),
    Verb(
        "preprocess",
        "preprocess one video into the official files: src_pose.mp4, src_face.mp4, src_ref.png",
        PreprocessSettings,
        _preprocess,
        (0, 1, 2, 3),
        (
            "video-lab preprocess --reference anna.png --video samba.mp4 --out anna-samba --models models",
            "video-lab preprocess --reference a.png --video v.mp4 --out a-v --models models --options '{fps: 30}'",
        ),
        common=("reference", "video", "out", "models", "mask", "options"),
    ),
    Verb(
        "inspect",
        "measure a driving video: numbered people, cuts, frame rate, advice; renders nothing",
        InspectSettings,
        _inspect,
        (0, 1, 2, 3),
        (
            "video-lab inspect samba.mp4 --models models --sheet samba.png",
            "video-lab inspect s3://bucket/samba.mp4 --models s3://bucket/models --json",
        ),
        common=("models", "sheet"),
        json_prints=ONE_OBJECT,
    ),
    Verb(
        "quantize",
        "make the FP4 or SVDQ file of a recipe from the published weights",
        QuantizeSettings,
        _quantize,
        (0, 1, 2, 3),
        (
            "video-lab quantize --models models",
            "video-lab quantize --models models --recipe fp4 --format g32 --calibrate manifests/nightly.yaml",
        ),
        common=("models", "recipe", "format", "calibrate"),
    ),
    Verb(
        "submit aws-batch",
        "send a run to AWS Batch as an array job, with a job that writes the report",
        SubmitAwsBatchSettings,
        _submit_aws_batch,
        SUBMIT_CODES,
        (
            "video-lab submit aws-batch s3://bucket/night.yaml --out s3://bucket/out --models s3://bucket/models "
            "--image registry.example.com/video-lab:0.1.0 --queue gpus --gpu L40S --within 2h --spot",
            "video-lab submit aws-batch night.yaml --out s3://bucket/out --models s3://bucket/models "
            "--image registry.example.com/video-lab:0.1.0 --queue gpus --shards 16 --render-only night-job",
        ),
        common=("out", "models", "image", "queue", "shards", "gpu", "within", "spot", "render_only"),
        json_prints=ONE_OBJECT,
    ),
    Verb(
        "submit gcp-batch",
        "send a run to GCP Batch as a job with tasks, with a job that writes the report",
        SubmitGcpBatchSettings,
        _submit_gcp_batch,
        SUBMIT_CODES,
        (
            "video-lab submit gcp-batch night.yaml --out gs://bucket/out --models gs://bucket/models "
            "--image registry.example.com/video-lab:0.1.0 --location us-central1 --machine-type g2-standard-16 "
            "--shards 16 --spot",
            "video-lab submit gcp-batch night.yaml --out gs://bucket/out --models gs://bucket/models "
            "--image registry.example.com/video-lab:0.1.0 --location us-central1 --machine-type a2-highgpu-1g "
            "--shards 16 --render-only night-job",
        ),
        common=("out", "models", "image", "location", "machine_type", "shards", "spot", "render_only"),
        json_prints=ONE_OBJECT,
    ),
    Verb(
        "submit kubernetes",
        "send a run to Kubernetes as an Indexed Job, with a Job that writes the report",
        SubmitKubernetesSettings,
        _submit_kubernetes,
        SUBMIT_CODES,
        (
            "video-lab submit kubernetes s3://bucket/night.yaml --out s3://bucket/out --models s3://bucket/models "
            "--image registry.example.com/video-lab:0.1.0 --shards 16 --secret s3-access",
            "video-lab submit kubernetes night.yaml --out s3://bucket/out --models s3://bucket/models "
            "--image registry.example.com/video-lab:0.1.0 --gpu H100 --within 2h --render-only night-job",
        ),
        common=("out", "models", "image", "shards", "gpu", "within", "secret", "spot", "render_only"),
        json_prints=ONE_OBJECT,
    ),
    Verb(
        "submit slurm",
        "send a run to Slurm as an array job of Apptainer containers, with a job that writes the report",
        SubmitSlurmSettings,
        _submit_slurm,
        SUBMIT_CODES,
        (
            "video-lab submit slurm /shared/night.yaml --out /shared/out --models /shared/models "
            "--image /shared/video-lab.sif --partition gpu --gpu H100 --within 2h",
            "video-lab submit slurm /shared/night.yaml --out /shared/out --models /shared/models "
            "--image /shared/video-lab.sif --shards 16 --render-only night-job",
        ),
        common=("out", "models", "image", "shards", "gpu", "within", "partition", "time_limit", "render_only"),
        json_prints=ONE_OBJECT,
    ),
    Verb(
        "weights fetch",
        "download the published files of a recipe into the model store",
        FetchSettings,
        _fetch,
        (0, 2, 3),
        (
            "video-lab weights fetch --models models --dry-run",
            "video-lab weights fetch --models models --recipe fp4-distill --part transformer",
        ),
        common=("models", "recipe", "part", "dry_run"),
    ),
    Verb(
        "weights verify",
        "check that the files of a recipe are complete and have the published checksums",
        VerifySettings,
        _verify,
        (0, 2, 3),
        ("video-lab weights verify --models models", "video-lab weights verify --models models --plan --format g32"),
        common=("models", "recipe"),
    ),
    Verb(
        "weights demo",
        "make the demo's tiny models and its media; needs no network",
        DemoSettings,
        _demo,
        (0, 2, 3),
        ("video-lab weights demo", "video-lab weights demo --models .cache/demo-models --media .cache/demo-media"),
    ),
)

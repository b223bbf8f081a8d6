"""JSON objects: builds the objects that `--json` prints for `run`, `validate`, `plan`, `doctor`, `submit` and errors.

In:   the result of a verb. Out: one JSON-able mapping; keys name units as those of records do. Never: printing.

Keys may be added but never renamed, because programs read them.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from runner.errors import RunnerError

if TYPE_CHECKING:
    from runner.finishing.interpolation import InterpolationForecast
    from runner.verbs.doctor import Check
    from runner.verbs.outcome import RunOutcome
    from runner.verbs.plan import FastForecast, Forecast, RunForecast, SvdqForecast
    from runner.verbs.submit import Submitted
    from runner.verbs.validate import Validation

__all__ = ["checks_object", "error_object", "plan_object", "run_object", "submitted_object", "validation_object"]


def error_object(error: RunnerError) -> dict[str, Any]:
    """Return `{"error": {"code", "message", "exit_code"}}`."""
    return {"error": {"code": error.code, "message": error.message, "exit_code": error.exit_code}}


def run_object(outcome: RunOutcome) -> dict[str, Any]:
    """Return the object of a run. In a dry run each job has also an `action`: run, skip, leased, exhausted or fail."""
    jobs = [line.model_dump(mode="json") for line in outcome.lines]
    for job in jobs if outcome.actions is not None else ():
        job["action"] = (outcome.actions or {})[job["id"]]
    return {
        "run_id": outcome.run_id,
        "exit_code": outcome.exit_code,
        "dry_run": outcome.dry_run,
        "shard": {"name": outcome.shard.name, "reason": outcome.shard_reason},
        "counts": dict(outcome.counts),
        "jobs": jobs,
        "outputs": outcome.outputs,
        "summary": outcome.summary or None,
        "sheet": outcome.sheet,
        "error": None if outcome.error is None else error_object(outcome.error)["error"],
    }


def validation_object(found: Validation, *, inputs_checked: bool) -> dict[str, Any]:
    """Return the object of `validate`. A job is `valid` if no problem was found."""
    wrong = {job_id for job_id, _ in found.problems}
    return {
        "manifest": found.manifest.source,
        "inputs_checked": inputs_checked,
        "jobs": [{"id": job.id, "valid": job.id not in wrong} for job in found.manifest.jobs],
        "problems": [{"job": job_id, "code": error.code, "message": error.message} for job_id, error in found.problems],
    }


def plan_object(forecast: RunForecast) -> dict[str, Any]:
    """Return the object of `plan`. `forecast_s` is null without a known GPU; `memory_bytes` is the peak per mode.

    A job's `frames`, `fps`, `tflop` and `forecast_s` are those of generation. `interpolation` has the frames and the
    rate of the output, and the additional cost. The totals' `tflop` and `forecast_s` include both. `fast` has the
    seconds and the precisions of the recipe that adapts to the device; null if it saves no time. `svdq` has the file
    of a recipe in an SVDQuant format and its seconds on every GPU that computes it, with the source of the GEMM `rate`:
    published or estimate; null for other recipes.
    """
    plans = [row.plan for row in forecast.jobs if row.plan is not None]
    seconds = [row.seconds for row in forecast.jobs if row.seconds is not None]
    return {
        "gpu": forecast.gpu,
        "warnings": list(forecast.warnings),
        "fast": None if forecast.fast is None else _fast(forecast.fast),
        "svdq": None if forecast.svdq is None else _svdq(forecast.svdq),
        "jobs": [_planned(row) for row in forecast.jobs],
        "totals": {
            "jobs": len(forecast.jobs),
            "failed": sum(row.error is not None for row in forecast.jobs),
            "frames": sum(plan.frames for plan in plans),
            "frames_denoised": sum(plan.denoised_frames for plan in plans),
            "tflop": sum(row.tflop for row in forecast.jobs),
            "forecast_s": sum(seconds) if forecast.gpu is not None else None,
        },
    }


def _planned(row: Forecast) -> dict[str, Any]:
    plan, error, between = row.plan, row.error, row.interpolation
    found: dict[str, Any] = {"id": row.job_id, "error": None, "warnings": list(row.warnings)}
    if error is not None:
        found["error"] = {"code": error.code, "message": error.message}
    if plan is not None:
        found |= {
            "frames": plan.frames,
            "width": plan.width,
            "height": plan.height,
            "segments": plan.segments,
            "segment_frames": plan.segment_frames,
            "frames_denoised": plan.denoised_frames,
            "padding_frames": plan.padding_frames,
            "overlap_frames": plan.overlap_total,
            "steps": plan.steps,
            "evaluations": plan.evaluations,
            "tflop": plan.tflop,
            "forecast_s": plan.seconds,
            "memory_bytes": dict(row.memory),
            "fps": None if row.fps is None else str(row.fps),
            "interpolation": None if between is None else _interpolated(between),
        }
    return found


def _fast(found: FastForecast) -> dict[str, Any]:
    running = found.running
    return {
        "recipe": running.name,
        "compute": running.compute,
        "attention": running.attention,
        "vae_bits": 32 if running.vae_dtype == "float32" else 16,  # the weights decide which 16-bit type
        "forecast_s": found.forecast_s,
        "asked_s": found.asked_s,
    }


def _svdq(found: SvdqForecast) -> dict[str, Any]:
    return {
        "compute": found.compute,
        "file_bytes": found.file_bytes,
        "file_in_store": found.stored,
        "gpus": [
            {"gpu": gpu, "forecast_s": seconds, "rate": "estimate" if gpu in found.estimated else "published"}
            for gpu, seconds in found.seconds.items()
        ],
    }


def _interpolated(between: InterpolationForecast) -> dict[str, Any]:
    return {
        "frames": between.frames,
        "fps": str(between.fps),
        "tflop": between.tflop,
        "forecast_s": between.seconds,
        "memory_bytes": between.memory_bytes,
    }


def checks_object(checks: Sequence[Check]) -> dict[str, Any]:
    """Return the object of `doctor`. `ok`: no check failed."""
    return {
        "ok": all(check.status != "fail" for check in checks),
        "checks": [dataclasses.asdict(check) for check in checks],
    }


def submitted_object(found: Submitted) -> dict[str, Any]:
    """Return the object of `submit`. `folder` is null if the job was submitted; `ids` is empty if it was not."""
    return {
        "platform": found.platform,
        "name": found.name,
        "run_id": found.run_id,
        "out": found.out,
        "manifest": found.manifest,
        "shards": found.tasks.tasks,
        "shards_reason": found.tasks.reason,
        "jobs": found.jobs,
        "uploaded": found.uploaded,
        "folder": found.folder,
        "files": list(found.files),
        "ids": [{"role": job.role, "id": job.id} for job in found.ids],
        "watch": list(found.watch),
    }

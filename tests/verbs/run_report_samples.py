"""Samples of run reports: processes with three threads on three jobs at a time, jobs of every status, previews."""

from __future__ import annotations

import io
import random
from collections.abc import Collection, Sequence
from typing import Any

from runner.records.record import ErrorRecord, ReuseRecord
from runner.records.run_report import GpuSeconds, JobReport, ProcessReport, RunReport, StageSpan

__all__ = ["jpeg_preview", "make_error", "make_job", "make_process", "make_report", "make_run"]

LOADING_S = 41.5
GIB = 2**30
DEVICE = "NVIDIA H200"
NO_PERSON = "Choose a driver with one person in view, or give boxes"
RESIZED = "the driver has 23.976 frames a second, fps 30 asks for more: frames are repeated"


def jpeg_preview(text: str, size: tuple[int, int] = (360, 640)) -> bytes:
    """A picture of its own for every text, with some texture, as a render has."""
    from PIL import Image, ImageDraw

    chance = random.Random(text)
    image = Image.linear_gradient("L").resize(size).convert("RGB")
    pen = ImageDraw.Draw(image)
    for _ in range(40):
        x, y = chance.randrange(size[0]), chance.randrange(size[1])
        wide, high = chance.randrange(10, 120), chance.randrange(10, 160)
        pen.ellipse((x, y, x + wide, y + high), fill=tuple(chance.randrange(40, 230) for _ in range(3)))
    out = io.BytesIO()
    image.save(out, format="JPEG", quality=90)
    return out.getvalue()


def make_job(job_id: str, status: str = "succeeded", **more: Any) -> JobReport:
    """One job; a succeeded one has all that is measured."""
    measured: dict[str, Any] = {}
    if status in ("succeeded", "skipped"):
        measured = {
            "attempt": 1,
            "host": "nova-01",
            "shard": "1-of-2",
            "wall_s": 96.4,
            "gpu_s": 61.25,
            "forecast_s": 58.0,
            "device_bytes": 71 * GIB,
            "forecast_bytes": 70 * GIB,
            "host_bytes": 23 * GIB,
            "stages_s": {"denoise": 52.0, "decode": 6.1, "poses": 5.2, "encode": 3.4, "text": 0.4},
            "frames": 77,
            "fps": "16",
            "film_s": 4.81,
            "width": 720,
            "height": 1280,
            "output": f"s3://renders/night/jobs/{job_id}/output.mp4",
            "poster": f"jobs/{job_id}/poster.jpg",
        }
    reason = {"succeeded": "no record", "skipped": "done before", "pending": "not begun", "lost": "begun by nova-02"}
    return JobReport(**{"id": job_id, "status": status, "reason": reason.get(status, "no record")} | measured | more)


def make_error(code: str, message: str, todo: str, step: str = "prepare") -> ErrorRecord:
    """The message ends with what to do, as those of the runner do."""
    return ErrorRecord(code=code, message=f"{message}. {todo}", stage=step, retryable=False, todo=todo)


def make_process(
    job_ids: Sequence[str],
    *,
    host: str = "nova-01",
    shard: str = "1-of-2",
    begin_s: float = 0.0,
    finished: bool = True,
    generate_s: Sequence[float] = (61.25,),
    device: str = DEVICE,
    failed: Collection[str] = (),
) -> ProcessReport:
    """A process as the loop runs it: the next job is prepared and the last delivered while one is generated.

    failed: jobs that fail while they are prepared.
    """
    loaded = begin_s + 3.0 + LOADING_S
    spans = [StageSpan(stage="load", begin_s=begin_s + 3.0, end_s=loaded)]
    free, prepared, work = loaded, begin_s + 4.0, 0.0
    delivered = loaded
    for number, job_id in enumerate(job_ids):
        prepare_end = prepared + (1.2 if job_id in failed else 12.0)
        spans.append(StageSpan(stage="prepare", job_id=job_id, begin_s=prepared, end_s=prepare_end))
        if job_id in failed:
            prepared = prepare_end
            continue
        seconds = generate_s[number % len(generate_s)]
        start = max(free, prepare_end)
        spans.append(StageSpan(stage="generate", job_id=job_id, begin_s=start, end_s=start + seconds))
        prepared, free, work = max(prepare_end, start) + 0.5, start + seconds + 0.2, work + seconds
        delivery = max(delivered, start + seconds)
        delivered = delivery + 9.0
        spans.append(StageSpan(stage="deliver", job_id=job_id, begin_s=delivery, end_s=delivered))
    if not finished:  # it died in the middle of the last job's generation
        last = max(place for place, span in enumerate(spans) if span.stage == "generate")
        end = (spans[last].begin_s + spans[last].end_s) / 2
        work -= spans[last].end_s - end
        cut = {"end_s": end}
        spans = [
            span.model_copy(update=cut if span.end_s > end else {}) for span in spans if span.begin_s < end - 0.001
        ]
    else:
        end = delivered + 0.4
    total = end - begin_s
    return ProcessReport(
        shard=shard,
        host=host,
        pid=4000 + len(job_ids),
        device=device,
        begin_s=begin_s,
        end_s=end,
        finished=finished,
        exit_code=0 if finished else None,
        gpu_seconds=GpuSeconds(total=total, work=work, loading=LOADING_S, idle=total - work - LOADING_S),
        spans=sorted(spans, key=lambda span: span.begin_s),
    )


def make_report(
    jobs: Sequence[JobReport], processes: Sequence[ProcessReport], *, gpu_hour: float | None = None, **more: Any
) -> RunReport:
    """The report of these jobs and processes: sums and counts fit."""
    spent = {
        name: sum(getattr(process.gpu_seconds, name) for process in processes)
        for name in ("total", "work", "loading", "idle")
    }
    film = sum(job.film_s or 0.0 for job in jobs if job.status == "succeeded")
    cost = None if gpu_hour is None else spent["total"] * gpu_hour / 3600
    counts: dict[str, int] = {"total": len(jobs)}
    stages: dict[str, float] = {}
    for job in jobs:
        counts[job.status] = counts.get(job.status, 0) + 1
        for name, seconds in job.stages_s.items():
            stages[name] = stages.get(name, 0.0) + seconds
    ended = all(process.finished for process in processes)
    values: dict[str, Any] = {
        "run_id": "2026-11-29T22-00-00-7f3a",
        "out": "s3://renders/night",
        "manifest": "s3://renders/manifests/night.yaml",
        "recipe": "standard+fp8",
        "made_at": "2026-11-30T06:12:44.120+00:00",
        "started_at": "2026-11-29T22:00:00.000+00:00",
        "finished_at": "2026-11-30T05:58:12.000+00:00" if ended else None,
        "seconds": max((process.end_s for process in processes), default=0.0),
        "counts": counts,
        "gpu_seconds": GpuSeconds(**spent),
        "film_s": film,
        "gpu_hour": gpu_hour,
        "cost": cost,
        "cost_per_film_s": cost / film if cost is not None and film else None,
        "caches": {
            "text": ReuseRecord(hits=len(jobs) * 2 // 3, misses=len(jobs) - len(jobs) * 2 // 3, hit_rate=0.66),
            "conditions": ReuseRecord(hits=len(jobs) // 4, misses=len(jobs) - len(jobs) // 4, hit_rate=0.25),
            "lora": ReuseRecord(hits=0, misses=0, hit_rate=0.0),
        },
        "stages_s": dict(sorted(stages.items(), key=lambda item: -item[1])),
        "processes": list(processes),
        "jobs": list(jobs),
    }
    return RunReport(**values | more)


def make_run(
    jobs: int = 24, *, gpu_hour: float | None = 2.49, killed: bool = True, forecast: bool = True, pending: int = 0
) -> RunReport:
    """A night: two hosts, a shard each, a share of failures and warnings, and a process that was killed."""
    chance = random.Random(jobs)
    names = [f"{chance.choice(('mira', 'jonas', 'aiko'))}-dance-{number:03d}" for number in range(jobs)]
    seconds = {name: round(chance.uniform(38, 95), 2) for name in names}
    made = [_night_job(number, name, seconds[name], chance, gpu_hour, forecast) for number, name in enumerate(names)]
    failed = {job.id for job in made if job.status == "failed"}
    halves = [names[0::2], names[1::2]]
    times = [[seconds[name] for name in half] for half in halves]
    first = make_process(halves[0], host="nova-01", shard="1-of-2", generate_s=times[0], failed=failed)
    second_ids = halves[1]
    processes = [first]
    if killed and len(second_ids) > 3:
        middle = len(second_ids) // 2
        place: dict[str, Any] = {"host": "nova-02", "shard": "2-of-2", "failed": failed}
        died = make_process(second_ids[: middle + 1], generate_s=times[1], finished=False, begin_s=2.0, **place)
        again = make_process(second_ids[middle:], generate_s=times[1][middle:], begin_s=died.end_s + 95.0, **place)
        processes += [died, again]
    elif second_ids:
        processes.append(
            make_process(second_ids, host="nova-02", shard="2-of-2", generate_s=times[1], begin_s=2.0, failed=failed)
        )
    made += [make_job(f"late-{number:03d}", "pending") for number in range(pending)]
    notes = ["shard 2-of-2: its first process left no exit code"] if killed else []
    return make_report(made, processes, gpu_hour=gpu_hour, notes=notes)


def _night_job(
    number: int, name: str, seconds: float, chance: random.Random, gpu_hour: float | None, forecast: bool
) -> JobReport:
    host = f"nova-0{number % 2 + 1}"
    place: dict[str, Any] = {"host": host, "shard": f"{number % 2 + 1}-of-2"}
    if number % 9 == 4:
        missing = f"s3://renders/in/{name}.mp4: does not exist"
        todo = "Check the path in the manifest, and that the file was uploaded"
        error = make_error("input.not_found", missing, todo)
        return make_job(name, "failed", attempt=1, wall_s=1.2, gpu_s=0.0, error=error, **place)
    if number % 23 == 11:
        error = make_error("input.no_person", f"{name}.mp4: no person is in view in frames 0 to 31", NO_PERSON)
        return make_job(name, "failed", attempt=2, wall_s=14.8, gpu_s=0.0, error=error, **place)
    if number % 40 == 17:
        return make_job(name, "skipped", **place)
    measured = round(seconds * chance.uniform(0.9, 1.25), 2)
    memory = round(chance.uniform(60, 74) * GIB)
    more: dict[str, Any] = {
        "gpu_s": seconds,
        "wall_s": seconds + 33.1,
        "forecast_s": measured if forecast else None,
        "device_bytes": memory if forecast else None,
        "forecast_bytes": round(memory * chance.uniform(0.93, 1.1)) if forecast else None,
        "cost": None if gpu_hour is None else round(seconds * 1.2 * gpu_hour / 3600, 4),
        "warnings": [RESIZED] if number % 7 == 3 else [],
        "stages_s": {"denoise": seconds * 0.85, "decode": seconds * 0.1, "poses": 5.2, "encode": 3.4, "text": 0.4},
    }
    return make_job(name, **place | more)

"""Run report: the schema of `report.json`: one run, over all its shards.

In:   plain values from the verb `report`. Out: a model that serialises to JSON and exports its JSON Schema.
Never: where records are stored, how a report looks. Times are UTC, ISO 8601; sizes bytes; durations seconds; moments
`…_s` of spans are seconds after the run's `started_at`.

    python -m runner.records.run_report schemas/    writes the schema that is in the repository
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any, Literal

from pydantic import Field

from runner.records.record import SCHEMA_VERSION, ErrorRecord, Record, ReuseRecord, schemas, write_schemas

__all__ = ["GpuSeconds", "JobReport", "JobState", "ProcessReport", "RunReport", "StageSpan", "report_schemas"]

JobState = Literal["succeeded", "failed", "skipped", "running", "lost", "pending"]


class StageSpan(Record):
    """A time span in which a thread of a process worked on one job, or loaded the model."""

    stage: Literal["load", "prepare", "generate", "deliver"]
    job_id: str | None = Field(None, description="null: loading")
    begin_s: float
    end_s: float


class GpuSeconds(Record):
    """The use of the devices' seconds, for one process or for all."""

    total: float = Field(ge=0)
    work: float = Field(ge=0, description="generating")
    loading: float = Field(ge=0, description="loading models")
    idle: float = Field(ge=0, description="the rest: starting, preparing, waiting, publishing")


class ProcessReport(Record):
    """One process of one shard, from its start to its end."""

    shard: str
    host: str
    pid: int | None = Field(description="null: it was killed before its first summary, and only its records are there")
    device: str = Field(description="empty if no model was loaded")
    begin_s: float = Field(description="after the run's started_at, by the clock of its host")
    end_s: float
    finished: bool = Field(description="false: it still runs or was killed; end_s is the time of its last record")
    exit_code: int | None = None
    stopped_by: str | None = None
    gpu_seconds: GpuSeconds
    spans: list[StageSpan] = Field(description="in the order of their begin")


class JobReport(Record):
    """One job of the run's manifest, or one that the run took from another source.

    Seconds, bytes, stages and cost are those of the attempt that this run recorded. They are null if another run did
    the work, or if the record does not contain them.
    """

    id: str
    status: JobState = Field(description="skipped: it was done before this run")
    reason: str
    attempt: int | None = None
    host: str = ""
    shard: str = ""
    wall_s: float | None = Field(None, description="from fetch to publish, waiting included")
    gpu_s: float | None = Field(None, description="the device's work")
    forecast_s: float | None = Field(None, description="seconds of generation as forecast; null for an unknown device")
    device_bytes: int | None = Field(None, description="the most that the process held on the device; null without one")
    forecast_bytes: int | None = Field(None, description="the forecast of device_bytes: the largest stage")
    host_bytes: int | None = Field(None, description="the most host memory of the process")
    stages_s: dict[str, float] = Field(default={}, description="seconds by stage, the longest first")
    frames: int | None = None
    fps: str | None = None
    film_s: float | None = Field(None, description="length of the output")
    width: int | None = None
    height: int | None = None
    output: str | None = Field(None, description="its URI")
    poster: str | None = Field(None, description="key of its preview picture on the output storage")
    cost: float | None = Field(
        None, description="its gpu_s and its share, by gpu_s, of all other GPU seconds, at gpu_hour"
    )
    error: ErrorRecord | None = None
    warnings: list[str] = Field(default=[], description="as in the record")


class RunReport(Record):
    """`runs/<run-id>/report.json`: one run, over all its shards."""

    schema_version: Literal[1] = SCHEMA_VERSION
    run_id: str
    out: str
    manifest: str
    recipe: str
    made_at: str
    started_at: str
    finished_at: str | None = Field(description="of the last process; null while one runs or was killed")
    seconds: float = Field(description="from the first process's start to the last one's end")
    counts: dict[str, int] = Field(description="jobs by status, and their total")
    gpu_seconds: GpuSeconds = Field(description="of `processes`; not known, and 0, where there are none")
    film_s: float = Field(description="length of what this run rendered")
    gpu_hour: float | None = Field(None, description="price of an hour of one device")
    cost: float | None = Field(None, description="of all GPU seconds, at gpu_hour; null where they are not known")
    cost_per_film_s: float | None = None
    caches: dict[str, ReuseRecord] = Field(
        description="hits and misses by cache, over all jobs of this run; bytes: the most that lay there after a job"
    )
    stages_s: dict[str, float] = Field(description="seconds by stage over all jobs, the longest first")
    processes: list[ProcessReport] = Field(description="by host, shard and start")
    jobs: list[JobReport] = Field(description="in the manifest's order")
    notes: list[str] = Field(default=[], description="facts that the report could not find out")


def report_schemas() -> dict[str, dict[str, Any]]:
    """File name → JSON Schema (draft 2020-12)."""
    return schemas({"report": RunReport})


if __name__ == "__main__":
    write_schemas(report_schemas(), Path(sys.argv[1]))

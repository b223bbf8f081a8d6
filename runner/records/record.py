"""Record: the versioned schemas of the records of jobs (`result.json`), attempts and runs (`summary.json`).

In:   plain values from the batch loop. Out: models that serialise to JSON and export their JSON Schema.
Never: how a job is run, or where records are stored. Times are UTC, ISO 8601; sizes bytes; durations seconds.

    python -m runner.records.record schemas/        writes the schemas that are in the repository
"""

from __future__ import annotations

import json
import platform
import sys
from collections.abc import Mapping
from functools import cache
from importlib import metadata
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field

from runner.errors import RunnerError, counts_as_attempt
from runner.records.approval import Approvals
from runner.records.drift_record import DriftRecord
from runner.records.people import People
from runner.redact import redact_tree

__all__ = [
    "SCHEMA_VERSION",
    "AttemptMark",
    "Efficiency",
    "ErrorRecord",
    "InputRecord",
    "JobLine",
    "LimitsRecord",
    "LimitsRow",
    "MemoryRecord",
    "MemoryTrendRecord",
    "OutputRecord",
    "ProcessRecord",
    "ProcessUsage",
    "ResultRecord",
    "ReuseRecord",
    "RunJobsRecord",
    "RunSummary",
    "SpanRecord",
    "environment",
    "reuse_of",
    "schemas",
    "write_schemas",
]

SCHEMA_VERSION: Literal[1] = 1
# Values that later runs compare, so they are not redacted
COMPARED = frozenset({"job_id", "job_ids", "fingerprint", "identity", "key", "sha256", "frames_sha256"})


class Record(BaseModel):
    # Unknown fields are ignored, as a later minor version may add some. Tests check written records against the schema.
    model_config = ConfigDict(frozen=True, extra="ignore")

    def to_json(self) -> bytes:
        """Return the JSON to store, with secrets masked. Bytes of a path that are not UTF-8 are escaped."""
        public = redact_tree(self.model_dump(mode="json"), keep=COMPARED)
        return (json.dumps(public, ensure_ascii=False, indent=2) + "\n").encode(errors="backslashreplace")


class InputRecord(Record):
    uri: str
    bytes: int = Field(ge=0)
    identity: str = Field(description="sha256:… of a local file; etag:…:size on S3")


class OutputRecord(Record):
    uri: str = Field(description="the MP4, or the folder of PNG frames, as this run named it")
    key: str = Field(description="the same, relative to the output folder, which may be moved")
    bytes: int = Field(ge=0)
    files: int = Field(ge=1, description="1 for an MP4, else the number of frames, one more with audio.wav")
    identity: str = Field(description="sha256:… locally, etag:… on S3; of the sorted list of both for frames")
    sha256: str | None = Field(description="of the MP4 as it was encoded; null for frames")
    frames: int = Field(ge=1)
    fps: str = Field(description="exact, e.g. 16 or 30000/1001")
    generated_fps: str | None = Field(
        None,
        description="the rate of the frames that the model made; if fps is higher, other frames lie between them; "
        "null in older records",
    )
    width: int
    height: int
    frames_sha256: str = Field(
        description="of the raw RGB frames before encoding. With frames_hash 2: the sha256 over the digests of all "
        "frames, 32 bytes each; a frame's digest is the sha256 over its height, width and channels (little-endian "
        "uint32) and its bytes"
    )
    frames_hash: int | None = Field(
        None,
        description="2: how frames_sha256 was made; null in records of older versions, which hashed shapes and bytes "
        "of all frames in one go",
    )


class MemoryRecord(Record):
    stages: dict[str, dict[str, int]] = Field(
        default={}, description="torch's peak allocated and reserved bytes, by stage; empty without a GPU"
    )
    forecast: dict[str, int] = Field(
        default={}, description="bytes that the process was expected to hold on the device, context included, by stage"
    )
    process_gpu_peak_bytes: int | None = Field(None, description="NVML, this process; null without a GPU")
    host_rss_peak_bytes: int | None = None
    overlapped: list[str] = Field(default=[], description="stages of other jobs that ran while this one generated")


class Efficiency(Record):
    frames_requested: int
    frames_denoised: int
    segments: int
    segments_generated: int | None = Field(None, description="by this attempt; null: all of them")
    segment_frames: int
    padding_fraction: float = Field(description="share of the denoised frames: after the end of the job")
    overlap_fraction: float = Field(description="share of the denoised frames: denoised twice, to join segments")
    tflop: float = Field(description="forecast from the model's shape, 10^12 floating point operations")
    tflop_per_s: float | None = Field(
        None, description="tflop of the segments that this attempt generated, over the seconds of generation"
    )
    generation_s: float | None = Field(None, description="the seconds of generation, all its stages together")
    forecast_s: float | None = Field(
        None, description="the same as forecast for this GPU before the job; null for an unknown GPU"
    )


class ReuseRecord(Record):
    """The use of one cache in one job."""

    hits: int = Field(ge=0)
    misses: int = Field(ge=0)
    hit_rate: float = Field(ge=0, le=1, description="hits of all lookups")
    bytes: int | None = Field(None, description="held for later jobs when this one ended; null for caches on disk")


class ErrorRecord(Record):
    code: str
    message: str
    stage: str
    retryable: bool
    todo: str | None = Field(None, description="what to do about it; the message ends with it")

    @classmethod
    def of(cls, error: RunnerError, stage: str) -> ErrorRecord:
        """Return the record of `error`, which happened in `stage`."""
        return cls(
            code=error.code, message=error.message, stage=stage, retryable=error.retryable, todo=error.todo or None
        )


class SpanRecord(Record):
    """A time span, in seconds after the `started_at` beside it."""

    begin_s: float
    end_s: float


class ResultRecord(Record):
    """`jobs/<id>/result.json`: written last and atomically. If it succeeded, `output` was stored before it."""

    schema_version: Literal[1] = SCHEMA_VERSION
    job_id: str
    status: Literal["succeeded", "failed"]
    attempt: int = Field(ge=1)
    attempts_counted: int | None = Field(
        None,
        ge=0,
        description="attempts with this fingerprint that count towards --max-attempts, this one included; counted anew "
        "after each that finished a segment which is kept",
    )
    run_id: str
    reason: str = Field(description="why the job ran")
    started_at: str
    finished_at: str
    fingerprint: str
    fingerprint_parts: dict[str, Any]
    inputs: dict[str, InputRecord] = {}
    output: OutputRecord | None = None
    host: str = Field("", description="where the attempt ran; empty in older records")
    shard: str = Field("", description="of the run, as in the name of its summary; empty in older records")
    wall_s: float | None = Field(
        None, ge=0, description="from fetch to publish, waiting included; null in older records"
    )
    gpu_s: float | None = Field(
        None,
        ge=0,
        description="the device's work: the seconds of all stages of generation and of what is done to the frames "
        "after it, without preparation and waiting; 0 for an attempt that failed before; null in older records",
    )
    spans: dict[str, SpanRecord] = Field(
        default={},
        description="when the job was with each thread: prepare, generate, deliver; empty in older records",
    )
    timings_s: dict[str, float] = {}
    steps_s: list[float] = Field(
        default=[], description="each model evaluation of the denoising steps, over all segments"
    )
    memory: MemoryRecord = MemoryRecord()
    efficiency: Efficiency | None = None
    resumed_at_segment: int | None = Field(
        None, ge=2, description="the first segment, from 1, that this attempt generated; null: it generated all of them"
    )
    drift: DriftRecord | None = Field(
        None,
        description="how the colours drift from segment to segment; null for jobs of one segment and in older records",
    )
    preprocess: dict[str, Any] = Field(default={}, description="counts of repairs and the models used")
    finishing: dict[str, dict[str, Any]] = Field(
        default={}, description="what each stage between decoder and encoder did, e.g. frames that were interpolated"
    )
    caches: dict[str, int] = Field(
        default={}, description="counters: hits and misses of what is reused across jobs, loads of the encoders"
    )
    reuse: dict[str, ReuseRecord] = Field(default={}, description="the same hits and misses by cache")
    recipe: str = ""
    engine: dict[str, Any] = Field(default={}, description="device, precision, and why each was chosen")
    environment: dict[str, Any] = {}
    computed_by: dict[str, str] = Field(
        default={},
        description="what must be equal beside the fingerprint for the frames to be the same bits: device, compute, "
        "memory mode, versions; of the last segment; empty where the generator does not say, and in older records",
    )
    error: ErrorRecord | None = None
    notes: list[str] = Field(default=[], description="what a reader of the record should know, warnings included")
    warnings: list[str] = Field(default=[], description="the notes that a person should check; empty in older records")

    @property
    def counted(self) -> int:
        """Attempts that count towards the limit. Records of version 0.1.0 lack the number; then `attempt` counts."""
        if self.attempts_counted is not None:
            return self.attempts_counted
        return self.attempt if self.error is None or counts_as_attempt(self.error.code) else 0


class ProcessRecord(Record):
    """Identifies a process, so that another one on the same machine can find out whether it still runs."""

    pid: int = Field(description="process id in `pid_namespace`")
    start_ticks: int = Field(description="its start in clock ticks after boot, as in the system's process table")
    boot_id: str = Field(description="of the running kernel: the same in all containers of a machine, new at each boot")
    pid_namespace: str = Field(description="process ids can be compared within one namespace only")


class AttemptMark(Record):
    """`jobs/<id>/attempt.json`: the lease of the runner that has the job, renewed while the job is under way.

    With an `error`, the attempt has failed, and the record beside it is an older one whose output was kept.
    """

    schema_version: Literal[1] = SCHEMA_VERSION
    job_id: str
    attempt: int = Field(ge=1)
    attempts_counted: int | None = Field(
        None, ge=0, description="attempts with this fingerprint before this one that count towards --max-attempts"
    )
    fingerprint: str
    run_id: str
    host: str
    started_at: str
    stage: Literal["preparing", "generating", "delivering"] = Field(
        "generating", description="an attempt counts if the process dies while the job is generating"
    )
    alone: bool = Field(False, description="no other job was under way in the process: it counts while preparing too")
    stopping: bool = Field(False, description="the process was stopping: the attempt does not count")
    replaces: ResultRecord | None = Field(
        None, description="the record that is removed while the output under its key is replaced"
    )
    finished_at: str | None = None
    error: ErrorRecord | None = None
    token: str = Field("", description="unique for this lease")
    lease_s: float | None = Field(
        None, ge=0, description="seconds after the last renewal when it is lost; null in marks of version 0.1.0"
    )
    renewals: int = Field(0, ge=0, description="counted up at each renewal, so that the content changes")
    process: ProcessRecord | None = None
    segments_before: int = Field(0, ge=0, description="segments that were finished when this attempt began")
    segments_done: int = Field(
        0, ge=0, description="segments that are finished and kept; a later attempt continues after them"
    )

    @property
    def progressed(self) -> bool:
        """Whether a later attempt finds more finished segments than this attempt found."""
        return self.segments_done > self.segments_before

    @property
    def counts(self) -> bool:
        """Whether this attempt counts towards the limit.

        It does if it failed through the job's own fault, or if the process died while generating the job; but not if
        it finished a segment that is kept.
        """
        if self.progressed:
            return False
        if self.error is not None:
            return counts_as_attempt(self.error.code)
        at_work = self.stage == "generating" or (self.alone and self.stage == "preparing")
        return at_work and not self.stopping

    @property
    def counted(self) -> int:
        """Attempts that count towards the limit, with this one if it counts; 0 after a segment was finished."""
        if self.progressed:
            return 0
        before = self.attempt - 1 if self.attempts_counted is None else self.attempts_counted
        return before + self.counts


class JobLine(Record):
    """One job in the summary of a run."""

    id: str
    status: Literal["succeeded", "failed", "skipped", "not_run"]
    reason: str
    attempt: int | None = None
    output: str | None = None
    seconds: float | None = Field(None, description="from fetch to publish")
    error: ErrorRecord | None = None
    warnings: list[str] = Field(default=[], description="as in the record")


class ProcessUsage(Record):
    """The use of the device by one process of a shard. `seconds` = work + loading + idle time."""

    host: str
    pid: int
    device: str = Field("", description="the GPU's name, or the CPU's; empty where no model was loaded")
    started_at: str
    seconds: float = Field(ge=0, description="from the start until the summary was last written")
    finished: bool = Field(description="false: the process still runs, or it was killed")
    work_s: float = Field(ge=0, description="the gpu_s of all its attempts, including failed and unfinished ones")
    loading: list[SpanRecord] = Field(default=[], description="when models were loaded")

    @property
    def loading_s(self) -> float:
        """Seconds of loading models."""
        return sum(span.end_s - span.begin_s for span in self.loading)

    @property
    def idle_s(self) -> float:
        """Seconds without work or loading."""
        return max(0.0, self.seconds - self.work_s - self.loading_s)


class MemoryTrendRecord(Record):
    """The resident host memory of the process from job to job, after the first hundred jobs."""

    jobs: int = Field(ge=2, description="jobs that were measured")
    rss_begin_bytes: int
    rss_end_bytes: int
    rss_slope_bytes_per_job: float = Field(description="of a straight line through all of them, by least squares")


class RunSummary(Record):
    """`runs/<run-id>/<shard>.summary.json`: rewritten at growing intervals during the run."""

    schema_version: Literal[1] = SCHEMA_VERSION
    run_id: str
    shard: str
    shard_reason: str
    manifest: str
    recipe: str
    started_at: str
    finished_at: str | None = Field(None, description="null during the run")
    seconds: float
    exit_code: int | None = None
    stopped_by: str | None = Field(
        None, description="a signal's name, the reason of a notice or an error's message, if the run was stopped early"
    )
    counts: dict[str, int]
    jobs: list[JobLine]
    memory_trend: MemoryTrendRecord | None = Field(None, description="null for runs of a hundred jobs or fewer")
    processes: list[ProcessUsage] = Field(
        default=[],
        description="those that ran this shard with this run id, one after the other, the newest last; empty in "
        "summaries of older versions",
    )
    environment: dict[str, Any]


class RunJobsRecord(Record):
    """`runs/<run-id>/jobs.json`: the jobs of a run's manifest, in its order, with those of other shards.

    `status` finds the remaining jobs with it.
    """

    schema_version: Literal[1] = SCHEMA_VERSION
    run_id: str
    manifest: str
    recipe: str
    force: bool = Field(description="the run renders every job, done or not")
    jobs: dict[str, str | None] = Field(
        description="id → the first 16 digits of a sha256 over what determines its frames, without the inputs; "
        "null if it could not be computed"
    )


class LimitsRow(Record):
    """Jobs with the same regression limits."""

    limits: dict[str, bool | float | str] = Field(
        description="as in a manifest under regression: psnr_min, …; only those that are given"
    )
    job_ids: list[str]


class LimitsRecord(Record):
    """`runs/<run-id>/regression.json`: how far the jobs of a run's manifest may differ from their baseline.

    It contains all jobs of the manifest, with those of other shards.
    """

    schema_version: Literal[1] = SCHEMA_VERSION
    rows: list[LimitsRow]


def reuse_of(counters: Mapping[str, int], gauges: Mapping[str, int]) -> dict[str, ReuseRecord]:
    """Return cache name → record, from counters NAME_cache_hits and NAME_cache_misses and gauges NAME_cache_bytes."""
    names = {
        name.removesuffix(end) for name in counters for end in ("_cache_hits", "_cache_misses") if name.endswith(end)
    }
    found = {}
    for name in sorted(names):
        hits, misses = (counters.get(f"{name}_cache_{what}", 0) for what in ("hits", "misses"))
        found[name] = ReuseRecord(
            hits=hits,
            misses=misses,
            hit_rate=round(hits / max(1, hits + misses), 4),
            bytes=gauges.get(f"{name}_cache_bytes"),
        )
    return found


@cache
def environment() -> Mapping[str, Any]:
    """Return package versions that affect the frames, the machine's GPUs and their driver. Imports no big package."""
    packages = (
        "video-lab-runner",
        "torch",
        "diffusers",
        "transformers",
        "onnxruntime",
        "onnxruntime-gpu",
        "av",
    )
    versions = {}
    for name in packages:
        try:
            versions[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return {
        "python": platform.python_version(),
        "platform": platform.platform(),
        "packages": versions,
        "driver": None,
        "gpus": [],
    } | _nvidia()


def _nvidia() -> dict[str, Any]:
    """Return all GPUs that this process may use, and the driver's version, from NVML (without torch)."""
    try:
        import pynvml

        pynvml.nvmlInit()
        try:
            handles = [pynvml.nvmlDeviceGetHandleByIndex(i) for i in range(pynvml.nvmlDeviceGetCount())]
            names = [str(pynvml.nvmlDeviceGetName(handle)) for handle in handles]
            return {"driver": str(pynvml.nvmlSystemGetDriverVersion()), "gpus": names}
        finally:
            pynvml.nvmlShutdown()
    except Exception:  # no driver, no library or no permission: report no GPU
        return {}


def schemas(models: Mapping[str, type[BaseModel]] | None = None) -> dict[str, dict[str, Any]]:
    """Return file name → JSON Schema (draft 2020-12) of each model. Default: the files of runs and of approvals."""
    models = models or {
        "result": ResultRecord,
        "summary": RunSummary,
        "attempt": AttemptMark,
        "people": People,
        "approved": Approvals,
        "regression": LimitsRecord,
        "jobs": RunJobsRecord,
    }
    return {
        f"{name}.v{SCHEMA_VERSION}.schema.json": model.model_json_schema(mode="serialization")
        for name, model in models.items()
    }


def write_schemas(found: Mapping[str, Mapping[str, Any]], folder: Path) -> None:
    """Write the result of `schemas`, one file per schema."""
    folder.mkdir(parents=True, exist_ok=True)
    for file, schema in found.items():
        (folder / file).write_text(json.dumps(schema, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


if __name__ == "__main__":
    write_schemas(schemas(), Path(sys.argv[1]))

"""Records of jobs that were never rendered, for tests of what compares them."""

from __future__ import annotations

import hashlib
from typing import Any

from runner.records.record import Efficiency, OutputRecord, ResultRecord
from runner.video.frame_digests import FRAMES_HASH, combined_digest

ENVIRONMENT = {"device": "A CPU, AVX2, 2 threads", "memory": "resident", "version of torch": "2.13.0", "driver": "None"}


def digest_list(*frames: int) -> list[str]:
    """One digest for each number: equal numbers are equal frames."""
    return [hashlib.sha256(str(frame).encode()).hexdigest() for frame in frames]


def rendered(digests: list[str], job_id: str = "a", **update: Any) -> ResultRecord:
    """A job that succeeded on a CPU; `update`: fields of the record, and of its output as `output={…}`."""
    output = OutputRecord(
        uri=f"out/jobs/{job_id}/output.mp4",
        key=f"jobs/{job_id}/output.mp4",
        bytes=100,
        files=1,
        identity="sha256:" + "0" * 64,
        sha256="0" * 64,
        frames=len(digests),
        fps="16",
        width=96,
        height=144,
        frames_sha256=combined_digest(digests),
        frames_hash=FRAMES_HASH,
    ).model_copy(update=update.pop("output", {}))
    record = ResultRecord(
        job_id=job_id,
        status="succeeded",
        attempt=1,
        run_id="night-1",
        reason="no record yet",
        started_at="2026-01-30T02:00:00.000+00:00",
        finished_at="2026-01-30T02:01:00.000+00:00",
        fingerprint="f",
        fingerprint_parts={"options.seed": 42},
        output=output,
        timings_s={"denoise": 2.0, "vae_decode": 1.0},
        recipe="fp4-distill",
        engine={"device": "cpu"},
        computed_by=ENVIRONMENT,
    )
    return record.model_copy(update=update)


def in_segments(segments: int, frames: int, overlap: int, requested: int) -> Efficiency:
    """Of a job in `segments` windows of `frames` frames."""
    denoised = segments * frames
    return Efficiency(
        frames_requested=requested,
        frames_denoised=denoised,
        segments=segments,
        segment_frames=frames,
        padding_fraction=0.0,
        overlap_fraction=round((segments - 1) * overlap / denoised, 4),
        tflop=1.0,
    )

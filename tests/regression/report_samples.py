"""Samples of the reports: frames in memory, findings of every verdict, evidence with real MP4s."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path

import numpy as np

from runner.regression.evidence import JobEvidence, VideoLink, make_pictures, write_preview
from runner.regression.findings import (
    Breach,
    Drift,
    FrameValues,
    Identity,
    JobFinding,
    JointDrift,
    Measurements,
    Misalignment,
    NightComparison,
    PerformanceFinding,
    SegmentDrift,
    Verdict,
)
from tests.video_files import indexed_frame

__all__ = ["FPS", "FRAMES", "HOSTILE", "ArrayFrames", "indexed_evidence", "make_comparison", "make_finding"]

FPS, FRAMES, JOINT, WORST = Fraction(25), 60, 29, 33
HOSTILE = """</script><script>alert("x")</script> <img src=x onerror=alert(1)> ' " ` | & \x00\x1b[31m"""


@dataclass(frozen=True)
class ArrayFrames:
    """Frames that are in memory already: uint8 [n, H, W, 3]."""

    array: np.ndarray
    fps: Fraction | None = FPS

    @property
    def frames(self) -> int:
        return len(self.array)

    @property
    def size(self) -> tuple[int, int]:
        return self.array.shape[2], self.array.shape[1]

    def windows(self, n: int) -> Iterable[np.ndarray]:
        for at in range(0, len(self.array), n):
            yield self.array[at : at + n]

    def frame(self, i: int) -> np.ndarray:
        return self.array[i]


def make_values(worst: float, mean: float, frames: int = FRAMES, at: int = WORST) -> FrameValues:
    values = [round(mean + (mean - worst) * 0.1 * math.sin(i / 3), 4) for i in range(frames)]
    values[at] = worst
    return FrameValues(mean=mean, p5=round(mean - (mean - worst) * 0.2, 4), worst=worst, worst_frame=at, values=values)


def make_measurements() -> Measurements:
    gain, offset = (1.02, 1.019, 1.021), (0.4, -0.2, 0.0)
    segments = [
        SegmentDrift(
            segment=number,
            begin=begin,
            end=end,
            gain=gain,
            offset=offset,
            delta_e=0.6 * number,
            within=0.21,
            laplacian=41.0,
            laplacian_ratio=0.97,
            motion=12.0,
            motion_ratio=1.02,
        )
        for number, begin, end in ((1, 0, JOINT), (2, JOINT, FRAMES))
    ]
    joint = JointDrift(frame=JOINT, step=2.31, excess=1.94, gain=gain, offset=offset)
    return Measurements(
        frames_baseline=FRAMES,
        frames_new=FRAMES,
        frames_compared=FRAMES,
        psnr=make_values(24.6, 38.0),
        ssim=make_values(0.8612, 0.984),
        largest_difference=187,
        largest_difference_frame=WORST,
        colour=3.4,
        colour_frame=WORST,
        shift=(1.0, 0.0),
        misalignments=[Misalignment(kind="repeated", frame=12, frames=1)],
        drift=Drift(joint_drift=1.94, joints=[joint], segments=segments),
        identity=Identity(cosine=0.8123, cosine_frame=WORST, frames=8, why={"face distance": "no face of 32 pixels"}),
    )


def make_finding(verdict: Verdict, name: str | None = None, **more: object) -> JobFinding:
    """A finding as `compare` gives it; `more` goes over its fields."""
    texts = {
        "failed": "The night has no output of this job: the model store was not reachable.",
        "broken": f"Frame {WORST} differs most: 24.6 dB, below the limit of 30 dB.",
        "new": "There is no baseline of this job yet.",
        "missing": "The baseline has this job; the night does not.",
        "uncalibrated": "28 of 60 frames differ; no limit is known for this model and device.",
        "changed": "All frames are within the limits; the worst has 41.2 dB.",
        "draft": "Accepted as a draft.",
        "identical": f"All {FRAMES} frames are the same.",
    }
    fields: dict[str, object] = {"id": name or f"{verdict}-job", "verdict": verdict, "text": texts[verdict]}
    fields |= {"recipe": "fp4-distill", "device": "nvidia-h200", "seconds": 12.34, "seconds_median": 11.9}
    if verdict == "failed":
        fields |= {"error": "INPUT_NOT_FOUND: no such file\nwhere: clips/dance-07.mp4", "seconds": None}
    if verdict in ("broken", "uncalibrated", "changed"):
        fields |= {
            "measurements": make_measurements(),
            "joints": [JOINT],
            "frames": FRAMES,
            "frames_differing": FRAMES - JOINT,
            "first_frame": JOINT,
            "differences": ["options.seed: 41 → 42", "version of torch: 2.12.0 → 2.13.0"],
            "run_id": "2026-11-29-a1",
            "baseline_run_id": "2026-11-27-c4",
            "approved": "Approved by mira on 2026-11-27: new choreography.",
            "performance": [
                PerformanceFinding(
                    name="seconds: denoise", unit="s", new=9.8, median=7.1, nights=5, ratio=1.38, verdict="slower"
                ),
                PerformanceFinding(
                    name="memory: vae_decode allocated",
                    unit="bytes",
                    new=8.1e9,
                    median=8.0e9,
                    nights=5,
                    ratio=1.01,
                    verdict="same",
                ),
                PerformanceFinding(
                    name="seconds: preprocess", unit="s", new=0.9, median=2.1, nights=5, ratio=0.43, verdict="better"
                ),
            ],
        }
    if verdict == "broken":
        fields["breaches"] = [
            Breach(
                metric="psnr_min",
                text=f"The worst frame, {WORST}, has a PSNR of 24.6 dB; the limit is 30 dB.",
                value=24.6,
                limit=30.0,
                frame=WORST,
            ),
            Breach(
                metric="joint_drift_max",
                text=f"At frame {JOINT}, a joint of segments, the still pixels step by 1.94 ΔE; the limit is 1 ΔE.",
                value=1.94,
                limit=1.0,
                frame=JOINT,
            ),
        ]
    return JobFinding(**(fields | more))


def make_comparison(jobs: list[JobFinding], **more: object) -> NightComparison:
    counts = {"total": len(jobs)}
    for job in jobs:
        counts[job.verdict] = counts.get(job.verdict, 0) + 1
    fields: dict[str, object] = {
        "out": "s3://renders/nightly/2026-11-29",
        "baseline": "s3://renders/baseline",
        "made_at": "2026-11-29T05:12:44+00:00",
        "seconds": 81.2,
        "exit_code": 4,
        "counts": counts,
        "environment": ["torch: 2.12.0 → 2.13.0", "driver: 575.51 → 580.12"],
        "approve": "video-lab approve s3://renders/nightly/2026-11-29 --baseline s3://renders/baseline --why 'TEXT'",
        "jobs": jobs,
    }
    return NightComparison(**(fields | more))


def indexed_evidence(folder: Path, finding: JobFinding, frames: int = FRAMES, **more: object) -> JobEvidence:
    """Evidence with two MP4s whose frames carry their index; of the new one, red is darker."""
    baseline = np.stack([indexed_frame(index) for index in range(frames)])
    new = baseline.copy()
    new[..., 0] //= 2
    videos: dict[str, VideoLink] = {
        name: write_preview(ArrayFrames(array), folder / f"{finding.id}-{name}.mp4", FPS)
        for name, array in (("baseline", baseline), ("new", new))
    }
    pictures = make_pictures(ArrayFrames(new), ArrayFrames(baseline), WORST, driver=baseline.__getitem__)
    return JobEvidence(**({"finding": finding, "pictures": pictures, "picture_frame": WORST, "videos": videos} | more))

"""Findings: the models of `compare`'s results, the source of its JSON, JUnit, Markdown and HTML.

In:   plain values. Out: frozen models that serialise to JSON. Never: how anything is measured or judged.

PSNR is in dB, and 100 for identical frames, because JSON has no infinity. Colour differences are CIE76 delta E in Lab.
Frames are counted from 0, segments from 1.
"""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from runner.records.record import SCHEMA_VERSION, Record

__all__ = [
    "PSNR_OF_EQUAL",
    "Breach",
    "Drift",
    "FrameValues",
    "Identity",
    "JobFinding",
    "JointDrift",
    "Measurements",
    "Misalignment",
    "NightComparison",
    "PerformanceFinding",
    "SegmentDrift",
    "Verdict",
]

PSNR_OF_EQUAL = 100.0

# In the order of every report. broken: a limit is broken. failed: the night has no output of the job. new: no baseline.
# missing: only in the baseline. uncalibrated: it differs, and no limit is known for this model and device. changed: it
# differs within the limits. draft: a first night, accepted by --bootstrap. identical: the same frames.
Verdict = Literal["broken", "failed", "new", "missing", "uncalibrated", "changed", "draft", "identical"]


class FrameValues(Record):
    """One metric, frame by frame."""

    mean: float
    p5: float = Field(description="5th percentile, counted from the worse end")
    worst: float
    worst_frame: int = Field(ge=0, description="index from 0, in both videos")
    values: list[float] = Field(default=[], description="of each frame, in order")


class Misalignment(Record):
    """A range of frames that do not correspond one to one in both videos."""

    kind: Literal["dropped", "repeated", "inserted", "moved"]
    frame: int = Field(
        ge=0, description="index in the baseline's video (of a repeated or inserted frame, in the new one)"
    )
    frames: int = Field(ge=1, description="number of frames")


class JointDrift(Record):
    """The colour step of the still pixels at one joint of segments."""

    frame: int = Field(ge=1, description="the first frame after the joint")
    step: float = Field(ge=0, description="delta E of the still pixels from the frames before to the frames after")
    excess: float = Field(ge=0, description="delta E of the step beyond the baseline's, above the usual value nearby")
    gain: tuple[float, float, float] = Field(
        description="red, green, blue: factor from before to after, without the baseline's own step"
    )
    offset: tuple[float, float, float] = Field(description="red, green, blue: 8-bit levels, added after the factor")
    still: float | None = Field(
        None, description="share of the picture that is still; below 0.05 the whole picture was measured instead"
    )


class SegmentDrift(Record):
    """One segment of the new video."""

    segment: int = Field(ge=1)
    begin: int = Field(ge=0, description="its first frame")
    end: int = Field(ge=1, description="one after its last frame")
    gain: tuple[float, float, float] = Field(description="of the still pixels against the baseline's, by channel")
    offset: tuple[float, float, float] = Field(description="the same, 8-bit levels")
    delta_e: float = Field(ge=0, description="of the still pixels against the baseline's")
    within: float = Field(ge=0, description="delta E of the still pixels from its first to its last quarter")
    laplacian: float = Field(ge=0, description="mean squared Laplacian of luma: texture; of the new video")
    laplacian_ratio: float = Field(ge=0, description="of the baseline's; 1: the same texture")
    motion: float = Field(ge=0, description="mean squared difference of neighbouring frames' luma; of the new video")
    motion_ratio: float = Field(ge=0, description="of the baseline's; 1: as much motion")
    still: float | None = Field(
        None, description="share of the picture that is still; below 0.05 the whole picture was measured instead"
    )


class Drift(Record):
    joint_drift: float = Field(ge=0, description="the largest `excess` of a joint; 0 with one segment")
    joints: list[JointDrift] = Field(default=[])
    segments: list[SegmentDrift] = Field(default=[])


class Identity(Record):
    """How similar the person is. A value that cannot be measured is null, and `why` has the reason by its name."""

    cosine: float | None = Field(None, description="of image embeddings of the person's box, worst of the frames")
    cosine_frame: int | None = None
    lpips: float | None = Field(None, description="LPIPS (AlexNet) of the worst of the examined frames")
    lpips_frame: int | None = None
    face_distance: float | None = Field(
        None, description="of the mean face embeddings of both videos; below 0.6: one person"
    )
    face_worst: float | None = Field(None, description="of the smoothed worst window of frames")
    face_frame: int | None = None
    face_pixels: float | None = Field(None, description="median side of the face")
    frames: int = Field(0, ge=0, description="number of examined frames")
    why: dict[str, str] = Field(default={}, description="name → why it is not measurable")


class Measurements(Record):
    """All metrics of one job: new video against the baseline's."""

    frames_baseline: int
    frames_new: int
    frames_compared: int = Field(ge=0, description="number of frames compared, from the first frame of both videos")
    psnr: FrameValues | None = Field(None, description="dB; null if the sizes differ")
    ssim: FrameValues | None = None
    largest_difference: int | None = Field(None, description="of one channel of a pixel, 0 to 255")
    largest_difference_frame: int | None = None
    colour: float | None = Field(None, description="delta E of the mean colours of the person's box, if it is known")
    colour_frame: int | None = None
    shift: tuple[float, float] | None = Field(
        None, description="pixels (right, down) by which the worst frame is moved; null if it is not a plain shift"
    )
    misalignments: list[Misalignment] = Field(default=[])
    drift: Drift | None = None
    identity: Identity | None = None


class PerformanceFinding(Record):
    """One stage's seconds, or one memory peak, against the median of the nights before."""

    name: str = Field(description="e.g. seconds: denoise; memory: vae_decode allocated")
    unit: Literal["s", "bytes"]
    new: float
    median: float = Field(description="equal to `new` if it is not judged")
    nights: int = Field(ge=0, description="number of nights of the median; 0 if it is not judged")
    ratio: float
    verdict: Literal["slower", "larger", "better", "same", "not judged"]
    why: str = Field("", description="why it is not judged")


class Breach(Record):
    """One limit that is broken, or one reason why the job counts as changed."""

    metric: str = Field(description="as in the manifest's regression:, or frames, size, rate, output")
    text: str = Field(description="a whole sentence with the value, the limit and the frame")
    value: float | None = None
    limit: float | None = None
    frame: int | None = None


class JobFinding(Record):
    id: str
    verdict: Verdict
    text: str = Field(description="one sentence with the most important fact")
    breaches: list[Breach] = Field(default=[])
    differences: list[str] = Field(default=[], description="settings and environment, e.g. options.seed: 41 → 42")
    exact: bool = Field(
        False, description="device, compute, memory mode and versions are the same, so the frames must be the same too"
    )
    first_frame: int | None = Field(None, description="the first frame whose digest differs")
    frames_differing: int | None = None
    frames: int | None = None
    measurements: Measurements | None = None
    performance: list[PerformanceFinding] = Field(default=[])
    seconds: float | None = None
    seconds_median: float | None = None
    device: str = ""
    baseline_device: str = Field("", description="the device of the baseline's render")
    recipe: str = ""
    run_id: str = ""
    baseline_run_id: str = ""
    approved: str = Field("", description="who approved the baseline, when and why, in one sentence")
    joints: list[int] = Field(default=[], description="the first frame of each segment after the first")
    error: str = Field("", description="of a failed job")
    notes: list[str] = Field(default=[])


class NightComparison(Record):
    """The content of `comparison.json`."""

    schema_version: Literal[1] = SCHEMA_VERSION
    out: str
    baseline: str
    made_at: str
    seconds: float
    exit_code: int
    counts: dict[str, int] = Field(description="verdict → jobs, and total")
    environment: list[str] = Field(default=[], description="differences of the nights' environments")
    approve: str = Field("", description="the command that accepts new and changed renders; empty if there are none")
    jobs: list[JobFinding] = Field(description="failures first")

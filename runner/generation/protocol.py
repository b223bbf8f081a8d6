"""Protocol: the interface between the batch loop and a model. The loop uses nothing else of a model.

A second model is one more folder beside this file that implements `Generator`, and a recipe.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import Any, Final, Protocol, TypeVar

import numpy as np

from runner.records.drift_record import DriftRecord
from runner.records.people import People
from runner.spec.options import JobOptions
from runner.timing import DeviceProbe, StageTimer

__all__ = [
    "DRIFT",
    "ClipInfo",
    "Conditions",
    "Generator",
    "JobDemand",
    "OnStep",
    "Request",
    "ResumePoint",
    "Segment",
    "SegmentPlan",
]

DRIFT: Final = "drift"  # of a resume point's `values`: a DriftRecord as JSON

OnStep = Callable[[int, int], None]  # model evaluations of the job: (done, in all); may raise to abandon the job


@dataclass(frozen=True)
class Request:
    """One job's inputs as local files."""

    reference: Path
    video: Path
    prompt: str
    options: JobOptions
    official: Path | None = None  # folder of the official script's files, instead of preprocessing
    mask: Path | None = None  # replace mode: a video (or image), white where the character goes


@dataclass(frozen=True)
class JobDemand:
    """The properties of a job that decide how much memory it takes, as far as they are known without its inputs."""

    size: tuple[int, int] | None  # (width, height); None: it depends on the inputs, which have not been read
    frames: int  # of its windows, at most
    guided: bool = False
    interpolates: bool = False
    loras: tuple[tuple[str, float], ...] = ()  # the job's LoRAs: names and strengths
    replace: bool = False  # whether the mode is replace


@dataclass(frozen=True)
class SegmentPlan:
    """How a job's frames are divided into windows that the model denoises, and what that costs."""

    frames: int  # frames to render
    segment_frames: int  # length of every window, 4k+1
    overlap_frames: int
    segments: int
    width: int
    height: int
    steps: int  # of the sampler in one window: fewer than requested if its schedule is shorter
    evaluations: int  # of the model in one window: a sampler may need several per step
    tflop: float  # forecast for the whole job, model and autoencoder
    seconds: float | None = None  # forecast for the device that computes; None if its speed is not known

    @property
    def denoised_frames(self) -> int:
        return self.segments * self.segment_frames

    @property
    def overlap_total(self) -> int:
        """Frames denoised twice because a window starts from the end of the last one."""
        return (self.segments - 1) * self.overlap_frames

    @property
    def padding_frames(self) -> int:
        """Frames denoised beyond the end of the job."""
        return self.denoised_frames - self.overlap_total - self.frames


@dataclass(frozen=True)
class ResumePoint:
    """The state before `segment`, from which `generate` continues as if it had not been interrupted.

    The arrays are not changed after they were returned. A generator needs nothing else of the earlier segments.
    """

    segment: int  # the first one that is still to be generated; plan.segments if none is left
    arrays: Mapping[str, np.ndarray]  # of standard numpy dtypes; their meaning is private to the generator
    values: Mapping[str, Any]  # JSON-able; their meaning is private to the generator, except for DRIFT

    @property
    def drift(self) -> DriftRecord | None:
        """The measured colour drift of the segments before `segment`; None if the generator does not measure it."""
        found = self.values.get(DRIFT)
        return None if found is None else DriftRecord.model_validate(found)


@dataclass(frozen=True)
class Segment:
    """A finished run of output frames, in order, without overlap or padding."""

    index: int
    frames: np.ndarray  # uint8 [n, H, W, 3] RGB
    pose: np.ndarray | None = None  # uint8 [n, H, W, 3] RGB: what drove these frames, for the preview
    resume: ResumePoint | None = None  # for the segment after this one; None if the generator cannot resume
    drift: DriftRecord | None = None  # of the job's colours up to and including this segment; None if not measured


@dataclass(frozen=True)
class ClipInfo:
    """The clip that will be rendered."""

    frames: int
    fps: Fraction
    width: int
    height: int
    start_s: float  # where it begins in the driving video, for the sound

    @property
    def size(self) -> tuple[int, int]:
        return self.width, self.height


class Conditions(Protocol):
    """What `prepare` made of a job's inputs. The loop uses only these members. It holds no long clip in pixels."""

    @property
    def clip(self) -> ClipInfo: ...

    @property
    def report(self) -> Mapping[str, Any]:
        """Counts worth recording, e.g. frames_without_person; JSON-able.

        `prepared_on`: the device, if the job was prepared on another device than the generator's other jobs. A resumed
        job must then find the same device.
        """
        ...

    @property
    def people(self) -> People | None:
        """Where the people are, at the size and frame rate of `clip`; None if not known. May be read after `close`."""
        ...

    def close(self) -> None:
        """Release files and buffers. Idempotent."""


C = TypeVar("C", bound=Conditions)


class Generator(Protocol[C]):
    """Turn jobs into frames. `prepare` runs in one thread and `generate` in another, each once at a time."""

    @property
    def identity(self) -> Mapping[str, str]:
        """Weight name → content identity; goes into the fingerprint."""
        ...

    @property
    def description(self) -> Mapping[str, Any]:
        """Device, compute, recipe, and why each was chosen; JSON-able; goes into the record."""
        ...

    @property
    def probe(self) -> DeviceProbe | None:
        """The probe of the device that `generate` computes on; None for the CPU."""
        ...

    @property
    def resume_identity(self) -> Mapping[str, str]:
        """What must be equal, beside the fingerprint, for a resumed job to have the same bits as an undisturbed one.

        E.g. device model, GEMM and attention backends, memory mode. Read it again for each segment:
        `fall_back_memory_mode` and a failed compilation change it. An empty mapping means that the generator cannot
        resume.
        """
        return {}

    def plan(self, frames: int, size: tuple[int, int], options: JobOptions) -> SegmentPlan:
        """Segments, padding and cost of `frames` frames at `size` (width, height). Pure."""
        ...

    def prepare(self, request: Request, timer: StageTimer) -> C:
        """Read the inputs and make the conditions that drive the model. Raises InputError for wrong inputs."""
        ...

    def generate(
        self,
        conditions: C,
        plan: SegmentPlan,
        timer: StageTimer,
        on_step: OnStep | None = None,
        start: ResumePoint | None = None,
    ) -> Iterator[Segment]:
        """Yield each segment as soon as it is decoded. The same conditions and plan give the same frames.

        `start`: the `resume` of a segment of the same job, from a generator with the same `resume_identity`. Only the
        segments from `start.segment` on are yielded then, with the same indices and the same frames. `on_step` counts
        the evaluations of the earlier segments as done. Raises InternalError if `start` does not fit `plan`.
        """
        ...

    def job_warnings(self, plan: SegmentPlan, options: JobOptions) -> Sequence[str]:
        """Return sentences for the record of the job that was just generated, which a person should read.

        E.g. that it took longer than necessary because blocks could not be compiled.
        """
        return ()

    def fall_back_memory_mode(self) -> bool:
        """Use less memory from now on, after `generate` ran out of it, in its thread. Return False if impossible."""
        return False

    def close(self) -> None:
        """Release the model."""

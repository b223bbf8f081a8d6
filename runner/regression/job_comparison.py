"""Job comparison: compares one job of the night with its baseline: first digests, then metrics if frames differ.

In:   records and files of both sides, limits, networks. Out: a `JobFinding`, and its `JobEvidence`.
Never: which jobs there are, the report's files.

If all frames have the same digests as the baseline's, no video is read. Otherwise both videos are read side by side,
some frames at a time.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from fractions import Fraction
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from runner.errors import InputError, InputNotFound, RunnerError
from runner.records.people import People
from runner.records.record import OutputRecord, ResultRecord
from runner.regression.alignment import align_digests
from runner.regression.diagnosis import diagnose
from runner.regression.evidence import JobEvidence, VideoLink, make_pictures, write_preview
from runner.regression.findings import PSNR_OF_EQUAL, Breach, JobFinding, Measurements
from runner.regression.frame_metrics import measure
from runner.regression.identity import MetricNetworks, frames_to_look_at, measure_identity
from runner.regression.judge import differences, digests_differ, is_exact, joints_of, judge, same_picture
from runner.regression.outputs import RenderedFrames
from runner.spec.regression_limits import RegressionLimits
from runner.storage import fetch_input
from runner.video import VideoReader

if TYPE_CHECKING:
    import numpy as np

__all__ = ["BASELINE_UNREADABLE", "JobComparison", "KeepVideo", "RenderedJob"]

BASELINE_UNREADABLE = "baseline"  # metric of a breach: the baseline's video cannot be read

KeepVideo = Callable[[str, str, VideoLink], VideoLink]  # (job id, "new" or "baseline", link to a file) → page's link


class RenderedJob(Protocol):
    """One side of the comparison: a rendered job and its files."""

    @property
    def record(self) -> ResultRecord:
        """The job's record; it has an output."""
        ...

    def digests(self) -> list[str] | None:
        """Return the digest of each frame; None if there is no list."""
        ...

    def people(self) -> bytes | None:
        """Return the content of people.json; None if there is none."""
        ...

    def fetch(self, dest: Path) -> Path | Sequence[Path]:
        """Copy the MP4, or the PNG frames in order, into the folder `dest`. Raises InputNotFound, storage.*."""
        ...


@dataclass(frozen=True)
class JobComparison:
    """Settings and steps of a job's comparison. `keep_video`: None if no report and no evidence is made."""

    networks: MetricNetworks | None = None
    keep_video: KeepVideo | None = None

    def compare(
        self,
        finding: JobFinding,
        new: RenderedJob,
        baseline: RenderedJob,
        scratch: Path,
        *,
        given: RegressionLimits,
        calibrated: RegressionLimits | None,
    ) -> tuple[JobFinding, JobEvidence | None]:
        """Complete `finding`, which has the job's id, texts and performance. `scratch`: a folder for this job only.

        If the night's video cannot be read, the verdict is `failed`. If the baseline's video cannot be read, the
        finding gets a breach of metric BASELINE_UNREADABLE.
        """
        after = new.record
        try:
            before = baseline.record
        except InputError as error:
            return _baseline_unreadable(finding, error), None
        assert before.output is not None and after.output is not None
        finding = finding.model_copy(
            update={
                "differences": differences(after, before),
                "exact": is_exact(after, before),
                "frames": max(after.output.frames, before.output.frames),
                "joints": joints_of(after.efficiency, after.output),
            }
        )
        evidence = None
        try:
            if same_picture(after.output, before.output) is not True:
                finding, digests = _with_digests(finding, new, baseline)
                if digests is None or finding.frames_differing is not None:
                    finding, evidence = self._measure(finding, new, baseline, scratch, digests)
        except _Unreadable as found:
            return found.finding, None
        finding = judge(finding, after, before, given=given, calibrated=calibrated)
        return finding, None if evidence is None else JobEvidence(finding, *evidence)

    def show_new(self, finding: JobFinding, new: RenderedJob, scratch: Path) -> tuple[JobFinding, JobEvidence | None]:
        """Return the evidence of a job without a baseline, so that it can be viewed before it is approved."""
        output = new.record.output
        assert output is not None
        if self.keep_video is None:
            return finding, None
        try:
            with _open(finding, new, scratch / "new", mine=True) as frames:
                left_out: dict[str, str] = {}
                middle = frames.frames // 2
                pictures = make_pictures(frames, None, middle, left_out=left_out)
                videos = {"new": self.keep_video(finding.id, "new", _link(frames, output, scratch / "new.mp4"))}
                return finding, JobEvidence(finding, pictures, middle, videos, left_out)
        except _Unreadable as found:
            return found.finding, None

    def _measure(
        self,
        finding: JobFinding,
        new: RenderedJob,
        baseline: RenderedJob,
        scratch: Path,
        digests: tuple[list[str], list[str]] | None,
    ) -> tuple[JobFinding, tuple[Any, ...] | None]:
        with ExitStack() as stack:
            frames_new = stack.enter_context(_open(finding, new, scratch / "new", mine=True))
            frames_baseline = stack.enter_context(_open(finding, baseline, scratch / "baseline", mine=False))
            people_new, people_baseline = _people(new), _people(baseline)
            found = measure(frames_new, frames_baseline, joints=finding.joints, people=people_new)
            if digests is not None:
                found = found.model_copy(update={"misalignments": align_digests(*digests)})
            elif _shows_no_change(found):
                return finding.model_copy(update={"notes": [*finding.notes, NO_DIGESTS]}), None
            if self.networks is not None:
                worst = [] if found.psnr is None else [found.psnr.worst_frame]
                at = frames_to_look_at(found.frames_compared, finding.joints, worst)
                identity = measure_identity(
                    frames_new,
                    frames_baseline,
                    people_new,
                    people_baseline,
                    networks=self.networks,
                    at=at,
                    fps=(_rate(new.record), _rate(baseline.record)),
                )
                found = found.model_copy(update={"identity": identity})
            finding = finding.model_copy(update={"measurements": found, "notes": [*finding.notes, *diagnose(found)]})
            if self.keep_video is None:
                return finding, None
            return finding, self._evidence(finding, new.record, frames_new, baseline.record, frames_baseline, scratch)

    def _evidence(
        self,
        finding: JobFinding,
        after: ResultRecord,
        frames_new: RenderedFrames,
        before: ResultRecord,
        frames_baseline: RenderedFrames,
        scratch: Path,
    ) -> tuple[Any, ...]:
        """Return the fields of `JobEvidence` after its finding."""
        assert self.keep_video is not None and finding.measurements is not None
        assert after.output is not None and before.output is not None
        psnr, left_out = finding.measurements.psnr, dict[str, str]()
        frame = psnr.worst_frame if psnr is not None else finding.first_frame or 0
        reference = None
        try:
            reference = _fetch(after, "reference", scratch)
        except RunnerError as error:
            left_out["reference"] = error.message
        pictures = make_pictures(
            frames_new,
            frames_baseline,
            frame,
            reference=reference,
            driver=_driver(after, scratch),
            left_out=left_out,
        )
        videos = {}
        for side, frames, output in (("baseline", frames_baseline, before.output), ("new", frames_new, after.output)):
            try:
                videos[side] = self.keep_video(finding.id, side, _link(frames, output, scratch / f"{side}.mp4"))
            except InputError as error:
                left_out[side] = error.message
        return pictures, frame, videos, left_out


NO_DIGESTS = "a record is too old to have per-frame digests; the decoded videos are equal"


class _Unreadable(Exception):
    """A video cannot be read; has the finding of its job."""

    def __init__(self, finding: JobFinding) -> None:
        super().__init__(finding.text)
        self.finding = finding


def _night_unreadable(finding: JobFinding, error: InputError) -> JobFinding:
    text = f"the night's output cannot be read: {error.message}"
    return finding.model_copy(update={"verdict": "failed", "text": text, "error": f"{error.code}: {error.message}"})


def _baseline_unreadable(finding: JobFinding, error: InputError) -> JobFinding:
    text = f"the baseline's render cannot be read: {error.message}"
    breach = Breach(metric=BASELINE_UNREADABLE, text=text)
    return finding.model_copy(update={"verdict": "broken", "text": text, "breaches": [breach]})


def _open(finding: JobFinding, side: RenderedJob, folder: Path, *, mine: bool) -> RenderedFrames:
    try:
        paths = side.fetch(folder)
        return RenderedFrames(paths if isinstance(paths, Path) else list(paths))
    except InputError as error:
        said = _night_unreadable if mine else _baseline_unreadable
        raise _Unreadable(said(finding, error)) from error


def _people(side: RenderedJob) -> People | None:
    """Return None if the file is missing or damaged: then only the box's colour and identity are not measured."""
    data = side.people()
    try:
        return None if data is None else People.parse(data)
    except ValueError:
        return None


def _with_digests(
    finding: JobFinding, new: RenderedJob, baseline: RenderedJob
) -> tuple[JobFinding, tuple[list[str], list[str]] | None]:
    """Return the finding with the differing frames, and both lists of digests; None for a list that does not exist."""
    try:
        after = new.digests()
    except InputError as error:
        raise _Unreadable(_night_unreadable(finding, error)) from error
    try:
        before = baseline.digests()
    except InputError as error:
        raise _Unreadable(_baseline_unreadable(finding, error)) from error
    if after is None or before is None:
        return finding, None
    change = digests_differ(after, before)
    if change is not None:
        finding = finding.model_copy(update={"first_frame": change.first, "frames_differing": change.count})
    return finding, (after, before)


def _rate(record: ResultRecord) -> Fraction | None:
    """Return frames per second of the output; PNG frames do not contain their rate."""
    return None if record.output is None else Fraction(record.output.fps)


def _shows_no_change(found: Measurements) -> bool:
    same_length = found.frames_new == found.frames_baseline == found.frames_compared
    return same_length and found.psnr is not None and found.psnr.worst >= PSNR_OF_EQUAL


def _fetch(record: ResultRecord, name: str, scratch: Path) -> Path:
    if name not in record.inputs:
        raise InputNotFound(f"the record names no input {name}", where=record.job_id)
    return fetch_input(record.inputs[name].uri, scratch / "inputs")


def _driver(record: ResultRecord, scratch: Path) -> Callable[[int], np.ndarray]:
    """Return a function from an output frame to the driving video's frame. Raises the errors of reading the video."""
    parts, output = record.fingerprint_parts, record.output
    assert output is not None

    @cache
    def opened() -> tuple[VideoReader, np.ndarray]:
        reader = VideoReader(_fetch(record, "video", scratch), parity=parts.get("reader") == "decord")
        sampled = reader.sample(
            parts.get("options.fps", "source"),
            parts.get("options.start_s", 0.0),
            parts.get("options.max_frames"),
            bool(parts.get("options.preprocess.parity")),
        )
        return reader, sampled.indices

    def frame(index: int) -> np.ndarray:
        reader, indices = opened()
        try:
            at = index * len(indices) // output.frames  # because a stage may have changed the number of frames
            picture: np.ndarray = reader.read(indices[at : at + 1])[0]
            return picture
        finally:
            reader.close()

    return frame


def _link(frames: RenderedFrames, output: OutputRecord, dest: Path) -> VideoLink:
    """Return a link to a video that a browser can play; for PNG frames an MP4 is made."""
    fps = Fraction(output.fps)
    if frames.path is not None:
        return VideoLink(fps=fps, frames=frames.frames, size=frames.size, file=frames.path)
    return write_preview(frames, dest, fps)

"""Judge: makes the verdict of a job from two records and measurements, with a sentence for each broken limit.

In:   the night's and the baseline's record, digests, measurements, limits. Out: `JobFinding`. Never: files, videos.

Frames must be bit-identical if everything that determines them is the same: device, compute, memory mode and the
versions of the packages. The version of this project is shown but not compared, because a night tests its changes.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction
from itertools import zip_longest
from typing import get_args

from runner.records.record import Efficiency, OutputRecord, ResultRecord
from runner.regression.diagnosis import name_face, shows_another_face
from runner.regression.face_network import SAME_PERSON
from runner.regression.findings import Breach, Identity, JobFinding, Measurements, PerformanceFinding, Verdict
from runner.spec.regression_limits import RegressionLimits
from runner.video import FRAMES_HASH

__all__ = [
    "DIFFERS",
    "ORDER",
    "FrameChange",
    "differences",
    "digests_differ",
    "environment_changes",
    "exit_code_of_verdicts",
    "is_exact",
    "joints_of",
    "judge",
    "same_picture",
]

ORDER: tuple[Verdict, ...] = get_args(Verdict)  # of the jobs in every report
DIFFERS = frozenset({"broken", "new", "missing"})
OWN_VERSION = "version of video-lab-runner"
NIGHTS_NEEDED = 3  # for a median with a limit: with fewer nights one slow night has too much weight


@dataclass(frozen=True)
class FrameChange:
    """The frames whose digests differ from the baseline's."""

    first: int  # index from 0
    count: int


def digests_differ(new: Sequence[str], baseline: Sequence[str]) -> FrameChange | None:
    """Compare digests frame by frame; a frame that only one side has differs. None: all frames are equal."""
    wrong = [i for i, (a, b) in enumerate(zip_longest(new, baseline)) if a != b]
    return FrameChange(wrong[0], len(wrong)) if wrong else None


def same_picture(new: OutputRecord, baseline: OutputRecord) -> bool | None:
    """Return whether both outputs have the same frames and rate. None: a record is too old for per-frame digests."""
    if new.frames_hash != FRAMES_HASH or baseline.frames_hash != FRAMES_HASH:
        return None
    return (new.frames_sha256, new.fps) == (baseline.frames_sha256, baseline.fps)


def is_exact(new: ResultRecord, baseline: ResultRecord) -> bool:
    """Return whether everything that determines the bits, beside job and recipe, is the same. Old records: False."""
    return bool(new.computed_by) and not environment_changes(new, baseline, own=False)


def environment_changes(new: ResultRecord, baseline: ResultRecord, *, own: bool = True) -> list[str]:
    """Return changes from the baseline to the night: `version of torch: 2.12.0 → 2.13.0`, …

    own: include this project's version.
    """
    if not new.computed_by or not baseline.computed_by:
        return [] if new.computed_by == baseline.computed_by else ["one of the records does not name its environment"]
    return [change for change in _changes(baseline.computed_by, new.computed_by) if own or OWN_VERSION not in change]


def differences(new: ResultRecord, baseline: ResultRecord) -> list[str]:
    """Return changes of the job's request from the baseline to the night: `options.seed: 41 → 42`, …"""
    return _changes(baseline.fingerprint_parts, new.fingerprint_parts)


def _changes(before: Mapping[str, object], after: Mapping[str, object]) -> list[str]:
    names = sorted(before.keys() | after.keys())
    return [
        f"{name}: {_shown(before.get(name))} → {_shown(after.get(name))}"
        for name in names
        if before.get(name) != after.get(name)
    ]


def _shown(value: object) -> str:
    text = "none" if value is None else str(value)
    return text if len(text) <= 60 else text[:24] + "…"


def joints_of(efficiency: Efficiency | None, output: OutputRecord) -> list[int]:
    """Return the first output frame of each segment after the first.

    If a stage has inserted frames between generated ones, generated frame b is output frame b times the rates' ratio.
    """
    if efficiency is None or efficiency.segments < 2 or efficiency.frames_requested < 1:
        return []
    frames, times = output.frames, Fraction(output.frames, efficiency.frames_requested)
    if output.generated_fps is not None:
        times = Fraction(output.fps) / Fraction(output.generated_fps)
    overlap = round(efficiency.overlap_fraction * efficiency.frames_denoised / (efficiency.segments - 1))
    step = efficiency.segment_frames - overlap
    begins = (efficiency.segment_frames + k * step for k in range(efficiency.segments - 1))
    found = {round(begin * times) for begin in begins}
    return sorted(begin for begin in found if 0 < begin < frames)


def judge(
    finding: JobFinding,
    new: ResultRecord,
    baseline: ResultRecord,
    *,
    given: RegressionLimits,
    calibrated: RegressionLimits | None,
) -> JobFinding:
    """Return the finding with its verdict, breaches and first sentence; it has measurements and performance already.

    `given`: the manifest's limits of this job; `calibrated`: the defaults, if they apply to this model and device.
    A metric without a limit is not judged. A limit of `given` whose metric could not be measured is broken.
    """
    assert new.output is not None and baseline.output is not None
    judged = calibrated is not None or given != RegressionLimits()
    limits = given.over(calibrated or RegressionLimits(same_frames=True if judged else None))
    breaches = _find_format_breaches(new.output, baseline.output)
    changed = finding.frames_differing is not None or finding.measurements is not None
    if changed and finding.exact and limits.same_frames and not breaches:
        breaches.append(_same_frames(finding))
    if finding.measurements is not None:
        breaches += _of_metrics(finding.measurements, limits) if judged else []
    if judged:
        breaches += [_slower(found, limits) for found in finding.performance if _breaks(found)]
    if breaches:
        verdict: Verdict = "broken"
        text = breaches[0].text
    elif not changed:
        verdict, text = "identical", f"all {new.output.frames} frames are the same"
    elif judged:
        verdict, text = "changed", f"{_how_many(finding)}, within the limits"
    else:
        verdict = "uncalibrated"
        text = f"{_how_many(finding)}; not calibrated: no limits are known for this model and device"
    return finding.model_copy(update={"verdict": verdict, "text": text, "breaches": breaches})


def exit_code_of_verdicts(verdicts: Sequence[Verdict]) -> int:
    """Return 4 if a job differs, is new or is missing, else 1 if a job failed, else 0."""
    if DIFFERS.intersection(verdicts):
        return 4
    return 1 if "failed" in verdicts else 0


def _find_format_breaches(new: OutputRecord, baseline: OutputRecord) -> list[Breach]:
    """Return breaches of size, number of frames and rate, which need no limit."""
    found = []
    if (new.width, new.height) != (baseline.width, baseline.height):
        text = f"the size is {new.width}x{new.height}; it was {baseline.width}x{baseline.height}"
        found.append(Breach(metric="size", text=text))
    if new.frames != baseline.frames:
        text = f"the video has {new.frames} frames; it had {baseline.frames}"
        found.append(Breach(metric="frames", text=text, value=new.frames, limit=baseline.frames))
    if new.fps != baseline.fps:
        found.append(Breach(metric="rate", text=f"the rate is {new.fps} frames per second; it was {baseline.fps}"))
    return found


def _same_frames(finding: JobFinding) -> Breach:
    text = f"{_how_many(finding)}, although device, compute, memory mode and versions are the same"
    if finding.differences:
        text = f"{_how_many(finding)}; the request differs: {', '.join(finding.differences[:3])}"
    return Breach(metric="same_frames", text=text, frame=finding.first_frame)


def _how_many(finding: JobFinding) -> str:
    if finding.frames_differing is None or finding.first_frame is None:
        return "frames differ"
    if finding.frames_differing == 1:
        return f"only frame {finding.first_frame} differs"
    return f"{finding.frames_differing} of {finding.frames} frames differ, the first is frame {finding.first_frame}"


def _of_metrics(found: Measurements, limits: RegressionLimits) -> list[Breach]:
    breaches = []
    for name, unit, series in (("psnr", " dB", found.psnr), ("ssim", "", found.ssim)):
        least = getattr(limits, f"{name}_min")
        if least is not None and series is not None and series.worst < least:
            frame, worst = series.worst_frame, series.worst
            text = f"{name.upper()} of frame {frame} is {worst:.4g}{unit}; the limit is at least {least:g}"
            breaches.append(Breach(metric=f"{name}_min", text=text, value=worst, limit=least, frame=frame))
    most = limits.max_frame_diff
    if most is not None and found.largest_difference is not None and found.largest_difference > most:
        text = f"a pixel of frame {found.largest_difference_frame} differs by {found.largest_difference} levels; "
        breaches.append(
            Breach(
                metric="max_frame_diff",
                text=f"{text}the limit is at most {most:g}",
                value=found.largest_difference,
                limit=most,
                frame=found.largest_difference_frame,
            )
        )
    return breaches + _of_drift(found, limits) + _of_identity(found, limits)


def _of_drift(found: Measurements, limits: RegressionLimits) -> list[Breach]:
    most = limits.joint_drift_max
    if most is None or found.drift is None or found.drift.joint_drift <= most:
        return []
    worst = max(found.drift.joints, key=lambda joint: joint.excess)
    text = (
        f"the colours step by {worst.excess:.3g} delta E at the joint before frame {worst.frame}, more than in the "
        f"baseline; the limit is at most {most:g}"
    )
    return [Breach(metric="joint_drift_max", text=text, value=worst.excess, limit=most, frame=worst.frame)]


def _of_identity(found: Measurements, limits: RegressionLimits) -> list[Breach]:
    least, identity = limits.identity_min, found.identity
    breaches = []
    if identity is not None and shows_another_face(identity):
        text, distance = name_face(identity), identity.face_distance
        frame = identity.face_frame
        breaches.append(Breach(metric="face_distance", text=text, value=distance, limit=SAME_PERSON, frame=frame))
    return breaches if least is None else breaches + _of_cosine(identity, least)


def _of_cosine(identity: Identity | None, least: float) -> list[Breach]:
    if identity is None or identity.cosine is None:
        why = "give --models" if identity is None else identity.why.get("cosine", "not measured")
        return [Breach(metric="identity_min", text=f"identity_min is set, but identity cannot be measured: {why}")]
    if identity.cosine >= least:
        return []
    text = f"the person of frame {identity.cosine_frame} has a cosine of {identity.cosine:.3f} to the baseline's; "
    return [
        Breach(
            metric="identity_min",
            text=f"{text}the limit is at least {least:g}",
            value=identity.cosine,
            limit=least,
            frame=identity.cosine_frame,
        )
    ]


def _breaks(found: PerformanceFinding) -> bool:
    return found.verdict in ("slower", "larger") and found.nights >= NIGHTS_NEEDED


def _slower(found: PerformanceFinding, limits: RegressionLimits) -> Breach:
    name = "seconds_max" if found.unit == "s" else "memory_max"
    shown = f"{found.new:.3g} s" if found.unit == "s" else f"{found.new / 1e9:.3g} GB"
    median = f"{found.median:.3g} s" if found.unit == "s" else f"{found.median / 1e9:.3g} GB"
    text = f"{found.name} took {shown}, {found.ratio:.2f} times the median of {found.nights} nights ({median})"
    return Breach(metric=name, text=text, value=found.ratio, limit=getattr(limits, name))
